"""Public images for DP-Mix_diff: declared in the config, and kept from being private.

The code cannot know what is public; whoever writes the config says so. What it refuses
is the obvious mistake: the private data themselves, under this name or another.
"""

import contextlib
import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Iterator

import numpy as np

from dpmix_jax.data import DataConfig, Dataset, datasets, folder, half, load_bank
from dpmix_jax.data.records import Records
from dpmix_jax.data.rendered import RENDERED, rendered
from dpmix_jax.errors import UserError, require

_NUM_RENDERED = 1_500


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublicConfig:
    """A dataset that is declared public. Nothing in it is protected.

    Its training split is the bank; its test split stays out, so that public test images
    do not enter training. Its classes are those of the training set, in the same order.
    Images that are used only for whitening may have other classes, but for those of a
    bank and drawn ones.

    Attributes:
      name: as for `DataConfig`, or `bank` for a folder of class folders of which all
        images are taken, such as `experiments/generate.py` writes, or
        `rendered_digits` for digits drawn from fonts, or `rendered_clothes` for images
        of the classes of Fashion-MNIST, drawn from what their names mean.
      path: as for `DataConfig`.
      image_size: as for `DataConfig`; None takes that of the private data.
      half: as for `DataConfig`, or None for all. The other half of the private dataset
        is what may be declared public of it.
      download: as for `DataConfig`.
      columns: as for `DataConfig`.
      count: how many images are drawn, None for 1,500; for the last two names alone.
    """

    name: str
    path: str | None = None
    image_size: int | None = None
    half: int | None = None
    download: bool = False
    columns: str = ""
    count: int | None = None

    def __post_init__(self):
        if self.count is not None:
            drawn, enough = self.name in RENDERED, self.count >= 1
            allowed = "at least 1" if drawn else f"None for public.name {self.name!r}"
            require(drawn and enough, "public.count", self.count, allowed)
        of_rendered = dict.fromkeys(RENDERED, ("path", "image_size", "half", "columns"))
        refused = {**of_rendered, "bank": ("half",)}
        for key in refused.get(self.name, ()):
            value = getattr(self, key)
            allowed = f"None for public.name {self.name!r}"
            require(not value, f"public.{key}", value, allowed)
        if self.name in RENDERED:
            return
        if self.is_bank:
            allowed = "the path of a folder for public.name 'bank'"
            require(self.path is not None, "public.path", self.path, allowed)
        with named_public():
            DataConfig(
                name=self.files,
                path=self.path,
                columns=self.columns,
                image_size=self.size(0),
                half=self.half or 0,
            )

    @property
    def is_bank(self) -> bool:
        return self.name == "bank"

    @property
    def files(self) -> str:
        """The dataset whose files lie as these do: those of a bank, as a `folder`."""
        return "folder" if self.is_bank else self.name

    def size(self, default: int) -> int:
        """Returns `image_size`, or that of the private data where there is none."""
        return default if self.image_size is None else self.image_size

    def is_other_half(self, private: DataConfig) -> bool:
        """Whether it has no record of the private data though they are of one set."""
        ours, theirs = (
            # Where a split keeps the shares of classes, other labels split otherwise.
            (config.name, config.path, config.columns)
            for config in (self, private)
        )
        return ours == theirs and {self.half, private.half} == {1, 2}


@contextlib.contextmanager
def named_public() -> Iterator[None]:
    """Says `public.` where reading a dataset says `data.` in its mistakes."""
    try:
        yield
    except UserError as error:
        keys = r"\bdata\.(?=(name|path|columns|image_size|half|download)\b)"
        raise UserError(re.sub(keys, "public.", str(error))) from None


def load_public(
    config: PublicConfig | None,
    private: DataConfig,
    dataset: Dataset,
    *,
    labelled: bool = True,
) -> Records | None:
    """Reads the public images that a private dataset will be trained with, if any.

    Args:
      config: of the public images, or None.
      private: of the private data.
      dataset: what `private` has brought.
      labelled: whether the classes of the images matter. Images of other classes
        than the training set's, which can only whiten, all get the label 0.

    Returns:
      The training split of the public dataset, with the constants of the private one,
      by which its images are normalised.

    Raises:
      UserError: if it cannot be read, if images or classes are unlike those of the
        training set, or if it is, lies in, or shares an image with the private data.
    """
    if config is None:
        return None
    _refuse_private_files(config, private)
    public = _read(config, private, dataset.train)
    public = _alike(config, public, dataset.train, labelled=labelled)
    _refuse_private_images(config, private, public, dataset)
    return public


def blank_public(
    config: PublicConfig | None, private: DataConfig, records: Records
) -> Records | None:
    """Returns black public images, as many as there are and of their shape, if any.

    Args:
      config: of the public images, or None.
      private: of the private data.
      records: training set, or `blank` ones like it.

    Raises:
      UserError: if they cannot be read, are of no known size, or unlike the training
        set's.
    """
    if config is None:
        return None
    if config.name in RENDERED:
        return _rendered(config, records, black=True)
    with named_public():
        public = datasets.blank(config.name, config.size(private.image_size))
    if public is None:
        source = datasets.public_source(private.name)
        if config.is_bank and source and not source.class_names:
            names = folder.bank_classes(str(config.path))
            records = dataclasses.replace(records, class_names=names)
        public = _read(config, private, records)
    elif config.half:  # they are all black
        public = public.subset(np.arange(len(public) // 2))
    labels = np.arange(len(public), dtype=np.int32) % records.num_classes
    names = records.class_names  # of blank records they are not the real ones
    public = dataclasses.replace(public, labels=labels, class_names=names)
    return _alike(config, public, records)


def describe(
    config: PublicConfig | None,
    bank: Records | None,
    images_per_record: int,
    pretraining_updates: int = 0,
    *,
    whitened_by: int = 0,
    checked: bool = True,
) -> str:
    """Says in a privacy statement what public data were used, and what they may hide.

    Args:
      config: of the public images, or None.
      bank: those images, or None.
      images_per_record: k_diff, or 0.
      pretraining_updates: of initial weights on these images, or 0.
      whitened_by: how many of these images set the whitening of embeddings, or 0.
      checked: whether copies of private images were looked for.
    """
    if config is None or bank is None:
        return "none"
    # Not the whole path: the statement is released.
    where = "" if config.path is None else f" ({pathlib.Path(config.path).name})"
    part = f", half {config.half} of its training records" if config.half else ""
    uses = []
    if images_per_record:
        uses.append(
            f"of which {images_per_record} enter each record's set in every update"
        )
    if pretraining_updates:
        uses.append(
            "on which the initial weights were trained for"
            f" {pretraining_updates} updates without noise"
        )
    if whitened_by:
        uses.append(
            f"of which the embeddings of {whitened_by:,} set the mean and the axes by"
            " which all embeddings are whitened"
        )
    origin = (
        "they were drawn by this program from what the names of the classes mean, and"
        " no photograph was used"
        if config.name == "rendered_clothes"
        else "if a generative model made them, its own training set may hold the"
        " private images or images like them"
    )
    copies = (
        "That none is an exact copy of a training record was checked before training,"
        " other copies not; the outcome of that check is not covered"
        if checked
        else "Copies of training or test records among them were not looked for"
    )
    return (
        f"{config.name}{where}{part}, {len(bank):,} images declared public in the"
        f" configuration (sha256 {bank.digest()[:16]}), {' and '.join(uses)}. They are"
        " not protected, and this guarantee holds only for what they do not reveal"
        f" already: {origin}. {copies}"
    )


def _read(config: PublicConfig, private: DataConfig, train: Records) -> Records:
    """Returns all images of a bank, or the training split of another dataset."""
    if config.name in RENDERED:
        return _rendered(config, train)
    channels, size = train.images.shape[-1], config.size(private.image_size)
    with named_public():
        if config.is_bank:
            path, names = str(config.path), train.class_names
            return load_bank(path, names, size, channels=channels)
        public, _ = datasets.read(
            config.name,
            config.path,
            size,
            download=config.download,
            columns=config.columns,
        )
    if len(public) == 0:
        raise UserError(f"public.name is {config.name!r}: it has no training records")
    return half(public, config.half or 0)


def _rendered(config: PublicConfig, train: Records, *, black: bool = False) -> Records:
    """Draws images of the classes and the shape of the private ones, or black ones."""
    name, count = config.name, config.count or _NUM_RENDERED
    height, width, channels = train.images.shape[1:]
    if height != width or not {*train.class_names} <= {*RENDERED[name]}:
        digits = name == "rendered_digits"
        known = "digits 0 to 9" if digits else f"among {', '.join(RENDERED[name])}"
        raise UserError(
            f"public.name is {name!r}: the private classes must be {known}, in square"
            " images"
        )
    shape = (height, width, channels)
    if black:
        images = np.zeros((count, *shape), np.uint8)
        labels = np.arange(count, dtype=np.int32) % train.num_classes
    else:
        images, labels = rendered(train.class_names, shape, count)
    return dataclasses.replace(train, images=images, labels=labels)  # as many of both


def _refuse_private_files(public: PublicConfig, private: DataConfig) -> None:
    if public.name in RENDERED or public.is_other_half(private):
        return
    theirs = datasets.location(private.name, private.path)
    with named_public():
        ours = datasets.location(public.files, public.path, download=public.download)
    same = public.name == private.name and ours == theirs  # also of embedded ones
    inside = ours is not None and theirs is not None and ours.is_relative_to(theirs)
    if same or inside:
        raise UserError(
            f"public.path is {public.path}: {public.name} there is the private training"
            f" set, data.name {private.name!r}, or a part of it; public images must"
            " come from elsewhere"
        )


def _refuse_private_images(
    config: PublicConfig, private: DataConfig, public: Records, dataset: Dataset
) -> None:
    """Compares checksums, so it finds exact copies only, wherever they were read from.

    Copies that were resized, rescaled or encoded again are not found.

    The answer depends on private records. It goes to whoever starts the run and holds
    them anyway; a run that is refused trains nothing and releases nothing.

    Duplicates within one dataset may fall on both of its halves.
    """
    if config.is_other_half(private):
        return
    images = set(image_checksums(public.images))
    kept_back = () if dataset.validation is None else (dataset.validation,)
    for records in (dataset.train, *kept_back):
        if not images.isdisjoint(image_checksums(records.images)):
            raise UserError(
                f"public.path is {config.path}: {config.name} has an image of the"
                " private training set; public images must come from elsewhere"
            )
    shared = sum(image in images for image in image_checksums(dataset.test.images))
    if shared:  # accuracy on them would flatter
        raise UserError(
            f"public.path is {config.path}: {config.name} has {shared} of the test"
            " images; public images must come from elsewhere"
        )


def image_checksums(images: np.ndarray) -> Iterator[bytes]:
    """Yields a checksum of the pixels of each image."""
    for image in images:
        yield hashlib.sha256(np.ascontiguousarray(image).data).digest()


def _alike(
    config: PublicConfig, public: Records, train: Records, *, labelled: bool = True
) -> Records:
    """Returns public images scaled as training images, if they are like those."""
    shape, wanted = public.images.shape[1:], train.images.shape[1:]
    if shape != wanted:
        raise UserError(
            f"public.image_size is {config.image_size}: images of {config.name} are"
            f" {shape}, they must be {wanted} as training images are"
        )
    if public.class_names != train.class_names:
        if labelled:
            raise UserError(
                f"public.name is {config.name!r}: its classes must be those of the"
                f" training set in the same order, {', '.join(train.class_names[:10])},"
                f" but they are {', '.join(public.class_names[:10])}"
                f" ({public.num_classes} instead of {train.num_classes})"
            )
        none = np.zeros(len(public), np.int32)
        names = train.class_names
        public = dataclasses.replace(public, labels=none, class_names=names)
    return dataclasses.replace(
        public, mean=train.mean, stddev=train.stddev, resize=train.resize
    )
