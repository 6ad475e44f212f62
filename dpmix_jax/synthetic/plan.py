"""Which images a bank has: the class, the number and the seed of each.

The seed of an image is a function of the bank's seed, its class and its number: it does
not depend on the batch that the image is made in, nor on interruptions.
"""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

from dpmix_jax.data import DataConfig, blank, datasets
from dpmix_jax.data.rendered import image_seed
from dpmix_jax.data.trees import reading
from dpmix_jax.errors import UserError, require


class Wanted(NamedTuple):
    """An image to be made: the `number`-th of a class, at the `attempt`-th try."""

    label: int
    class_name: str
    number: int
    attempt: int
    seed: int  # of 63 bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Which images a bank has; as many of each class as possible, the first get more.

    Attributes:
      class_names: in the order of the dataset's labels.
      count: of all images.
      seed: of the bank.
      image_shape: height, width and channels (1 or 3) of each.
    """

    class_names: tuple[str, ...]
    count: int
    seed: int
    image_shape: tuple[int, int, int]

    def __post_init__(self):
        height, width, channels = self.image_shape
        if height != width or channels not in (1, 3) or not 1 <= height <= 2048:
            raise UserError(
                f"--image_size makes images {self.image_shape}: they must be square, of"
                " 1 to 2048 pixels a side, and RGB or grey"
            )
        for name in self.class_names:
            if self.class_names.count(name) > 1:
                raise UserError(f"class {name!r} is named twice: names must differ")
        classes = len(self.class_names)
        allowed = f"at least 1 for each of the {classes} classes"
        require(0 < classes <= self.count, "--count", self.count, allowed)
        require(self.seed >= 0, "--seed", self.seed, "at least 0")

    def wanted(self) -> Iterator[Wanted]:
        """Yields first tries, classes in turn: a bank is balanced while it grows."""
        for index in range(self.count):
            number, label = divmod(index, len(self.class_names))
            yield self.attempt(label, number + 1, 0)

    def attempt(self, label: int, number: int, attempt: int) -> Wanted:
        """Returns an image to be made, the first of a class having number 1."""
        seed = image_seed(self.seed, label, number, attempt)
        return Wanted(label, self.class_names[label], number, attempt, seed)


def make_plan(
    *,
    data: str | None,
    path: str | None,
    classes: str | None,
    count: int | None,
    image_size: int,
    seed: int,
) -> Plan:
    """Plans a bank as the flags of `experiments/generate.py` say, which explains them.

    Of a dataset only its classes, its number of records and the shape of its images
    are taken, which are constants but for `npz`, `folder` and unknown `tfds:`.

    Raises:
      UserError: naming the flag that is missing or wrong.
    """
    names = () if classes is None else _listed(pathlib.Path(classes).expanduser())
    shape = (image_size, image_size, 3)
    if data is not None:
        own = blank(DataConfig(name=data, path=path, image_size=image_size))
        if names and len(names) != own.num_classes:
            raise UserError(
                f"--classes is {classes}: it names {len(names)} classes, {data} has"
                f" {own.num_classes}"
            )
        known = datasets.public_source(data)
        names = names or (known.class_names if known else own.class_names)
        count = len(own) if count is None else count
        shape = own.image_shape
    elif path is not None:
        raise UserError(f"--path is {path}: it needs --data")
    for flag, value in (("classes", names), ("count", count), ("image_size", shape[0])):
        if value in ((), None, 0):
            raise UserError(
                f"--{flag} is missing: give it, or a --data that tells it without its"
                " files"
            )
    assert count is not None
    return Plan(class_names=names, count=count, seed=seed, image_shape=shape)


def _listed(path: pathlib.Path) -> tuple[str, ...]:
    with reading(f"--classes is {path}"):
        lines = path.read_text().splitlines()
        names = tuple(line.strip() for line in lines if line.strip())
        if not names:
            raise UserError("it names no classes")
    return names
