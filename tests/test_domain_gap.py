"""Fréchet distances, features, what they are taken of, and the program."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from flax import linen as nn

from dpmix_jax import UserError, data, domain_gap, experiment, models, privacy
from dpmix_jax.command_line import load_experiment
from dpmix_jax.data.public import PublicConfig
from dpmix_jax.domain_gap import Encoder, compare, frechet_distance
from dpmix_jax.synthetic import Plan, fill
from dpmix_jax.synthetic.render import Render
from dpmix_jax.workdir import Workdir
from tests import towers
from tests.conftest import ROOT

SCRIPT = ROOT / "experiments/domain_gap.py"
DIGITS = tuple("0123456789")


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DPMIX_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))


def sample(num, dim, seed=0, shift=0.0):
    """Correlated features whose covariance has all ranks that `num` allows."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(dim, dim)) / np.sqrt(dim) + np.eye(dim)
    return rng.normal(size=(num, dim)) @ mix + rng.normal(size=dim) + shift


def exact(mean, root, num=20, seed=0):
    """`num` points whose mean and covariance `root' root` are exact."""
    rng = np.random.default_rng(seed)
    dim = len(mean)
    noise = rng.normal(size=(num, dim))
    axes, _ = np.linalg.qr(noise - noise.mean(axis=0))
    return axes * np.sqrt(num - 1) @ root + np.asarray(mean)


def textbook(a, b):
    """As Heusel et al. compute it."""
    covariance_a, covariance_b = np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(covariance_a @ covariance_b).real
    means = np.square(a.mean(axis=0) - b.mean(axis=0)).sum()
    return means + np.trace(covariance_a + covariance_b - 2 * root)


def test_one_dimension_by_hand():
    # Variances 2 and 8, means 0 and 3: 9 + 2 + 8 - 2 sqrt(16).
    found = frechet_distance(np.array([[-1], [1]]), np.array([[1.0], [5.0]]))
    assert found == pytest.approx(11.0, rel=1e-14)


def test_axes_by_hand():
    a = exact([0, 0, 0], np.diag([1.0, 2.0, 3.0]))
    b = exact([1, 0, 2], np.diag([4.0, 2.0, 0.0]), num=50, seed=1)  # one is constant
    assert frechet_distance(a, b) == pytest.approx(5 + 9 + 0 + 9, rel=1e-12)


def test_two_covariances_that_do_not_commute():
    root_a, root_b = np.array([[2.0, 1.0], [0.0, 1.0]]), np.array([[1.0, 0], [3.0, 1]])
    product = root_a.T @ root_a @ root_b.T @ root_b
    # The eigenvalues of a 2x2 root: (sqrt(l1) + sqrt(l2))^2 = trace + 2 sqrt(det).
    trace = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    expected = np.square(root_a).sum() + np.square(root_b).sum() - 2 * trace
    a, b = exact([1, 2], root_a), exact([1, 2], root_b, num=7, seed=1)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_large_samples_come_near_to_their_distributions():
    rng = np.random.default_rng(0)
    a = rng.normal(0.0, [1.0, 2.0, 0.5], (40_000, 3))
    b = rng.normal([1.0, 0.0, 0.0], [3.0, 1.0, 0.5], (30_000, 3))
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + 1, rel=0.02)


@pytest.mark.parametrize("dim", [2, 5, 20])
def test_equals_the_textbook_where_that_is_sound(dim):
    a, b = sample(100, dim), sample(60, dim, seed=1, shift=0.3)
    assert frechet_distance(a, b) == pytest.approx(textbook(a, b), rel=1e-9)
    assert frechet_distance(a, a + 2) == pytest.approx(4 * dim, rel=1e-12)


@pytest.mark.parametrize(("num", "dim"), [(50, 8), (8, 50), (2, 3)])
def test_identical_sets_have_no_distance(num, dim):
    a = sample(num, dim)
    assert 0 <= frechet_distance(a, a) <= 1e-10
    assert 0 <= frechet_distance(a, a[::-1]) <= 1e-10


@pytest.mark.parametrize(("num", "other"), [(60, 40), (9, 40), (9, 5)])
def test_symmetric_and_free_of_order_and_rotation(num, other):
    a, b = sample(num, 20), sample(other, 20, seed=1, shift=0.5)
    found = frechet_distance(a, b)
    rng = np.random.default_rng(2)
    rotation, _ = np.linalg.qr(rng.normal(size=(20, 20)))
    for same in (
        frechet_distance(b, a),
        frechet_distance(rng.permutation(a), rng.permutation(b)),
        frechet_distance(a @ rotation, b @ rotation),
        frechet_distance(a + 7, b + 7),
        frechet_distance(3 * a, 3 * b) / 9,
    ):
        assert same == pytest.approx(found, rel=1e-10)


def test_fewer_images_than_features():
    """In the few dimensions that the images span, the textbook is sound again."""
    a, b = sample(6, 50), sample(9, 50, seed=1)
    basis, _ = np.linalg.qr(np.concatenate([a, b]).T)
    root = scipy.linalg.sqrtm(np.cov(a.T) + 1e-13 * np.eye(50)).real
    values = np.linalg.eigvalsh(root @ np.cov(b.T) @ root).clip(0)
    expected = np.square(a.mean(axis=0) - b.mean(axis=0)).sum() + np.trace(
        np.cov(a.T) + np.cov(b.T)
    )
    expected -= 2 * np.sqrt(values).sum()
    found = frechet_distance(a, b)
    assert found == pytest.approx(expected, rel=1e-4)
    assert found == pytest.approx(frechet_distance(a @ basis, b @ basis), rel=1e-10)


def test_large_offsets_and_float32_do_not_hurt():
    a, b = sample(50, 10), sample(50, 10, seed=1)
    found = frechet_distance(a + 1e6, b + 1e6)
    assert found == pytest.approx(frechet_distance(a, b), rel=1e-7)
    single = frechet_distance(a.astype(np.float32), b.astype(np.float32))
    assert isinstance(single, float)
    assert single == pytest.approx(frechet_distance(a, b), rel=1e-5)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (
            np.ones((1, 3)),
            np.ones((5, 3)),
            r"^features_a are \(1, 3\): .* N at least 2",
        ),
        (np.ones((5, 3)), np.ones((0, 3)), r"^features_b are \(0, 3\)"),
        (np.ones(5), np.ones((5, 3)), r"^features_a are \(5,\): they must be \[N, D\]"),
        (np.ones((5, 3)), np.ones((5, 4)), r"^features_b are .* must be \[M, 3\]"),
        (np.ones((5, 3)), np.full((5, 3), np.nan), "^features_b have values that are"),
        (np.full((5, 3), np.inf), np.ones((5, 3)), "^features_a have values that are"),
    ],
)
def test_features_that_are_refused(a, b, message):
    with pytest.raises(UserError, match=message):
        frechet_distance(a, b)


def test_draws_are_of_equal_size_and_halves_are_disjoint(monkeypatch):
    drawn = []

    def record(a, b):
        drawn.append((a[:, 0].tolist(), b[:, 0].tolist()))
        return float(len(drawn))

    monkeypatch.setattr(domain_gap, "frechet_distance", record)
    bank, test = -1.0 - np.arange(12)[:, None], np.arange(21.0)[:, None]
    gap = compare(bank, test, num_draws=3, rng=np.random.default_rng(0))
    assert gap == domain_gap.Gap(10, (1.0, 3.0, 5.0), (2.0, 4.0, 6.0))
    for (from_bank, half), (same, other) in zip(drawn[::2], drawn[1::2], strict=True):
        assert half == same
        assert all(number < 0 for number in from_bank)
        assert len({*from_bank}) == len({*half}) == len({*other}) == 10
        assert {*half}.isdisjoint(other)
    assert drawn[0] != drawn[2]
    small = compare(bank[:4], test, num_draws=1, rng=np.random.default_rng(0))
    assert small.num_images == 4
    for few in ((bank[:1], test), (bank, test[:3])):
        with pytest.raises(UserError, match="it takes 2 and 4 to compare"):
            compare(*few, num_draws=1, rng=np.random.default_rng(0))


def test_no_gap_looks_like_halves_and_a_gap_does_not():
    test = sample(2000, 5)
    alike = test[::2], test[1::2]
    gap = compare(*alike, num_draws=5, rng=np.random.default_rng(0))
    assert np.median(gap.bank) == pytest.approx(np.median(gap.halves), rel=0.3)
    gap = compare(alike[0] + 1, alike[1], num_draws=5, rng=np.random.default_rng(0))
    assert min(gap.bank) > 5 * max(gap.halves)


OPTIONS = {
    "cnn": {"features": (4, 8), "groups": 2},
    "wrn": {"depth": 10, "width": 1, "groups": 4},
    "vit": {**towers.OPTIONS["vit"], "depth": 1},
    "convnext": {**towers.OPTIONS["convnext"], "depths": (1,), "features": (8,)},
}


def random_params(model):
    """Random weights, by which no compilation is needed."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes
    )


def encoder_of(name):
    model = models.create(name, 10, **OPTIONS[name])
    return model, random_params(model)


@pytest.mark.parametrize("name", sorted(models.REGISTRY))
def test_features_are_what_the_last_layer_is_given(name):
    model, params = encoder_of(name)
    images = jax.random.normal(jax.random.key(1), (3, 8, 8, 1))
    features_fn = domain_gap.penultimate(model.apply)
    found, logits = jax.jit(lambda *a: (features_fn(*a), model.apply(*a)))(
        params, images
    )
    assert found.dtype == jnp.float32
    assert found.ndim == 2
    last = max(key for key in params["params"] if key.startswith(("Dense", "head")))
    layer = params["params"][last]
    np.testing.assert_allclose(
        found @ layer["kernel"] + layer["bias"][None],
        logits,
        rtol=1e-5,
        atol=1e-6,
    )


class Convolutional(nn.Module):
    """Ends in a convolution, with a Dense before it, or none."""

    dense: bool

    @nn.compact
    def __call__(self, images):
        x = nn.Dense(4)(images) if self.dense else images
        return nn.Conv(10, (3, 3))(x).mean(axis=(1, 2))


@pytest.mark.parametrize("dense", [False, True])
def test_a_model_without_a_last_dense_layer_is_refused(dense):
    model = Convolutional(dense)
    params = random_params(model)
    with pytest.raises(UserError, match="the encoder's last layer is not a Dense"):
        domain_gap.penultimate(model.apply)(params, jnp.zeros((2, 8, 8, 1)))


@pytest.mark.parametrize("batch_size", [1, 7, 30, 512])
def test_features_equal_a_plain_loop(batch_size):
    model, params = encoder_of("cnn")
    records = data.load(data.DataConfig(name="digits")).test.subset(np.arange(30))
    features_fn = domain_gap.penultimate(model.apply)
    found = domain_gap.features(features_fn, params, records, batch_size=batch_size)
    one_by_one = [
        features_fn(params, records.normalize(jnp.asarray(image[None])))[0]
        for image in records.images
    ]
    np.testing.assert_allclose(found, np.stack(one_by_one), rtol=1e-4, atol=1e-5)
    pixels = domain_gap.features(domain_gap.pixels, (), records, batch_size=batch_size)
    assert pixels.shape == (30, 64)
    expected = records.normalize(jnp.asarray(records.images)).reshape(30, 64)
    np.testing.assert_allclose(pixels, expected, rtol=1e-6)


def test_features_that_are_not_finite_are_refused():
    model, params = encoder_of("cnn")
    params = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
    test = data.load(data.DataConfig(name="digits")).test
    with pytest.raises(UserError, match="features are not finite"):
        domain_gap.features(domain_gap.penultimate(model.apply), params, test)


def render(path, count):
    plan = Plan(class_names=DIGITS, count=count, seed=0, image_shape=(8, 8, 1))
    generator = Render(class_names=plan.class_names, image_shape=plan.image_shape)
    fill(path, plan, generator, batch_size=count)
    return path


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return PublicConfig(
        name="bank", path=str(render(tmp_path_factory.mktemp("digits") / "bank", 60))
    )


class Poison:
    """Stands for private records: to look at them in any way is an error."""

    def __getattribute__(self, name):
        raise AssertionError(f"the private records' {name} was read")

    def __len__(self):
        raise AssertionError("the private records were counted")


@pytest.mark.proves("domain_gap.load_images", 1)
def test_training_and_validation_records_are_never_looked_at(bank, monkeypatch):
    test = data.load(data.DataConfig(name="digits")).test
    monkeypatch.setattr(
        data, "load", lambda config: data.Dataset(Poison(), test, Poison())
    )
    config = data.DataConfig(name="digits", validation_size=100)
    found_test, found_bank = domain_gap.load_images(config, bank)
    np.testing.assert_array_equal(found_test.images, test.images)
    assert len(found_bank) == 60
    assert (found_bank.mean, found_bank.stddev) == (test.mean, test.stddev)


@pytest.mark.proves("domain_gap.load_images", 1)
@pytest.mark.parametrize("validation_size", [0, 5])
def test_other_training_records_change_no_bit(bank, tmp_path, validation_size):
    digits = data.load(data.DataConfig(name="digits"))
    results = []
    for shift in (0, 1):
        path = tmp_path / f"{shift}.npz"
        np.savez(
            path,
            train_images=digits.train.images[:20] ^ np.uint8(255 * shift),
            train_labels=(digits.train.labels[:20] + shift) % 10,
            test_images=digits.test.images,
            test_labels=digits.test.labels,
            class_names=DIGITS,
        )
        config = data.DataConfig(
            name="npz", path=str(path), validation_size=validation_size
        )
        test, found = domain_gap.load_images(config, bank)
        assert len(test) == 360
        results.append(
            domain_gap.measure(
                Encoder("pixels", domain_gap.pixels, ()), found, test, num_draws=2
            )
        )
    assert results[0] == results[1]


def test_the_training_set_is_refused_as_public(tmp_path, monkeypatch):
    """By its name too, wherever it is: its images are not compared."""
    config = data.DataConfig(name="cifar10", path=str(tmp_path / "a"))
    for name in ("cifar10", "tfds:cifar10", "tfds:cifar10:3.0.2"):
        public = PublicConfig(name=name, path=str(tmp_path / "b"))
        with pytest.raises(UserError, match=r"^public.name is .* no features may be"):
            domain_gap.load_images(config, public)
    path = tmp_path / "private"
    render(path / "inside", 10)
    private = data.DataConfig(name="folder", path=str(path))
    public = PublicConfig(name="bank", path=str(path / "inside"))
    digits = data.load(data.DataConfig(name="digits"))
    monkeypatch.setattr(data, "load", lambda config: digits)
    with pytest.raises(UserError, match="or a part of it"):
        domain_gap.load_images(private, public)


def test_test_images_in_the_bank_are_refused(tmp_path):
    test = data.load(data.DataConfig(name="digits")).test
    np.savez(
        tmp_path / "copies.npz",
        train_images=test.images[:3],
        train_labels=test.labels[:3],
        test_images=test.images[:0],
        test_labels=test.labels[:0],
        class_names=DIGITS,
    )
    public = PublicConfig(name="npz", path=str(tmp_path / "copies.npz"))
    with pytest.raises(UserError, match="npz has 3 of the test images"):
        domain_gap.load_images(data.DataConfig(name="digits"), public)


@pytest.fixture(scope="module")
def folder(bank, tmp_path_factory):
    """Holds `bank`, a finished `run` of three updates, and runs that are not right."""
    folder = tmp_path_factory.mktemp("gap")
    shutil.copytree(bank.path, folder / "bank")
    config = load_experiment(
        [
            f"--config={ROOT}/configs/digits.py",
            "--config.seed=3",
            "--config.model.features=4,8",
            "--config.model.groups=2",
            "--config.method.name=dp_sgd",
            "--config.method.k_base=1",
            "--config.method.k_self=0",
            "--config.privacy.num_updates=3",
            "--config.privacy.expected_batch_size=60",
            "--config.performance.microbatch_size=64",
        ]
    )
    mechanism = privacy.Mechanism(
        sampling_prob=60 / 1437, num_updates=3, noise_multiplier=1.0
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(privacy, "calibrate", lambda **kwargs: mechanism)
        patch.setattr("dpmix_jax.performance.keep_compiled_code", lambda _: None)
        assert experiment.run(config, Workdir(folder / "run")) == 0
    for broken in ("unfinished", "cut", "strange", "none"):
        shutil.copytree(folder / "run", folder / broken)
    (folder / "unfinished/results.json").unlink()
    (folder / "cut/model.safetensors").write_bytes(b"\0" * 9)
    (folder / "strange/config.json").write_text("[]")
    (folder / "none/results.json").write_text("[]")
    (folder / "empty").mkdir()
    return folder


def test_the_encoder_has_the_ema_weights_of_the_run(folder):
    encoder = domain_gap.load_encoder(Workdir(folder / "run"), (8, 8, 1))
    digits = data.load(data.DataConfig(name="digits")).test
    found = domain_gap.features(encoder.features_fn, encoder.params, digits)
    assert found.shape == (360, 8 * 4 * 4)
    layer = encoder.params["params"]["Dense_0"]
    predicted = (found @ layer["kernel"] + layer["bias"]).argmax(axis=1)
    results = json.loads((folder / "run/results.json").read_text())
    assert (predicted == digits.labels).mean() == results["test_accuracy_ema"]
    confusion = np.array(results["confusion_ema"])
    assert np.bincount(predicted, minlength=10).tolist() == confusion.sum(0).tolist()


def test_the_encoder_takes_images_of_other_classes(folder, bank):
    """Its last layer is not used, so that need not fit."""
    encoder = domain_gap.load_encoder(Workdir(folder / "run"), (8, 8, 1))
    test, _ = domain_gap.load_images(data.DataConfig(name="digits"), bank)
    few = dataclasses.replace(
        test, labels=test.labels // 4, class_names=("a", "b", "c")
    )
    result = domain_gap.measure(encoder, few, few, num_draws=1, per_class=True)
    assert list(result["classes"]) == ["a", "b", "c"]
    assert result["distance_of_all_images"] < 1e-8


# Flags, and the one line they end with. All run in one process, started once.
BANK = "--public=bank --public_path=bank"
MISTAKES = {
    "": "--encoder is missing: give the workdir of a run, or pixels",
    "--encoder=run": "--public is missing",
    "--encoder=run --public=bank": "public.path is None: it must be the path of a",
    "--encoder=run --public=bank --public_path=no": "bank no: there is no such folder",
    "--encoder=run --public=x": "public.name is 'x': it must be one of digits",
    "--encoder=run --public=digits": "public.name is 'digits': its training records",
    f"--encoder=pixels {BANK}": "--data is missing",
    f"--encoder=pixels {BANK} --data=dig": "data.name is 'dig': it must be one of",
    f"--encoder=run {BANK} --path=x": "--path is x: it needs --data",
    f"--encoder=run {BANK} --image_size=8": "--image_size is 8: it needs --data",
    f"--encoder=run {BANK} --data=digits --image_size=10": (
        "encoder run/model.safetensors does not fit images of (10, 10, 3)"
    ),
    f"--encoder=no {BANK}": "encoder no is no workdir: it must have a config.json",
    f"--encoder=empty {BANK}": "encoder empty is no workdir",
    f"--encoder=unfinished {BANK}": "encoder unfinished is not finished",
    f"--encoder=cut {BANK}": "encoder cut/model.safetensors: cannot be read",
    f"--encoder=strange {BANK}": "strange/config.json is not a config",
    f"--encoder=none {BANK}": "encoder none: results.json is damaged",
    f"--encoder=run {BANK} --draws=0": "--draws is 0: it must be at least 1",
    f"--encoder=run {BANK} --batch_size=0": "--batch_size is 0: it must be at least",
    f"--encoder=run {BANK} --json=no/x": "--json is no/x: cannot be written",
    "--encoder=run --draws=x": "flag --draws=x",
    "--encoder=run --split=train": "Unknown command line flag 'split'",
    "--encoder=run --validation_size=3": "Unknown command line flag 'validation_size'",
    f"--encoder=run {BANK} bank": "unknown argument bank",
}
RIGHT = {
    "model": f"--encoder=run {BANK} --per_class --json=a.json",
    "same": f"--encoder=run {BANK} --data=digits --json=b.json --batch_size=100",
    "pixels": f"--encoder=pixels {BANK} --data=digits --draws=3 --json=c.json",
}
DRIVER = f"""
import json, sys, io, contextlib
from absl import flags
sys.path.insert(0, {str(SCRIPT.parent)!r})
import domain_gap as script
from dpmix_jax import command_line
shown = []
for line in json.load(sys.stdin):
    flags.FLAGS.unparse_flags()
    for flag in flags.FLAGS.flags_by_module_dict()[script.__name__]:
        flag.unparse()
    status, out, err = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            script.main(command_line.parse(["x", *line.split()]))
        except SystemExit as ended:
            status = ended.code
    shown.append((status, out.getvalue(), err.getvalue()))
json.dump(shown, sys.stdout)
"""


@pytest.fixture(scope="module")
def driven(folder):
    """Runs the program with each line of flags; returns status, output and errors."""
    commands = [*MISTAKES, *RIGHT.values()]
    shown = subprocess.run(
        [sys.executable, "-W", "error", "-c", DRIVER],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert shown.returncode == 0, shown.stderr
    return dict(zip(commands, json.loads(shown.stdout), strict=True))


@pytest.mark.parametrize("command", MISTAKES)
def test_mistakes_are_one_line(command, driven):
    status, _, line = driven[command]
    assert status == 2
    assert line.startswith("error: ")
    assert MISTAKES[command] in line
    assert line.count("\n") == 1


def test_a_model_and_pixels_see_the_gap(driven, folder):
    """Rendered digits are not handwritten ones; the table says what JSON says."""
    results = []
    for name, file in (("model", "a"), ("pixels", "c")):
        status, out, err = driven[RIGHT[name]]
        assert (status, err) == (0, "")
        result = json.loads((folder / f"{file}.json").read_text())
        assert out == domain_gap.table(result) + "\n"
        gap = result["matched"]
        assert gap["num_images"] == 60
        assert min(gap["bank"]) > max(gap["halves"]) > 0
        assert "only distances by this encoder compare" in out
        assert "halves of the test set, which have no gap" in out
        results.append(result)
    assert results[0]["encoder"] == "run"
    assert len(results[0]["matched"]["bank"]) == 10
    assert list(results[0]["classes"]) == list(DIGITS)
    assert {gap["num_images"] for gap in results[0]["classes"].values()} == {6}
    assert results[1]["encoder"] == "pixels"
    assert results[1]["num_features"] == 64
    assert len(results[1]["matched"]["bank"]) == 3
    assert "classes" not in results[1]


def test_the_dataset_is_that_of_the_run_and_batches_do_not_matter(driven, folder):
    assert driven[RIGHT["same"]][0] == 0
    first, second = (json.loads((folder / f"{name}.json").read_text()) for name in "ab")
    found = second["distance_of_all_images"]
    assert found == pytest.approx(first["distance_of_all_images"], rel=1e-4)


def test_classes_of_too_few_images_are_named(bank):
    test, found = domain_gap.load_images(data.DataConfig(name="digits"), bank)
    few = found.subset(np.flatnonzero((found.labels != 7) | (np.arange(60) == 42)))
    encoder = Encoder("pixels", domain_gap.pixels, ())
    result = domain_gap.measure(encoder, few, test, num_draws=1, per_class=True)
    assert [name for name, gap in result["classes"].items() if gap is None] == ["7"]
    assert "\n7      too few\n" in domain_gap.table(result)
