"""Every dataset by name: where its files may be, its official page, its constants.

To add one, write how its files are read and add it to `SOURCES`.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from dpmix_jax.data import cache, cifar, folder, idx, images, tfds, trees
from dpmix_jax.data.digits import load_digits
from dpmix_jax.data.npz import load_npz
from dpmix_jax.data.records import Records
from dpmix_jax.errors import UserError
from dpmix_jax.places import data_folder
from dpmix_jax.progress import say

Pair = tuple[Records, Records]

# Mean and standard deviation of each channel, for pixels in [0, 1]: published
# constants, never computed from a user's records.
_CLIP = (images.CLIP_MEAN, images.CLIP_STDDEV)  # for photographs
_CONSTANTS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "mnist": ((0.1307,), (0.3081,)),  # as in PyTorch's examples
    "fashion_mnist": ((0.2860,), (0.3530,)),  # as commonly used
}

_DIGITS = tuple("0123456789")
_FASHION_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
_EUROSAT_CLASSES = (
    *("AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial"),
    *("Pasture", "PermanentCrop", "Residential", "River", "SeaLake"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A dataset that can be read, by one of two functions.

    Attributes:
      arrays: reads a path into training and test records: what is small and no files.
      layout: lists the images in the trees of files that `open` makes of a path.
      official: names that the dataset has when it is downloaded or unpacked; none if
        its files are the user's own.
      elsewhere: folders in which an operating system keeps it.
      url: of its official page.
      known: training records, their height, width and channels (0 where images
        differ in size), and classes; None for files of the user's own.
      class_names: where they are constants, in order; else none.
    """

    arrays: Callable[[pathlib.Path], Pair] | None = None
    layout: Callable[..., cache.Encoded] | None = None
    open: Callable[[pathlib.Path], list[trees.Tree]] = lambda p: [trees.open_tree(p)]
    official: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()
    url: str = ""
    known: tuple[int, tuple[int, int, int], int] | None = None
    class_names: tuple[str, ...] = ()


def read(name: str, path: str | None, image_size: int) -> Pair:
    """Returns training and test records of a dataset, in canonical order.

    Args:
      name: of `SOURCES`, or `tfds:<builder>`.
      path: of its files; None for where they are by default.
      image_size: 0 for images as they are, all of one size; else what `images.fit`
        brings them to, in RGB.

    Raises:
      UserError: if they are missing or damaged.
    """
    if name == "digits":
        train, test = load_digits()
    elif tfds.NAME.fullmatch(name):
        return _read_tfds(name, path, image_size)
    else:
        source = SOURCES[name]
        found = find(name, path)
        if source.layout is not None:
            return _read_files(name, source, found, image_size)
        assert source.arrays is not None
        train, test = source.arrays(found)
    return _resized(name, train, test, image_size) if image_size else (train, test)


def class_names(name: str) -> tuple[str, ...]:
    """Returns the classes of a dataset where they are constants, else none."""
    source = _source(name)
    return source.class_names if source else ()


def blank(name: str, image_size: int) -> Records | None:
    """Returns training records of the number and shape of a dataset, all of them black.

    Classes have their names where those are constants, else numbers.

    Raises:
      UserError: if images differ in size and `image_size` is 0.
    """
    source = _source(name)
    if source is None or source.known is None:
        return None
    count, shape, num_classes = source.known
    shape = (image_size, image_size, 3) if image_size else shape
    if 0 in shape:
        raise UserError(
            f"data.image_size is 0: it must be positive, for images of {name} differ in"
            " size"
        )
    black = cache.Decoded(
        class_names=source.class_names or tuple(map(str, range(num_classes))),
        train=(
            np.broadcast_to(np.uint8(0), (count, *shape)),
            np.zeros(count, np.int32),
        ),
        test=(np.zeros((0, *shape), np.uint8), np.zeros(0, np.int32)),
        skipped={},
    )
    return _records(name, black)[0]


def _source(name: str) -> Source | None:
    """Returns what is known of a dataset, prepared by TensorFlow Datasets or not."""
    match = tfds.NAME.fullmatch(name)
    return SOURCES.get(match["builder"] if match else name)


def find(name: str, path: str | None) -> pathlib.Path:
    """Returns the folder or file that holds a dataset.

    Below `path`, or by default below `places.data_folder()`, it may have an official
    name; else it is `path` itself.

    Raises:
      UserError: if there is nothing, with where to get it.
    """
    source = SOURCES[name]
    if path is None:
        tops = [data_folder() / name, data_folder()]
        places = [top / official for top in tops for official in source.official]
        places += [data_folder() / name, *map(pathlib.Path, source.elsewhere)]
    else:
        given = pathlib.Path(path).expanduser()
        places = [given / official for official in source.official] + [given]
    for place in places:
        if place.exists():
            return place
    if not source.official:
        raise UserError(f"data.path is {path}: cannot be read (there is no such file)")
    names = " or ".join(source.official)
    where = path or " or ".join([f"{data_folder()}", *source.elsewhere])
    raise UserError(
        f"data.path is {path}: {name} ({names}) is not in {where}; get it from"
        f" {source.url}, then `python experiments/prepare.py --name={name} --path=<it>`"
    )


def place(name: str, path: str | None) -> pathlib.Path | None:
    """Returns the resolved folder or file that `read` would read; None for `digits`.

    Raises:
      UserError: if there is none.
    """
    if name == "digits":
        return None
    by_tfds = tfds.NAME.fullmatch(name)
    return (tfds.find_version if by_tfds else find)(name, path).resolve()


def _read_files(name: str, source: Source, path: pathlib.Path, image_size: int) -> Pair:
    opened, layout = source.open(path), source.layout
    assert layout is not None
    found = cache.decoded(
        name,
        [*(tree.identity() for tree in opened), image_size],
        lambda: layout(*opened),
        functools.partial(images.decode, image_size=image_size),
    )
    return _records(name, found)


def _read_tfds(name: str, path: str | None, image_size: int) -> Pair:
    folder = tfds.find_version(name, path)
    channels = 3 if image_size else tfds.channels(folder, name=name)
    found = cache.decoded(
        re.sub(r"\W", "-", name),
        [trees.open_tree(folder).identity(), image_size],
        lambda: tfds.list_examples(folder, name=name),
        functools.partial(images.decode, image_size=image_size, channels=channels),
    )
    match = tfds.NAME.fullmatch(name)
    assert match is not None
    return _records(match["builder"], found)


def _records(name: str, found: cache.Decoded) -> Pair:
    if found.skipped:
        reasons = ", ".join(f"{count} {why}" for why, count in found.skipped.items())
        say(f"{name}: files not used: {reasons}")
    channels = found.train[0].shape[-1]
    mean, stddev = _CONSTANTS.get(name, _CLIP if channels == 3 else ((0.5,), (0.5,)))
    train, test = (
        Records(
            images=images,
            labels=labels,
            class_names=found.class_names,
            mean=_broadcast(mean, channels),
            stddev=_broadcast(stddev, channels),
        )
        for images, labels in (found.train, found.test)
    )
    return train, test


def _resized(name: str, train: Records, test: Records, image_size: int) -> Pair:
    """Brings records that are in memory to RGB of another size, through the cache."""
    channels = train.images.shape[-1]
    if channels not in (1, 3):
        raise UserError(
            f"data.image_size is {image_size}: images of {channels} channels cannot be"
            " resized, it must be 0"
        )

    def fit(pixels: np.ndarray) -> np.ndarray:
        plain = pixels[..., 0] if channels == 1 else pixels
        return images.fit(Image.fromarray(plain).convert("RGB"), image_size)

    both = {"train": train, "test": test}
    found = cache.decoded(
        name,
        [train.digest(), test.digest(), image_size],
        lambda: cache.Encoded(
            class_names=train.class_names,
            train=[cache.Example(("train", i), n) for i, n in enumerate(train.labels)],
            test=[cache.Example(("test", i), n) for i, n in enumerate(test.labels)],
            contents=lambda keys: (((s, i), both[s].images[i]) for s, i in keys),
            skipped={},
        ),
        fit,
    )
    resized = (
        dataclasses.replace(
            records,
            images=images,
            mean=_broadcast(records.mean, 3),
            stddev=_broadcast(records.stddev, 3),
        )
        for records, (images, _) in ((train, found.train), (test, found.test))
    )
    train, test = resized
    return train, test


def _broadcast(constants: tuple[float, ...], channels: int) -> tuple[float, ...]:
    return constants * channels if len(constants) == 1 else constants


def _pet_trees(path: pathlib.Path) -> list[trees.Tree]:
    """Returns the images and the annotations, two folders or two archives."""
    found = []
    for part in ("images", "annotations"):
        places = [path / f"{part}{suffix}" for suffix in ("", *trees.ARCHIVES)]
        present = [place for place in places if place.exists()]
        if not present:
            raise UserError(
                f"data.path is {path}: {part} or {part}.tar.gz is missing; get it from"
                f" {SOURCES['oxford_iiit_pet'].url}"
            )
        found.append(trees.open_tree(present[0]))
    return found


def _cifar(classes: int) -> Source:
    mean, stddev = _CONSTANTS[f"cifar{classes}"]
    folders = {
        10: ("cifar-10-batches-bin", "cifar-10-batches-py"),
        100: ("cifar-100-binary", "cifar-100-python"),
    }[classes]
    archives = (f"cifar-{classes}-binary.tar.gz", f"cifar-{classes}-python.tar.gz")
    return Source(
        arrays=functools.partial(
            cifar.load_cifar, num_classes=classes, mean=mean, stddev=stddev
        ),
        official=(*archives, *folders),
        url="https://www.cs.toronto.edu/~kriz/cifar.html",
        known=(50_000, (32, 32, 3), classes),
        class_names=cifar.class_names(classes),
    )


def _idx(name: str, class_names: tuple[str, ...], **places: Any) -> Source:
    mean, stddev = _CONSTANTS[name]
    read = functools.partial(
        idx.load_idx, class_names=class_names, mean=mean, stddev=stddev
    )
    return Source(arrays=read, class_names=class_names, **places)


SOURCES = {
    "digits": Source(known=(1_437, (8, 8, 1), 10), class_names=_DIGITS),  # embedded
    "npz": Source(arrays=load_npz),
    "cifar10": _cifar(10),
    "cifar100": _cifar(100),
    "eurosat": Source(
        layout=folder.eurosat,
        official=("EuroSAT_RGB", "2750", "EuroSAT_RGB.zip", "EuroSAT.zip"),
        url="https://github.com/phelber/EuroSAT",
        known=(21_600, (64, 64, 3), 10),
        class_names=_EUROSAT_CLASSES,
    ),
    "caltech256": Source(
        layout=folder.caltech256,
        official=("256_ObjectCategories", "256_ObjectCategories.tar"),
        url="https://data.caltech.edu/records/nyy15-4j048",
        known=(24_485, (0, 0, 3), 257),
    ),
    "sun397": Source(
        layout=folder.sun397,
        official=("SUN397", "SUN397.tar.gz"),
        url="https://vision.princeton.edu/projects/2010/SUN/",
        known=(87_003, (0, 0, 3), 397),
    ),
    "oxford_iiit_pet": Source(
        layout=folder.oxford_iiit_pet,
        open=_pet_trees,
        official=("oxford-iiit-pet",),
        url="https://www.robots.ox.ac.uk/~vgg/data/pets/",
        known=(3_680, (0, 0, 3), 37),
    ),
    "fashion_mnist": _idx(
        "fashion_mnist",
        _FASHION_CLASSES,
        official=("fashion-mnist",),
        elsewhere=("/usr/share/datasets/fashion-mnist",),  # Debian's package
        url="https://github.com/zalandoresearch/fashion-mnist (or Debian's package"
        " dataset-fashion-mnist)",
        known=(60_000, (28, 28, 1), 10),
    ),
    "mnist": _idx(
        "mnist",
        _DIGITS,
        official=("MNIST/raw",),
        url="http://yann.lecun.com/exdb/mnist/",
        known=(60_000, (28, 28, 1), 10),
    ),
    "folder": Source(layout=folder.class_folders),
}
NAMES = tuple(SOURCES)
