"""Loading weights: names of every library, the cache, and files that are bad."""

import importlib.util
import io
import json
import pickle
import re
import sys
import time
import types
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util
from PIL import Image

from dpmix_jax import UserError, checkpoint, models
from dpmix_jax.data import images
from dpmix_jax.data.preprocess import resize_bicubic
from dpmix_jax.models import dialects, pretrained
from dpmix_jax.models.pretrained import load_encoder, load_weights
from dpmix_jax.models.tensor_files import StoredArray, open_arrays
from tests import towers
from tests.conftest import ROOT

SIZE = (12, 8)  # of the images of the tiny ViT


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DPMIX_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/encoders"


@pytest.fixture
def weights():
    """A state dict of the tiny ViT as open_clip names it."""
    found = towers.state(towers.fixture("vit", "open_clip"))
    return {key: np.ascontiguousarray(value) for key, value in found.items()}


@pytest.fixture(scope="module")
def like():
    module = models.create("vit", None, **towers.OPTIONS["vit"])
    return towers.encoder_shapes(module, SIZE)


def save(path, weights):
    safetensors.numpy.save_file(weights, path)
    return path


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def refused(path, like, *parts):
    """Checks that a file is refused in one line that has all of some parts."""
    with pytest.raises(UserError) as error:
        load_encoder(path, like)
    message = str(error.value)
    assert message.startswith(f"weights are {path}: ")
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


# Names.


@pytest.mark.parametrize(("tower", "library"), towers.BOTH)
def test_keys_and_shapes_at_full_size(tower, library):
    """Each parameter has its key, each key of the tower its parameter."""
    projected = library != "timm"  # the classifier, which was left out there
    options = {} if projected else {"embedding_size": None}
    size = {"vit": 224, "convnext": 256}[tower]
    module = models.create(tower, None, **options)
    shapes = {
        key: leaf.shape
        for key, leaf in pretrained._flat(
            towers.encoder_shapes(module, (size, size))
        ).items()
    }
    stored = {
        key: StoredArray(shape, np.dtype("float32"), lambda: None)
        for key, shape in towers.shapes(tower, library).items()
    }
    spoken = {"vit": dialects.VIT, "convnext": dialects.CONVNEXT}[tower]
    dialect, sources = pretrained._recognized("x", shapes, spoken, stored)
    assert dialect.name == library
    expected = {key: shape for parts in sources.values() for key, shape in parts}
    others = [
        key
        for key in stored
        if library == "open_clip" and not key.startswith("visual.")
    ]
    assert bool(others) == (library == "open_clip")  # the text tower
    tower_shapes = towers.shapes(tower, library)
    assert expected == {k: v for k, v in tower_shapes.items() if k not in others}
    assert pretrained._unexpected(dialect, shapes, stored, expected) == []
    for ours, parts in sources.items():
        arrays = [np.broadcast_to(np.float32(0), shape) for _, shape in parts]
        converted = dialect.convert(ours, shapes[ours], arrays)
        assert converted.shape == shapes[ours]


def test_what_surrounds_a_tower_is_ignored(tmp_path, weights, like):
    """The text tower, the prefix of a wrapper, or no prefix of the tower."""
    expected = load_encoder(save(tmp_path / "a", weights), like)
    text = np.zeros((2, 2), np.float32)
    keys = ("positional_embedding", "text_projection", "token_embedding.weight")
    more = {**weights, **{key: text for key in (*keys, "transformer.resblocks.0.x")}}
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


def test_a_classifier_with_a_bias_is_no_projection(tmp_path, like):
    weights = towers.state(towers.fixture("vit", "timm"))
    path = save(tmp_path / "a", {**weights, "head.bias": np.ones(8, np.float32)})
    refused(path, like, "head.bias is unexpected")


# The cache.


def test_a_converted_encoder_is_kept(tmp_path, weights, like, cache_folder, capsys):
    """By content of the file and shapes; what is damaged is made anew."""
    path = save(tmp_path / "a.safetensors", weights)
    expected = load_encoder(path, like)
    (cached,) = cache_folder.glob("*.safetensors")
    time_made = cached.stat().st_mtime_ns
    assert_same(load_encoder(path, like), expected)
    assert cached.stat().st_mtime_ns == time_made
    cached.write_bytes(cached.read_bytes()[:-1])
    assert_same(load_encoder(path, like), expected)
    assert_same(load_encoder(path, like), expected)
    assert cached.stat().st_mtime_ns > time_made
    weights["visual.proj"] = weights["visual.proj"] + 1.0
    changed = load_encoder(save(path, weights), like)
    expected["proj"]["kernel"] = expected["proj"]["kernel"] + 1.0
    assert_same(changed, expected)
    assert len([*cache_folder.glob("*.safetensors")]) == 2
    assert not [*cache_folder.glob(".*.partial")]
    assert capsys.readouterr().err == ""


def test_without_a_place_for_the_cache_it_goes_on(
    tmp_path, weights, like, monkeypatch, capsys
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DPMIX_JAX_CACHE", str(tmp_path / "file"))
    load_encoder(save(tmp_path / "a", weights), like)
    assert "warning: the encoder is not kept in the cache" in capsys.readouterr().err


# Bad files.


def test_keys_and_shapes_must_be_those_of_the_model(tmp_path, weights, like):
    path = tmp_path / "a.safetensors"
    missing = {k: v for k, v in weights.items() if "ln_post" not in k}
    what = "it must be the image tower of this model as open_clip names it"
    expected = "visual.ln_post.weight is missing (and 1 more)"
    assert what in refused(save(path, missing), like).split(";")[0]
    assert expected.replace("weight", "bias") in refused(path, like).replace(
        "weight", "bias"
    )
    more = {**weights, "visual.extra": np.ones(3, np.float32)}
    refused(save(path, more), like, "; visual.extra is unexpected")
    wider = {**weights, "visual.proj": np.ones((16, 9), np.float32)}
    refused(save(path, wider), like, "; visual.proj is (16, 9), not (16, 8)")
    unknown = {**weights, "logit": np.ones(3, np.float32)}
    refused(save(path, unknown), like, "; logit is unexpected")
    all_at_once = {**missing, "visual.extra": weights["visual.proj"]}
    refused(save(path, all_at_once), like, "is missing (and 1 more), visual.extra is")


def test_positions_are_not_interpolated(tmp_path, weights):
    module = models.create("vit", None, **towers.OPTIONS["vit"])
    weights["visual.positional_embedding"] = np.zeros((10, 16), np.float32)
    path = save(tmp_path / "a", weights)
    message = refused(path, towers.encoder_shapes(module, (20, 20)))
    assert "visual.positional_embedding is (10, 16), not (26, 16)" in message
    assert "it is for images of 12x12 pixels, not 20x20" in message


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.full((16, 8), np.nan, np.float32), "visual.proj is not finite"),
        (np.zeros((16, 8), np.int32), "visual.proj is int32, it must be float"),
    ],
)
def test_values_must_be_finite_numbers(tmp_path, weights, like, value, message):
    refused(save(tmp_path / "a", {**weights, "visual.proj": value}), like, message)


def test_files_that_are_none(tmp_path, weights, like):
    """Missing, of neither format, cut off, changed, or of something else."""
    path = tmp_path / "a.safetensors"
    hint = "hf download laion/CLIP-ViT-B-16-laion2B-s34B-b88K open_clip_model"
    refused(path, like, "it must be a file", hint)
    refused(tmp_path, like, "it must be a file")
    neither = "it must be a safetensors file or one that torch.save wrote"
    for content in (b"", b"<html>not found</html>", b"version https://git-lfs"):
        path.write_bytes(content)
        refused(path, like, neither)
    path.write_bytes(pickle.dumps(weights))
    refused(path, like, f"{neither} since PyTorch 1.6, not before")
    whole = save(path, weights).read_bytes()
    for length in (20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(path, like, "it must be a whole file, not a truncated or damaged one")
    refused(save(path, {"x": np.ones(2)}), like, "its keys are x and the like")
    refused(save(path, {}), like, "its keys are none")
    refused(save(path, {"x\ny": np.ones(2)}), like, "a key is not printable")
    other = towers.state(towers.fixture("convnext", "timm"))
    refused(save(path, other), like, "open_clip or transformers or timm names it")
    with pytest.raises(ValueError, match="like must be the parameters of the encoder"):
        load_encoder(path, {"head": {"bias": np.zeros(3)}})


# What torch.save writes.


def test_torch_files_are_read_as_pytorch_reads_them():
    """Views, strides, precisions, scalars and empty tensors, by torch.save."""
    expected = {
        key.removeprefix("tensors/"): value
        for key, value in towers.archive().items()
        if key.startswith("tensors/")
    }
    with open_arrays(towers.FIXTURES / "tensors.pt") as arrays:
        assert set(arrays) == set(expected)
        for key, array in arrays.items():
            value = array.read()
            assert value.shape == array.shape == expected[key].shape
            assert value.dtype == array.dtype
            np.testing.assert_array_equal(value.astype(np.float64), expected[key])
        dtypes = {key: str(array.dtype) for key, array in arrays.items()}
    assert dtypes["plain"] == dtypes["part"] == "float32"
    assert (dtypes["half"], dtypes["brain"]) == ("float16", "bfloat16")
    assert (dtypes["double"], dtypes["integers"]) == ("float64", "int64")


@pytest.fixture
def torch_save(tmp_path, monkeypatch):
    """Writes an archive as torch.save does, without PyTorch, so that it can lie."""
    rebuild = types.FunctionType((lambda *args: args).__code__, {}, "rebuild")
    rebuild.__module__, rebuild.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    storage = type("FloatStorage", (), {"__module__": "torch"})
    fakes = {"torch": {"FloatStorage": storage}}
    fakes["torch._utils"] = {"_rebuild_tensor_v2": rebuild}
    for name, content in fakes.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)

    class Tensor:
        def __init__(self, key, values, **lies):
            strides = [stride // values.itemsize for stride in values.strides]
            view = {"offset": 0, "shape": values.shape, "strides": tuple(strides)}
            self.key, self.size = key, lies.pop("size", values.size)
            self.view = (view | lies).values()

        def __reduce__(self):
            return rebuild, (self, *self.view, False, {})

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            if isinstance(obj, Tensor) and obj.key in self.reduced:
                return "storage", storage, obj.key, "cpu", obj.size
            if isinstance(obj, Tensor):
                self.reduced.add(obj.key)
            return None

    def write(content, name="a.pt", lies=(), **entries):
        """Takes a dictionary of arrays, or the bytes of a pickle."""
        path, pickled = tmp_path / name, io.BytesIO()
        entries = {"version": b"3", "byteorder": b"little", **entries}
        if isinstance(content, dict):
            described = {
                key: Tensor(str(i), v, **dict(lies).get(key, {}))
                if isinstance(v, np.ndarray)
                else v
                for i, (key, v) in enumerate(content.items())
            }
            pickler = Pickler(pickled, 2)
            pickler.reduced = set()
            pickler.dump(described)
            for i, value in enumerate(content.values()):
                entries.setdefault(f"data/{i}", np.asarray(value).tobytes())
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x/data.pkl", pickled.getvalue() or content)
            for entry, data in entries.items():
                archive.writestr(f"x/{entry}", data)
        return path

    return write


def test_a_torch_file_is_as_good_as_a_safetensors_file(
    tmp_path, weights, like, torch_save
):
    expected = load_encoder(save(tmp_path / "a", weights), like)
    assert_same(load_encoder(torch_save(weights), like), expected)


def test_code_in_a_pickle_is_not_run(tmp_path, like, torch_save):
    """Calls, classes that run code when they are made, and states of objects."""
    touched = tmp_path / "touched"
    for pickled, name in (
        (f"cos\nsystem\n(S'touch {touched}'\ntR.", "os.system"),
        (f"(S'touch {touched}'\nios\nsystem\n.", "os.system"),
        (f"cbuiltins\neval\n(S'open({str(touched)!r}, 0)'\ntR.", "builtins.eval"),
        ("ctorch\nload\n.", "torch.load"),
        ("ctorch._utils\n_rebuild_tensor\n.", "torch._utils._rebuild_tensor"),
        ("ccollections\nOrderedDict.fromkeys\n.", "collections.OrderedDict.from"),
        ("cnumpy\nload\n.", "numpy.load"),
    ):
        expected = f"must be a state dict of tensors only, but it asks for {name}"
        path = torch_save(pickled.encode())
        refused(path, like, expected, "nothing of it was run")
    assert not touched.exists()
    for pickled in (
        "ccollections\nOrderedDict\n(dS'pop'\nI1\nsb.",  # sets an attribute of it
        "ctorch\nFloatStorage\n(dS'a'\nI1\nsb.",
        "(S'a'\nctorch\nFloatStorage\n)R.",
    ):
        refused(torch_save(pickled.encode()), like, "not a truncated or damaged one")


def test_torch_files_that_are_bad(tmp_path, weights, like, torch_save):
    damaged = "it must be a whole file, not a truncated or damaged one"
    key = "visual.proj"
    for lie in (
        {"offset": 1},
        {"offset": -1},
        {"shape": (17, 8)},
        {"shape": (16, 8), "strides": (8,)},
        {"strides": (9, 1)},
        {"strides": (-8, 1)},
        {"shape": ("16", 8)},
    ):
        refused(torch_save(weights, lies={key: lie}), like, damaged)
    number = [*weights].index(key)
    entry = {f"data/{number}": bytes(16 * 8 * 4 - 1)}
    refused(torch_save(weights, **entry), like, damaged, "does not hold 128 float32")
    path = torch_save(weights)
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    refused(path, like, damaged)
    values = weights[key].tobytes()
    path.write_bytes(whole.replace(values, values[::-1]))
    refused(path, like, damaged, "Bad CRC-32")
    program = {"code/__torch__.py": b""}
    refused(torch_save(weights, **program), like, "not a TorchScript program")
    big = torch_save(weights, byteorder=b"big")
    refused(big, like, "its numbers must be little-endian")
    refused(torch_save(pickle.dumps([1])), like, "must be a state dict, not a list")
    refused(torch_save({"epoch": 3}), like, "entry 'epoch' must be a tensor, not int")
    nested = pickle.dumps({"state_dict": {"epoch": 3}, "epoch": 3})
    refused(torch_save(nested), like, "entry 'epoch' must be a tensor, not int")


# Weights of a run.


def test_weights_of_a_run(tmp_path):
    """Raw or averaged; a head of other classes stays as it is if that is asked for."""
    options = {"depth": 10, "width": 1}
    params = {"params": towers.draw_params(models.create("wrn", 5, **options), (8, 8))}
    ema = jax.tree.map(lambda leaf: leaf + 1.0, params)
    path = tmp_path / "model.safetensors"
    state = types.SimpleNamespace(params=params, ema_params=ema)
    path.write_bytes(checkpoint.export_weights(state))
    assert_same(load_weights(path, params), ema)
    assert_same(load_weights(path, params, ema=False), params)
    other = models.create("wrn", 3, **options)
    like = {"params": towers.draw_params(other, (8, 8), seed=1)}
    with pytest.raises(UserError, match=r"Dense_0/bias is \(5,\), not \(3,\) \(and 1"):
        load_weights(path, like)
    found = load_weights(path, like, skip=("Dense_0",))
    assert_same(found["params"].pop("Dense_0"), like["params"].pop("Dense_0"))
    del ema["params"]["Dense_0"]
    assert_same(found, ema)
    for like_, skip, message in (
        (params, ("head",), "skip is 'head': it must be the name of a module"),
        ({"params": params["params"]["WSConv_0"]}, (), "is missing .* is unexpected"),
    ):
        with pytest.raises(UserError, match=message):
            load_weights(path, like_, skip=skip)
    with pytest.raises(UserError, match=r"it must be a file, the model\.safetensors"):
        load_weights(tmp_path / "nothing", params)


# De et al.'s names. Keys and shapes (of 1,000 classes) and logits are those of
# WideResNet in jax_privacy at commit 5a35a95, with dm-haiku 0.0.17 and jax 0.10.2:
# experiments/image_classification/models/cifar.py.
DE_ET_AL = ROOT / "tests/fixtures/jax_privacy_wrn28_10.json"
LOGITS = (
    (-1.84472334, 0.70145869, 2.32618237, -2.4880302, 0.37377828),
    (-1.89856279, 0.07351178, 2.10931015, -1.78740311, -0.44733045),
)


def test_keys_of_de_et_al_at_full_size():
    model = models.create("wrn", 1000, depth=28, width=10)
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    flat = {"/".join(k): v for k, v in traverse_util.flatten_dict(like).items()}
    keys = dialects.jax_privacy_keys(flat)
    found = {keys[path]: list(leaf.shape) for path, leaf in flat.items()}
    assert found == json.loads(DE_ET_AL.read_text())
    vit = {"params/encoder/norm/scale", "params/head/kernel"}
    assert dialects.jax_privacy_keys(vit) is None


def wrn_of_de_et_al(classes=5):
    """Returns arrays of a small network by their names, and two images."""
    layers = {
        key: shape
        for key, shape in json.loads(DE_ET_AL.read_text()).items()
        if not re.search(r"(Conv|norm)_[1-3]_", key)
    }
    small = {16: 16, 160: 16, 320: 32, 640: 64, 1000: classes, 3: 3, 1: 1}
    rng = np.random.default_rng(0)
    arrays = {}
    for key, shape in sorted(layers.items()):
        values = 0.3 * rng.standard_normal([small[side] for side in shape])
        ones = key.endswith(("/gain", "/scale"))
        arrays[key] = (values + ones).astype(np.float32)
    return arrays, rng.standard_normal((2, 16, 16, 3)).astype(np.float32)


def test_weights_of_de_et_al(tmp_path):
    arrays, images = wrn_of_de_et_al()
    path = tmp_path / "wrn.safetensors"
    safetensors.numpy.save_file(arrays, path)

    def like(classes, **options):
        model = models.create("wrn", classes, **{"depth": 10, "width": 1, **options})
        return model, jax.eval_shape(model.init, jax.random.key(0), images)

    model, wanted = like(5)
    logits = model.apply(load_weights(path, wanted), images)
    np.testing.assert_allclose(logits, LOGITS, atol=1e-5)
    # For other classes all but the last layer, as De et al. fine-tune.
    _, other = like(3)
    found = load_weights(path, other, skip=("Dense_0",))["params"]
    assert found["Dense_0"]["kernel"].shape == (64, 3)
    assert isinstance(found["Dense_0"]["kernel"], jax.ShapeDtypeStruct)
    np.testing.assert_array_equal(
        found["WSConv_0"]["kernel"], arrays["wide_res_net/First_conv/w"]
    )
    for (_, wrong), message in (
        (like(3), r"jax_privacy names them; wide_res_net/Softmax/b is \(5,\), not"),
        (like(5, order=3), r"Block_1_skip_norm/.* is \(16,\), not|_skip_norm/"),
        (like(5, depth=16), r"Block_\d\w+_1_\d/\w+ is missing \(and 29 more\)"),
    ):
        with pytest.raises(UserError, match=message):
            load_weights(path, wrong)
    del arrays["wide_res_net/Final_norm/offset"]
    arrays["wide_res_net/Extra/w"] = images
    safetensors.numpy.save_file(arrays, path)
    with pytest.raises(UserError) as error:
        load_weights(path, wanted)
    assert str(error.value).endswith(
        "wide_res_net/Final_norm/offset is missing, wide_res_net/Extra/w is unexpected"
    )


# Preprocessing.


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


# At full size.


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of the libraries
@pytest.mark.skipif(
    importlib.util.find_spec("open_clip") is None,
    reason='needs open_clip: pip install -e ".[towers]"',
)
@pytest.mark.parametrize("tower", ["vit", "convnext"])
def test_towers_at_full_size_are_those_of_open_clip(tower, tmp_path):
    """Random weights; embeddings, logits and gradients."""
    from tests import make_towers

    model, size = make_towers.full(tower)
    visual = model.visual
    make_towers.randomize(visual, 0)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2, size, size, 3), np.uint8)
    found = make_towers.expected(visual, visual, pixels, 10, 0)
    for key, value in model.state_dict().items():
        found[f"state/{key}"] = value.numpy()
    started = time.time()
    worst = towers.assert_parity(tower, found, tmp_path)
    print(f"{tower}: {worst:.2e} in {time.time() - started:.1f} s")
