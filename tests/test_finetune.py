"""Weights to start from, frozen parts, and private heads on frozen encoders."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from PIL import Image

import dpmix_jax as dpm
from dpmix_jax import (
    Mechanism,
    UserError,
    clipped_gradient,
    data,
    ghost_clipped_gradient,
    models,
    sampling,
    training,
)
from dpmix_jax.data import images
from dpmix_jax.models import finetune
from dpmix_jax.models.finetune import FinetuneConfig, join, on_embeddings
from dpmix_jax.run import build, experiment, start
from dpmix_jax.run.cli import load_experiment
from dpmix_jax.run.workdir import Workdir
from tests import files, towers, toy
from tests.conftest import ROOT

CONVNEXT = models.create("convnext", 3, **towers.OPTIONS["convnext"])
SHAPES = jax.eval_shape(CONVNEXT.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


def paths(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_names_divide_the_parameters():
    trained, frozen = FinetuneConfig(trainable="head").split(SHAPES)
    assert paths(trained) == {"params/head/kernel", "params/head/bias"}
    assert paths(trained) | paths(frozen) == paths(SHAPES)
    assert paths(trained).isdisjoint(paths(frozen))
    assert join(trained, frozen) == SHAPES
    more, _ = FinetuneConfig(trainable="head, proj").split(SHAPES)
    assert paths(trained) < paths(more)
    assert all(re.search("head|proj", path) for path in paths(more))
    assert FinetuneConfig().split(SHAPES) == (SHAPES, {})
    message = "finetune.trainable has 'hed': it must be the name of a module of the"
    with pytest.raises(UserError, match=message):
        FinetuneConfig(trainable="hed").split(SHAPES)
    with pytest.raises(UserError, match=r"finetune.trainable is ' ': it must be 'all'"):
        FinetuneConfig(trainable=" ")
    with pytest.raises(UserError, match=r"finetune.weights is None: it must be"):
        FinetuneConfig(skip="head")


def small_params():
    """Of a model with modules to be named."""
    shallow, rng = toy.init_params(), np.random.default_rng(1)
    proj = jnp.asarray(rng.normal(size=(4, 4)), jnp.float32)
    encoder = {"conv": {"kernel": shallow["kernel"]}, "proj": {"kernel": proj}}
    return {"params": {"encoder": encoder, "head": {"kernel": shallow["dense"]}}}


def small_loss(params, images, labels, frozen):
    inner = join(params, frozen)["params"]
    kernels = [inner["encoder"][name]["kernel"] for name in ("conv", "proj")]
    dense = kernels[1] @ inner["head"]["kernel"]
    return toy.loss_fn({"kernel": kernels[0], "dense": dense}, images, labels)


small_gradient = jax.jit(jax.grad(small_loss))


@pytest.mark.sampled("head-clipped_gradient", "head,proj-ghost_clipped_gradient")
@pytest.mark.parametrize("transform", [clipped_gradient, ghost_clipped_gradient])
@pytest.mark.parametrize("trainable", ["head", "head,proj"])
def test_the_gradient_is_that_of_the_loop_and_of_named_modules_only(
    trainable, transform
):
    """A loop over records takes all gradients, and keeps the trained ones to clip."""
    config, params = FinetuneConfig(trainable=trainable), small_params()
    images = jax.random.normal(jax.random.key(1), (3, 2, 6, 6, 1))
    labels = jax.nn.one_hot(jnp.arange(6).reshape(3, 2) % 3, 3)
    trained, frozen = config.split(params)
    expected, norms = 0.0, []
    for record in zip(images, labels, strict=True):
        gradient = toy.flat(config.split(small_gradient(params, *record, {}))[0])
        norms.append(np.linalg.norm(gradient))
        expected = expected + gradient * min(1.0, 0.1 / norms[-1])
    gradient_fn = jax.jit(transform(small_loss, l2_clip_norm=0.1))
    total, aux = gradient_fn(trained, images, labels, constants=(frozen,))
    assert paths(total) == paths(trained)
    np.testing.assert_allclose(toy.flat(total), expected, atol=1e-5)
    np.testing.assert_allclose(aux.grad_norms, norms, rtol=1e-4)


def small_model(name):
    """A model of three classes and parameters that are not zero, for 16x16 or 32x32."""
    options = {**towers.OPTIONS, "wrn": {"depth": 10, "width": 1, "groups": 2}}[name]
    module = models.create(name, 3, **options)
    size = 32 if name == "convnext" else 16
    return module, {"params": towers.draw_params(module, (size, size))}, size


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("vit", "head"),
        pytest.param("convnext", "head", marks=pytest.mark.slow),
        pytest.param("wrn", "Dense_0", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("leaves", [("bias",), ("scale", "bias")])
def test_biases_and_scales_alone_are_trained(name, last, leaves):
    """The last layer and the named parameters of every layer: equal to the loop."""
    module, params, size = small_model(name)
    config = FinetuneConfig(trainable=",".join((last, *leaves)))
    trained, frozen = config.split(params)
    expected = {
        path
        for path in paths(params)
        if path.split("/")[1] == last or path.split("/")[-1] in leaves
    }
    assert paths(trained) == expected
    assert {path.split("/")[-1] for path in expected} == {"kernel", *leaves}
    assert paths(frozen) == paths(params) - expected

    def loss_fn(params, pictures, labels, frozen):
        logits = module.apply(join(params, frozen), pictures)
        return optax.softmax_cross_entropy(logits, labels).mean()

    pictures = jax.random.normal(jax.random.key(1), (3, 2, size, size, 3))
    labels = jax.nn.one_hot(jnp.arange(6).reshape(3, 2) % 3, 3)
    gradient_fn = jax.jit(clipped_gradient(loss_fn, l2_clip_norm=0.5))
    total, _ = gradient_fn(trained, pictures, labels, constants=(frozen,))
    of_all = jax.jit(jax.grad(lambda params, *record: loss_fn(params, *record, {})))
    terms = []
    for record in zip(pictures, labels, strict=True):
        of_trained, _ = config.split(of_all(params, *record))
        terms.append(toy.flat(of_trained))
        terms[-1] = terms[-1] * min(1.0, 0.5 / np.linalg.norm(terms[-1]))
    np.testing.assert_allclose(toy.flat(total), sum(terms), atol=1e-5)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(total))


@pytest.mark.sampled("wrn-32-Dense_0-numbers2")
@pytest.mark.parametrize(
    ("name", "size", "last", "numbers"),
    [
        ("vit", 224, "head", (5_130, 108_042, 128_010, 86_197_770)),
        ("convnext", 256, "head", (6_410, 136_714, 156_810, 88_228_234)),
        ("wrn", 32, "Dense_0", (2_570, 6_842, 8_858, 2_753_818)),
    ],
)
def test_how_many_are_trained(name, size, last, numbers):
    """The table of docs/fine_tuning.md: of ten classes, at full size, by shapes."""
    module, blank = models.create(name, 10), jnp.zeros((1, size, size, 3))
    shapes = jax.eval_shape(module.init, jax.random.key(0), blank)
    said = (ROOT / "docs/fine_tuning.md").read_text()
    for names, number in zip(("", ",bias", ",scale,bias"), numbers, strict=False):
        trained, _ = FinetuneConfig(trainable=last + names).split(shapes)
        assert sum(leaf.size for leaf in jax.tree.leaves(trained)) == number
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == numbers[-1]
    assert " | ".join(f"{number:,}" for number in numbers) in said


@pytest.mark.parametrize("files", [{}, {"weights": "f", "skip": "head"}])
def test_a_head_that_is_zero_must_be_trained(files):
    for trainable in ("bias", "encoder", "proj,scale"):
        with pytest.raises(UserError) as error:
            FinetuneConfig(trainable=trainable, **files).split(SHAPES)
        assert str(error.value) == (
            f"finetune.trainable is {trainable!r}: it must be 'all' or a list with"
            " 'head', which is zero where no file brings it"
        )
    from_file, _ = FinetuneConfig(trainable="bias", weights="f").split(SHAPES)
    assert {path.split("/")[-1] for path in paths(from_file)} == {"bias"}


def loss_fn(params, pictures, labels, frozen):
    logits = CONVNEXT.apply(join(params, frozen), pictures)
    return optax.softmax_cross_entropy(logits, labels).mean()


@pytest.mark.sampled
def test_frozen_parts_go_forward_only():
    """Products beyond the forward pass are two for the head, and none is of images."""
    trained, frozen = FinetuneConfig(trainable="head").split(SHAPES)
    gradient_fn = clipped_gradient(loss_fn, l2_clip_norm=0.1)

    def products(function, *args):
        text = str(jax.make_jaxpr(function)(*args))
        return len(re.findall(r"= (?:dot_general|conv_general_dilated)\[", text))

    def step(params, frozen):
        return gradient_fn(params, pictures, labels, constants=(frozen,))

    pictures, labels = jnp.zeros((3, 2, 32, 32, 3)), jnp.zeros((3, 2, 3))
    forward = products(CONVNEXT.apply, SHAPES, pictures[0])
    assert forward <= products(step, trained, frozen) <= forward + 2
    assert products(step, SHAPES, {}) > 2 * forward  # the count does see gradients


def test_resizing_on_the_device_is_that_of_the_cache():
    """Pillow's pixels within 1 of 255, then the constants."""
    small = data.load(data.DataConfig(resize=20)).train
    assert small.image_shape == (20, 20, 1)
    found = small.normalize(jnp.asarray(small.images[:5]))
    for image, pixels in zip(small.images, np.asarray(found), strict=False):
        large = Image.fromarray(image[..., 0]).resize(
            (20, 20), Image.Resampling.BICUBIC
        )
        expected = (np.asarray(large) / 255 - 0.5) / 0.5
        np.testing.assert_allclose(pixels[..., 0], expected, atol=2.01 / 255)
    rgb = data.load(data.DataConfig(image_size=16, normalization="clip")).train
    assert (rgb.mean, rgb.stddev) == (images.CLIP_MEAN, images.CLIP_STDDEV)
    for options, message in (
        ({"resize": -1}, "data.resize is -1: it must be in [0, 2048]"),
        (
            {"normalization": "x"},
            "data.normalization is 'x': it must be dataset or clip",
        ),
    ):
        with pytest.raises(UserError) as error:
            data.DataConfig(**options)
        assert str(error.value) == message
    with pytest.raises(UserError, match=r"images of 1 channel.s. must be RGB"):
        data.load(data.DataConfig(normalization="clip"))


SHORT = {
    "seed": 0,
    "method.k_base": 1,
    "method.k_self": 1,
    "method.k_diff": 0,
    "method.distinct_pairs": False,
    "augmentation.max_shift": 1,
    "augmentation.flip": False,
    "performance.microbatch_size": 32,
    "optimizer.ema_decay": 0.5,
}
VIT_FLAGS = {
    "data.name": "digits",
    "data.image_size": 16,
    "data.resize": 0,
    "model.patch_size": 8,
    "model.width": 8,
    "model.depth": 1,
    "model.heads": 2,
    "model.embedding_size": 8,
}
CONVNEXT_FLAGS = SHORT | {
    "data.name": "digits",
    "data.image_size": 32,
    "data.resize": 0,
    "model.patch_size": 4,
    "model.depths": towers.OPTIONS["convnext"]["depths"],
    "model.features": towers.OPTIONS["convnext"]["features"],
    "model.embedding_size": 8,
    "privacy.expected_batch_size": 100,
    "privacy.num_updates": 40,
    "privacy.epsilon": 50.0,
    "optimizer.learning_rate": 2.0,
    "logging.eval_every": 40,
}


def load(config, flags):
    return load_experiment(
        [f"--config={config}", *(f"--config.{k}={v}" for k, v in flags.items())]
    )


@pytest.fixture
def encoder(tmp_path):
    path = tmp_path / "tower.safetensors"
    safetensors.numpy.save_file(towers.weights("convnext"), path)
    return path


@pytest.mark.slow
def test_a_head_on_a_frozen_convnext_learns_digits(tmp_path, encoder):
    """From a file of open_clip, end to end; the statement names it."""
    flags = CONVNEXT_FLAGS | {"finetune.encoder": encoder}
    config = load("configs/convnext_base.py", flags)
    workdir = Workdir(tmp_path / "run")
    assert experiment.run(config, workdir) == 0
    assert workdir.results()["test_accuracy_ema"] > 0.2  # by 8 random features
    weights = safetensors.numpy.load_file(workdir.path / "model.safetensors")
    assert weights["params/params/head/kernel"].shape == (8, 10)
    assert not any("encoder" in name for name in weights)
    said = " ".join((workdir.path / "PRIVACY.md").read_text().split())
    assert "began from the weights in tower.safetensors (sha256" in said
    assert "of which head were trained" in said
    # Other weights must not meet the same noise.
    train, before = data.load(config.data).train, config.finetune.checksums()
    state = {k: v * 2 for k, v in safetensors.numpy.load_file(encoder).items()}
    safetensors.numpy.save_file(state, encoder)
    digests = [
        start.data_digest(train, None, sums)
        for sums in (before, config.finetune.checksums())
    ]
    assert digests[0] != digests[1]


@pytest.mark.slow
def test_a_run_of_biases_leaves_every_other_bit(tmp_path):
    """The released file has what was trained, and loads onto what anybody can draw."""
    flags = SHORT | VIT_FLAGS | {"finetune.trainable": "head,bias"}
    flags |= {"privacy.num_updates": 2, "privacy.expected_batch_size": 20}
    config = load("configs/vit_b16.py", flags)
    assert experiment.run(config, Workdir(tmp_path / "run")) == 0
    records = digits(config.data)
    model = build.classifier(config, records)
    public = dict(named(model.init(sampling.stream_key(0, "init"))))
    stored = safetensors.numpy.load_file(tmp_path / "run" / "model.safetensors")
    for part in ("params/", "ema_params/"):
        found = {
            k.removeprefix(part): v for k, v in stored.items() if k.startswith(part)
        }
        assert {k for k in public if "/head/" in k or k.endswith("/bias")} == set(found)
        assert all(np.any(found[key] != public[key]) for key in found)
    whole = jax.tree.unflatten(
        jax.tree.structure(model.shapes), (public | found).values()
    )
    pictures = records.images[:8]
    logits = model.logits(whole, records.normalize(jnp.asarray(pictures)))
    np.testing.assert_allclose(
        dpm.load(tmp_path / "run")(pictures), jax.nn.softmax(logits), atol=1e-6
    )


MECHANISM = Mechanism(sampling_prob=0.1, num_updates=3, noise_multiplier=3.0)


@functools.cache
def digits(config):
    return data.load(config).train


def built(config, seed):
    records = digits(config.data)
    model = build.classifier(config, records)
    given = config.finetune.load(model.shapes)
    parts = build.build(config, model, given, records, mechanism=MECHANISM, seed=seed)
    return parts, model


def test_frozen_weights_without_a_file_are_known_to_all():
    """Not the secret seed's: it is forgotten, and the released head needs them."""
    flags = {"model.features": "4,8", "model.groups": 2, "privacy.num_updates": 3}
    config = load("configs/digits.py", flags | {"finetune.trainable": "Dense_0"})
    (first, model), (second, _) = (built(config, seed) for seed in (1, 2))
    np.testing.assert_array_equal(toy.flat(first.frozen), toy.flat(second.frozen))
    trained = [toy.flat(parts.state.params) for parts in (first, second)]
    assert (trained[0] != trained[1]).any()
    assert paths(first.all_params(first.state.params)) == paths(model.shapes)


def tiny(name, size, **changes):
    """A head on a random, frozen encoder, on digits enlarged to `size` pixels."""
    options = {
        "vit": {k: v for k, v in VIT_FLAGS.items() if k[:6] == "model."},
        "convnext": {k: v for k, v in CONVNEXT_FLAGS.items() if k[:6] == "model."},
    }[name]
    config = {"vit": "vit_b16", "convnext": "convnext_base"}[name]
    flags = SHORT | options | {"data.name": "digits", "data.image_size": size}
    flags |= {"data.resize": 0, "method.k_base": 3, "method.k_self": 0} | changes
    return built(load(f"configs/{config}.py", flags), seed=3)


def accumulated(parts, indices):
    """The sum over a microbatch, of a head that is not zero."""
    params = jax.tree.map(lambda p: p + 0.3, parts.state.params)
    return parts.accumulate(
        training.init_sums(params, parts.mesh),
        params,
        jnp.int32(2),
        parts.put(np.array(indices)),
        parts.inputs,
    )


GROUPS = {
    "method.name": "microbatch_mixup",
    "method.group_size": 2,
}


@pytest.mark.sampled
@pytest.mark.proves("models.finetune.on_embeddings", 1)
@pytest.mark.parametrize(
    ("name", "size", "flags", "indices"),
    [
        # Three images a record: the last chunk of 15 is smaller than the others.
        ("vit", 16, {}, [5, 9, 700, -1, -1]),
        pytest.param(
            *("vit", 16, GROUPS, [[5, 9, -1], [700, -1, -1]]), marks=pytest.mark.slow
        ),
        pytest.param(
            *("vit", 16, {"performance.clipping": "ghost"}, [5, 9, 700, -1]),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("vit", 16, {"performance.precision": "bfloat16"}, [5, 9, 700, -1]),
            marks=pytest.mark.slow,
        ),
        pytest.param("convnext", 32, {}, [5, 9, -1], marks=pytest.mark.slow),
    ],
)
def test_a_head_on_embeddings_is_a_head_on_images(
    monkeypatch, name, size, flags, indices
):
    """Embeddings of all sets at once give the gradient of the whole loss."""
    sums = accumulated(tiny(name, size, **flags)[0], indices)
    assert paths(sums.gradients) == {"params/head/kernel", "params/head/bias"}
    assert sums.nonprivate["records"] == float(np.sum(np.array(indices) >= 0))
    monkeypatch.setattr(finetune, "is_head", lambda *args: False)
    expected = accumulated(tiny(name, size, **flags)[0], indices)
    scale = np.abs(toy.flat(expected.gradients)).max()
    tolerance = 1e-5 if "performance.precision" not in flags else 2e-2
    np.testing.assert_allclose(
        toy.flat(sums.gradients), toy.flat(expected.gradients), atol=tolerance * scale
    )
    for key, value in expected.nonprivate.items():
        np.testing.assert_allclose(sums.nonprivate[key], value, rtol=tolerance)


@pytest.mark.proves("models.finetune.on_embeddings", 1)
def test_the_term_of_a_record_is_of_its_own_embeddings():
    """Bit for bit: each record has a class, and so a row of the sum, for itself."""
    num, changed = 4, 2

    def head_loss(params, embeddings, labels):
        scores = (embeddings[:, None] * params[None]).sum(axis=2)
        return (labels * jnp.tanh(scores)).sum(axis=1).mean()

    gradient_fn = clipped_gradient(head_loss, l2_clip_norm=0.1)
    whole = on_embeddings(gradient_fn, lambda w, images: images.mean((1, 2)) * w[None])
    assert whole.sensitivity() == gradient_fn.sensitivity()
    rng = np.random.default_rng(0)
    images = rng.normal(size=(num, 3, 4, 4, 2)).astype(np.float32)
    labels = np.broadcast_to(np.eye(num, dtype=np.float32)[:, None], (num, 3, num))
    params, frozen = jnp.ones((num, 2)), jnp.array([1.0, 2.0])

    @jax.jit
    def rows(images):
        return whole(params, images, labels, constants=(frozen,))[0]

    base, others = rows(images), np.arange(num) != changed
    expected = gradient_fn(params, images.mean((2, 3)) * frozen[None, None], labels)[0]
    np.testing.assert_allclose(base, expected, atol=1e-7)
    assert np.asarray(base).any(axis=1).all()
    for value in (0.0, np.nan, 1e30):
        images[changed] = value
        np.testing.assert_array_equal(rows(images)[others], base[others])


def test_two_files_of_one_name_are_two_files(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model.safetensors").write_text(folder)
    config = FinetuneConfig(
        weights=str(tmp_path / "a/model.safetensors"),
        encoder=str(tmp_path / "b/model.safetensors"),
    )
    sums = config.checksums()
    assert len(set(sums.values())) == 2
    for checksum in sums.values():
        assert f"model.safetensors (sha256 {checksum[:16]})" in config.describe(sums)


def random_vit(path, size, options):
    """Writes weights as a run does, strong enough that images differ in them."""
    module = models.create("vit", 37, **options)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *size, 3)))
    rng = np.random.default_rng(0)

    def draw(keys, leaf):
        scale = np.prod(leaf.shape[:-1]) ** -0.5 if len(leaf.shape) > 1 else 0.1
        drawn = rng.normal(size=leaf.shape) * scale
        return (drawn + ("scale" in str(keys[-1]))).astype(np.float32)

    drawn = jax.tree_util.tree_map_with_path(draw, shapes)
    safetensors.numpy.save_file({f"ema_params/{k}": v for k, v in named(drawn)}, path)


def named(tree):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


@pytest.mark.slow
def test_the_end_of_a_vit_on_pets(tmp_path, monkeypatch):
    """Weights of another run, but for its head; the last block is trained as well."""
    monkeypatch.setenv("DPMIX_JAX_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "oxford-iiit-pet"
    for members in files.pet_members(count=12):
        files.put(root, members)
    options = {
        "patch_size": 8,
        "width": 16,
        "depth": 2,
        "heads": 2,
        "embedding_size": 8,
    }
    random_vit(tmp_path / "model.safetensors", (16, 16), options)
    flags = SHORT | {
        "data.path": root,
        "data.image_size": 16,
        "finetune.weights": tmp_path / "model.safetensors",
        "finetune.skip": "head",
        "finetune.trainable": "head,ln_post,block_1",
        "privacy.expected_batch_size": 10,
        "privacy.num_updates": 3,
        **{f"model.{key}": value for key, value in options.items()},
    }
    config = load("configs/vit_b16.py:oxford_iiit_pet-1", flags)
    workdir = Workdir(tmp_path / "run")
    assert experiment.run(config, workdir) == 0
    weights = safetensors.numpy.load_file(workdir.path / "model.safetensors")
    modules = {name.split("/")[3] for name in weights if "/encoder/" in name}
    assert modules == {"ln_post", "block_1"}
    assert any("/head/" in name for name in weights)
    facts = json.loads((workdir.path / "privacy.json").read_text())
    assert "model.safetensors (sha256" in facts["public_data"]


@pytest.mark.sampled("flags0-weights are no.pt: it must be a file, for")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"finetune.encoder": "no.pt"}, "weights are no.pt: it must be a file, for"),
        ({"finetune.encoder": "README.md"}, "weights are README.md: it must be"),
        ({"finetune.weights": "no.st"}, "weights are no.st: it must be a file, the"),
        ({"finetune.trainable": "tail"}, "finetune.trainable has 'tail': it must be"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(tmp_path, flags, message):
    config = load("configs/convnext_base.py", CONVNEXT_FLAGS | flags)
    with pytest.raises(UserError, match=re.escape(message)):
        experiment.run(config, Workdir(tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    flags = {"finetune.encoder": "README.md"}
    config = load("configs/digits.py", flags)
    with pytest.raises(UserError, match="a model without an encoder, such as wrn"):
        config.finetune.load(build.classifier(config, digits(config.data)).shapes)
