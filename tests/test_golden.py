"""What is drawn, computed and promised stays what it was when it was recorded.

Integers, keys, batches, texts and the order of records are compared exactly, floats
with a tolerance. Where code was moved and nothing else was done, floats are the same
bit for bit on one processor and one version of JAX:

    DPMIX_JAX_GOLDEN_EXACT=1 pytest -n 0 -m "slow or not slow" tests/test_golden.py

To record what has changed on purpose, delete its entries from `tests/golden/*.json` and
run the same command with `DPMIX_JAX_GOLDEN_RECORD=1`, on each version of JAX. Values
of all versions are in one file, bits in one file for each.
"""

import functools
import hashlib
import importlib
import json
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import safetensors.numpy
from dp_accounting import NeighboringRelation

from tests import files, runs, towers, toy
from tests.conftest import ROOT

# Everything of the package that a test below reaches is named from here to `FOLDER`.
from dpmix_jax import (  # isort: skip
    AugmentationConfig,
    MethodConfig,
    Mechanism,
    augmentation_set,
    clipped_gradient,
    data,
    ghost_clipped_gradient,
    make_pool,
    microbatches,
    poisson_batch,
    record_keys,
    stream_key,
)
from dpmix_jax.baselines.microbatch_mixup import (
    MicrobatchMixupConfig,
    group_set,
    of_groups,
    random_groups,
)
from dpmix_jax.baselines.microbatch_mixup import batches as group_batches
from dpmix_jax.data import DataConfig, load_bank, tfds
from dpmix_jax.data.public import PublicConfig, load_public
from dpmix_jax.run import experiment
from dpmix_jax.run.cli import load_experiment
from dpmix_jax.run.config import from_config_dict
from dpmix_jax.run.workdir import Workdir
from dpmix_jax.sweeps import from_config_dict as sweep_from_config_dict

FOLDER = pathlib.Path(__file__).parent / "golden"
EXACT = os.environ.get("DPMIX_JAX_GOLDEN_EXACT") == "1"
RECORD = os.environ.get("DPMIX_JAX_GOLDEN_RECORD") == "1"
VALUES, BITS = FOLDER / "values.json", FOLDER / f"bits-{jax.__version__}.json"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def flatten(result):
    """Returns the leaves of nested dicts and lists by their paths."""
    pairs = jax.tree.leaves_with_path(result, is_leaf=lambda leaf: leaf is None)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in pairs
    }


def summary(leaf):
    """Returns what a mismatch is judged by: all of a scalar, some of an array."""
    if not isinstance(leaf, np.ndarray):
        return leaf
    found = {"shape": list(leaf.shape), "dtype": leaf.dtype.name}
    flat = leaf.ravel()
    some = flat[np.linspace(0, max(leaf.size - 1, 0), 6).astype(int)[: leaf.size]]
    if leaf.dtype.kind != "f":
        return found | {"sha256": sha256(leaf.tobytes()), "some": some.tolist()}
    flat = flat.astype(np.float64)
    direction = np.random.default_rng(0).standard_normal(leaf.size)
    return found | {
        "norm": float(np.linalg.norm(flat)),
        "along": float(flat @ direction),  # changes with any permutation
        "some": [float(value) for value in some],
    }


def bits(leaf):
    """Returns a float's or a float array's every bit, None for anything else."""
    if isinstance(leaf, float):
        return leaf.hex()
    if isinstance(leaf, np.ndarray) and leaf.dtype.kind == "f":
        return sha256(leaf.tobytes())
    return None


def assert_close(found, expected, rtol, path):
    if isinstance(expected, dict) and "norm" in expected:
        atol = 3 * rtol * expected["norm"]
        for key, value in expected.items():
            if key in ("norm", "along", "some"):
                value = pytest.approx(value, rel=rtol, abs=atol)
            assert found[key] == value, path
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=rtol, abs=rtol), path
    else:
        assert found == expected, path


def read(path):
    return json.loads(path.read_text()) if path.exists() else {}


def add(path, name, content):
    everything = read(path)
    everything.setdefault(name, content)
    path.write_text(json.dumps(everything, indent=1, sort_keys=True) + "\n")


def check(name, result, *, rtol=1e-5, exact=True):
    """Compares nested dicts and lists with what was recorded under a name.

    Args:
      name: of the entry.
      result: arrays, numbers and strings in dicts and lists.
      rtol: of floats, between processors and versions of JAX.
      exact: whether bits are to be the same where both are.
    """
    leaves = flatten(result)
    values = {path: summary(leaf) for path, leaf in leaves.items()}
    found = {path: bits(leaf) for path, leaf in leaves.items()}
    found = {path: value for path, value in found.items() if value and exact}
    if RECORD:
        add(VALUES, name, values)
        add(BITS, name, found)
    expected = read(VALUES)[name]
    assert set(values) == set(expected)
    for path, value in values.items():
        assert_close(value, expected[path], rtol, path)
    if EXACT:
        assert found == read(BITS)[name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """For the runs of this file, which share their compiled code."""
    return tmp_path_factory.mktemp("golden")


def write_npz(path, images, labels, num_train):
    np.savez(
        path,
        train_images=images[:num_train],
        train_labels=labels[:num_train],
        test_images=images[num_train:],
        test_labels=labels[num_train:],
        class_names=np.array(["c", "a", "b"]),
    )


# --- What is drawn ---------------------------------------------------------------

SEEDS = (0, 2**100 + 7)


def test_batches_and_groups():
    found = {}
    for seed in SEEDS:
        for step in (0, 1, 700):
            batch = poisson_batch(seed, step, num_records=1437, sampling_prob=0.02)
            groups = random_groups(seed, step, batch, num_records=1437, num_groups=9)
            drawn = group_batches(
                seed,
                num_records=1437,
                sampling_prob=0.02,
                microbatch_size=8,
                num_groups=9,
            )
            found[f"{seed}/{step}"] = {
                "batch": batch,
                "microbatches": microbatches(batch, 7),
                "groups": groups,
                "microbatches of groups": drawn(step),
            }
    check("batches", found)


def test_keys():
    found = {}
    streams = ("init", "sampling", "augmentation", "groups", "pretraining")
    for seed in SEEDS:
        for stream in streams:
            key = stream_key(seed, stream)
            keys = record_keys(key, jnp.int32(3), jnp.array([[0, 5], [1436, -1]]))
            found[f"{seed}/{stream}"] = {
                "key": np.asarray(jax.random.key_data(key)),
                "records": np.asarray(jax.random.key_data(keys)),
            }
    check("keys", found)


# --- The sets and the clipped sum -------------------------------------------------

METHODS = {
    "dp_sgd": {},
    "self_aug": {"k_base": 3},
    "dp_mix_self": {"k_base": 3, "k_self": 4},
    "dp_mix_self_same": {"k_base": 1, "k_self": 2, "distinct_pairs": False},
    "dp_mix_diff": {"k_base": 2, "k_self": 3, "k_diff": 2, "alpha": 1.0},
    "dp_mix_diff_class": {"k_base": 2, "k_self": 3, "k_diff": 2, "draw": "class"},
    "pure_dp_mix_diff": {"k_self": 2, "k_diff": 3},
    "microbatch_mixup": {"k_base": 2, "group_size": 2},
}


def method(name):
    return {"name": re.sub("_(same|class)$", "", name), **METHODS[name]}


def marked(names, slow):
    """Parametrises a test with names, of which some are slow."""
    slowly = {name: pytest.mark.slow for name in slow}
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=slowly.get(name, ())) for name in names]
    )


@pytest.fixture(scope="module")
def digits():
    dataset = data.load(DataConfig())
    public = load_public(PublicConfig(name="rendered_digits"), DataConfig(), dataset)
    return dataset.train, public


AUGMENTATIONS = {
    "whole": AugmentationConfig(flip=True, max_shift=2),
    "subpixel": AugmentationConfig(flip=False, max_shift=0.5, subpixel=True),
}
ROWS = np.array([3, 700, 1436, 12, 12, 5])  # a record may come twice


def params():
    rng = np.random.default_rng(5)
    shapes = {"kernel": (3, 3, 1, 4), "dense": (4, 10)}
    return {
        name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()
    }


def made(name, augmentation, digits, transform):
    """Returns the sets of some records and their clipped sum."""
    records, public = digits
    cls = MicrobatchMixupConfig if name == "microbatch_mixup" else MethodConfig
    config = cls(**method(name))
    bank = make_pool(public.images, public.labels, public.class_names, draw="class")
    gradient_fn = transform(toy.loss_fn, l2_clip_norm=0.3)
    if name == "microbatch_mixup":
        rows = np.array([[3, 700, 1436, 12], [12, 5, -1, -1]])
        make = group_set(config, augmentation)
        gradient_fn = of_groups(gradient_fn)
    else:
        rows = ROWS
        make = augmentation_set(config, augmentation, normalize=records.normalize)
    present = jnp.asarray(rows >= 0, jnp.float32)[..., None]
    images = records.normalize(jnp.asarray(records.images[rows]))
    labels = jax.nn.one_hot(records.labels[rows], 10) * present
    keys = record_keys(stream_key(11, "augmentation"), jnp.int32(2), jnp.asarray(rows))

    @jax.jit
    def compute(keys, images, labels, bank):
        sets = jax.vmap(make, in_axes=(0, 0, 0, None))(keys, images, labels, bank)
        return sets, gradient_fn(params(), *sets)

    sets, (total, aux) = compute(keys, images, labels, bank)
    found = {
        "images": sets[0],
        "labels": sets[1],
        "sum": dict(total),
        "norms": aux.grad_norms,
        "losses": aux.values,
    }
    sensitivity = [float(gradient_fn.sensitivity(r)) for r in NeighboringRelation]
    return jax.tree.map(np.asarray, found) | {"sensitivity": sensitivity}


@pytest.mark.sampled
@marked(METHODS, slow=("dp_mix_self_same", "dp_mix_diff"))
def test_sets_and_clipped_sums(name, digits):
    augmentation = AUGMENTATIONS["subpixel" if name == "self_aug" else "whole"]
    check(f"sets/{name}", made(name, augmentation, digits, clipped_gradient))


@pytest.mark.slow
def test_ghost_clipped_sum(digits):
    found = made(
        "dp_mix_self", AUGMENTATIONS["subpixel"], digits, ghost_clipped_gradient
    )
    check("sets/ghost", found, rtol=1e-3, exact=False)


# --- Runs from the first key to what is released ----------------------------------


def run_config(name, **changes):
    """Returns a run of three updates as nested dicts, with changes by dotted keys."""
    config = ml_collections.ConfigDict(
        {
            "seed": 3,
            "data": {"name": "digits", "validation_size": 100},
            "model": {"name": "cnn", "features": (4, 8), "groups": 2},
            "method": method(name),
            "augmentation": {"flip": False, "max_shift": 0.5, "subpixel": True},
            "privacy": {
                "epsilon": 0.2,  # quick to calibrate
                "delta": 1e-3,
                "expected_batch_size": 40,
                "num_updates": 3,
                "l2_clip_norm": 1.0,
            },
            "optimizer": {"learning_rate": 0.5, "ema_decay": 0.95},
            # No batch below is a multiple of it.
            "performance": {"microbatch_size": 8, "dataset_on": "device"},
            "logging": {"log_every": 1, "eval_every": 3, "checkpoint_every": 2},
        }
    )
    if "diff" in name:
        config.public = {"name": "rendered_digits"}
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return config.to_dict()


def text(content):
    """Returns a text whose numbers are compared as such, without versions and sums."""
    content = re.sub(r"dp_accounting [\d.]+", "dp_accounting", content)
    content = " ".join(re.sub(r"\b[0-9a-f]{12,64}\b", "<sha256>", content).split())
    number = r"\d+(?:\.\d+)?(?:e-?\d+)?"
    return {
        "words": re.sub(number, "#", content),
        "numbers": [float(value) for value in re.findall(number, content)],
    }


def outcome(folder, config):
    """Runs an experiment, and returns what it has released."""
    path = folder / sha256(repr(config).encode())[:12]
    assert experiment.run(from_config_dict(config), Workdir(path)) == 0
    facts = json.loads((path / "privacy.json").read_text())
    del facts["accountant"]
    public_data = text(facts.pop("public_data"))
    return {
        "weights": safetensors.numpy.load_file(path / "model.safetensors"),
        "PRIVACY.md": text((path / "PRIVACY.md").read_text()),
        "privacy.json": {**facts, "public_data": public_data},
        "metrics": [
            {key: value for key, value in line.items() if "accuracy" not in key}
            for line in runs.metrics(path)
        ],
    }


PRETRAINED = {
    "public": {"name": "rendered_digits"},
    "pretrain": {"num_updates": 2, "batch_size": 16, "learning_rate": 0.1},
}
# Of a head on an encoder, which is for images of 8 x 12; as many as of digits.
HEAD = {
    "data": {"name": "npz", "normalization": "clip", "validation_size": 100},
    "model": {"name": "vit", **towers.OPTIONS["vit"]},
}


def tower(folder):
    """Writes weights of an encoder, and images of its size."""
    weights, images = folder / "tower.safetensors", folder / "images.npz"
    rng, shapes = np.random.default_rng(0), towers.weights("vit")
    drawn = {
        name: 0.3 * rng.standard_normal(like.shape, np.float32)
        for name, like in sorted(shapes.items())
    }
    safetensors.numpy.save_file(drawn, weights)
    pixels, labels = files.learnable(1600, 3, size=12)
    write_npz(images, pixels[:, :8], labels, 1437)
    return {"finetune.encoder": str(weights), "data.path": str(images)}


HEAD_ALONE = {**HEAD, "finetune": {"trainable": "head"}}
RUNS = {
    **{name: (name, {}) for name in METHODS if name != "dp_mix_self_same"},
    "host": ("dp_mix_diff", {"performance.dataset_on": "host"}),
    "groups_on_host": ("microbatch_mixup", {"performance.dataset_on": "host"}),
    "momentum": (
        "dp_mix_self",
        {"optimizer.momentum": 0.9, "optimizer.weight_decay": 1e-3},
    ),
    "replace_one": ("dp_sgd", {"privacy.neighboring_relation": "replace_one"}),
    "pretrained": ("self_aug", PRETRAINED),
    "resized_wide_resnet": (
        "self_aug",
        {
            "model": {"name": "wrn", "depth": 10, "width": 1, "groups": 4},
            "data.resize": 12,
        },
    ),
    "bfloat16": ("dp_mix_self", {"performance.precision": "bfloat16"}),
    "ghost": ("dp_mix_self", {"performance.clipping": "ghost"}),
    "head": ("dp_mix_self", HEAD_ALONE),
    "head_of_groups": ("microbatch_mixup", HEAD_ALONE),
    "last_block": (
        "dp_mix_self",
        {**HEAD, "finetune": {"trainable": "head,ln_post,block_1"}},
    ),
}
RTOL = {
    "ghost": 1e-3,
    "bfloat16": 1e-3,
    # Where its input is one colour, the first convolution gives its bias, zero, and
    # rounding decides on which side of the ReLU that is.
    "resized_wide_resnet": 2e-2,
}


@pytest.mark.sampled
@marked(RUNS, slow={*RUNS} - {"dp_mix_self"})
def test_runs(name, folder, monkeypatch):
    monkeypatch.setenv("DPMIX_JAX_CACHE", str(folder / "cache"))
    run_method, changes = RUNS[name]
    if "finetune" in changes:
        changes = {**changes, **tower(folder)}
    config = run_config(run_method, **changes)
    result = outcome(folder, config)
    check(f"runs/{name}", result, rtol=RTOL.get(name, 1e-5), exact=name != "ghost")


# --- What the config files promise ------------------------------------------------

EPSILONS = ("1", "2", "3", "4", "6", "8")
OF_EACH = ("cifar10", "cifar100", "eurosat", "caltech256", "sun397", "oxford_iiit_pet")
OF_TOWERS = tuple(f"{name}-{epsilon}" for name in OF_EACH for epsilon in (1, 2, 4, 8))
CONFIGS = {
    "digits": EPSILONS,
    "fashion_mnist": EPSILONS,
    "wrn16_4_cifar10": EPSILONS,
    "wrn16_4_cifar100": EPSILONS,
    "wrn16_4_eurosat": EPSILONS,
    "wrn40_4_cifar10": EPSILONS,
    "wrn28_10": ("cifar10-1", "cifar10-8", "cifar100-2", "cifar100-4"),
    "vit_b16": OF_TOWERS,
    "convnext_base": OF_TOWERS,
}
SWEEPS = {
    "baselines": ("digits", "cifar10"),
    "rates": ("digits:1", "vit_b16:eurosat-4"),
    "table10": ("digits", "cifar10"),
    "table11": ("",),
}


def load(name, argument="", flags=()):
    suffix = f":{argument}" if argument else ""
    if name == "wrn28_10":  # it does not load without
        flags = ("--config.finetune.weights=w", *flags)
    return load_experiment([f"--config={ROOT}/configs/{name}.py{suffix}", *flags])


SETTINGS = {
    "data": "name image_size resize normalization half validation_size",
    "model": "name options",
    "method": "name num_views num_public num_mixes alpha distinct_pairs",
    "augmentation": "flip max_shift subpixel",
    "privacy": "epsilon delta expected_batch_size num_updates l2_clip_norm"
    " neighboring_relation selection",
    "optimizer": "learning_rate momentum weight_decay ema_decay",
    "finetune": "skip trainable",
    "performance": "precision clipping",
}


def facts(config):
    """Returns what decides a result, as JSON, without what a method would ignore."""
    of_groups = {"num_mixes": config.method.set_size, "distinct_pairs": True}
    found = {
        group: {
            key: getattr(getattr(config, group), key, of_groups.get(key))
            for key in keys.split()
        }
        for group, keys in SETTINGS.items()
    }
    if config.public:
        found["public"] = [config.public.name, config.public.path, config.public.half]
    if updates := config.pretrain.num_updates:
        rate, size = config.pretrain.learning_rate, config.pretrain.batch_size
        found["pretrain"] = [updates, size, rate]
    if config.method.name == "microbatch_mixup":
        found["method"]["group_size"] = config.method.group_size
    if not found["method"]["num_mixes"]:
        del found["method"]["alpha"], found["method"]["distinct_pairs"]
    return json.loads(json.dumps(found, default=dict))


def digest_of_facts(config):
    return sha256(json.dumps(facts(config), sort_keys=True).encode())


def mechanism(config, noise_multiplier):
    return Mechanism(
        sampling_prob=config.privacy.sampling_prob(len(data.blank(config.data))),
        num_updates=config.privacy.num_updates,
        noise_multiplier=noise_multiplier,
        neighboring_relation=config.privacy.relation,
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_configs(name):
    found = {"default": facts(load(name))}
    for argument in CONFIGS[name]:
        config = load(name, argument)
        found[argument] = {
            "settings": digest_of_facts(config),
            "updates": config.privacy.num_updates,
            "rate": config.optimizer.learning_rate,
            "q": mechanism(config, 1.0).sampling_prob,
        }
    config = load(name)
    for noise in (1.0, 3.0):
        found[f"epsilon by RDP at {noise}"] = mechanism(config, noise).epsilon(
            config.privacy.delta, accountant="rdp"
        )
    if name == "digits":
        found["epsilon"] = mechanism(config, 2.6903).epsilon(config.privacy.delta)
    check(f"configs/{name}", found)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_epsilon_of_configs(name):
    config = load(name)
    found = {
        f"{noise}": mechanism(config, noise).epsilon(config.privacy.delta)
        for noise in (1.0, 3.0)
    }
    check(f"epsilon/{name}", found)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "wrn16_4_cifar10", "vit_b16"])
def test_sigma_of_configs(name, folder, monkeypatch):
    monkeypatch.setenv("DPMIX_JAX_CACHE", str(folder / "cache"))
    config = load(name)
    found = config.privacy.calibrate(mechanism(config, 1.0).sampling_prob)
    check(f"sigma/{name}", {"sigma": found.noise_multiplier})


@pytest.mark.parametrize("name", SWEEPS)
def test_sweeps(name):
    found = {}
    for argument in SWEEPS[name]:
        file = importlib.import_module(f"configs.{name}")
        grid = sweep_from_config_dict(file.get_config(*filter(None, [argument])))
        found[argument or "default"] = {
            "runs": len(grid.runs()),
            "metric": grid.metric,
            "settings": {
                str(run.folder): digest_of_facts(load_experiment([*run.flags]))
                for run in grid.runs()
                if run.seed in (None, 0)
            },
        }
    check(f"sweeps/{name}", found)


# --- The order of records ---------------------------------------------------------


def cifar(num_classes, kind, root):
    sizes = (30, 20) if num_classes == 10 else (200, 100)
    parts = [files.learnable(size, num_classes, seed=size) for size in sizes]
    files.cifar(root, num_classes, kind, *parts)


def idx(root):
    parts = [files.learnable(size, 10, size=28, seed=size) for size in (30, 20)]
    files.idx(root, *((images[..., 0], labels) for images, labels in parts))


def npz(root):
    write_npz(root / "x.npz", *files.learnable(30, 3, size=8), 20)
    return root / "x.npz"


def split_folders(root):
    files.put(root, files.class_members(["dog", "cat"], 11, top="train/"))
    files.put(root, files.class_members(["dog", "cat"], 3, top="test/"))


def pets(root):
    images, annotations = files.pet_members(12)
    files.tar(root / "images.tar.gz", images)
    files.tar(root / "annotations.tar.gz", annotations)


def prepared(root):
    pytest.importorskip("tensorflow_datasets")
    source = data.load(DataConfig(half=1))
    few = [records.subset(np.arange(40)) for records in (source.train, source.test)]
    tfds.write("mnist", *few, str(root))


# Each writes a dataset into a folder, and may return the path of its file there. The
# name of the dataset is what stands before a hyphen.
READERS = {
    **{
        f"cifar{num}-{kind}": functools.partial(cifar, num, kind)
        for num in (10, 100)
        for kind in ("binary", "python")
    },
    "mnist": idx,
    "fashion_mnist": idx,
    "npz": npz,
    "folder": lambda root: files.put(
        root, files.class_members(["dog", "cat", "Cow"], 11)
    ),
    "folder-split": split_folders,
    "eurosat-zip": lambda root: files.make_zip(root / "x.zip", files.eurosat_members()),
    "eurosat": lambda root: files.put(root, files.eurosat_members()),
    "caltech256": lambda root: files.tar(root / "x.tar", files.caltech_members(12)),
    "sun397": lambda root: files.tar(root / "x.tar", files.sun_members(11)),
    "oxford_iiit_pet": pets,
    "tfds": prepared,
}


def order(records):
    """Returns pixels, labels and constants of a split, whose order they tell."""
    return {
        "images": np.asarray(records.images),
        "labels": np.asarray(records.labels),
        "class_names": " ".join(records.class_names),
        "constants": [*records.mean, *records.stddev],
        "shape": list(records.image_shape),
    }


def splits(config):
    found = data.load(config)
    return {
        name: order(records)
        for name, records in found._asdict().items()
        if records is not None
    }


@pytest.mark.parametrize("name", READERS)
def test_order_of_records(name, tmp_path, monkeypatch):
    """Pixels of JPEG files are those of the pinned Pillow."""
    monkeypatch.setenv("DPMIX_JAX_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "data"
    root.mkdir()
    path = READERS[name](root) or root
    dataset = "tfds:mnist" if name == "tfds" else name.partition("-")[0]
    config = {"name": dataset, "path": str(path)}
    check(
        f"records/{name}",
        {
            "whole": splits(DataConfig(**config)),
            "second half": splits(DataConfig(**config, half=2, validation_size=3)),
            "resized": splits(DataConfig(**config, image_size=6)),
        },
    )


@pytest.mark.sampled
def test_order_of_digits_and_public_images(tmp_path, monkeypatch, digits):
    monkeypatch.setenv("DPMIX_JAX_CACHE", str(tmp_path / "cache"))
    classes = ("T-shirt/top", "0", "é b")
    folders = ["0", "T-shirt%2Ftop", "%C3%A9 b"]
    root = files.put(tmp_path / "bank", files.class_members(folders, 11))
    grey = {"channels": 1, "mean": (0.2,), "stddev": (0.3,)}
    check(
        "records/digits",
        {
            "whole": splits(DataConfig()),
            "first half": splits(DataConfig(half=1, validation_size=100)),
            "clip": splits(DataConfig(image_size=10, normalization="clip", resize=12)),
            "rendered": order(digits[1]),
            "bank": order(load_bank(root, classes)),
            "grey bank": order(load_bank(root, classes, 6, **grey)),
        },
    )
