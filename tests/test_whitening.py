"""Whitening: against the formula, and in whole runs with public images."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dpmix_jax import Mechanism, UserError, data
from dpmix_jax.data.public import load_public
from dpmix_jax.models import whitening
from dpmix_jax.models.finetune import FinetuneConfig
from dpmix_jax.models.whitening import Whitening, fit
from dpmix_jax.run import build, experiment
from dpmix_jax.run.config import from_config_dict, to_dict
from dpmix_jax.run.workdir import Workdir
from tests import runs


def embeddings(n=60, size=5, rank=5):
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(rank, size)) * np.geomspace(5, 0.1, rank)[:, None]
    return (rng.normal(size=(n, rank)) @ mixing + 3).astype(np.float32)


def apply(params, x):
    return Whitening().apply({"params": params}, jnp.asarray(x))


@pytest.mark.parametrize(("n", "rank"), [(60, 5), (60, 2), (3, 5)])
@pytest.mark.parametrize("regularization", [1e-3, 0.1, 10.0])
def test_it_is_the_inverse_root_of_the_covariance(n, rank, regularization):
    """By the formula in full, with fewer images than axes and flat axes as well."""
    x = embeddings(n, rank=rank)
    covariance = np.cov(x.T.astype(np.float64), bias=True)
    values, axes = np.linalg.eigh(covariance)
    scales = (values / values[-1] + regularization) ** -0.5
    expected = (x - x.mean(0)) @ (axes * scales) @ axes.T
    expected *= np.sqrt(np.square(x).sum() / np.square(expected).sum())
    found = apply(fit(x, regularization), x)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_axes_beyond_the_rank_keep_their_scale(monkeypatch):
    monkeypatch.setattr(whitening, "_RANK", 2)
    x = embeddings()
    params = fit(x, 0.01)
    assert params["directions"].shape == (5, 2)
    white = np.asarray(apply(params, x))
    axes = np.linalg.svd(x - x.mean(0))[2]
    before, after = ((v - v.mean(0)) @ axes.T for v in (x, white))
    ratios = after.std(0) / before.std(0) / float(params["scale"])
    np.testing.assert_allclose(ratios[2:], 1.0, rtol=1e-3)
    assert ratios[0] < ratios[1] < 1.0


def test_it_starts_as_the_identity():
    x = jnp.asarray(embeddings().reshape(60, 5, 1))
    params = Whitening().init(jax.random.key(0), x)
    np.testing.assert_array_equal(Whitening().apply(params, x), x)


@pytest.mark.parametrize("x", [np.zeros((4, 3)), np.ones((1, 3)), np.ones((4, 3))])
def test_embeddings_that_do_not_vary_lose_their_mean_alone(x):
    found = apply(fit(x, 0.1), 2.0 * x.astype(np.float32))
    np.testing.assert_allclose(found, x, atol=1e-6)


def configured(regularization=0.1, public="rendered_digits", **groups):
    values = to_dict(runs.config(privacy__num_updates=3))
    values["model"] = {"name": "scattering_linear", "scales": 1}
    values["finetune"] = {"whitening": regularization}
    values["public"] = {"name": public}
    return from_config_dict(values | groups)


def parts_of(config, change=lambda records: None):
    dataset = data.load(config.data)
    public = load_public(config.public, config.data, dataset)
    records = dataclasses.replace(
        dataset.train,
        images=dataset.train.images.copy(),
        labels=dataset.train.labels.copy(),
    )
    change(records)
    model = build.classifier(config, records)
    parts = build.build(
        config,
        model,
        config.finetune.load(model.shapes),
        records,
        mechanism=Mechanism(sampling_prob=0.1, num_updates=3, noise_multiplier=3.0),
        seed=3,
        public=public,
    )
    return parts, model, records.normalize(jnp.asarray(public.images))


def test_the_public_images_are_whitened_and_the_head_alone_is_trained():
    parts, model, images = parts_of(configured(regularization=1e-6))
    assert set(parts.state.params["params"]) == {"head"}
    assert set(parts.frozen["params"]) == {"whitening"}
    found = np.asarray(model.encode(parts.frozen, images)).reshape(len(images), -1)
    np.testing.assert_allclose(found.mean(0), 0.0, atol=1e-3)
    first = np.linalg.eigvalsh(np.cov(found.T))[::-1][:20]
    np.testing.assert_allclose(first, first.mean(), rtol=0.05)


def test_it_is_the_same_whatever_the_private_records_are():
    def change(records):
        records.images[:] = 255 - records.images
        records.labels[:] = 0

    base, found = (parts_of(configured(), *c)[0].frozen for c in ([], [change]))
    jax.tree.map(np.testing.assert_array_equal, base, found)


@pytest.mark.parametrize(
    "kind", [pytest.param("fresh", marks=pytest.mark.slow), "kept"]
)
def test_a_run_releases_it_and_says_where_it_is_from(tmp_path, kind):
    config = configured()
    config = dataclasses.replace(
        config, finetune=dataclasses.replace(config.finetune, embeddings=kind)
    )
    assert experiment.run(config, Workdir(tmp_path / "run")) == 0
    path = tmp_path / "run" / "model.safetensors"
    weights = safetensors.numpy.load_file(path)
    mean = weights["ema_params/params/whitening/mean"]
    assert np.abs(mean).max() > 0
    text = " ".join((tmp_path / "run" / "PRIVACY.md").read_text().split())
    assert "by whose embeddings those of all images are whitened" in text

    again = FinetuneConfig(weights=str(path), whitening=0.1)
    model = build.classifier(config, data.load(config.data).train)
    given = again.load(model.shapes)["params"]
    name = "ema_params/params/head/kernel"
    np.testing.assert_array_equal(given["head"]["kernel"], weights[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"regularization": 0.0}, "finetune.whitening is 0.0: it must be positive"),
        ({"public": None}, "public.name is None: it must be the name of a public"),
        (
            {"model": {"name": "cnn", "features": "4,8", "groups": 2}},
            "finetune.whitening is set: it must be None for a model without an encoder",
        ),
        (
            {"model": {"name": "vit", "patch_size": 4, "width": 8, "heads": 2}},
            "finetune.whitening is 0.1: it must be None where more is trained than a",
        ),
    ],
)
def test_mistakes_are_told_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        experiment.run(configured(**changes), Workdir(tmp_path / "run"))
    assert not list((tmp_path / "run").glob("[!.]*"))
