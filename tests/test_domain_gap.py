"""Fréchet distances, features, what they are taken of, and the program."""

import dataclasses
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import scipy.linalg
from flax import linen as nn

from dpmix_jax import UserError, data, models
from dpmix_jax.data.public import PublicConfig
from dpmix_jax.data.rendered import Render
from dpmix_jax.models.finetune import FinetuneConfig
from dpmix_jax.run.config import ModelConfig, to_dict
from dpmix_jax.run.export import describe
from dpmix_jax.run.workdir import Workdir
from dpmix_jax.synthetic import Plan, domain_gap, fill
from dpmix_jax.synthetic.domain_gap import compare, frechet_distance
from tests import runs, towers
from tests.programs import call

DIGITS = tuple("0123456789")


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DPMIX_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))


def sample(num, dim, seed=0, shift=0.0):
    """Correlated features whose covariance has all ranks that `num` allows."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(dim, dim)) / np.sqrt(dim) + np.eye(dim)
    return rng.normal(size=(num, dim)) @ mix + rng.normal(size=dim) + shift


def textbook(a, b):
    """As Heusel et al. compute it."""
    covariance_a, covariance_b = np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(covariance_a @ covariance_b).real
    means = np.square(a.mean(axis=0) - b.mean(axis=0)).sum()
    return means + np.trace(covariance_a + covariance_b - 2 * root)


@pytest.mark.parametrize("dim", [2, 5, 20])
def test_equals_the_textbook_where_that_is_sound(dim):
    # Variances 2 and 8, means 0 and 3: 9 + 2 + 8 - 2 sqrt(16).
    found = frechet_distance(np.array([[-1], [1]]), np.array([[1.0], [5.0]]))
    assert found == pytest.approx(11.0, rel=1e-14)
    a, b = sample(100, dim), sample(60, dim, seed=1, shift=0.3)
    found = frechet_distance(a, b)
    assert found == pytest.approx(textbook(a, b), rel=1e-9)
    assert frechet_distance(a, a + 2) == pytest.approx(4 * dim, rel=1e-12)
    assert frechet_distance(a + 1e6, b + 1e6) == pytest.approx(found, rel=1e-6)
    single = frechet_distance(a.astype(np.float32), b.astype(np.float32))
    assert single == pytest.approx(found, rel=1e-5)


@pytest.mark.parametrize(("num", "other"), [(60, 40), (9, 40), (9, 5)])
def test_more_and_fewer_images_than_features(num, other):
    """Symmetric, free of order and rotation, and zero for equal sets."""
    a, b = sample(num, 20), sample(other, 20, seed=1, shift=0.5)
    rng = np.random.default_rng(2)
    rotation, _ = np.linalg.qr(rng.normal(size=(20, 20)))
    # In the few dimensions that all images span, the textbook is sound.
    basis, _ = np.linalg.qr(np.concatenate([a, b]).T)
    for same in (
        frechet_distance(b, a),
        frechet_distance(rng.permutation(a), rng.permutation(b)),
        frechet_distance(a @ rotation, b @ rotation),
        frechet_distance(3 * a, 3 * b) / 9,
        frechet_distance(a @ basis, b @ basis),
    ):
        assert same == pytest.approx(frechet_distance(a, b), rel=1e-10)
    assert 0 <= frechet_distance(a, a[::-1]) <= 1e-10


def test_draws_are_of_equal_size_and_halves_are_disjoint(monkeypatch):
    drawn = []

    def record(a, b):
        drawn.append((a[:, 0].tolist(), b[:, 0].tolist()))
        return float(len(drawn))

    monkeypatch.setattr(domain_gap, "frechet_distance", record)
    bank, test = -1.0 - np.arange(12)[:, None], np.arange(21.0)[:, None]
    assert compare(bank[:4], test, num_draws=0).num_images == 4
    gap = compare(bank, test, num_draws=3)
    assert gap == domain_gap.Gap(10, [1.0, 3.0, 5.0], [2.0, 4.0, 6.0])
    for (from_bank, half), (same, other) in zip(drawn[::2], drawn[1::2], strict=True):
        assert half == same
        assert all(number < 0 for number in from_bank)
        assert len({*from_bank}) == len({*half}) == len({*other}) == 10
        assert {*half}.isdisjoint(other)
    assert drawn[0] != drawn[2]
    assert compare(bank[:1], test, num_draws=1) is None
    assert compare(bank, test[:3], num_draws=1) is None


CNN = {"features": (4, 8), "groups": 2}
VIT = {**towers.OPTIONS["vit"], "depth": 1}


def random_params(model):
    """Random weights, by which no compilation is needed."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes
    )


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("name", "options", "last"), [("cnn", CNN, "Dense_0"), ("vit", VIT, "head")]
)
def test_features_are_what_the_last_layer_is_given(name, options, last):
    """For all images, in their order."""
    model = models.create(name, 10, **options)
    params = random_params(model)
    records = data.load(data.DataConfig(name="digits")).test.subset(np.arange(200))
    features_fn = domain_gap.penultimate(model.apply)
    found = domain_gap.features(features_fn, params, records)
    layer = params["params"][last]
    logits = jax.jit(model.apply)(params, records.normalize(records.images))
    np.testing.assert_allclose(
        found @ layer["kernel"] + layer["bias"], logits, rtol=1e-4, atol=1e-5
    )
    with pytest.raises(UserError, match="features are not finite"):
        domain_gap.features(lambda scale, x: x * scale, np.float32("nan"), records)


def test_features_of_a_head_on_a_grid_are_flat():
    model = models.create("scattering_linear", 10, scales=1)
    features_fn = domain_gap.penultimate(model.apply)
    assert features_fn(random_params(model), jnp.zeros((2, 8, 8, 1))).shape == (2, 144)


class Convolutional(nn.Module):
    """Has a Dense layer, and ends in a convolution."""

    @nn.compact
    def __call__(self, images):
        return nn.Conv(10, (3, 3))(nn.Dense(4)(images)).mean(axis=(1, 2))


def test_a_model_without_a_last_dense_layer_is_refused():
    features_fn = domain_gap.penultimate(Convolutional().apply)
    with pytest.raises(UserError, match="the encoder's last layer is not a Dense"):
        features_fn(random_params(Convolutional()), jnp.zeros((2, 8, 8, 1)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds `bank`, a finished `run` of other classes, and runs that are not right."""
    folder = tmp_path_factory.mktemp("gap")
    plan = Plan(class_names=DIGITS, count=60, seed=0, image_shape=(8, 8, 1))
    render = Render(class_names=DIGITS, image_shape=(8, 8, 1))
    fill(folder / "bank", plan, render, batch_size=60)
    base = runs.config()
    test = data.load(base.data).test
    test = dataclasses.replace(test, class_names=DIGITS[:7], labels=test.labels % 7)
    for run, name, options in (("run", "cnn", CNN), ("head", "vit", VIT)):
        config = dataclasses.replace(
            base,
            model=ModelConfig(name=name, options=options),
            finetune=FinetuneConfig(trainable="head" if run == "head" else "all"),
        )
        params = random_params(models.create(name, 7, **options))
        trained, _ = config.finetune.split(params)
        tensors = {
            f"ema_params/{jax.tree_util.keystr(path, simple=True, separator='/')}": leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(trained)
        }
        workdir = Workdir(folder / run)
        workdir.path.mkdir()
        workdir.write("model.safetensors", safetensors.numpy.save(tensors))
        workdir.write_json("config.json", to_dict(config))
        workdir.write_json("model.json", describe(config, test, {}))
        workdir.write_json("results.json", {})
    for broken in ("cut", "strange"):
        shutil.copytree(folder / "run", folder / broken)
    (folder / "cut/model.safetensors").write_bytes(b"\0" * 9)
    (folder / "strange/config.json").write_text("[]")
    return folder


@pytest.fixture
def bank(folder):
    return PublicConfig(name="bank", path=str(folder / "bank"))


class Poison:
    """Stands for private records: to look at them in any way is an error."""

    def __getattribute__(self, name):
        raise AssertionError(f"the private records' {name} was read")

    def __len__(self):
        raise AssertionError("the private records were counted")


@pytest.mark.proves("synthetic.domain_gap.load_images", 1)
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


def test_training_and_test_images_are_refused_as_public(tmp_path):
    """The training set by its name too, wherever it is."""
    config = data.DataConfig(name="cifar10", path=str(tmp_path / "a"))
    for name in ("cifar10", "tfds:cifar10", "tfds:cifar10:3.0.2"):
        public = PublicConfig(name=name, path=str(tmp_path / "b"))
        with pytest.raises(UserError, match=r"^public.name is .* no features may be"):
            domain_gap.load_images(config, public)
    config = data.DataConfig(name="hf:a/faces", path=str(tmp_path / "a"))
    for name, message in (
        ("a/faces", "no features may be"),
        ("b/Faces", "no features may be"),
        ("b/dogs", "of Parquet files"),
    ):
        with pytest.raises(UserError, match=message):
            domain_gap.load_images(config, PublicConfig(name=f"hf:{name}"))
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


BANK = "--public=bank --public_path=bank"
MISTAKES = {
    "--encoder=run --public=digits": "public.name is 'digits': its training records",
    f"--encoder=pixels {BANK}": "--data is missing",
    f"--encoder=run {BANK} --path=x": "data.path is 'x': it must be None",
    f"--encoder=run {BANK} --data=digits --image_size=10": "images of (10, 10, 3), not",
    f"--encoder=no {BANK}": "--encoder is no: it must be pixels or the workdir of a",
    f"--encoder=cut {BANK}": "cut/model.safetensors",
    f"--encoder=strange {BANK}": "--encoder is strange: it must be pixels or the",
    "--encoder=run --split=train": "Unknown command line flag 'split'",
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_mistakes_are_one_line(folder, flags):
    done = call("experiments/domain_gap.py", flags.split(), folder=folder)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert MISTAKES[flags] in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "images"),
    [
        ("--encoder=run --per_class", [60, *[6] * 10]),
        ("--encoder=head", [60]),
        ("--encoder=pixels --data=digits --draws=3", [60]),
    ],
)
def test_a_model_and_pixels_see_the_gap(folder, flags, images):
    """Rendered digits are not handwritten ones."""
    given = [*flags.split(), *BANK.split()]
    done = call("experiments/domain_gap.py", given, folder=folder)
    assert (done.returncode, done.stderr) == (0, "")
    number = r"[\d.e+-]+"
    rows = re.findall(
        rf"^(all|class \d) +(\d+)((?:  +{number} \({number} to {number}\)){{2}})$",
        done.stdout,
        re.MULTILINE,
    )
    assert [int(count) for _, count, _ in rows] == images
    _, to_bank, _, _, _, to_half = map(float, re.findall(number, rows[0][2]))
    assert to_bank > to_half > 0  # the least distance, and the greatest of halves
    assert "only distances by this encoder compare" in done.stdout
    assert "halves of the test set, which have no gap" in done.stdout


def test_classes_of_too_few_images_are_named():
    gap = compare(sample(9, 2), sample(9, 2), num_draws=1)
    shown = domain_gap.table({"all": gap, "7": None}, "x")
    assert "\n7    too few\n" in shown
