"""Loading weights: names of open_clip and of De et al., and files that are bad."""

import functools
import importlib.util
import json
import math
import pickle
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util
from PIL import Image

from dpmix_jax import UserError, models
from dpmix_jax.data import images
from dpmix_jax.data.images import resize_bicubic
from dpmix_jax.models import pretrained
from dpmix_jax.models.pretrained import checksum, load_encoder, load_weights
from dpmix_jax.run.checkpoint import export_weights
from tests import towers
from tests.conftest import ROOT


@pytest.fixture
def weights():
    """A state dict of the tiny ViT as open_clip names it."""
    return towers.weights("vit")


@pytest.fixture(scope="module")
def like():
    module = models.create("vit", None, **towers.OPTIONS["vit"])
    return towers.encoder_shapes(module, (12, 8))


def save(path, weights):
    safetensors.numpy.save_file(weights, path)
    return path


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def refused(path, like, *parts, load=load_encoder, **options):
    """Checks that a file is refused in one line that has all of some parts."""
    with pytest.raises(UserError) as error:
        load(path, like, **options)
    message = str(error.value)
    assert message.startswith(f"weights are {path}: ")
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


# Image towers of open_clip.


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("tower", "size", "count"),
    [("vit", 224, 86_192_640), ("convnext", 256, 88_221_824)],
)
def test_keys_and_shapes_at_full_size(monkeypatch, tower, size, count):
    """Each parameter has its key, each key its parameter; numbers are open_clip's."""
    shapes = towers.full_shapes(tower)
    assert sum(map(math.prod, shapes.values())) == count
    file = {key: np.broadcast_to(np.float32(0), size) for key, size in shapes.items()}
    monkeypatch.setattr(pretrained, "_read", lambda *_: file)
    monkeypatch.setattr(pretrained, "_float32", lambda path, key, array: array)
    like = towers.encoder_shapes(models.create(tower, None), (size, size))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(like)) == count
    found = load_encoder("x", like)
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), found, like)


def test_what_surrounds_a_tower_is_ignored(tmp_path, weights, like):
    """The text tower, the prefix of a wrapper, or no prefix of the tower."""
    expected = load_encoder(save(tmp_path / "a", weights), like)
    text = np.zeros((2, 2), np.int64)
    more = weights | {"positional_embedding": text, "token_embedding.weight": text}
    assert_same(load_encoder(save(tmp_path / "b", more), like), expected)
    wrapped = {f"module.{key}": value for key, value in more.items()}
    assert_same(load_encoder(save(tmp_path / "c", wrapped), like), expected)
    bare = {key.removeprefix("visual."): value for key, value in weights.items()}
    assert_same(load_encoder(save(tmp_path / "d", bare), like), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_precisions_become_float32(tmp_path, weights, like, dtype):
    cast = {key: value.astype(jnp.dtype(dtype)) for key, value in weights.items()}
    found = load_encoder(save(tmp_path / "a", cast), like)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype("float32")}
    expected = cast["visual.proj"].astype(np.float32)
    np.testing.assert_array_equal(found["proj"]["kernel"], expected)


def test_keys_shapes_and_values_must_be_those_of_the_model(tmp_path, weights, like):
    path, proj = tmp_path / "a.safetensors", weights["visual.proj"]
    missing = {k: v for k, v in weights.items() if "ln_post" not in k}
    message = refused(save(path, missing), like, "is missing (and 1 more)")
    assert "must be the image tower of this model as open_clip names it;" in message
    more = {"visual.extra\n": proj}
    refused(save(path, weights | more), like, r"; 'visual.extra\n' is unexpected")
    refused(save(path, missing | more), like, "1 more), 'visual.extra")
    wide, infinite = np.ones((16, 9), np.float32), proj * np.float32(np.inf)
    for key, value, expected in (
        ("visual.proj", wide, "; 'visual.proj' is (16, 9), not (16, 8)"),
        ("visual.positional_embedding", wide, "(7, 16), for images of another size"),
        ("visual.proj", infinite, "'visual.proj' is not finite"),
        ("visual.proj", proj.astype(np.int32), "is int32, it must be float"),
    ):
        refused(save(path, weights | {key: value}), like, expected)
    for other in ({}, {"x": proj}, towers.weights("convnext")):
        refused(save(path, other), like, "must be the image tower", "' is missing (and")
    message = "finetune.encoder is .*: it must be None for a model whose encoder is not"
    with pytest.raises(UserError, match=message):
        load_encoder(path, {"head": {"bias": np.zeros(3)}})


def test_a_home_folder_is_found(tmp_path, monkeypatch, weights, like):
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "a", weights)
    assert_same(load_encoder("~/a", like), load_encoder(tmp_path / "a", like))
    assert checksum("~/a") == checksum(tmp_path / "a")


def test_files_that_are_none(tmp_path, weights, like):
    """Missing, of neither format, cut off, or PyTorch's without PyTorch."""
    path = tmp_path / "a.safetensors"
    hint = "hf download laion/CLIP-ViT-B-16-laion2B-s34B-b88K open_clip_model"
    refused(path, like, "it must be a file", hint)
    refused(tmp_path, like, "it must be a file")
    whole = save(path, weights).read_bytes()
    for content in (b"", b"<html>none</html>", whole[:20], whole[:-1]):
        path.write_bytes(content)
        refused(path, like, "it must be a safetensors file or", "not damaged (")
    path.write_bytes(pickle.dumps({"params": {}}))
    refused(path, like, "must not be a pickle", "lines that convert De et al.'s")


def test_a_file_of_pytorch_without_pytorch(tmp_path, monkeypatch, like):
    monkeypatch.setitem(sys.modules, "torch", None)  # an import raises ImportError
    path = tmp_path / "a.pt"
    path.write_bytes(b"PK\x03\x04")
    refused(path, like, "install torch, or convert the file", "a.safetensors'")


# Weights of a run.


def test_weights_of_a_run(tmp_path):
    """Averaged ones; a head of other classes stays as it is if that is asked for."""
    options = {"depth": 10, "width": 1}
    params = {"params": towers.draw_params(models.create("wrn", 5, **options), (8, 8))}
    ema = jax.tree.map(lambda leaf: leaf + 1.0, params)
    path = tmp_path / "model.safetensors"
    path.write_bytes(export_weights(params, ema))
    assert_same(load_weights(path, params), ema)
    other = models.create("wrn", 3, **options)
    like = {"params": towers.draw_params(other, (8, 8), seed=1)}
    wrong = "Dense_0/bias' is (5,), not (3,) (and 1"
    refused(path, like, wrong, load=load_weights)
    found = load_weights(path, like, skip=("Dense_0",))
    assert_same(found["params"].pop("Dense_0"), like["params"].pop("Dense_0"))
    del ema["params"]["Dense_0"]
    assert_same(found, ema)
    part = {"params": params["params"]["WSConv_0"]}
    refused(path, part, "is missing (and 2", "is unexpected (and", load=load_weights)
    nothing, hint = tmp_path / "nothing", "it must be a file, the model.safetensors"
    refused(nothing, params, hint, load=load_weights)
    with pytest.raises(UserError, match="skip is 'head': it must be the name of a mod"):
        load_weights(path, params, skip=("head",))


# De et al.'s names. Keys and shapes (of 1,000 classes) and logits are those of
# WideResNet in jax_privacy at commit 5a35a95, with dm-haiku 0.0.17 and jax 0.10.2:
# experiments/image_classification/models/cifar.py.
DE_ET_AL = json.loads((ROOT / "tests/fixtures/jax_privacy_wrn28_10.json").read_text())
LOGITS = (
    (-1.84472334, 0.70145869, 2.32618237, -2.4880302, 0.37377828),
    (-1.89856279, 0.07351178, 2.10931015, -1.78740311, -0.44733045),
)


def test_keys_of_de_et_al_at_full_size():
    model = models.create("wrn", 1000, depth=28, width=10)
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    flat = traverse_util.flatten_dict(like, sep="/")
    keys = pretrained._de_et_al_keys(flat)
    assert {keys[path]: list(leaf.shape) for path, leaf in flat.items()} == DE_ET_AL


@pytest.mark.sampled
def test_weights_of_de_et_al(tmp_path):
    small = {16: 16, 160: 16, 320: 32, 640: 64, 1000: 5, 3: 3, 1: 1}
    rng, arrays = np.random.default_rng(0), {}
    for key, shape in sorted(DE_ET_AL.items()):
        if not re.search(r"(Conv|norm)_[1-3]_", key):
            values = 0.3 * rng.standard_normal([small[side] for side in shape])
            ones = key.endswith(("/gain", "/scale"))
            arrays[key] = (values + ones).astype(np.float32)
    pixels = rng.standard_normal((2, 16, 16, 3)).astype(np.float32)
    path = save(tmp_path / "wrn.safetensors", arrays)

    def other(name, classes=5, **options):
        model = models.create(name, classes, **options)
        return model, jax.eval_shape(model.init, jax.random.key(0), pixels)

    like = functools.partial(other, "wrn", depth=10, width=1)
    model, wanted = like(5)
    logits = jax.jit(model.apply)(load_weights(path, wanted), pixels)
    np.testing.assert_allclose(logits, LOGITS, atol=1e-5)
    # For other classes all but the last layer, as De et al. fine-tune.
    found = load_weights(path, like(3)[1], skip=("Dense_0",))["params"]
    assert found["Dense_0"]["kernel"].shape == (64, 3)
    assert isinstance(found["Dense_0"]["kernel"], jax.ShapeDtypeStruct)
    first = arrays["wide_res_net/First_conv/w"]
    np.testing.assert_array_equal(found["WSConv_0"]["kernel"], first)
    for (_, wrong), message in (
        (like(3), "jax_privacy names them; 'wide_res_net/Softmax/b' is (5,), not"),
        (like(5, order=3), "_skip_norm/"),
        (other("cnn"), "'wide_res_net/Conv_0/kernel' is missing (and 3 more)"),
        (like(5, depth=16), "is missing (and 29 more)"),
    ):
        refused(path, wrong, message, load=load_weights)
    del arrays["wide_res_net/Final_norm/offset"]
    save(path, arrays | {"wide_res_net/Extra/w": pixels})
    missing = "'wide_res_net/Final_norm/offset' is missing"
    extra = "'wide_res_net/Extra/w' is unexpected"
    refused(path, wanted, f"; {missing}, {extra}", load=load_weights)


# Preprocessing.


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(32, 32, 224), (8, 8, 13), (64, 41, 17), (37, 90, 50), (5, 7, 5), (61, 60, 60)],
)
def test_resizing_on_the_device_is_that_of_pillow(height, width, size):
    """Larger, smaller and equal, odd and even: within 1 of 255 anywhere."""
    rng = np.random.default_rng(size)
    batch = rng.integers(0, 256, (2, 1, height, width, 3), np.uint8)
    batch[0] = np.where(batch[0] > 128, 255, 0)  # overshoots have to be clipped
    resize = jax.jit(resize_bicubic, static_argnums=1)
    found = np.asarray(resize(batch, size))
    assert found.shape == (2, 1, size, size, 3)
    assert found.dtype == np.uint8
    expected = np.stack([images.fit(Image.fromarray(one[0]), size) for one in batch])
    difference = np.abs(found[:, 0].astype(int) - expected.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.02


def test_only_integers_are_resized():
    with pytest.raises(ValueError, match="images are float32: they must be uint8"):
        resize_bicubic(jnp.zeros((2, 2, 3)), 4)


# With open_clip and PyTorch.


class Touch:
    """An object whose pickle makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return self.path.touch, ()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of the libraries
@pytest.mark.skipif(
    importlib.util.find_spec("open_clip") is None,
    reason='needs open_clip: pip install -e ".[towers]"',
)
class TestWithOpenClip:
    @pytest.mark.parametrize("tower", ["vit", "convnext"])
    def test_towers_at_full_size(self, tower, tmp_path):
        """Random weights; embeddings and a gradient."""
        import torch

        from tests import make_towers

        model, size = make_towers.full(tower)
        expected = make_towers.results(model.visual, (size, size), 0)
        path = tmp_path / "open_clip_pytorch_model.bin"
        torch.save(model.state_dict(), path)
        towers.assert_parity(tower, path, expected)

    def test_files_of_pytorch(self, tmp_path, monkeypatch, weights, like):
        """Views, a training checkpoint, the line that converts, code and damage."""
        import torch

        expected = load_encoder(save(tmp_path / "a", weights), like)
        path, other = tmp_path / "a.pt", tmp_path / "a.safetensors"
        tensors = {f"module.{key}": torch.tensor(v) for key, v in weights.items()}
        tensors["module.visual.proj"] = tensors["module.visual.proj"].t().clone().t()
        tensors["module.logit_scale"] = tensors["module.visual.proj"][0, 0]
        torch.save({"epoch": 3, "state_dict": tensors}, path)
        assert_same(load_encoder(path, like), expected)
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "torch", None)
            line = refused(path, like).split("this line of Python: ")[1]
        exec(line)
        assert_same(load_encoder(other, like), expected)
        whole, touched = path.read_bytes(), tmp_path / "touched"
        torch.save({"a": Touch(touched)}, other)
        for content in (other.read_bytes(), whole[:-30]):
            path.write_bytes(content)
            refused(path, like, "it must be a safetensors file or a state dict of")
        assert not touched.exists()
