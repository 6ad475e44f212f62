"""Image files: official layouts, splits, decoding, archives, and the cache."""

import contextlib
import os
import signal
import stat
import subprocess
import sys
import tarfile
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from dpmix_jax import UserError, data, progress
from dpmix_jax.data import DataConfig, cache, folder, images
from tests import files
from tests.conftest import ROOT

PAIR = ["cat", "dog"]
KINDS = ["folder", "zip", ".tar", ".tar.gz"]


@pytest.fixture(autouse=True)
def caches(tmp_path_factory, monkeypatch):
    top = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("DPMIX_JAX_CACHE", str(top))
    return top / "data"


def load(path, name="folder", **options):
    return data.load(DataConfig(name=name, path=str(path), **options))


def tree(root, count=5, **options):
    return files.put(root, files.class_members(PAIR, count, **options))


def packed(tmp_path, members, kind):
    if kind == "folder":
        return files.put(tmp_path / "unpacked", members)
    if kind == "zip":
        return files.make_zip(tmp_path / "x.zip", members)
    return files.tar(tmp_path / f"x{kind}", members, {".tar": "w"}.get(kind, "w:gz"))


@pytest.mark.parametrize(
    ("name", "members", "class_names", "sizes"),
    [
        ("eurosat", files.eurosat_members(), files.EUROSAT.split(), (80, 20)),
        # What is no image of a class is passed over; one record is in neither split.
        ("caltech256", files.caltech_members(), files.CALTECH, (14, 3)),
        ("sun397", files.sun_members(), files.SUN, (12, 3)),  # it has nested classes
    ],
)
def test_official_layouts(tmp_path, name, members, class_names, sizes):
    """Each image has the label of its folder, and is in the same place in any kind."""
    datasets = [load(packed(tmp_path, members, kind), name) for kind in KINDS]
    again = load(tmp_path / "x.zip", name)  # from the cache
    for records in zip(*(dataset[:2] for dataset in (*datasets, again)), strict=True):
        assert len({each.digest() for each in records}) == 1
    train, test = datasets[0][:2]
    assert train.class_names == tuple(class_names)
    assert (len(train), len(test)) == sizes
    folders = {
        bytes(images.decode(content)): os.path.dirname(file)
        for file, content in members
        if file.endswith(".jpg")
    }
    for records in (train, test):
        assert isinstance(records.images, np.memmap)
        assert not records.images.flags.writeable
        for image, label in zip(records.images, records.labels, strict=True):
            assert folders[bytes(image)].endswith(class_names[label])


def test_oxford_iiit_pet(tmp_path):
    members, annotations = files.pet_members()
    files.put(tmp_path / "a", [*members, *annotations])
    (tmp_path / "b").mkdir()
    files.tar(tmp_path / "b/images.tar.gz", members)
    files.tar(tmp_path / "b/annotations.tar.gz", annotations)
    for top in ("a", "b"):
        dataset = load(tmp_path / top, "oxford_iiit_pet")
        assert dataset.train.class_names == files.PETS
        assert dataset.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
        assert dataset.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
        expected = images.decode(dict(members)["images/american_bulldog_3.jpg"])
        np.testing.assert_array_equal(dataset.test.images[3], expected)


def test_splits_have_the_sizes_of_the_paper():
    sizes = lambda split: tuple(len(part) for part in split)  # noqa: E731
    labels = np.arange(27000) % 10
    assert sizes(folder.stratified(labels)) == (21600, 5400)
    test = labels[folder.stratified(labels)[1]]
    assert np.bincount(test).tolist() == [540] * 10
    assert sizes(folder.uniform(np.zeros(30607))) == (24485, 6121)
    assert sizes(folder.uniform(np.zeros(108754))) == (87003, 21750)
    train, test = folder.uniform(np.zeros(30607))
    assert len({*train, *test}) == 30606
    assert (np.diff(train) > 0).all()


def test_folder_with_train_and_test(tmp_path, capsys):
    tree(tmp_path, 3, top="x/train/")
    tree(tmp_path, 2, top="x/test/")
    files.put(tmp_path, [("x/train/cat/notes.txt", b""), ("x/readme.png", b"")])
    dataset = load(tmp_path)
    assert dataset.train.class_names == ("cat", "dog")
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.test.labels.tolist() == [0, 0, 1, 1]
    assert "2 files are not used" in capsys.readouterr().err
    files.put(tmp_path, files.class_members(["bird"], 1, top="x/test/"))
    with pytest.raises(UserError, match="class 'bird' is in train/ or in test/"):
        load(tmp_path)


def test_folder_splits_by_class(tmp_path, capsys):
    dataset = load(tree(tmp_path / "a", 10))
    assert np.bincount(dataset.train.labels).tolist() == [8, 8]
    assert np.bincount(dataset.test.labels).tolist() == [2, 2]
    assert "20 % of each class become the test set" in capsys.readouterr().err
    with pytest.raises(UserError, match="cannot be split by class"):
        load(tree(tmp_path / "few", 1))


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_an_empty_class_is_an_error(tmp_path, kind):
    """A class that depended on its records would tell whether there are any."""
    members = files.class_members(PAIR, 5)
    path = packed(tmp_path, [*members, ("empty/notes.txt", b"none")], kind)
    with pytest.raises(UserError, match="class 'empty' has no images"):
        load(path)
    if kind == "folder":  # also where nothing is in its folder
        (path / "empty/notes.txt").unlink()
        with pytest.raises(UserError, match="class 'empty' has no images"):
            load(path)


def test_trees_that_are_no_dataset_are_refused(tmp_path):
    (tmp_path / "none").mkdir()
    (tmp_path / "x.rar").write_bytes(b"Rar!")
    for path, message in (
        (tmp_path / "absent", "there is no such file"),
        (tmp_path / "none", "two or more folders of classes in it, there are 0"),
        (files.put(tmp_path / "a", [("cat/a.png", b"")]), "classes in it, there are 1"),
        (tree(tmp_path / "c", top="train/"), "train/ but no test/"),
        (tmp_path / "x.rar", r"a folder, or an archive that ends in \.zip"),
    ):
        with pytest.raises(UserError, match=message):
            load(path)


def test_modes_become_rgb():
    colour = Image.fromarray(files.picture(0))
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    deep = Image.fromarray(grey.astype(np.uint16) << 8 | 0x7F)
    pgm = (grey.astype(">u2") << 8 | 0x7F).astype(">u2").tobytes()
    clear = colour.quantize(8)
    clear.info["transparency"] = 0
    cases = {
        "grey": (files.encoded(grey), np.stack([grey] * 3, -1)),
        "deep": (files.encoded(deep), np.stack([grey] * 3, -1)),
        "palette": (files.encoded(colour.quantize(8)), colour.quantize(8)),
        "clear": (files.encoded(clear, transparency=b"\0\x80"), colour.quantize(8)),
        "alpha": (files.encoded(colour.convert("RGBA")), colour),
        "gif": (files.encoded(colour.quantize(8), ".gif"), colour.quantize(8)),
        "cmyk": (files.encoded(colour.convert("CMYK"), ".tif"), colour),
        "pgm": (b"P5 8 8 65535\n" + pgm, np.stack([grey] * 3, -1)),
    }
    for name, (content, expected) in cases.items():
        if isinstance(expected, Image.Image):
            expected = np.asarray(expected.convert("RGB"))
        np.testing.assert_array_equal(images.decode(content), expected, err_msg=name)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees: ignored
    turned = files.encoded(files.picture(0, (4, 8)), exif=exif)
    assert images.decode(turned).shape == (4, 8, 3)
    wide = files.encoded(Image.new("1", (20000, 10000)))  # of few bytes
    line = files.encoded(Image.new("L", (60000, 1)))
    for content, size, message in (
        (files.encoded(Image.fromarray(grey.astype(np.float32)), ".tif"), 0, "mode F"),
        (wide, 0, "more than|exceeds"),
        (line, 224, "are more than 67,108,864 pixels"),
    ):
        with pytest.raises(Exception, match=message):
            images.decode(content, image_size=size)


@pytest.mark.parametrize("shape", [(300, 500), (500, 333), (64, 64), (17, 64)])
def test_resizing_is_that_of_torchvision_and_clip(shape):
    """Against the steps written out: Resize(64, bicubic), CenterCrop(64)."""
    photo = Image.fromarray(files.picture(0, shape))
    width, height = photo.size
    if width <= height:
        small = photo.resize((64, int(64 * height / width)), Image.Resampling.BICUBIC)
    else:
        small = photo.resize((int(64 * width / height), 64), Image.Resampling.BICUBIC)
    left = round((small.width - 64) / 2.0)
    top = round((small.height - 64) / 2.0)
    expected = np.asarray(small)[top : top + 64, left : left + 64]
    np.testing.assert_array_equal(images.fit(photo, 64), expected)


def test_sizes_that_differ_need_image_size(tmp_path):
    tree(tmp_path)
    (tmp_path / "dog/dog_1.png").write_bytes(files.encoded(files.picture(0, (9, 12))))
    with pytest.raises(UserError, match=r"cat_1.png is .*dog_1.png is .*image_size"):
        load(tmp_path)
    assert load(tmp_path, image_size=6).train.images.shape == (8, 6, 6, 3)


def test_images_that_cannot_be_decoded_are_named(tmp_path, caches):
    tree(tmp_path)
    whole = (tmp_path / "cat/cat_3.png").read_bytes()
    for content, message in (
        (b"", "its 0 bytes are none of JPEG, PNG,"),
        (whole[: len(whole) // 2], "truncated"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "bytes are none of JPEG, PNG,"),
    ):
        (tmp_path / "cat/cat_3.png").write_bytes(content)
        (tmp_path / "dog/dog_2.png").write_bytes(content)
        with pytest.raises(
            UserError, match=rf"2 images .* cat/cat_3.png \(.*{message}"
        ):
            load(tmp_path)
    assert {path.name for path in caches.glob("*/*")} == {".lock"}


def test_a_class_whose_name_is_not_utf8_is_refused(tmp_path):
    root = tree(tmp_path)
    os.rename(os.fsencode(root / "cat"), os.fsencode(root) + b"/\xff")
    with pytest.raises(UserError, match=r"class '\\udcff': its name must be UTF-8"):
        load(root)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", ["zip", ".tar.gz"])
def test_archives_keep_to_themselves(tmp_path, kind):
    """Names outside of it are passed over; of two files of one name, one is read."""
    members = files.class_members(PAIR, 5)
    names = ["../evil.png", "/evil.png", "cat/../../evil.png", "./cat/cat_1.png"]
    names += ["__MACOSX/cat/a.png", "cat/.hidden.png", ".git/a.png"]
    more = [*members, *((name, members[0][1]) for name in names)]
    dataset = load(packed(tmp_path, more, kind))
    assert (len(dataset.train), len(dataset.test)) == (8, 2)
    assert not list(tmp_path.rglob("evil.png"))


@pytest.mark.parametrize("kind", KINDS[1:])
def test_damaged_archives_are_one_clear_error(tmp_path, kind):
    path = packed(tmp_path, files.class_members(PAIR, 5), kind)
    whole = path.read_bytes()
    damaged = whole[:150] + bytes(16) + whole[166:]
    for content in (whole[: len(whole) // 2], b"", b"text", damaged):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{path.name}: cannot be read"):
            load(path)


def test_links_to_folders_are_passed_over_to_files_followed(tmp_path, capsys):
    root = tree(tmp_path / "a")
    (root / "cat" / "loop").symlink_to(root)
    (root / "again").symlink_to(root / "cat")
    (root / "cat" / "cat_6.png").symlink_to(root / "dog" / "dog_1.png")
    (root / "cat" / ".hidden.png").write_bytes(b"")
    os.mkfifo(root / "cat" / "pipe.png")
    dataset = load(root)
    assert dataset.train.class_names == ("cat", "dog")
    assert len(dataset.train) + len(dataset.test) == 11
    told = capsys.readouterr().err
    assert told.count(f"{root / 'again'} is a link to a folder, and is not fol") == 1
    (root / "cat" / "cat_7.png").symlink_to(root / "nowhere")
    with pytest.raises(UserError, match=r"cannot be read .*cat_7.png"):
        load(root)


def test_links_in_a_tar_are_passed_over(tmp_path):
    link = tarfile.TarInfo("cat/link.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    members = [*files.class_members(PAIR, 5), (link, b"")]
    assert len(load(files.tar(tmp_path / "x.tar", members, "w")).train) == 8
    again = tarfile.TarInfo("cat/again.png")  # the same file by another name
    again.type, again.linkname = tarfile.LNKTYPE, members[0][0]
    nothing = tarfile.TarInfo("cat/nothing.png")
    nothing.type, nothing.linkname = tarfile.LNKTYPE, "cat/link.png"
    more = [(again, b""), (nothing, b"")]
    found = load(files.tar(tmp_path / "y.tar", [*members, *more], "w"))
    assert len(found.train) + len(found.test) == 11


def test_cache_is_used_private_and_renewed(tmp_path, caches, monkeypatch):
    root = tree(tmp_path / "a")
    before = load(root).train.digest()
    (made,) = caches.iterdir()
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    for path in (made / "images.uint8", made / "meta.json"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_fill", None)
        assert load(root).train.digest() == before
    (root / "dog/dog_5.png").replace(root / "cat/cat_1.png")
    files.put(root, [("dog/dog_5.png", files.encoded(files.picture(7)))])
    assert load(root).train.digest() != before
    assert len(list(caches.iterdir())) == 2
    for path in caches.glob("*/images.uint8"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="is damaged, delete it"):
        load(root)


def test_validation_of_mapped_images_is_mapped_and_leaves_no_file(tmp_path, caches):
    root = tree(tmp_path / "a", 10)
    whole, split = load(root), load(root, validation_size=5)
    assert (len(split.train), len(split.validation)) == (11, 5)
    order = np.random.default_rng(0).permutation(16)
    for records, indices in ((split.validation, order[:5]), (split.train, order[5:])):
        assert isinstance(records.images, np.memmap)
        np.testing.assert_array_equal(records.images, whole.train.images[indices])
    assert split.train.digest() == load(root, validation_size=5).train.digest()
    left = {path.name for path in caches.parent.rglob("*") if path.is_file()}
    assert left == {".lock", "images.uint8", "meta.json"}


PREPARE = """
import sys, time
from dpmix_jax import data
from dpmix_jax.data import images
decode = images.decode
def slow(content, **options):
    print("decoding\\n", end="", flush=True)  # one write: two threads do it
    time.sleep(float(sys.argv[2]))
    return decode(content, **options)
images.decode = slow
print(data.load(data.DataConfig(name="folder", path=sys.argv[1])).train.digest())
"""


@pytest.mark.slow
def test_several_preparations_make_one_cache(tmp_path, caches):
    """One is killed, and leaves what is no cache; then two want the same one."""

    def prepare(seconds):
        command = [sys.executable, "-c", PREPARE, str(root), str(seconds)]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    root = tree(tmp_path / "a")
    killed = prepare(60)
    assert killed.stdout.readline() == "decoding\n"
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not list(caches.glob("*/meta.json"))
    both = [prepare(0.2) for _ in range(2)]
    shown = [process.communicate()[0] for process in both]
    digest = load(root).train.digest()
    assert all(text.split()[-1] == digest for text in shown)
    assert sum(text.count("decoding") for text in shown) == 10  # each image once
    (made,) = caches.iterdir()
    names = sorted(path.name for path in made.iterdir())
    assert names == [".lock", "images.uint8", "meta.json"]


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, caches):
    root = tree(tmp_path / "a")

    @contextlib.contextmanager
    def full(path, *, mode):
        error = OSError(28, "No space left on device")
        yield mock.Mock(write=mock.Mock(side_effect=error))

    with monkeypatch.context() as patch:
        patch.setattr(cache, "replacing", full)
        with pytest.raises(
            UserError, match=r"the cache .* cannot be written \(No space"
        ):
            load(root)
    assert [path.name for path in caches.glob("*/*")] == [".lock"]
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("DPMIX_JAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(
        UserError, match=r"the cache .*DPMIX_JAX_CACHE, is not writable"
    ):
        load(root)


def test_long_work_shows_its_progress(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "_SECONDS", 0.0)
    load(tree(tmp_path / "a"))
    shown = capsys.readouterr().err
    assert "preparing folder" in shown
    assert "10/10" in shown
