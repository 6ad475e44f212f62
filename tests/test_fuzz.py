"""Whatever is in a file or on a command line: it is read, or refused in one line.

Bytes of valid files are changed, cut off and put in. More of it by name:

    DPMIX_JAX_FUZZ=2000 pytest -n 0 tests/test_fuzz.py
"""

import json
import os
import pathlib
import tempfile
from unittest import mock

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpmix_jax import Mechanism, UserError, data, training
from dpmix_jax.data import DataConfig
from dpmix_jax.models import pretrained
from dpmix_jax.run import ledger
from dpmix_jax.run.checkpoint import Checkpoints
from dpmix_jax.run.cli import load_experiment
from dpmix_jax.run.config import from_config_dict, to_dict
from dpmix_jax.run.workdir import Workdir
from tests import files, runs
from tests.conftest import ROOT

EXAMPLES = int(os.environ.get("DPMIX_JAX_FUZZ", "25"))
fuzzed = settings(
    max_examples=EXAMPLES,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
EDITS = st.lists(
    st.tuples(
        st.floats(0, 1), st.sampled_from(["set", "cut", "put"]), st.binary(max_size=8)
    ),
    min_size=1,
    max_size=4,
)


def edited(content: bytes, edits) -> bytes:
    found = bytearray(content)
    for where, kind, new in edits:
        at = int(where * len(found))
        if kind == "cut":
            del found[at:]
        elif kind == "set":
            found[at : at + len(new)] = new
        else:
            found[at:at] = new
    return bytes(found)


def read_or_refused(read):
    """Calls it; what a `UserError` says is one line, and nothing else is raised."""
    said = ""
    try:
        read()
    except UserError as error:
        said = str(error)
    assert "\n" not in said


PARAMS = {"params": {"Dense_0": {"kernel": np.ones((3, 2), np.float32)}}}
STATE = training.init_state({"w": jnp.arange(3.0)}, optax.sgd(1.0))


def npz_file(folder):
    path = folder / "data.npz"
    labels = np.arange(4)
    pixels = np.zeros((4, 5, 5, 1), np.uint8)
    np.savez(
        path,
        train_images=pixels,
        train_labels=labels,
        test_images=pixels,
        test_labels=labels,
        class_names=np.array(["a", "b", "c", "d"]),
    )
    return path, lambda: data.load(DataConfig(name="npz", path=str(path)))


def idx_file(folder):
    records = np.zeros((6, 8, 8), np.uint8), np.arange(6)
    files.idx(folder, records, records, compress=False)
    path = sorted(folder.glob("*images*"))[0]
    return path, lambda: data.load(DataConfig(name="mnist", path=str(folder)))


CIFAR = files.learnable(10, 10, seed=0), files.learnable(10, 10, seed=1)


def cifar_pickle(folder):
    path = folder / "cifar-10-batches-py" / "data_batch_2"
    files.put(folder, files.cifar_members(10, "python", *CIFAR))
    return path, lambda: data.load(DataConfig(name="cifar10", path=str(folder)))


def cifar_archive(folder):
    path = files.cifar(folder, 10, "binary", *CIFAR)
    return path, lambda: data.load(DataConfig(name="cifar10", path=str(path)))


def tar_file(folder):
    path = files.tar(folder / "x.tar", files.class_members(("cat", "dog"), 5), "w")
    return path, lambda: data.load(DataConfig(name="folder", path=str(path)))


def zip_file(folder):
    path = files.make_zip(folder / "x.zip", files.class_members(("cat", "dog"), 5))
    return path, lambda: data.load(DataConfig(name="folder", path=str(path)))


def image_file(folder):
    files.put(folder / "photos", files.class_members(("cat", "dog"), 5))
    path = sorted((folder / "photos").rglob("*.png"))[0]
    config = DataConfig(name="folder", path=str(folder / "photos"), image_size=8)
    return path, lambda: data.load(config)


def weights_file(folder):
    path = folder / "model.safetensors"
    tensors = {
        "ema_params/params/Dense_0/kernel": PARAMS["params"]["Dense_0"]["kernel"]
    }
    path.write_bytes(safetensors.numpy.save(tensors))
    return path, lambda: pretrained.load_weights(path, PARAMS)


def checkpoint_file(folder):
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(STATE)
    return folder / "checkpoints" / "0.safetensors", lambda: checkpoints.restore(STATE)


def config_file(folder):
    config = runs.config()
    path = folder / "config.json"
    path.write_text(json.dumps(to_dict(config)))
    return path, lambda: Workdir(folder).check(config)


def metrics_file(folder):
    path = folder / "metrics.jsonl"
    path.write_text('{"step": 1, "epsilon": 0.5}\n{"step": 2, "epsilon": 0.6}\n')
    return path, Workdir(folder).metrics


def ledger_file(folder):
    book = ledger.Ledger(folder / "records.jsonl")
    mechanism = Mechanism(sampling_prob=0.1, num_updates=2, noise_multiplier=2.0)
    for _ in range(2):
        book.spend(mechanism, epsilon=1.0, delta=1e-5, workdir="a")
    return book.path, book.runs


FILES = (
    npz_file,
    idx_file,
    cifar_pickle,
    cifar_archive,
    tar_file,
    zip_file,
    image_file,
    weights_file,
    checkpoint_file,
    config_file,
    metrics_file,
    ledger_file,
)


@pytest.mark.sampled("image_file", "zip_file")
@pytest.mark.parametrize("make", FILES, ids=lambda make: make.__name__)
@fuzzed
@given(EDITS)
def test_a_file_is_read_or_refused_in_one_line(make, edits):
    with (
        tempfile.TemporaryDirectory() as name,
        mock.patch.dict(os.environ, DPMIX_JAX_CACHE=f"{name}/cache"),
    ):
        folder = pathlib.Path(name)
        path, read = make(folder)
        read()  # as it is
        before = written(folder)
        path.write_bytes(edited(path.read_bytes(), edits))
        read_or_refused(read)
        assert written(folder) <= before


@pytest.mark.parametrize("line", ["[]", "1", "null", '"a"', "{}"])
def test_json_of_another_kind_is_refused_or_passed_over(tmp_path, line):
    for make in (config_file, metrics_file, ledger_file):
        path, read = make(tmp_path)
        path.write_text(f"{line}\n")
        read_or_refused(read)
    (tmp_path / "results.json").write_text(line)
    read_or_refused(Workdir(tmp_path).results)


def written(folder):
    """Returns all files but those of the cache, and of locks."""
    found = {path for path in folder.rglob("*") if path.is_file()}
    return {p for p in found if p.name != ".lock" and folder / "cache" not in p.parents}


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**12), 10**12),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(-3, 3), max_size=3),
)
KEYS = sorted(
    f"{group}.{name}"
    for group, values in to_dict(runs.config()).items()
    if isinstance(values, dict)
    for name in values
)


@fuzzed
@given(
    st.dictionaries(
        st.sampled_from([*KEYS, "seed", "no.such", "x"]), VALUES, max_size=4
    )
)
def test_a_config_is_taken_or_refused_in_one_line(changes):
    values = to_dict(runs.config())
    for key, value in changes.items():
        group, _, name = key.rpartition(".")
        (values.setdefault(group, {}) if group else values)[name] = value
    read_or_refused(lambda: from_config_dict(values))


@fuzzed
@given(
    st.lists(
        st.tuples(
            st.sampled_from([*KEYS, "", "x", "method", "data.name.x"]),
            st.text(max_size=6).filter(lambda text: "\0" not in text),
        ),
        max_size=3,
    )
)
def test_flags_are_taken_or_refused_in_one_line(given_flags):
    flags = [f"--config.{key}={value}" for key, value in given_flags]
    argv = [f"--config={ROOT}/configs/digits.py", *flags]
    read_or_refused(lambda: load_experiment(argv))
