"""CIFAR archives and IDX files: read exactly, and refused when they are damaged."""

import os
import pickle
import tarfile
import zlib

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from dpmix_jax import UserError, data
from dpmix_jax.data import DataConfig
from dpmix_jax.data.cifar import MD5
from tests import files

TRAIN, TEST = files.learnable(50, 10, seed=0), files.learnable(20, 10, seed=1)
HUNDRED = files.learnable(200, 100, seed=2), files.learnable(100, 100, seed=3)


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


def test_cifar_checksum_is_shown(tmp_path, capsys, monkeypatch):
    archive = files.cifar(tmp_path, train=TRAIN, test=TEST)
    load(archive)
    shown = capsys.readouterr().err
    assert "not an official archive" in shown
    md5 = shown.split("MD5 ")[1].split(",")[0]
    monkeypatch.setitem(MD5, "cifar-10-binary.tar.gz", md5)
    load(archive)
    assert f"{md5}, the official cifar-10-binary.tar.gz" in capsys.readouterr().err


def test_cifar_by_default_is_below_the_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DPMIX_JAX_DATA", str(tmp_path))
    with pytest.raises(UserError, match=r"cs.toronto.edu.*prepare.py --name=cifar10"):
        data.load(DataConfig(name="cifar10"))
    files.cifar(tmp_path, train=TRAIN, test=TEST)
    assert_holds(data.load(DataConfig(name="cifar10")), TRAIN, TEST)


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (Evil(), "it asks for posix.system"),
        ({b"data": Evil(), b"labels": [1]}, "it asks for posix.system"),
        ({b"data": np.zeros((2, 3072), np.uint8)}, "cannot be read .*labels"),
        ({b"data": np.zeros((2, 3072)), b"labels": [0, 1]}, "images of float64"),
        ({b"data": np.zeros((2, 12), np.uint8), b"labels": [0, 1]}, r"\(2, 12\)"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}, r"int64 \(1,\)"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}, r"in \[0, 10\)"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [-1]}, r"in \[0, 10\)"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [2**32]}, r"\[0, 10\)"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [1.5]}, "float64"),
        ([1, 2], "cannot be read"),
    ],
)
def test_pickled_batches_are_refused(tmp_path, monkeypatch, batch, message):
    monkeypatch.chdir(tmp_path)
    members = dict(files.cifar_members(10, "python", TRAIN, TEST))
    members["cifar-10-batches-py/data_batch_2"] = pickle.dumps(batch, 2)
    archive = files.tar(tmp_path / "cifar-10-python.tar.gz", members.items())
    with pytest.raises(UserError, match=message):
        load(archive)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("protocol", range(2, 5))
def test_pickles_of_any_age_are_read(tmp_path, protocol):
    members = dict(files.cifar_members(10, "python", TRAIN, TEST))
    name = "cifar-10-batches-py/test_batch"
    members[name] = files.cifar_pickle(10, *TEST, protocol=protocol)
    assert_holds(load(files.tar(tmp_path / "x.tar.gz", members.items())), TRAIN, TEST)


def test_binary_batches_are_refused(tmp_path):
    wrong = TRAIN[0], np.full(50, 10)
    with pytest.raises(UserError, match=r"labels are in \[10, 10\]"):
        load(files.cifar(tmp_path, train=wrong, test=TEST))
    members = files.cifar_members(10, "binary", TRAIN, TEST)
    name, content = members[1]
    members[1] = name, content[:-1]
    with pytest.raises(UserError, match=f"{name} has .* bytes, no multiple of .* 3073"):
        load(files.tar(tmp_path / "short.tar.gz", members))
    with pytest.raises(UserError, match="data_batch_1 is missing"):
        load(files.tar(tmp_path / "less.tar.gz", members[:1] + members[2:]))
    with pytest.raises(UserError, match=r"it holds .*test_batch.bin twice"):
        load(files.tar(tmp_path / "twice.tar.gz", members + members[:1]))
    other = ("elsewhere/test_batch.bin", members[0][1])
    with pytest.raises(UserError, match=r"it holds .* and elsewhere/test_batch.bin"):
        load(files.tar(tmp_path / "two.tar.gz", [*members, other]))


@pytest.mark.parametrize("name", ["../data_batch_1.bin", "/tmp/x.bin", "a/../../b"])
def test_members_that_point_outside_are_refused(tmp_path, name):
    members = files.cifar_members(10, "binary", TRAIN, TEST)
    with pytest.raises(UserError, match="points outside"):
        load(files.tar(tmp_path / "slip.tar.gz", [*members, (name, b"x")]))


def test_links_in_archives_are_not_followed(tmp_path):
    members = files.cifar_members(10, "binary", TRAIN, TEST)
    link = tarfile.TarInfo(members[0][0])
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with pytest.raises(UserError, match="test_batch is missing"):
        load(files.tar(tmp_path / "link.tar.gz", [(link, b""), *members[1:]]))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("suffix", [".tar.gz", ".tar"])
def test_truncated_archives_are_refused(tmp_path, share, suffix):
    members = files.cifar_members(10, "binary", TRAIN, TEST)
    mode = {".tar.gz": "w:gz", ".tar": "w"}[suffix]
    whole = files.tar(tmp_path / f"x{suffix}", members, mode).read_bytes()
    # Of a plain tar, up to the end of the last member: all members are there then.
    length = int(len(whole) * share) if share < 0.999 else len(whole.rstrip(b"\0")) + 9
    (tmp_path / f"cut{suffix}").write_bytes(whole[: min(length, len(whole) - 1)])
    with pytest.raises(UserError, match=r"cut.*cannot be read"):
        load(tmp_path / f"cut{suffix}")


def test_plain_tar_cut_between_members_is_refused(tmp_path):
    """Tarfile takes a tar without its end mark for a whole one."""
    members = files.cifar_members(10, "binary", TRAIN, TEST)
    path = files.tar(tmp_path / "x.tar", members, "w")
    with tarfile.open(path) as archive:
        end = archive.getmembers()[-1].offset_data + 10 * 3073
    end += -end % 512
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(UserError, match="no end mark"):
        load(path)


def test_a_member_too_large_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "bomb.tar.gz"
    info = tarfile.TarInfo("cifar-10-batches-bin/data_batch_1.bin")
    info.size = 2**40
    path.write_bytes(zlib.compress(info.tobuf(), wbits=31))
    with pytest.raises(
        UserError, match="1,099,511,627,776 bytes, it must have at most"
    ):
        load(path)


@hypothesis.given(place=st.integers(0, 10**6), value=st.integers(0, 255))
def test_damaged_cifar_is_refused_or_read(tmp_path_factory, place, value):
    for kind in ("binary", "python"):
        folder = tmp_path_factory.mktemp("damaged")
        path = files.cifar(folder, 10, kind, TRAIN, TEST)
        content = bytearray(path.read_bytes())
        content[place % len(content)] ^= value or 1
        path.write_bytes(bytes(content))
        try:
            dataset, message = load(path), ""
        except UserError as error:
            dataset, message = None, str(error)
        assert "\n" not in message
        if dataset is not None:  # the damage was in a header, not in the data
            assert_holds(dataset, TRAIN, TEST)


@hypothesis.given(place=st.integers(0, 10**6), value=st.integers(1, 255))
def test_damaged_pickles_are_refused_or_read(tmp_path_factory, place, value):
    folder = tmp_path_factory.mktemp("damaged")
    members = dict(files.cifar_members(10, "python", TRAIN, TEST))
    name = "cifar-10-batches-py/test_batch"
    content = bytearray(members[name])
    ends = [*range(300), *range(len(content) - 300, len(content))]  # not the pixels
    content[ends[place % len(ends)]] ^= value
    files.put(folder, (members | {name: bytes(content)}).items())
    try:
        dataset = load(folder)
    except UserError:
        return
    assert dataset.test.labels.max() < 10


GREY = [(images[..., 0], labels) for images, labels in (TRAIN, TEST)]


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_idx_round_trip(tmp_path, compress, name):
    dataset = load(files.idx(tmp_path, *GREY, compress=compress), name)
    assert_holds(dataset, *((images[..., None], labels) for images, labels in GREY))
    assert dataset.train.class_names[0] == {"mnist": "0"}.get(name, "T-shirt/top")
    with pytest.raises(UserError, match=r"fashion-mnist.*Debian"):
        load(tmp_path / "absent", "fashion_mnist")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], "shorter than the"),
        (lambda content: content + b"x", "longer than the"),
        (lambda content: content[:6], "is not an IDX file"),
        (lambda content: b"", "is not an IDX file"),
        (lambda content: b"\0\0\x0d\3" + content[4:], "is not an IDX file"),
        (lambda content: b"\0\0\x08\1" + content[4:], "is not an IDX file"),
        (lambda content: content[:4] + b"\xff" * 12 + content[16:], "declares"),
    ],
)
def test_damaged_idx_is_refused(tmp_path, damage, message):
    folder = files.idx(tmp_path, *GREY, compress=False)
    path = folder / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=message):
        load(folder, "mnist")


def test_idx_that_do_not_fit_together_are_refused(tmp_path):
    (images, labels), test = GREY
    with pytest.raises(UserError, match="one for each of the 50 images"):
        load(files.idx(tmp_path / "a", (images, labels[1:]), test), "mnist")
    with pytest.raises(UserError, match=r"labels are in \[10, 10\]"):
        load(files.idx(tmp_path / "b", (images, np.full(50, 10)), test), "mnist")
    with pytest.raises(UserError, match="must be of one size"):
        load(files.idx(tmp_path / "c", (images[:, 1:], labels), test), "mnist")
    folder = files.idx(tmp_path / "d", *GREY)
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte.gz is missing"):
        load(folder, "mnist")


@hypothesis.given(place=st.integers(0, 10**6), length=st.integers(0, 10**6))
def test_truncated_or_damaged_gzip_is_one_clear_error(tmp_path_factory, place, length):
    folder = files.idx(tmp_path_factory.mktemp("idx"), *GREY)
    path = folder / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[: length % len(whole)])
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte.gz"):
        load(folder, "mnist")
    damaged = bytearray(whole)
    damaged[10 + place % (len(whole) - 10)] ^= 0x10
    path.write_bytes(bytes(damaged))
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte.gz"):
        load(folder, "mnist")


def test_arrays_are_resized_through_the_cache(tmp_path):
    folder = files.idx(tmp_path, *GREY)
    dataset = load(folder, "mnist", image_size=48)
    assert isinstance(dataset.train.images, np.memmap)
    assert dataset.train.images.shape == (50, 48, 48, 3)
    assert dataset.train.mean == (0.1307,) * 3
    np.testing.assert_array_equal(dataset.train.labels, GREY[0][1])
    same = load(folder, "mnist", image_size=32).train.images
    np.testing.assert_array_equal(same, np.repeat(GREY[0][0][..., None], 3, axis=-1))
