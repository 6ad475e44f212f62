"""Every dataset by name: its files, where they are published, its constants.

To add one, write how its files are read (see `arrays` and `folder`), and add a row to
`SOURCES`.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable

import numpy as np
from PIL import Image

from dpmix_jax.data import arrays, folder, hf, images, tfds
from dpmix_jax.data.cache import Arrays, Listing, decoded
from dpmix_jax.data.download import advice, locate
from dpmix_jax.data.records import Records
from dpmix_jax.data.trees import identity, reading, scan
from dpmix_jax.errors import UserError

# Mean and standard deviation of each channel, for pixels in [0, 1]: published
# constants, never computed from a user's records.
Constants = tuple[tuple[float, ...], tuple[float, ...]]
_CLIP = (images.CLIP_MEAN, images.CLIP_STDDEV)  # for photographs
_PLAIN = ((0.5,), (0.5,))

_DIGITS = tuple("0123456789")
_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach
couch crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster
house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear
pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket
rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip
turtle wardrobe whale willow_tree wolf woman worm"""
_FASHION = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
_EUROSAT = """
AnnualCrop Forest HerbaceousVegetation Highway Industrial Pasture PermanentCrop
Residential River SeaLake"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A dataset that can be read, by one of two functions of the paths of its parts.

    Attributes:
      arrays: reads what is small, and no image files.
      layout: lists image files, each part of them a `Tree`.
      parts: for each the names that it may have, see `download.locate`.
      elsewhere: folders in which an operating system keeps them.
      known: training records, their height, width and channels (0 where images differ
        in size), and classes; None for files of the user's own.
      class_names: where they are constants, in order; else none.
      constants: mean and standard deviation; None for those of CLIP where images are
        RGB, and 0.5 where they are grey.
    """

    arrays: Callable[..., Arrays] | None = None
    layout: Callable[..., Listing] | None = None
    parts: tuple[str, ...] = ("",)
    elsewhere: tuple[str, ...] = ()
    known: tuple[int, tuple[int, int, int], int] | None = None
    class_names: tuple[str, ...] = ()
    constants: Constants | None = None


_IDX = tuple(
    f"{name}-ubyte {name}-ubyte.gz"
    for name in (
        *("train-images-idx3", "train-labels-idx1"),
        *("t10k-images-idx3", "t10k-labels-idx1"),
    )
)

SOURCES = {
    "digits": Source(
        arrays=arrays.digits,
        parts=(),  # it is embedded in scikit-learn
        known=(1_437, (8, 8, 1), 10),
        class_names=_DIGITS,
        constants=_PLAIN,
    ),
    "npz": Source(arrays=arrays.npz, constants=_PLAIN),
    "cifar10": Source(
        arrays=arrays.cifar10,
        parts=(
            "cifar-10-binary.tar.gz cifar-10-python.tar.gz"
            " cifar-10-batches-bin cifar-10-batches-py",
        ),
        known=(50_000, (32, 32, 3), 10),
        class_names=tuple(_CIFAR10.split()),
        constants=((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    ),
    "cifar100": Source(
        arrays=arrays.cifar100,
        parts=(
            "cifar-100-binary.tar.gz cifar-100-python.tar.gz"
            " cifar-100-binary cifar-100-python",
        ),
        known=(50_000, (32, 32, 3), 100),
        class_names=tuple(_CIFAR100.split()),
        constants=((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    ),
    "eurosat": Source(
        layout=folder.eurosat,
        parts=("EuroSAT_RGB 2750 EuroSAT_RGB.zip EuroSAT.zip",),
        known=(21_600, (64, 64, 3), 10),
        class_names=tuple(_EUROSAT.split()),
    ),
    "caltech256": Source(
        layout=folder.caltech256,
        parts=("256_ObjectCategories 256_ObjectCategories.tar",),
        known=(24_485, (0, 0, 3), 257),
    ),
    "sun397": Source(
        layout=folder.sun397,
        parts=("SUN397 SUN397.tar.gz",),
        known=(87_003, (0, 0, 3), 397),
    ),
    "oxford_iiit_pet": Source(
        layout=folder.oxford_iiit_pet,
        parts=("images images.tar.gz", "annotations annotations.tar.gz"),
        known=(3_680, (0, 0, 3), 37),
    ),
    "fashion_mnist": Source(
        arrays=arrays.idx,
        parts=_IDX,
        elsewhere=("/usr/share/datasets/fashion-mnist",),  # Debian's, of other bytes
        known=(60_000, (28, 28, 1), 10),
        class_names=_FASHION,
        constants=((0.2860,), (0.3530,)),  # as commonly used
    ),
    "mnist": Source(
        arrays=arrays.idx,
        parts=_IDX,
        known=(60_000, (28, 28, 1), 10),
        class_names=_DIGITS,
        constants=((0.1307,), (0.3081,)),  # as in PyTorch's examples
    ),
    "folder": Source(layout=folder.class_folders),
}
NAMES = tuple(SOURCES)


def read(
    name: str,
    path: str | None,
    image_size: int,
    *,
    download: bool = False,
    columns: str = "",
) -> tuple[Records, Records]:
    """Returns training and test records of a dataset, in canonical order.

    Args:
      name: of `SOURCES`, `tfds:<builder>` or `hf:<repository>`.
      path: of its files; None for where they are by default.
      image_size: 0 for images as they are, all of one size; else what `images.fit`
        brings them to, in RGB.
      download: whether official files that are missing may be fetched.
      columns: of `hf:`, see `hf.read`.

    Raises:
      UserError: if files are missing or damaged.
    """
    if hf.repository_of(name):
        place = hf.find(name, path, download=download)
        with reading(f"data.path is {place}"):
            return _records(hf.read(name, place, image_size, columns), None)
    if tfds.builder_of(name):
        known, version = public_source(name), tfds.find_version(name, path)
        with reading(f"data.path is {version}"):
            found = tfds.read(name, version, image_size)
            return _records(found, known.constants if known else None)
    source = SOURCES[name]
    parts = locate(name, source.parts, path, source.elsewhere, download=download)
    with reading(f"data.path is {location(name, path)}", lambda: advice(name, parts)):
        if source.layout is not None:
            layout = source.layout
            found = decoded(
                name,
                [*map(identity, parts), image_size],
                lambda: layout(*map(scan, parts)),
                functools.partial(images.decode, image_size=image_size),
            )
            return _records(found, source.constants)
        assert source.arrays is not None
        found = source.arrays(*parts)
        if not found.class_names:
            found = found._replace(class_names=source.class_names)
        train, test = _records(found, source.constants)
        if not image_size:
            return train, test
        return _records(_resized(name, train, test, image_size), source.constants)


def blank(name: str, image_size: int) -> Records | None:
    """Returns training records of the number and shape of a dataset, all of them black.

    Classes have their names where those are constants, else numbers. None is returned
    for files of the user's own.

    Raises:
      UserError: if images differ in size and `image_size` is 0.
    """
    source = public_source(name)
    if source is None or source.known is None:
        return None
    count, shape, num_classes = source.known
    shape = (image_size, image_size, 3) if image_size else shape
    if 0 in shape:
        raise UserError(
            f"data.image_size is 0: it must be positive, for images of {name} differ in"
            " size"
        )
    black = np.broadcast_to(np.uint8(0), (count, *shape)), np.zeros(count, np.int32)
    names = source.class_names or tuple(map(str, range(num_classes)))
    found = Arrays(names, black, (black[0][:0], black[1][:0]))
    return _records(found, source.constants)[0]


def location(
    name: str, path: str | None, *, download: bool = False
) -> pathlib.Path | None:
    """Returns the resolved folder or file that `read` would read; None for `digits`.

    Raises:
      UserError: if there is none.
    """
    if tfds.builder_of(name):
        return tfds.find_version(name, path).resolve()
    if hf.repository_of(name):
        return hf.find(name, path, download=download).resolve()
    source = SOURCES[name]
    parts = locate(name, source.parts, path, source.elsewhere, download=download)
    if len(parts) > 1:
        return parts[0].parent.resolve()
    return parts[0].resolve() if parts else None


def public_source(name: str) -> Source | None:
    """Returns a public dataset, prepared by TensorFlow Datasets or not, else None."""
    source = SOURCES.get(tfds.builder_of(name) or name)
    return source if source and source.known else None


def _records(found: Arrays, constants: Constants | None) -> tuple[Records, Records]:
    """Returns both splits."""

    def split(pixels: np.ndarray, labels: np.ndarray) -> Records:
        channels = pixels.shape[-1] if pixels.ndim == 4 else 1
        mean, stddev = constants or (_CLIP if channels == 3 else _PLAIN)
        return Records(
            images=pixels,
            labels=labels,
            class_names=found.class_names,
            mean=mean * (channels // len(mean)),  # those of grey, for each channel
            stddev=stddev * (channels // len(stddev)),
        )

    train, test = split(*found.train), split(*found.test)
    if train.images.shape[1:] != test.images.shape[1:]:
        raise UserError(
            f"training images are {train.images.shape[1:]}, test images"
            f" {test.images.shape[1:]}: they must be of one size"
        )
    return train, test


def _resized(name: str, train: Records, test: Records, image_size: int) -> Arrays:
    """Brings images that are in memory to RGB of another size, through the cache."""

    def fit(pixels: np.ndarray) -> np.ndarray:
        plain = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
        return images.fit(Image.fromarray(plain).convert("RGB"), image_size)

    def listing() -> Listing:
        both = {"train": train.images, "test": test.images}
        return Listing(
            train.class_names,
            [(("train", row), label) for row, label in enumerate(train.labels)],
            [(("test", row), label) for row, label in enumerate(test.labels)],
            lambda keys: (((split, row), both[split][row]) for split, row in keys),
        )

    return decoded(name, [train.digest(), test.digest(), image_size], listing, fit)
