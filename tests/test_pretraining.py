"""Weights from public images, halves of a dataset, and runs that use them."""

import contextlib
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpmix_jax import AugmentationConfig, UserError, data, stream_key, training
from dpmix_jax.baselines.pretraining import PretrainConfig, pretrain
from dpmix_jax.data.public import PublicConfig, load_public
from dpmix_jax.run import experiment
from dpmix_jax.run.cli import load_experiment
from tests import toy
from tests.runs import outcome, run

CONFIG = PretrainConfig(num_updates=6, batch_size=64, learning_rate=1.0)
KEY = stream_key(0, "pretraining")


def states(first=None, config=CONFIG, seed=1, key=KEY):
    first = first or training.init_state(toy.init_params(), config.build())
    found = pretrain(
        first,
        toy.loss_fn,
        config,
        AugmentationConfig(max_shift=1),
        toy.pool(30, seed),
        normalize=toy.records(1).normalize,
        key=key,
    )
    return list(found)


@pytest.fixture(scope="module")
def whole():
    return states()


@pytest.mark.proves("baselines.pretraining.pretrain", 1)
def test_it_learns_the_pool_and_depends_on_it_and_the_key(whole):
    assert [int(state.step) for state, _ in whole] == [1, 2, 3, 4, 5, 6]
    pool, like = toy.pool(30, 1), toy.records(1)
    labels = jax.nn.one_hot(pool.labels, toy.NUM_CLASSES)
    before, after = (
        toy.loss_fn(params, like.normalize(pool.images), labels)
        for params in (toy.init_params(), whole[-1][0].params)
    )
    assert after < before

    def weights(found):
        return toy.flat(found[-1][0].params)

    np.testing.assert_array_equal(weights(states()), weights(whole))
    assert (weights(states(seed=2)) != weights(whole)).any()
    other = stream_key(1, "pretraining")
    assert (weights(states(key=other)) != weights(whole)).any()


def test_going_on_from_a_state_is_bit_identical(whole):
    again = states(first=jax.tree.map(jnp.copy, whole[2][0]))
    assert len(again) == 3
    np.testing.assert_array_equal(
        toy.flat(again[-1][0].params), toy.flat(whole[-1][0].params)
    )


def test_each_update_draws_for_itself():
    still = PretrainConfig(num_updates=3, batch_size=8, learning_rate=1e-9)
    assert len({float(loss) for _, loss in states(config=still)}) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_updates": -1}, "pretrain.num_updates is -1: it must be at least 0"),
        ({"batch_size": 0}, "pretrain.batch_size is 0: it must be at least 1"),
        (
            {"learning_rate": 0.0},
            "pretrain.learning_rate is 0.0: it must be positive and finite",
        ),
        ({"momentum": 1.0}, r"pretrain.momentum is 1.0: it must be in [0, 1)"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(UserError) as error:
        PretrainConfig(**options)
    assert str(error.value) == message


def test_pretraining_needs_public_images_and_allows_them():
    flags = ["--config=configs/digits.py", "--config.pretrain.num_updates=5"]
    with pytest.raises(UserError, match=r"a public dataset for pretrain.num_updates 5"):
        load_experiment(flags)
    flags += ["--config.public.name=rendered_digits", "--config.method.name=self_aug"]
    flags += ["--config.method.k_self=0"]
    assert load_experiment(flags).pretrain.num_updates == 5
    with pytest.raises(UserError, match="'self_aug', which takes no public images"):
        load_experiment([*flags, "--config.pretrain.num_updates=0"])


def test_halves_are_disjoint_equal_and_fixed():
    whole = data.load(data.DataConfig()).train
    halves = [data.load(data.DataConfig(half=n)).train for n in (1, 2)]
    assert [len(half) for half in halves] == [718, 718]  # one of 1,437 is in neither
    rows = [{image.tobytes() for image in half.images} for half in halves]
    assert rows[0].isdisjoint(rows[1])
    assert rows[0] | rows[1] <= {image.tobytes() for image in whole.images}
    again = data.load(data.DataConfig(half=2, validation_size=18))
    assert len(again.train) == 700
    assert len(data.blank(data.DataConfig(half=2, validation_size=18))) == 700


def test_only_the_other_half_may_be_public():
    private = data.DataConfig(half=1)
    dataset = data.load(private)
    found = load_public(PublicConfig(name="digits", half=2), private, dataset)
    expected = data.load(data.DataConfig(half=2)).train
    np.testing.assert_array_equal(found.images, expected.images)
    for half in (1, None):
        with pytest.raises(UserError, match="is the private training set"):
            load_public(PublicConfig(name="digits", half=half), private, dataset)
    whole = data.DataConfig()
    with pytest.raises(UserError, match="is the private training set"):
        load_public(PublicConfig(name="digits", half=2), whole, data.load(whole))


def test_the_other_half_of_another_file_is_compared_with(tmp_path):
    """Halves of two files do not tell that they share nothing."""
    source = data.load(data.DataConfig())
    paths = [tmp_path / name for name in ("a.npz", "b.npz")]
    for path in paths:
        np.savez(
            path,
            train_images=source.train.images[:40],
            train_labels=source.train.labels[:40],
            test_images=source.test.images[:5],
            test_labels=source.test.labels[:5],
            class_names=source.train.class_names,
        )
    private = data.DataConfig(name="npz", path=str(paths[0]), half=1)
    public = PublicConfig(name="npz", path=str(paths[1]))
    with pytest.raises(UserError, match="has an image of the private training set"):
        load_public(public, private, data.load(private))


OPTIONS = {
    "method__name": "microbatch_mixup",
    "method__group_size": 4,
    "method__k_self": 0,
    "data__half": 1,
    "public__name": "digits",
    "public__half": 2,
    "pretrain__num_updates": 6,
    "pretrain__batch_size": 64,
    "privacy__num_updates": 2,
}


class After(list):
    """A signal that comes after some looks."""

    def __init__(self, looks):
        super().__init__([signal.SIGTERM])
        self.looks = looks

    def __bool__(self):
        self.looks -= 1
        return self.looks < 0


@pytest.mark.slow
def test_a_run_stopped_while_it_pretrains_ends_with_the_same_bits(
    tmp_path, monkeypatch
):
    done = run(tmp_path / "whole", **OPTIONS)
    assert done.status == 0, done.err
    assert "microbatch_mixup, K = 2" in done.err
    assert "pre-training 6/6  loss" in done.err
    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        caught = contextlib.nullcontext(After(3))
        patch.setattr(experiment, "caught_signals", lambda _: caught)
        assert run(stopped, **OPTIONS).status == 128 + signal.SIGTERM
    assert (stopped / "pretraining").exists()
    assert not (stopped / "results.json").exists()
    done = run(stopped, **OPTIONS)
    assert done.status == 0, done.err
    assert "pre-training 4/6" not in done.err
    assert "pre-training 6/6" in done.err
    assert outcome(stopped) == outcome(tmp_path / "whole")
    assert not (stopped / "pretraining").exists()
    assert json.loads((stopped / "privacy.json").read_text())["num_records"] == 718
    text = " ".join((stopped / "PRIVACY.md").read_text().split())
    assert (
        "digits, half 2 of its training records, 718 images declared public in the"
        " configuration"
    ) in text
    assert "the initial weights were trained for 6 updates without noise" in text
    assert "gradients of groups of records (4 expected in each" in text
    assert "Copies of training or test records among them were not looked for" in text
