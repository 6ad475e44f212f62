"""Audits: they find planted faults, and nothing where there is none."""

import dataclasses
import functools
import itertools
import json
import math
import re
import stat

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg
import scipy.stats
from dp_accounting import NeighboringRelation
from jax_privacy import clipping

from dpmix_jax import (
    AugmentationConfig,
    Mechanism,
    UserError,
    audit,
    augmentation_set,
    check_sensitivity,
    clipped_gradient,
    factorization,
    ghost_clipped_gradient,
    record_keys,
    stream_key,
)
from dpmix_jax.mixup import METHODS
from dpmix_jax.models.classifier import make_classifier
from dpmix_jax.run import audit as audit_of_run
from tests import toy
from tests.conftest import ROOT
from tests.programs import call
from tests.test_finetune import load
from tests.test_kept import TINY_VIT
from tests.test_towers import SMALL

NUM, CLIP_NORM = 4, 0.05
DATA = toy.records(NUM)
IMAGES = np.asarray(DATA.normalize(jnp.asarray(DATA.images)))
LABELS = np.eye(toy.NUM_CLASSES, dtype=np.float32)[DATA.labels]


# --- Replay -----------------------------------------------------------------------


# Drawn by class, public images depend on a private label; otherwise nothing does.
OPTIONS = {"pure_dp_mix_diff": {"draw": "class", "k_self": 0}}


def sum_of_sets(method, make_gradient=clipped_gradient):
    """The clipped sum of a method's sets, for `check_sensitivity`."""
    record_set = augmentation_set(
        toy.method(method, **OPTIONS.get(method, {})),
        AugmentationConfig(max_shift=1),
        normalize=DATA.normalize,
    )
    gradient_fn = make_gradient(toy.loss_fn, l2_clip_norm=CLIP_NORM)
    pool = toy.pool(5) if "diff" in method else None
    params, key = toy.init_params(), stream_key(3, "augmentation")

    @jax.jit
    def clipped_sum(records, is_padding):
        images, labels = records
        keys = record_keys(key, jnp.int32(2), jnp.arange(NUM))
        sets = jax.vmap(record_set, (0, 0, 0, None))(keys, images, labels, pool)
        return gradient_fn(params, *sets, is_padding_example=is_padding)[0]

    return clipped_sum, gradient_fn.sensitivity


@pytest.mark.sampled("dp_mix_self-formed")
@pytest.mark.parametrize(
    "make_gradient",
    [clipped_gradient, pytest.param(ghost_clipped_gradient, marks=pytest.mark.slow)],
    ids=["formed", "ghost"],
)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_its_sensitivity(method, make_gradient):
    clipped_sum, sensitivity = sum_of_sets(method, make_gradient)
    found = check_sensitivity(clipped_sum, (IMAGES, LABELS), sensitivity, indices=[1])
    assert found["record 1 removed"] == pytest.approx(CLIP_NORM, rel=1e-3)
    assert len(found) == 1 + (NUM - 1) + 1 + 2 * 8
    assert all("record 1" in name for name in found)
    if method != "pure_dp_mix_diff":  # which takes nothing but the label
        assert found["record 1 NaN"] <= CLIP_NORM * 1.001  # it counts as nothing
    assert CLIP_NORM < max(found.values()) <= 2 * CLIP_NORM * 1.001


TINY_MODELS = {
    "cnn": {"features": (4, 8), "groups": 2},
    "wrn": {"depth": 10, "width": 1, "groups": 2},
    "vit": SMALL["vit"],
    "convnext": SMALL["convnext"],
    "scattering_linear": {"scales": 1, "angles": 2},
    "scattering_cnn": {"scales": 1, "angles": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("make_gradient", [clipped_gradient, ghost_clipped_gradient])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_model_keeps_its_sensitivity(name, make_gradient):
    """All of its parameters are trained, on sets of views and mixups."""
    model = make_classifier(
        name, TINY_MODELS[name], image_shape=(16, 16, 3), num_classes=toy.NUM_CLASSES
    )

    def loss_fn(params, images, labels):
        logits = model.logits(params, images)
        return optax.softmax_cross_entropy(logits, labels).mean()

    gradient_fn = make_gradient(loss_fn, l2_clip_norm=CLIP_NORM)
    record_set = augmentation_set(
        toy.method("dp_mix_self"), AugmentationConfig(max_shift=1)
    )
    params = jax.tree.map(  # of heads and scales that start at zero, too
        lambda leaf: leaf + jax.random.normal(jax.random.key(2), leaf.shape) / 10,
        model.init(jax.random.key(1)),
    )

    @jax.jit
    def clipped_sum(records, is_padding):
        key = stream_key(3, "augmentation")
        keys = record_keys(key, jnp.int32(2), jnp.arange(NUM))
        sets = jax.vmap(record_set)(keys, *records)
        return gradient_fn(params, *sets, is_padding_example=is_padding)[0]

    images = jax.random.normal(jax.random.key(0), (NUM, 16, 16, 3))
    found = check_sensitivity(
        clipped_sum, (images, LABELS), gradient_fn.sensitivity, indices=[1]
    )
    assert found["record 1 removed"] == pytest.approx(CLIP_NORM, rel=2e-2)


def gradient_fn(images):
    """Gradients of a linear loss: the records themselves."""
    return clipped_gradient(lambda params, x: params @ x, l2_clip_norm=1.0)(
        jnp.zeros(3), images
    )[0]


def promised(relation):
    return 2.0 if relation == NeighboringRelation.REPLACE_ONE else 1.0


VECTORS = np.array([[3.0, 0, 0], [0, 2.0, 0], [0.1, 0, 0.2]], np.float32)


def masked(records, is_padding):
    return jnp.where(is_padding[:, None], 0.0, jnp.asarray(records))


# Faults, by what is found first.
FAULTS = {
    "no clip": (
        lambda records, pad: masked(records, pad).sum(0),
        "record 0 removed: the sum moves by 3 of 1.0001",
    ),
    "a clip for each part of a record": (
        lambda records, pad: sum(
            gradient_fn(masked(records, pad) * part[None]) for part in jnp.eye(3)
        ),
        "record 0 (first numbers )?1e6, then removed: the sum moves by 1.7",
    ),
    "mixed across records": (
        lambda records, pad: gradient_fn(
            masked(records, pad) + 50 * jnp.roll(masked(records, pad), 1, axis=0)
        ),
        r"record \d removed: the sum moves by 1\.\d+ of 1.0001",
    ),
    "divided by the drawn batch": (
        lambda records, pad: 3 * gradient_fn(masked(records, pad)) / np.sum(1.0 - pad),
        r"record \d removed: the sum moves by 1\.\d+ of 1.0001",
    ),
    "what is no number passes": (
        lambda records, pad: gradient_fn(masked(records, pad)) + 0 * records[0],
        "record 0 (first numbers )?NaN, then removed: the sum moves by nan of 1.0001",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_before_the_noise_are_found(fault):
    clipped_sum, message = FAULTS[fault]
    with pytest.raises(AssertionError, match=message):
        check_sensitivity(clipped_sum, VECTORS, promised)


def test_without_a_fault_nothing_is_found():
    found = check_sensitivity(
        lambda records, pad: gradient_fn(masked(records, pad)), VECTORS, promised
    )
    assert max(found.values()) <= 2.0
    assert found["record 2 removed"] == pytest.approx(np.hypot(0.1, 0.2))


def test_the_layout_of_records_hides_nothing():
    """Special values reach records that are not contiguous, and bytes."""

    def leaks(records, pad):
        return gradient_fn(masked(records[:, 0], pad)) + 0 * records[1, 0]

    turned = np.moveaxis(np.stack([VECTORS, VECTORS], 2), 2, 1)
    assert not turned.flags.c_contiguous
    with pytest.raises(AssertionError, match="record 1 NaN, then removed"):
        check_sensitivity(leaks, turned, promised, indices=[1])

    def dark(records, pad):  # bytes are scaled, and the clip is forgotten at 255
        return np.where(pad[:, None], 0, records).sum(0) / 254

    images = np.full((3, 1), 254, np.uint8)
    with pytest.raises(
        AssertionError, match=r"record 2 255, then removed: .* by 1\.00394 of"
    ):
        check_sensitivity(dark, images, lambda relation: 1.0, indices=[-1])


def test_keys_that_change_are_found():
    draws = iter(range(10))
    with pytest.raises(AssertionError, match="the same records gave two sums"):
        check_sensitivity(lambda *_: jnp.float32(next(draws)), VECTORS, promised)


# --- Canaries ---------------------------------------------------------------------

CLAIM = 0.8665  # of this mechanism, at delta = 1e-5
MECHANISM = Mechanism(sampling_prob=0.5, num_updates=10, noise_multiplier=7.0)


@functools.cache
def audits(factor=1.0, make_gradient=clipped_gradient, repeats=3, num=2000):
    """Bounds on epsilon of repeated audits, where the noise is `factor` times right."""
    weaker = Mechanism(
        sampling_prob=MECHANISM.sampling_prob,
        num_updates=MECHANISM.num_updates,
        noise_multiplier=factor * MECHANISM.noise_multiplier,
    )
    return [
        audit.audit(
            audit.gradient_canaries(
                weaker, num, seed=seed, make_gradient=make_gradient
            ),
            num,
            delta=1e-5,
            rng=np.random.default_rng(seed),
        )
        for seed in range(repeats)
    ]


@pytest.mark.sampled
def test_bounds_are_below_the_claim_and_above_zero():
    assert MECHANISM.epsilon(1e-5) == pytest.approx(CLAIM, rel=0.02)
    found = audits()
    assert all(0.05 < each.epsilon < CLAIM / 2 for each in found)
    assert all(each.epsilon <= each.epsilon_gaussian < CLAIM for each in found)
    assert all(0.55 < each.auroc < 0.6 for each in found)


@pytest.mark.sampled
def test_too_little_noise_is_found():
    """A quarter of the noise, as where sigma is divided by a batch of four devices."""
    assert all(each.epsilon > 1.2 * CLAIM for each in audits(0.25))


def test_a_missing_clip_is_found():
    def unclipped(loss_fn, *, l2_clip_norm):
        whole = clipped_gradient(loss_fn, l2_clip_norm=1e6 * l2_clip_norm)
        return clipping.BoundedSensitivityCallable(whole.fun, l2_clip_norm, True)

    found = audits(1.0, unclipped, repeats=1)
    assert found[0].epsilon > CLAIM
    assert found[0].auroc == 1.0


MECHANISMS = {
    "independent": MECHANISM,
    "turns": dataclasses.replace(
        MECHANISM, sampling_prob=0.25, noise_multiplier=3.0, strategy=(1.0, 0.5, 0.25)
    ),
    "each turn": dataclasses.replace(
        MECHANISM, sampling_prob=0.5, noise_multiplier=6.0, strategy=(1.0, 0.5)
    ),
    "allocation": dataclasses.replace(
        MECHANISM, sampling_prob=0.25, noise_multiplier=3.0, allocated=True
    ),
}


@pytest.mark.sampled
@pytest.mark.parametrize("name", ["turns", "allocation"])
def test_less_is_found_than_is_claimed_and_more_with_a_third_of_the_noise(name):
    """As where a participation in three updates would count for one."""
    claimed = MECHANISMS[name]
    for factor in (1.0, 1 / 3):
        noise = factor * claimed.noise_multiplier
        found = audit.audit(
            audit.gradient_canaries(
                dataclasses.replace(claimed, noise_multiplier=noise), 4000, seed=3
            ),
            4000,
            delta=1e-5,
            rng=np.random.default_rng(0),
        )
        assert found.epsilon > 0.1
        assert (found.epsilon > claimed.epsilon(1e-5)) == (factor < 1)


@pytest.mark.parametrize("name", MECHANISMS)
def test_the_score_is_the_likelihood_ratio(name):
    """Against all ways to be drawn, each with its density; T ends within an epoch."""
    updates, claimed, stddev = 6 - (name != "turns"), MECHANISMS[name], 0.7
    silent, (b, q) = np.zeros(updates), (claimed.bands, claimed.sampling_prob)
    if claimed.allocated:
        epochs = [[*range(start, start + 4)] for start in range(0, updates, 4)]
        ways = [(4.0 ** -len(epochs), drawn) for drawn in itertools.product(*epochs)]
    else:
        ways = []
        for first in range(b):
            turns = [*range(first, updates, b)]
            for coins in itertools.product([0, 1], repeat=len(turns)):
                each = [b * q if coin else 1 - b * q for coin in coins]
                ways.append((np.prod(each) / b, itertools.compress(turns, coins)))
    column = factorization.impulse(claimed.strategy, updates)
    noise = scipy.linalg.toeplitz(column, silent) * math.hypot(*claimed.strategy)
    density = functools.partial(
        scipy.stats.multivariate_normal.pdf, cov=stddev**2 * noise @ noise.T
    )
    seen = np.random.default_rng(0).normal(size=(updates, 3))
    expected = np.zeros(3)
    for chance, drawn in ways:
        adds = silent.copy()
        adds[[step for step in drawn if step < updates]] = 1.0
        expected = expected + chance * density(seen.T, adds)
    np.testing.assert_allclose(
        audit._log_likelihood_ratios(seen, claimed, stddev),
        np.log(expected / density(seen.T, silent)),
        rtol=1e-9,
    )


def test_scores_without_signal_bound_nothing():
    """Where `epsilon_from_gdp` of jax_privacy 2.0.0 reports 3.5 to 5.9."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        found = audit.audit(lambda included: np.zeros(200), 200, delta=1e-5, rng=rng)
        assert found.epsilon < 0.8
        assert 0.3 < found.auroc < 0.7


def test_perfect_scores_bound_epsilon_by_the_number_of_canaries():
    """All m/2 guesses right: q^(m/2) = the share of the error, q = 1 / (1 + e^-eps)."""
    rng = np.random.default_rng(0)
    size = 64
    included = np.arange(size) % 2 == 0
    found = audit.bound(included * 1.0, included, delta=1e-12, rng=rng)
    q = (0.05 / 4) ** (1 / 32)  # 32, 16, 8 or 4 guesses
    assert found.epsilon == pytest.approx(np.log(q / (1 - q)), rel=1e-3)
    assert found.auroc == 1.0
    np.testing.assert_array_equal(found.true_positives[[0, 32, 64]], [0, 1, 1])
    np.testing.assert_array_equal(found.false_positives[[0, 32, 64]], [0, 0, 1])


def test_the_bound_allows_for_coins_that_were_thrown_again():
    """Of 8 canaries one throw in 128 is, and each bound errs more often by that."""
    included = np.arange(8) % 2 == 0
    rng = np.random.default_rng(0)
    options = {"delta": 1e-12, "rng": rng, "confidence": 0.51}
    found = audit.bound(included * 1.0, included, **options)
    q = (0.49 * 127 / 128) ** (1 / 4)  # 4 guesses
    assert found.epsilon == pytest.approx(np.log(q / (1 - q)), rel=1e-4)


def test_scores_that_are_no_numbers_are_lowest():
    rng = np.random.default_rng(0)
    included = np.arange(16) % 2 == 0
    scores = np.where(
        included, 1e-30, np.where(np.arange(16) % 4 == 1, np.nan, -np.inf)
    )
    assert audit.bound(scores, included, delta=1e-5, rng=rng).auroc == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_canaries": 7}, "num_canaries is 7: it must be at least 8"),
        ({"confidence": 0.4}, "confidence is 0.4: it must be in"),
        ({"delta": 0.0}, "delta is 0.0: it must be in"),
    ],
)
def test_refuses(options, message):
    options = {"num_canaries": 10, "delta": 1e-5, **options}
    with pytest.raises(UserError, match=re.escape(message)):
        audit.audit(pytest.fail, rng=np.random.default_rng(0), **options)


def test_coins_are_thrown_again_if_all_fall_alike():
    class Coins:
        def __init__(self):
            self.thrown = iter([np.zeros(8), np.ones(8), np.arange(8) % 2])

        def random(self, size):
            return next(self.thrown, np.zeros(size))

    found = audit.audit(np.asarray, 8, delta=1e-5, rng=Coins())
    assert found.auroc == 1.0
    rng = np.random.default_rng(0)
    with pytest.raises(UserError, match="it must be neither all nor none"):
        audit.bound(np.arange(8.0), np.ones(8, bool), delta=1e-5, rng=rng)
    with pytest.raises(UserError, match=r"included\.dtype is 'int64': it must be bool"):
        audit.bound(np.arange(8.0), np.arange(8) % 2, delta=1e-5, rng=rng)
    options = {"delta": 1e-5, "rng": rng, "confidence": 95}
    with pytest.raises(UserError, match=r"confidence is 95: it must be in \(0, 1\)"):
        audit.bound(np.arange(8.0), np.arange(8) < 4, **options)


# --- The program ------------------------------------------------------------------

SHORT = (
    "--config.privacy.epsilon=0.3",  # quickly calibrated
    "--config.privacy.num_updates=2",
    "--config.privacy.expected_batch_size=719",
    "--config.performance.microbatch_size=256",
    "--config.model.features=(4,)",
    "--config.model.groups=2",
    "--config.method.k_base=2",
    "--config.method.k_self=1",
)


def program(*flags):
    config = f"--config={ROOT}/configs/digits.py"
    return call("experiments/audit.py", [config, *flags])


def test_an_audit_of_gradients_writes_what_it_found(tmp_path):
    out = tmp_path / "audit"
    done = program("--canaries=100", "--repeats=2", f"--workdir={out}", *SHORT)
    assert done.returncode == 0, done.stderr
    assert re.search(r"audit 2/2: epsilon at least [\d.]+ \(claimed 0.3", done.stderr)
    report = json.loads((out / "audit.json").read_text())
    assert report["canaries"] == "gradient"
    assert report["claim"] == pytest.approx(0.3, rel=1e-3)
    assert [each["num_canaries"] for each in report["audits"]] == [100, 100]
    assert report["audits"][0]["epsilon"] <= report["claim"]
    text = (out / "audit.md").read_text()
    assert "# Audit with 100 gradient canaries" in text
    assert text.count("\n| ") == 4
    assert (out / "audit.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mislabelled", "crafted"])
def test_an_audit_of_records_trains(tmp_path, kind):
    done = program(
        f"--kind={kind}", "--canaries=60", f"--workdir={tmp_path / kind}", *SHORT
    )
    assert done.returncode == 0, done.stderr
    assert "update 2/2" in done.stderr
    (found,) = json.loads((tmp_path / kind / "audit.json").read_text())["audits"]
    assert 0.2 < found["auroc"] < 0.8
    assert found["epsilon"] < 1.0


@pytest.mark.slow
def test_a_head_on_a_frozen_encoder_is_audited(tmp_path):
    config = load("configs/vit_b16.py", TINY_VIT | {"finetune.embeddings": "kept"})
    assert audit_of_run.run(
        config, tmp_path, kind="mislabelled", num_canaries=50, repeats=1
    )
    text = (tmp_path / "audit.md").read_text()
    assert "not to be released" in text
    assert stat.S_IMODE((tmp_path / "audit.md").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--kind=crafted", "--canaries=1400"],
            "--canaries is 1400: it must be at most 1181",
        ),
        (
            [
                "--config.privacy.selection=poisson",
                "--config.privacy.expected_candidates=5",
                "--config.data.validation_size=100",
            ],
            "privacy.selection must be None: an audit is of one run",
        ),
        (
            [
                "--kind=crafted",
                "--config.privacy.sampling=allocation",
                "--config.privacy.expected_batch_size=479",
            ],
            "privacy.sampling is 'allocation': it must be 'poisson' for crafted",
        ),
    ],
)
def test_the_program_refuses(tmp_path, flags, message):
    done = program(f"--workdir={tmp_path / 'out'}", *flags)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "out").exists()
