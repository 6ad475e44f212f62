"""Scattering against kymatio and against its definition, and models that use it."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpmix_jax import UserError, models
from dpmix_jax.models import finetune
from dpmix_jax.models.classifier import make_classifier
from dpmix_jax.models.scattering import coefficients, normalize, roots
from dpmix_jax.run import experiment
from dpmix_jax.run.config import from_config_dict, to_dict
from dpmix_jax.run.workdir import Workdir
from tests import make_scattering, runs
from tests.conftest import ROOT


def assert_close(found, expected, tolerance=1e-6):
    assert found.shape == expected.shape
    largest = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * largest)


def by_order(found, scales, angles):
    """Divides coefficients of one channel by order, whose magnitudes differ much."""
    return np.split(found, [1, 1 + scales * angles], axis=-1)


@pytest.mark.sampled("fashion_mnist")
@pytest.mark.parametrize("name", make_scattering.CASES)
def test_coefficients_are_kymatios(name):
    *options, shape = make_scattering.CASES[name]
    with np.load(ROOT / "tests/fixtures/scattering.npz") as fixture:
        images, expected = fixture[f"{name}_images"], fixture[name]
    found = coefficients(images.astype(np.float32) / np.float32(255), *options)
    channels = shape[-1]
    for pair in zip(
        np.split(np.asarray(found), channels, -1),
        np.split(expected, channels, -1),
        strict=True,
    ):
        for a, b in zip(*(by_order(x, *options[:2]) for x in pair), strict=True):
            if b.size:
                assert_close(a, b, 2e-6)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("kymatio") is None,
    reason='needs kymatio: pip install -e ".[peers]"',
)
@pytest.mark.filterwarnings("ignore")  # those of the library
@pytest.mark.parametrize("side", [8, 28, 33, 64])
@pytest.mark.parametrize("scales", [1, 2, 3])
def test_coefficients_are_kymatios_at_other_sizes(side, scales):
    images = make_scattering.draw((1, side, side + 3, 2), seed=side)
    expected = make_scattering.coefficients(images, scales, 6, 2)
    found = coefficients(images.astype(np.float32) / np.float32(255), scales, 6, 2)
    assert_close(found, expected)


def plain(image, scales, angles, order):
    """[H, W] -> [h, w, P] as the papers say it, in float64: convolutions by FFT."""
    sides = [(n // 2**scales + 2) * 2**scales for n in image.shape]
    before = [(m - n) // 2 for m, n in zip(sides, image.shape, strict=True)]
    after = [m - n - b for m, n, b in zip(sides, image.shape, before, strict=True)]
    image = np.pad(image, list(zip(before, after, strict=True)), mode="reflect")
    # The wavelets are so short that one period either way is enough.
    y, x = (np.arange(-2 * n, 3 * n) for n in sides)
    y, x = np.meshgrid(y, x, indexing="ij")

    def spectrum(values):
        periods = values.reshape(5, sides[0], 5, sides[1])
        return np.fft.fft2(periods.sum((0, 2))).real

    def gaussian(sigma, slant, angle):
        across = (x * np.cos(angle) - y * np.sin(angle)) * slant
        along = y * np.cos(angle) + x * np.sin(angle)
        values = np.exp(-(along**2 + across**2) / (2 * sigma**2))
        return values * slant / (2 * 3.1415 * sigma**2), along

    def morlet(j, k):
        angle = (int(angles / 2 - 1) - k) * np.pi / angles
        bump, along = gaussian(0.8 * 2**j, 4 / angles, angle)
        wave = bump * np.exp(0.75j * np.pi / 2**j * along)
        return spectrum(wave - bump * wave.sum() / bump.sum())

    def convolve(values, filtered, step):
        return np.fft.ifft2(np.fft.fft2(values) * filtered)[::step, ::step]

    def cut(filtered, step):  # to the low frequencies of a smaller image
        for axis in (0, 1):
            few = filtered.shape[axis] // step
            kept = np.fft.fftshift(np.fft.fftfreq(few, 1 / few)).astype(int)
            filtered = np.take(filtered, np.fft.ifftshift(kept), axis)
        return filtered

    low = spectrum(gaussian(0.8 * 2 ** (scales - 1), 1.0, 0.0)[0])

    def average(values, j):
        smooth = convolve(values, cut(low, 2**j), 2 ** (scales - j)).real
        return smooth[1:-1, 1:-1]

    first, second = [], []
    for j in range(scales):
        for k in range(angles):
            modulus = np.abs(convolve(image, morlet(j, k), 2**j))
            first.append(average(modulus, j))
            for i in range(j + 1, scales) if order == 2 else ():
                for m in range(angles):
                    filtered = cut(morlet(i, m), 2**j)
                    again = np.abs(convolve(modulus, filtered, 2 ** (i - j)))
                    second.append(average(again, i))
    return np.stack([average(image, 0), *first, *second], axis=-1)


@pytest.mark.sampled("shape0-options0", "shape3-options3")
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((9, 7), (1, 4, 2)),
        ((8, 8), (1, 8, 1)),
        ((11, 18), (2, 3, 2)),
        ((21, 16), (3, 2, 2)),
        ((12, 13), (2, 4, 1)),
    ],
)
def test_coefficients_are_those_of_the_definition(shape, options):
    images = np.random.default_rng(0).normal(size=(2, *shape, 3))
    expected = [
        np.concatenate([plain(image[..., c], *options) for c in range(3)], -1)
        for image in images
    ]
    found = coefficients(images.astype(np.float32), *options)
    assert_close(found, np.array(expected))


@pytest.mark.sampled
def test_groups_of_each_image_have_mean_0_and_variance_1():
    x = np.random.default_rng(0).normal(3.0, 5.0, (2, 4, 5, 18)).astype(np.float32)
    for groups, taken in ((9, 9), (27, 18), (5, 3), (1, 1)):
        found = normalize(jnp.asarray(x), groups)
        grouped = np.asarray(found).reshape(2, -1, taken, 18 // taken)
        np.testing.assert_allclose(grouped.mean((1, 3)), 0.0, atol=1e-6)
        np.testing.assert_allclose(grouped.var((1, 3)), 1.0, atol=1e-5)
        np.testing.assert_allclose(normalize(3 * x + 1, groups), found, atol=1e-5)
        quarter = normalize(jnp.asarray(x), groups, 375.0)  # 25 before
        assert 0.2 < jnp.abs(quarter).mean() / jnp.abs(found).mean() < 0.3


@pytest.mark.sampled
def test_roots_are_of_all_but_the_averaged_image():
    images = jax.random.normal(jax.random.key(0), (3, 8, 6, 2))
    plain = np.asarray(coefficients(images, 1, 8, 2)).reshape(3, 4, 3, 2, 9)
    options = {"scales": 1, "shape": (8, 6, 2), "groups": 0}
    model = classifier(roots=True, **options)
    found = np.asarray(model.encode({}, images)).reshape(plain.shape)
    np.testing.assert_allclose(found[..., 0], plain[..., 0], atol=1e-6)
    np.testing.assert_allclose(found[..., 1:] ** 2, plain[..., 1:], atol=1e-6)
    assert (plain[..., 0] < 0).any()
    negative = roots(jnp.full((1, 1, 1, 2), -1e-9), 1)
    np.testing.assert_array_equal(np.ravel(negative), np.float32([-1e-9, 0]))


def classifier(name="scattering_linear", shape=(8, 8, 1), **options):
    return make_classifier(name, options, image_shape=shape, num_classes=10)


def test_each_embedding_is_of_its_image_alone():
    """To the last bit, in chunks and in the rest that is left of them."""
    model = classifier(scales=1, shape=(8, 6, 2))
    assert model.cpu_images == 16
    images = jax.random.normal(jax.random.key(0), (131, 8, 6, 2))
    encode = jax.jit(model.encode)
    found = np.asarray(encode({}, images))
    assert found.shape == (131, 4, 3, 18)
    others = np.asarray(encode({}, images.at[jnp.array([1, 129])].set(jnp.nan)))
    changed = np.isnan(others).all((1, 2, 3))
    assert list(np.flatnonzero(changed)) == [1, 129]
    np.testing.assert_array_equal(others[~changed], found[~changed])
    eager = model.encode({}, images[:3])
    np.testing.assert_allclose(eager, found[:3], atol=1e-5)
    raw = classifier(scales=1, shape=(8, 6, 2), groups=0).encode({}, images[:3])
    np.testing.assert_allclose(raw, coefficients(images[:3], 1, 8, 2), atol=1e-6)
    assert_close(normalize(raw, 27), eager, 1e-5)


@pytest.mark.sampled
@pytest.mark.parametrize("name", ["scattering_linear", "scattering_cnn"])
def test_only_the_head_has_parameters(name):
    def size(model):
        return sum(leaf.size for leaf in jax.tree.leaves(model.shapes))

    model = classifier(name, shape=(28, 28, 1))
    assert set(model.shapes["params"]) == {"head"}
    assert finetune.is_head(model.shapes, {})
    of_layers = {name: 81 * 49 * 10 + 10} | {
        "scattering_cnn": 11680 + 4640 + 16 * 32 * 32 + 32 + 330
    }
    assert size(model) == of_layers[name]
    deep = classifier("scattering_cnn", features=(8, 8), pool=True, hidden=0, scales=1)
    assert size(deep) == 9 * 9 * 8 + 8 + 9 * 64 + 8 + 4 * 80 + 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": 0}, "scales is 0: it must be at least 1"),
        ({"order": 3}, "order is 3: it must be 1 or 2"),
        ({"groups": -1}, "groups is -1: it must be at least 0"),
        ({"scales": 4}, "images are 8x8 pixels: they must be at least 16x16"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        classifier(**options)


def test_options_are_those_of_the_encoder_and_of_the_head():
    encoder = "scales", "angles", "order", "roots", "groups", "epsilon"
    assert models.options("scattering_linear") == encoder
    head = "features", "pool", "hidden"
    assert models.options("scattering_cnn") == (*encoder, *head)


@pytest.mark.parametrize("name", ["scattering_linear", "scattering_cnn"])
@pytest.mark.slow
def test_a_run_trains_the_head(name, tmp_path):
    values = to_dict(runs.config(privacy__num_updates=2, model__features="4,8"))
    values["model"] = {"name": name, "scales": 1}
    config = from_config_dict(values)
    assert experiment.run(config, Workdir(tmp_path)) == 0
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])
