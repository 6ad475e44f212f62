"""Whitening: against the formula, and in whole runs with public images."""

import dataclasses
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dpmix_jax import Mechanism, UserError, data
from dpmix_jax.data.public import load_public
from dpmix_jax.models import pretrained, whitening
from dpmix_jax.models.whitening import Whitening, fit
from dpmix_jax.run import build, experiment
from dpmix_jax.run import embeddings as run_embeddings
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
@pytest.mark.parametrize("regularization", [1e-4, 0.1, 10.0])
def test_it_is_the_inverse_root_of_the_covariance(n, rank, regularization):
    """By the formula in full, with fewer images than axes and flat axes as well."""
    x = embeddings(n, rank=rank)
    covariance = np.cov(x.T.astype(np.float64), bias=True)
    values, axes = np.linalg.eigh(covariance)
    scales = (values / values[-1] + regularization) ** -0.5
    expected = (x - x.mean(0)) @ (axes * scales)
    expected *= np.sqrt(np.square(x).sum() / np.square(expected).sum())
    found = np.asarray(apply(fit(x, regularization), x))
    # Axes have no sign of their own, and are not correlated.
    covariance = np.cov(found.T)
    off_diagonal = covariance - np.diag(np.diag(covariance))
    np.testing.assert_allclose(off_diagonal, 0.0, atol=1e-3 * covariance.max())
    products = found @ found.T
    np.testing.assert_allclose(products, expected @ expected.T, rtol=1e-3, atol=1e-2)


def test_axes_beyond_the_first_are_left_out(monkeypatch):
    monkeypatch.setattr(whitening, "_AXES", 2)
    x = embeddings()
    params = fit(x, 0.01)
    assert params["axes"].shape == (5, 2)
    white = np.asarray(apply(params, x))
    axes = np.linalg.svd(x - x.mean(0))[2][:2]
    correlations = np.abs(np.corrcoef(white.T, axes @ (x - x.mean(0)).T)[:2, 2:])
    np.testing.assert_allclose(correlations, np.eye(2), atol=1e-3)
    np.testing.assert_allclose(np.square(white).sum(), np.square(x).sum(), rtol=1e-3)


def test_few_images_leave_axes_empty():
    few = fit(embeddings(n=3), 0.1)["axes"]
    assert few.shape == (5, 5)
    assert (np.abs(few).max(0) > 0).tolist() == [True, True, False, False, False]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_embeddings_that_cannot_be_whitened_are_refused(value):
    x = embeddings()
    x[7, 2] = value
    with pytest.raises(UserError, match="of public images that are not finite"):
        fit(x, 0.1)
    with pytest.raises(UserError, match=r"of 131,073 numbers, more than 131,072"):
        fit(np.zeros((1, 131_073), np.float32), 0.1)


@pytest.mark.parametrize(
    "x", [np.zeros((4, 3)), np.ones((1, 3)), 1 + 1e-7 * np.eye(4, 3)]
)
def test_embeddings_that_hardly_differ_are_refused(x):
    with pytest.raises(UserError, match="of public images that hardly differ"):
        fit(x.astype(np.float32), 0.1)


def test_many_public_images_are_thinned_out():
    np.testing.assert_array_equal(whitening.chosen(9), np.arange(9))
    some = whitening.chosen(100_000)
    assert len(np.unique(some)) == len(some) == 4096
    assert some[[0, -1]].tolist() == [0, 99_999]


VIT = {"name": "vit", "patch_size": 4, "width": 8, "heads": 2, "depth": 1}


def configured(regularization=0.1, public="rendered_digits", finetune=(), **groups):
    values = to_dict(runs.config(privacy__num_updates=4))
    values["model"] = {"name": "scattering_linear", "scales": 1}
    values["finetune"] = {"whitening": regularization, **dict(finetune)}
    count = {"count": 300} if public == "rendered_digits" else {}
    values["public"] = {"name": public, **count}
    return from_config_dict(values | groups)


def whitened(config, path, train_set=None):
    """Returns the model, the weights to start from, and what these were made of."""
    dataset = data.load(config.data)
    dataset = dataset._replace(train=train_set or dataset.train)
    public, records = load_public(config.public, config.data, dataset), dataset.train
    model = build.classifier(config, records)
    given = config.finetune.load(model.shapes)
    given = run_embeddings.whitened(
        config, model, given, records, public, Workdir(path)
    )
    return model, given, records, public


def parts_of(config, path):
    model, given, records, public = whitened(config, path)
    parts = build.build(
        config,
        model,
        given,
        records,
        mechanism=Mechanism(sampling_prob=0.1, num_updates=4, noise_multiplier=3.0),
        seed=3,
        public=public,
    )
    return parts, model, records.normalize(jnp.asarray(public.images))


@pytest.mark.sampled
@pytest.mark.parametrize(
    "config",
    [
        configured(regularization=1e-4),
        configured(1e-4, finetune={"trainable": "head"}, model=VIT),
    ],
    ids=["scattering", "vit"],
)
def test_public_images_are_whitened_and_the_head_alone_is_trained(tmp_path, config):
    parts, model, images = parts_of(config, tmp_path)
    assert set(parts.state.params["params"]) == {"head"}
    assert set(parts.frozen["params"]) >= {"whitening"}
    found = np.asarray(jax.jit(model.encode)(parts.frozen, images))
    found = found.reshape(len(images), -1)
    assert np.abs(found.mean(0)).max() < 0.1 * found.std()
    first = np.linalg.eigvalsh(np.cov(found.T))[::-1][:4]
    np.testing.assert_allclose(first, first.mean(), rtol=0.1)
    assert parts.inputs.pool is None  # nothing is drawn of them


def test_it_is_the_same_whatever_the_private_records_are(tmp_path):
    config = configured()
    train_set = data.load(config.data).train
    other = dataclasses.replace(
        train_set, images=255 - train_set.images[5:900], labels=train_set.labels[:895]
    )
    base, found = (
        whitened(config, tmp_path, records)[1]["params"]["whitening"]
        for records in (train_set, other)
    )
    jax.tree.map(np.testing.assert_array_equal, base, found)
    assert np.abs(base["axes"]).max() > 0.01


def test_a_run_that_goes_on_is_not_whitened_again(tmp_path, monkeypatch):
    config, workdir = configured(), Workdir(tmp_path)
    _, given, *_ = whitened(config, tmp_path)
    workdir.begin(3, data="", noise_multiplier=1.0)
    run_embeddings.save_whitening(given, workdir)
    monkeypatch.setattr(whitening, "fit", lambda *_: pytest.fail("fitted again"))
    _, found, *_ = whitened(config, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, found, given)
    other = {"mean": np.zeros(3, np.float32), "directions": np.ones(3, np.float32)}
    workdir.write("whitening.safetensors", safetensors.numpy.save(other))
    with pytest.raises(UserError, match="began with another kind of whitening"):
        whitened(config, tmp_path)
    workdir.write("whitening.safetensors", b"cut")
    with pytest.raises(UserError, match=r"whitening.safetensors is damaged"):
        whitened(config, tmp_path)
    workdir.whitening.unlink()
    workdir.embeddings.write_bytes(b"")
    with pytest.raises(UserError, match=r"has lost whitening.safetensors"):
        whitened(config, tmp_path)
    workdir.clean_up()
    with pytest.raises(pytest.fail.Exception, match="fitted again"):
        whitened(config, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fresh", "kept"])
def test_a_run_goes_on_with_its_whitening_and_releases_it(
    tmp_path, monkeypatch, capsys, kind
):
    """Stopped and continued it comes to the same bits; what is released is whole."""
    config = configured(finetune={"embeddings": kind}, method={"name": "dp_sgd"})
    assert experiment.run(config, Workdir(tmp_path / "whole")) == 0
    assert "what is frozen is random" not in "".join(capsys.readouterr())

    def stop(*args):
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Workdir, "add_metrics", stop)
        status = experiment.run(config, Workdir(tmp_path / "run"))
    assert status == 128 + signal.SIGTERM
    monkeypatch.setattr(whitening, "fit", lambda *_: pytest.fail("fitted again"))
    assert experiment.run(config, Workdir(tmp_path / "run")) == 0
    assert not (tmp_path / "run" / "whitening.safetensors").exists()

    path = tmp_path / "run" / "model.safetensors"
    assert path.read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    text = " ".join((tmp_path / "run" / "PRIVACY.md").read_text().split())
    assert "of which the embeddings of 300 set the mean and the axes by" in text
    dataset = data.load(config.data)
    model = build.classifier(config, dataset.train)
    params = pretrained.load_weights(path, model.shapes)
    test = dataset.test
    logits = model.logits(params, test.normalize(jnp.asarray(test.images)))
    accuracy = (np.asarray(logits).argmax(1) == test.labels).mean()
    results = Workdir(tmp_path / "run").results()
    assert accuracy == pytest.approx(results["test_accuracy_ema"], abs=0.003)
    assert accuracy > 0.3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"regularization": 1e-5}, "finetune.whitening is 1e-05: it must be at least"),
        ({"public": None}, "public.name is None: it must be the name of a public"),
        (
            {"model": {"name": "cnn", "features": "4,8", "groups": 2}},
            "finetune.whitening is set: it must be None for a model without an",
        ),
        (
            {"model": {"name": "scattering_cnn", "scales": 1}},
            "encoder and a linear head, such as scattering_cnn",
        ),
        (
            {"model": VIT},
            "finetune.whitening is 0.1: it must be None where more is trained than a",
        ),
        (
            {"finetune": {"weights": "model.safetensors"}},
            "finetune.skip is '': it must be a list with 'head' for finetune.whitening",
        ),
    ],
)
def test_mistakes_are_told_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        experiment.run(configured(**changes), Workdir(tmp_path / "run"))
    assert not list((tmp_path / "run").glob("[!.]*"))
