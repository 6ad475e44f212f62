"""CIFAR archives and IDX files: read exactly, and no code is run by them."""

import os
import pickle

import numpy as np
import pytest

from dpmix_jax import UserError, data
from dpmix_jax.data import DataConfig
from tests import files

TRAIN, TEST = files.learnable(50, 10, seed=0), files.learnable(20, 10, seed=1)
HUNDRED = files.learnable(200, 100, seed=2), files.learnable(100, 100, seed=3)
GREY = [(images[..., 0], labels) for images, labels in (TRAIN, TEST)]


def load(path, name="cifar10", **options):
    return data.load(DataConfig(name=name, path=str(path), **options))


def assert_holds(dataset, train, test):
    for records, (images, labels) in ((dataset.train, train), (dataset.test, test)):
        np.testing.assert_array_equal(records.images, images)
        np.testing.assert_array_equal(records.labels, labels)
        assert records.labels.dtype == np.int32
        assert records.images.flags.c_contiguous


@pytest.mark.parametrize("kind", ["binary", "python"])
@pytest.mark.parametrize("num_classes", [10, 100])
def test_cifar_archive_and_folder_are_the_same(tmp_path, kind, num_classes):
    train, test = (TRAIN, TEST) if num_classes == 10 else HUNDRED
    archive = files.cifar(tmp_path, num_classes, kind, train, test)
    dataset = load(archive, f"cifar{num_classes}")
    assert_holds(dataset, train, test)
    assert len(set(dataset.train.class_names)) == num_classes
    assert dataset.train.class_names[3] == {10: "cat", 100: "bear"}[num_classes]
    assert_holds(load(tmp_path, f"cifar{num_classes}"), train, test)  # by its name
    unpacked = tmp_path / "unpacked"
    files.put(unpacked, files.cifar_members(num_classes, kind, train, test))
    assert_holds(load(unpacked, f"cifar{num_classes}"), train, test)


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


@pytest.mark.parametrize("batch", [Evil(), {b"data": Evil(), b"labels": [1]}])
def test_pickles_run_no_code(tmp_path, monkeypatch, batch):
    monkeypatch.chdir(tmp_path)
    members = dict(files.cifar_members(10, "python", TRAIN, TEST))
    members["cifar-10-batches-py/data_batch_2"] = pickle.dumps(batch, 2)
    archive = files.tar(tmp_path / "cifar-10-python.tar.gz", members.items())
    with pytest.raises(UserError, match=r"it asks for posix\.system"):
        load(archive)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("protocol", range(2, 5))
def test_pickles_of_any_age_are_read(tmp_path, protocol):
    members = dict(files.cifar_members(10, "python", TRAIN, TEST))
    name = "cifar-10-batches-py/test_batch"
    members[name] = files.cifar_pickle(10, *TEST, protocol=protocol)
    assert_holds(load(files.tar(tmp_path / "x.tar.gz", members.items())), TRAIN, TEST)


def test_an_archive_that_lacks_something_is_refused(tmp_path):
    (name, content), *others = files.cifar_members(10, "binary", TRAIN, TEST)
    for members, message in (
        ([(name, content[:-1]), *others], "ValueError"),
        (others, f"KeyError: '{name.split('/')[1]}'"),
    ):
        with pytest.raises(UserError, match=rf"cannot be read \({message}"):
            load(files.tar(tmp_path / "x.tar.gz", members))


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_idx_round_trip(tmp_path, compress, name):
    dataset = load(files.idx(tmp_path, *GREY, compress=compress), name)
    assert_holds(dataset, *((images[..., None], labels) for images, labels in GREY))
    assert dataset.train.class_names[0] == {"mnist": "0"}.get(name, "T-shirt/top")


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: b"",
        lambda content: b"\0\0\x0d\3" + content[4:],
    ],
)
def test_damaged_idx_is_one_clear_error(tmp_path, damage):
    folder = files.idx(tmp_path, *GREY, compress=False)
    path = folder / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        UserError, match=r"^data.path is .*: cannot be read \("
    ) as error:
        load(folder, "mnist")
    assert "\n" not in str(error.value)


def test_arrays_are_resized_through_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DPMIX_JAX_CACHE", str(tmp_path / "cache"))
    folder = files.idx(tmp_path, *GREY)
    dataset = load(folder, "mnist", image_size=48)
    assert isinstance(dataset.train.images, np.memmap)
    assert dataset.train.images.shape == (50, 48, 48, 3)
    assert dataset.train.mean == (0.1307,) * 3
    np.testing.assert_array_equal(dataset.train.labels, GREY[0][1])
    same = load(folder, "mnist", image_size=32).train.images
    np.testing.assert_array_equal(same, np.repeat(GREY[0][0][..., None], 3, axis=-1))
