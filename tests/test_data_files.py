"""Image files: official layouts, splits, decoding, damage, and the cache."""

import os
import pathlib
import signal
import stat
import subprocess
import sys
import tarfile
import time
import zipfile

import numpy as np
import pytest
from PIL import Image

from dpmix_jax import UserError, data
from dpmix_jax.data import DataConfig, cache, images, splits, trees
from tests import files
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("DPMIX_JAX_CACHE", str(folder))
    return folder / "data"


def load(path, name="folder", **options):
    return data.load(DataConfig(name=name, path=str(path), **options))


def tree(root, count=5, **options):
    return files.put(root, files.class_members(["cat", "dog"], count, **options))


def packed(tmp_path, members, kind):
    if kind == "folder":
        return files.put(tmp_path / "unpacked", members)
    if kind == "zip":
        return files.make_zip(tmp_path / "x.zip", members)
    return files.tar(tmp_path / f"x{kind}", members, {".tar": "w"}.get(kind, "w:gz"))


def pixels(content):
    return images.decode(content)


KINDS = ["folder", "zip", ".tar", ".tar.gz"]


@pytest.mark.parametrize("kind", KINDS)
def test_eurosat(tmp_path, kind):
    members = files.eurosat_members()
    dataset = load(packed(tmp_path, members, kind), "eurosat")
    assert dataset.train.class_names == tuple(files.EUROSAT.split())
    ordered = sorted(members)
    labels = np.repeat(np.arange(10), 10)
    train, test = splits.stratified(labels)
    assert np.bincount(labels[test]).tolist() == [2] * 10
    for records, indices in ((dataset.train, train), (dataset.test, test)):
        np.testing.assert_array_equal(records.labels, labels[indices])
        for image, index in zip(records.images, indices, strict=True):
            np.testing.assert_array_equal(image, pixels(ordered[index][1]))
        assert isinstance(records.images, np.memmap)
        assert not records.images.flags.writeable


@pytest.mark.parametrize("kind", KINDS)
def test_caltech256_skips_what_is_no_image_of_a_class(tmp_path, kind, capsys):
    path = packed(tmp_path, files.caltech_members(), kind)
    for _ in range(2):  # from the files, then from the cache
        dataset = load(path, "caltech256")
        shown = capsys.readouterr().err
        assert "1 not images by their suffix, 1 in a subfolder of a class" in shown
        assert "1 left out by the split" in shown
    assert dataset.train.class_names == ("001.ak47", "056.dog", "198.spider")
    assert (len(dataset.train), len(dataset.test)) == (14, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_sun397_has_nested_classes(tmp_path, kind):
    dataset = load(packed(tmp_path, files.sun_members(), kind), "sun397")
    assert dataset.train.class_names == files.SUN
    assert (len(dataset.train), len(dataset.test)) == (12, 3)
    everything = np.concatenate([dataset.train.labels, dataset.test.labels])
    assert np.bincount(everything).tolist() == [5, 5, 5]
    place = next(i for i, label in enumerate(dataset.train.labels) if label == 1)
    members = dict(files.sun_members())
    nested = [pixels(v) for k, v in members.items() if "/outdoor/" in k]
    assert any(np.array_equal(dataset.train.images[place], image) for image in nested)


@pytest.mark.parametrize("kind", ["folder", "archives"])
def test_oxford_iiit_pet(tmp_path, kind, capsys):
    members, annotations = files.pet_members()
    if kind == "folder":
        files.put(tmp_path, [*members, *annotations])
    else:
        files.tar(tmp_path / "images.tar.gz", members)
        files.tar(tmp_path / "annotations.tar.gz", annotations)
    dataset = load(tmp_path, "oxford_iiit_pet")
    assert dataset.train.class_names == files.PETS
    assert dataset.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert dataset.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    expected = pixels(dict(members)["images/american_bulldog_3.jpg"])
    np.testing.assert_array_equal(dataset.test.images[3], expected)
    assert "1 not images by their suffix" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Bengal_0 3", "Bengal_0 2", "class 2 is american_bulldog and, for Bengal_0"),
        ("Bengal_0 3", "Bengal_0 4", "a breed has two classes"),
        ("Bengal_0 3", "Bengal_9 3", "Bengal_9 has no image"),
        ("Bengal_0 3", "Bengal_1 3", "Bengal_1 has no image, or is listed twice"),
        ("Bengal_0 3", "Bengal_2 3", "Bengal_2 has no image, or is listed twice"),
        ("Bengal_0 3", "Bengal_0 x", "is not `<breed>_<number>"),
    ],
)
def test_pet_lists_that_contradict_themselves_are_refused(tmp_path, old, new, message):
    members, annotations = files.pet_members()
    files.put(tmp_path, [*members, *annotations])
    path = tmp_path / "annotations/trainval.txt"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError, match=message):
        load(tmp_path, "oxford_iiit_pet")


def test_splits_have_the_sizes_of_the_paper():
    sizes = lambda split: tuple(len(part) for part in split)  # noqa: E731
    assert sizes(splits.stratified(np.arange(27000) % 10)) == (21600, 5400)
    assert sizes(splits.uniform(np.zeros(30607))) == (24485, 6121)
    assert sizes(splits.uniform(np.zeros(108754))) == (87003, 21750)
    train, test = splits.uniform(np.zeros(30607))
    assert len({*train, *test}) == 30606
    assert (np.diff(train) > 0).all()


def test_folder_with_train_and_test(tmp_path):
    tree(tmp_path, 3, top="train/")
    tree(tmp_path, 2, top="test/")
    dataset = load(tmp_path)
    assert dataset.train.class_names == ("cat", "dog")
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.test.labels.tolist() == [0, 0, 1, 1]
    (tmp_path / "test/bird").mkdir()
    files.put(tmp_path, files.class_members(["bird"], 1, top="test/"))
    with pytest.raises(UserError, match="class 'bird' is in train/ or in test/"):
        load(tmp_path)


def test_folder_splits_by_class(tmp_path):
    dataset = load(tree(tmp_path, 10))
    assert np.bincount(dataset.train.labels).tolist() == [8, 8]
    assert np.bincount(dataset.test.labels).tolist() == [2, 2]
    with pytest.raises(UserError, match="cannot be split by class"):
        load(tree(tmp_path / "few", 1))


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_class_is_an_error(tmp_path, kind):
    members = files.class_members(["cat", "dog"], 5)
    path = packed(tmp_path, [*members, ("empty/notes.txt", b"none")], kind)
    with pytest.raises(UserError, match="class 'empty' has no images"):
        load(path)


def test_an_empty_folder_is_an_empty_class(tmp_path):
    (tree(tmp_path / "a") / "empty").mkdir()
    with pytest.raises(UserError, match="class 'empty' has no images"):
        load(tmp_path / "a")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name, content in files.class_members(["cat", "dog"], 5):
            archive.writestr(name, content)
        archive.mkdir("empty")
    with pytest.raises(UserError, match="class 'empty' has no images"):
        load(tmp_path / "x.zip")


def test_trees_that_are_no_dataset_are_refused(tmp_path):
    (tmp_path / "none").mkdir()
    for path, message in (
        (tmp_path / "none", "two or more folders of classes in it, there are 0"),
        (tmp_path / "absent", "there is no such file"),
        (tree(tmp_path / "a", top="train/"), "train/ but no test/"),
    ):
        with pytest.raises(UserError, match=message):
            load(path)
    (tmp_path / "x.rar").write_bytes(b"Rar!")
    with pytest.raises(UserError, match=r"a folder, or an archive that ends in \.zip"):
        load(tmp_path / "x.rar")
    with pytest.raises(UserError, match=r"ClassName.txt is missing"):
        load(tree(tmp_path / "b"), "sun397")
    with pytest.raises(UserError, match=r"images or images.tar.gz is missing.*robots"):
        load(tmp_path / "b", "oxford_iiit_pet")
    with pytest.raises(UserError, match=r"github.com/phelber/EuroSAT, then `python"):
        load(tmp_path / "absent", "eurosat")


def test_modes_become_rgb(tmp_path):
    colour = Image.fromarray(files.picture(0))
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    deep = Image.fromarray(grey.astype(np.uint16) << 8 | 0x7F)
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
    }
    for name, (content, expected) in cases.items():
        if isinstance(expected, Image.Image):
            expected = np.asarray(expected.convert("RGB"))
        np.testing.assert_array_equal(images.decode(content), expected, err_msg=name)
    jpeg = images.decode(files.encoded(colour.convert("CMYK"), ".jpg", quality=95))
    assert np.abs(jpeg.astype(int) - np.asarray(colour)).mean() < 30
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees: ignored
    turned = files.encoded(files.picture(0, (4, 8)), exif=exif)
    assert images.decode(turned).shape == (4, 8, 3)
    with pytest.raises(images.BadImageError, match="mode F"):
        images.decode(files.encoded(Image.fromarray(grey.astype(np.float32)), ".tif"))


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


def test_images_that_cannot_be_decoded_are_counted(tmp_path, cache_folder):
    tree(tmp_path)
    whole = (tmp_path / "cat/cat_3.png").read_bytes()
    (tmp_path / "cat/cat_3.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "dog/dog_2.png").write_bytes(b"")
    (tmp_path / "dog/dog_4.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    with pytest.raises(UserError, match=r"3 images .*cannot be decoded, .*cat_3.png"):
        load(tmp_path)
    assert not [path for path in cache_folder.iterdir() if path.is_dir()]
    jpeg = files.encoded(files.picture(0, (64, 64)), ".jpg")
    with pytest.raises(images.BadImageError, match="truncated"):
        images.decode(jpeg[: len(jpeg) // 2])


def test_images_that_unpack_to_too_much_are_refused():
    wide = files.encoded(Image.new("1", (20000, 10000)))
    assert len(wide) < 100_000
    with pytest.raises(images.BadImageError, match=r"more than|exceeds"):
        images.decode(wide)
    line = files.encoded(Image.new("L", (60000, 1)))
    with pytest.raises(images.BadImageError, match=r"are more than 67,108,864 pixels"):
        images.decode(line, image_size=224)


@pytest.mark.parametrize("kind", ["zip", ".tar.gz"])
def test_archives_keep_to_themselves(tmp_path, kind, monkeypatch):
    members = files.class_members(["cat", "dog"], 5)
    for name in ("../evil.png", "/evil.png", "cat/../../evil.png", "cat\\..\\evil.png"):
        with pytest.raises(UserError, match="points outside"):
            load(packed(tmp_path, [*members, (name, members[0][1])], kind))
    assert not list(tmp_path.rglob("evil.png"))
    monkeypatch.setattr(trees, "MAX_BYTES", 1000)
    with pytest.raises(
        UserError, match=r"big.png has 1,001 bytes, it must have at most"
    ):
        load(packed(tmp_path, [*members, ("cat/big.png", bytes(1001))], kind))


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", ["zip", ".tar.gz"])
def test_duplicate_names_are_refused(tmp_path, kind):
    members = files.class_members(["cat", "dog"], 5)
    with pytest.raises(UserError, match=r"it holds cat/cat_1.png twice"):
        load(packed(tmp_path, [*members, members[0]], kind))
    with pytest.raises(UserError, match=r"it holds cat/cat_1.png twice"):
        load(packed(tmp_path, [*members, ("./cat/cat_1.png", b"")], kind))


def test_truncated_or_lying_zips_are_refused(tmp_path):
    path = files.make_zip(tmp_path / "x.zip", files.class_members(["cat", "dog"], 5))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"x\.zip: cannot be read"):
        load(path)
    damaged = bytearray(whole)
    damaged[150] ^= 0xFF  # inside of the first image
    path.write_bytes(bytes(damaged))
    with pytest.raises(UserError, match=r"x\.zip: cannot be read \(Bad CRC"):
        load(path)


def test_links_to_folders_are_skipped_to_files_followed(tmp_path, capsys):
    root = tree(tmp_path / "a")
    (root / "cat" / "loop").symlink_to(root)
    (root / "again").symlink_to(root / "cat")
    (root / "cat" / "cat_6.png").symlink_to(root / "dog" / "dog_1.png")
    (root / "cat" / ".hidden.png").write_bytes(b"")
    os.mkfifo(root / "cat" / "pipe.png")
    dataset = load(root)
    assert dataset.train.class_names == ("cat", "dog")
    assert len(dataset.train) + len(dataset.test) == 11
    shown = capsys.readouterr().err
    assert "2 links to folders" in shown
    assert "1 hidden" in shown
    assert "1 neither files nor folders" in shown
    (root / "cat" / "cat_7.png").symlink_to(root / "nowhere")
    with pytest.raises(UserError, match=r"cannot be read .*cat_7.png"):
        load(root)


def test_links_in_archives_are_skipped(tmp_path, capsys):
    link = tarfile.TarInfo("cat/link.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    members = files.class_members(["cat", "dog"], 5)
    path = files.tar(tmp_path / "x.tar", [*members, (link, b"")], "w")
    zipped = zipfile.ZipInfo("cat/link.png")
    zipped.external_attr = (stat.S_IFLNK | 0o777) << 16
    other = files.make_zip(tmp_path / "x.zip", [*members, (zipped, "/etc/passwd")])
    for archive in (path, other):
        assert len(load(archive).train) == 8
        assert "1 neither files nor folders" in capsys.readouterr().err


def test_cache_is_used_private_and_renewed(tmp_path, cache_folder, monkeypatch):
    root = tree(tmp_path / "a")
    before = load(root).train.digest()
    (found,) = [path for path in cache_folder.iterdir() if path.is_dir()]
    assert stat.S_IMODE(found.stat().st_mode) == 0o700
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_prepare", None)
        assert load(root).train.digest() == before
    first = root / "cat/cat_1.png"
    (root / "dog/dog_5.png").replace(first)
    files.put(root, [("dog/dog_5.png", files.encoded(files.picture(7)))])
    assert load(root).train.digest() != before
    assert len([path for path in cache_folder.iterdir() if path.is_dir()]) == 2
    (found / "train_images.npy").write_bytes(b"")
    with pytest.raises(UserError, match="is damaged, delete it"):
        cache._open(found)


def test_validation_of_mapped_images_is_mapped(tmp_path):
    root = tree(tmp_path / "a", 10)
    whole, split = load(root), load(root, validation_size=5)
    assert (len(split.train), len(split.validation)) == (11, 5)
    order = np.random.default_rng(0).permutation(16)
    for records, indices in ((split.validation, order[:5]), (split.train, order[5:])):
        assert isinstance(records.images, np.memmap)
        np.testing.assert_array_equal(records.images, whole.train.images[indices])
    assert split.train.digest() == load(root, validation_size=5).train.digest()


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


def prepare(root, seconds):
    return subprocess.Popen(
        [sys.executable, "-c", PREPARE, str(root), str(seconds)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_killed_preparation_leaves_no_cache(tmp_path, cache_folder):
    root = tree(tmp_path / "a")
    killed = prepare(root, 60)
    assert killed.stdout.readline() == "decoding\n"
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    left = [path.name for path in cache_folder.iterdir() if path.is_dir()]
    assert all(name.endswith(".partial") for name in left)
    assert left
    dataset = load(root)
    assert len(dataset.train) == 8
    assert not list(cache_folder.glob("*.partial"))


def test_two_preparations_at_once_make_one_cache(tmp_path, cache_folder):
    root = tree(tmp_path / "a")
    both = [prepare(root, 0.2) for _ in range(2)]
    shown = [process.communicate()[0] for process in both]
    digest = load(root).train.digest()
    assert all(text.split()[-1] == digest for text in shown)
    assert sum(text.count("decoding") for text in shown) == 10  # each image once
    assert len([path for path in cache_folder.iterdir() if path.is_dir()]) == 1


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("DPMIX_JAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"the cache .* cannot be written"):
        load(tree(tmp_path / "a"))


def test_long_work_shows_its_progress(tmp_path, monkeypatch, capsys):
    clock = iter(range(0, 10**6, 6))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    load(tree(tmp_path / "a"))
    assert (
        "preparing folder: 2 of 10 images, 0/s, ETA 0:00:48" in capsys.readouterr().err
    )


def test_digest_of_a_map_does_not_read_it_whole(tmp_path, monkeypatch):
    records = load(tree(tmp_path / "a")).train
    whole = records.digest()
    monkeypatch.setattr("dpmix_jax.data.records._DIGEST_BYTES", 500)
    assert records.digest() == whole
    assert pathlib.Path(records.images.filename).exists()
