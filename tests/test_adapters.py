"""Low-rank adapters: where they are, their gradients, and what is released."""

import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax import traverse_util

import dpmix_jax as dpm
from dpmix_jax import UserError, clipped_gradient, data, models
from dpmix_jax.models import pretrained
from dpmix_jax.models.finetune import FinetuneConfig, join, released
from dpmix_jax.run import build
from tests import runs, towers, toy
from tests.conftest import ROOT

SMALL = {**towers.OPTIONS, "wrn": {"depth": 10, "width": 1, "groups": 2}}
LAST = {"vit": "head", "convnext": "head", "wrn": "Dense_0"}


def small(name):
    """A model of three classes, and parameters that are not zero."""
    module, size = models.create(name, 3, **SMALL[name]), 32
    return module, {"params": towers.draw_params(module, (size, size))}, size


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def matrices(trained):
    """The shapes of A and B by the path of their matrix, in the model."""
    found = flat(trained)
    return {
        path.removesuffix("/lora_a"): (leaf.shape, found[path[:-1] + "b"].shape)
        for path, leaf in found.items()
        if path.endswith("/lora_a")
    }


def moved(tree):
    """Adapters away from the start, where B is zero."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: x + 0.3 * rng.standard_normal(x.shape).astype(np.float32), tree
    )


@pytest.mark.sampled
@pytest.mark.parametrize("name", SMALL)
def test_the_start_is_the_pretrained_model_bit_for_bit(name):
    _, params, _ = small(name)
    config = FinetuneConfig(trainable=LAST[name], rank=2)
    trained, frozen = config.split(params)
    jax.tree.map(np.testing.assert_array_equal, join(trained, frozen), params)
    again, _ = config.split(params)
    jax.tree.map(np.testing.assert_array_equal, trained, again)  # a public key
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    of_shapes, _ = config.split(shapes)
    assert jax.tree.map(jnp.shape, of_shapes) == jax.tree.map(jnp.shape, trained)


@pytest.mark.sampled("convnext")
@pytest.mark.parametrize(
    ("name", "size", "left_out", "number"),
    [
        ("vit", 224, "patches", 600_074),
        ("convnext", 256, r"stem|stage_\d_\d+/conv", 756_490),
        ("wrn", 32, "WSConv_0", 68_234),
    ],
    ids=["vit", "convnext", "wrn"],
)
def test_all_matrices_have_one_but_those_of_pixels_and_single_channels(
    name, size, left_out, number
):
    """At full size, by shapes; the numbers are those of docs/fine_tuning.md."""
    module, blank = models.create(name, 10), jnp.zeros((1, size, size, 3))
    shapes = jax.eval_shape(module.init, jax.random.key(0), blank)
    trained, _ = FinetuneConfig(trainable=LAST[name], rank=4).split(shapes)
    kernels = {
        path: leaf.shape
        for path, leaf in flat(shapes).items()
        if path.endswith("/kernel") and LAST[name] not in path.split("/")
    }
    found = matrices(trained)
    assert found == {
        path: ((np.prod(shape[:-1]), 4), (4, shape[-1]))
        for path, shape in kernels.items()
        if not re.search(rf"/({left_out})/kernel", path)
    }
    assert len(found) < len(kernels)
    assert sum(leaf.size for leaf in jax.tree.leaves(trained)) == number
    assert f"{number:,}" in (ROOT / "docs/fine_tuning.md").read_text()


def test_adapters_start_gaussian_and_zero():
    _, params, _ = small("vit")
    trained, _ = FinetuneConfig(trainable="head", rank=4).split(params)
    found = flat(trained)
    drawn = [leaf * len(leaf) ** 0.5 for k, leaf in found.items() if k[-2:] == "_a"]
    assert np.std(np.concatenate(drawn)) == pytest.approx(1.0, abs=0.1)
    assert len({leaf.ravel()[0].item() for leaf in drawn}) == len(drawn)
    assert not any(np.any(leaf) for k, leaf in found.items() if k[-2:] == "_b")


def sums_of(name, rank=2):
    """A clipped sum over three records, the model's loss, and where it is taken."""
    module, params, size = small(name)
    trained, frozen = FinetuneConfig(trainable=LAST[name], rank=rank).split(params)
    trained = moved(trained)

    def loss_fn(params, pictures, labels, frozen):
        logits = module.apply(join(params, frozen), pictures)
        return optax.softmax_cross_entropy(logits, labels).mean()

    gradient_fn = clipped_gradient(loss_fn, l2_clip_norm=0.5)
    pictures = jax.random.normal(jax.random.key(1), (3, 2, size, size, 3))
    labels = jax.nn.one_hot(jnp.arange(6).reshape(3, 2) % 3, 3)

    @jax.jit
    def clipped_sum(pictures, is_padding):
        return gradient_fn(
            trained,
            pictures,
            labels,
            constants=(frozen,),
            is_padding_example=is_padding,
        )[0]

    return clipped_sum, module, (trained, frozen), (pictures, labels)


@pytest.mark.sampled
@pytest.mark.parametrize(
    "name", ["vit", *(pytest.param(x, marks=pytest.mark.slow) for x in list(SMALL)[1:])]
)
def test_the_gradient_is_that_of_the_loop_and_of_the_chain_rule(name):
    """Of whole weights by a plain gradient, from which those of A and B follow."""
    clipped_sum, module, parts, records = sums_of(name)

    @jax.jit
    def of_whole(params, pictures, labels):
        def loss(params):
            logits = module.apply(params, pictures)
            return optax.softmax_cross_entropy(logits, labels).mean()

        return jax.grad(loss)(params)

    trained, expected = flat(parts[0]), 0.0
    for record in zip(*records, strict=True):
        whole, term = flat(of_whole(join(*parts), *record)), {}
        for path in trained:
            matrix, _, kind = path.rpartition("/lora_")
            if not matrix:
                term[path] = whole[path]
                continue
            a, b = (trained[f"{matrix}/lora_{x}"] for x in "ab")
            change = np.asarray(whole[matrix], np.float64).reshape(len(a), -1)
            term[path] = change @ b.T if kind == "a" else a.T @ change
        vector = toy.flat(traverse_util.unflatten_dict(term, sep="/"))
        expected = expected + vector * min(1.0, 0.5 / np.linalg.norm(vector))
    found = clipped_sum(records[0], jnp.zeros(3, bool))
    np.testing.assert_allclose(toy.flat(found), expected, atol=2e-5)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(found))


@pytest.mark.sampled
def test_the_term_of_a_record_is_its_own():
    """Bit for bit, whatever the others hold; and no record moves the sum by more."""
    clipped_sum, _, _, (pictures, _) = sums_of("vit")
    alone = jnp.array([True, False, True])
    base = clipped_sum(pictures, alone)
    for value in (0.0, np.nan, 1e30):
        other = pictures.at[jnp.array([0, 2])].set(value)
        jax.tree.map(np.testing.assert_array_equal, clipped_sum(other, alone), base)
        changed = clipped_sum(pictures.at[0].set(value), jnp.zeros(3, bool))
        without = clipped_sum(pictures, jnp.array([True, False, False]))
        apart = np.linalg.norm(toy.flat(changed) - toy.flat(without))
        assert apart <= 0.5 * (1 + 1e-5)


@pytest.mark.sampled
def test_what_is_released_is_the_whole_model():
    """W + A B by NumPy, under the names of the model; without adapters what it was."""
    _, params, _ = small("wrn")
    config = FinetuneConfig(trainable="Dense_0", rank=3)
    trained, frozen = config.split(params)
    trained = moved(trained)
    found, start, new = (flat(x) for x in (released(trained, frozen), params, trained))
    assert found.keys() == start.keys()
    adapted = matrices(trained)
    assert len(adapted) > 5
    for path, leaf in found.items():
        expected = new.get(path, start[path])
        if path in adapted:
            a, b = (np.float64(new[f"{path}/lora_{x}"]) for x in "ab")
            expected = expected + (a @ b).reshape(leaf.shape)
        np.testing.assert_allclose(leaf, expected, atol=1e-5)
    alone, frozen = FinetuneConfig(trainable="Dense_0").split(params)
    assert flat(released(alone, frozen)).keys() == flat(alone).keys()


RUN = {
    "finetune__trainable": "Dense_0",
    "finetune__rank": 2,
    "optimizer__ema_decay": 0.5,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("adapters") / "run"
    done = runs.run(workdir, **RUN)
    assert done.status == 0, done.err
    assert "warning: what is frozen is random: finetune.encoder" in done.err
    return workdir


@pytest.mark.slow
def test_the_file_of_a_run_is_one_of_the_plain_model(finished):
    """It is loaded by `load`, and by another run of any kind to start from."""
    config = runs.config(**RUN)
    test = data.load(config.data).test
    model = build.classifier(config, test)
    path = finished / "model.safetensors"
    params = pretrained.load_weights(path, model.shapes)  # every key, and no other
    logits = model.logits(params, test.normalize(jnp.asarray(test.images)))
    found = dpm.load(finished)(test.images)
    np.testing.assert_allclose(found, jax.nn.softmax(logits), atol=1e-6)
    accuracy = (found.argmax(axis=1) == test.labels).mean()
    results = runs.outcome(finished)["results"]
    assert accuracy == pytest.approx(results["test_accuracy_ema"], abs=1e-6)
    start = model.init(dpm.stream_key(0, "init"))["params"]
    changed = {
        name: bool(np.any(params["params"][name]["kernel"] != start[name]["kernel"]))
        for name in ("Conv_0", "Conv_1")
    }
    assert changed == {"Conv_0": False, "Conv_1": True}
    FinetuneConfig(weights=str(path), trainable="Dense_0").load(model.shapes)
    said = FinetuneConfig(weights="w", trainable="head", rank=2).describe(
        {"weights": "0" * 64}
    )
    assert "head were trained, and changes of rank 2 of all frozen matrices." in said


@pytest.mark.slow
def test_killed_it_goes_on_to_the_same_bits(finished, tmp_path):
    workdir = tmp_path / "run"
    assert runs.kill_when("update  4/12", workdir, **RUN) == -signal.SIGKILL
    done = runs.run(workdir, **RUN)
    assert done.status == 0, done.err
    assert "going on after update" in done.err
    assert runs.outcome(workdir) == runs.outcome(finished)
    assert len(safetensors.numpy.load_file(workdir / "model.safetensors")) > 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"rank": 9},
            "finetune.rank is 9: it must be at most the smallest side of a"
            " frozen matrix, 8",
        ),
        (
            {"trainable": "all"},
            "finetune.rank is 2: it must be None where no matrix is"
            " frozen, see finetune.trainable",
        ),
        (
            {"embeddings": "kept"},
            "finetune.embeddings is 'kept': it must be 'fresh'"
            " where more is trained than a head on a frozen encoder, see"
            " finetune.trainable and finetune.rank",
        ),
        (
            {"whitening": 0.1},
            "finetune.whitening is 0.1: it must be None where more is"
            " trained than a head on a frozen encoder, see finetune.trainable and"
            " finetune.rank",
        ),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    _, params, _ = small("vit")
    values = {"trainable": "head", "rank": 2} | options
    with pytest.raises(UserError) as error:
        FinetuneConfig(**values).split(params)
    assert str(error.value) == message
    for rank in (0, -1):
        with pytest.raises(UserError, match=f"rank is {rank}: it must be at least 1"):
            FinetuneConfig(rank=rank)
