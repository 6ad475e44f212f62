"""A bank: `<class>/<number>.png` and `manifest.json`, written image by image.

The seed of an image is a function of the bank's seed, its class and its number: it does
not depend on the batch that the image is made in, nor on interruptions. Each PNG tells
its seed and a checksum of its pixels, by which a resumed run knows what it can keep.
"""

import collections
import dataclasses
import hashlib
import io
import json
import math
import pathlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from dpmix_jax.data import images
from dpmix_jax.data.bank import class_folder
from dpmix_jax.errors import UserError
from dpmix_jax.files import locked, write_atomically
from dpmix_jax.progress import duration, say

_FORMAT = 1
_KEYWORD = "dpmix_jax"  # of the text in each PNG
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_ATTEMPTS = 10  # for an image that the generator refuses to show
_SECONDS_BETWEEN_LINES = 10.0


class Wanted(NamedTuple):
    """An image to be made: the `number`-th of a class, at the `attempt`-th try."""

    label: int
    class_name: str
    number: int
    attempt: int
    seed: int  # of 63 bits


_Made = tuple[Wanted, np.ndarray]


class Generator(Protocol):
    """Makes images, each from its class and seed alone.

    Attributes:
      settings: everything else that the images depend on; JSON.
    """

    settings: dict[str, Any]

    def __call__(self, wanted: Sequence[Wanted]) -> list[np.ndarray | None]:
        """Returns uint8 [H, W, C] for each, None for what must not be shown."""


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
        twice = [n for n, k in collections.Counter(self.class_names).items() if k > 1]
        if twice:
            raise UserError(f"class {twice[0]!r} is named twice: names must differ")
        for name in self.class_names:
            class_folder(name)
        if self.count < len(self.class_names) or not self.class_names:
            raise UserError(
                f"--count is {self.count}: it must be at least 1 for each of the"
                f" {len(self.class_names)} classes"
            )
        if self.seed < 0:
            raise UserError(f"--seed is {self.seed}: it must be at least 0")

    def wanted(self) -> Iterator[Wanted]:
        """Yields first tries, classes in turn: a bank is balanced while it grows."""
        for index in range(self.count):
            number, label = divmod(index, len(self.class_names))
            yield self.attempt(label, number + 1, 0)

    def attempt(self, label: int, number: int, attempt: int) -> Wanted:
        """Returns an image to be made, the first of a class having number 1."""
        key = f"{self.seed}/{label}/{number}/{attempt}".encode()
        seed = int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1
        return Wanted(label, self.class_names[label], number, attempt, seed)


def fill(
    path: pathlib.Path, plan: Plan, generator: Generator, *, batch_size: int
) -> dict[str, Any]:
    """Writes what a bank lacks; returns its manifest.

    Valid images of a run that was stopped are kept; those that are cut off, altered or
    of another seed are made again. An image that the generator refuses to show is made
    with the seed of the next try, and counted in the manifest.

    Raises:
      UserError: if the folder is of a bank with other settings or holds anything else,
        cannot be written, or an image is refused at every try.
    """
    with locked(path, f"bank {path}"):
        try:
            return _Bank(path, plan, generator.settings).fill(generator, batch_size)
        except OSError as error:
            raise UserError(
                f"bank {path} cannot be written: {error.strerror or error}"
            ) from None


class _Bank:
    def __init__(self, path: pathlib.Path, plan: Plan, settings: Mapping[str, Any]):
        self.path, self.plan, self.refused = path, plan, 0
        everything = {**settings, **dataclasses.asdict(plan)}
        self.settings = json.loads(json.dumps(everything))  # as they are read again
        text = json.dumps(everything, sort_keys=True)
        self._key = hashlib.sha256(text.encode()).digest()

    def fill(self, generator: Generator, batch_size: int) -> dict[str, Any]:
        manifest = self.path / "manifest.json"
        if manifest.exists():
            self._check_settings(manifest)
        self._check_files(manifest)
        missing = self._missing()
        if missing:
            self._write_manifest(finished=False)
        made = self._made(generator, missing, batch_size)
        for batch in self._progress(made, len(missing)):
            for wanted, pixels in batch:
                self._write(wanted, pixels)
        return self._write_manifest(finished=True)

    def _file(self, wanted: Wanted) -> pathlib.Path:
        name = f"{wanted.number:06}.png"
        return self.path / class_folder(wanted.class_name) / name

    def _check_settings(self, manifest: pathlib.Path) -> None:
        """Raises if the folder was begun with others."""
        try:
            kept = json.loads(manifest.read_text())["settings"]
            both = [(k, kept.get(k), self.settings.get(k)) for k in self.settings]
            both += [(k, v, None) for k, v in kept.items() if k not in self.settings]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{manifest} is not of a bank: use another --out") from None
        changed = [
            f"{key} was {_short(old)}, is {_short(new)}"
            for key, old, new in both
            if old != new
        ]
        if changed:
            raise UserError(
                f"bank {self.path} was begun with other settings, use another --out:"
                f" {'; '.join(changed)}"
            )

    def _check_files(self, manifest: pathlib.Path) -> None:
        """Raises if the folder holds what is not of this bank."""
        known = {manifest}
        if manifest.exists():
            known |= {self._file(wanted) for wanted in self.plan.wanted()}
            known |= {file.parent for file in known}
        for file in sorted(self.path.rglob("*")):
            # Hidden are the lock, and what a kill has left.
            if file not in known and not file.name.startswith("."):
                raise UserError(
                    f"bank {self.path} holds {file.relative_to(self.path)}, which is"
                    " not of it: use a new or empty --out"
                )

    def _missing(self) -> list[Wanted]:
        """Returns what is not there or not valid."""
        missing, damaged = [], 0
        for wanted in self.plan.wanted():
            file = self._file(wanted)
            exists = file.exists()
            attempt = self._valid(file.read_bytes(), wanted) if exists else None
            if attempt is None:
                missing.append(wanted)
                damaged += exists
            else:
                self.refused += attempt
        kept = self.plan.count - len(missing)
        if kept or damaged:
            again = f", {damaged:,} damaged or altered to be made again"
            say(f"bank {self.path}: {kept:,} images kept{again if damaged else ''}")
        return missing

    def _valid(self, content: bytes, wanted: Wanted) -> int | None:
        """Returns the try that made the image, None if it is not as it was written."""
        if not content.endswith(_PNG_END):
            return None
        try:
            channels = self.plan.image_shape[-1]
            pixels = images.decode(content, channels=channels)
            with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
                note = json.loads(image.info[_KEYWORD])
                image.verify()  # the checksums, which decoding forgives
            attempt = int(note["attempt"])
        except (images.BadImageError, OSError, SyntaxError):  # it is damaged
            return None
        except (ValueError, LookupError, TypeError):  # its note is not ours
            return None
        if not 0 <= attempt < _ATTEMPTS:
            return None
        tried = self.plan.attempt(wanted.label, wanted.number, attempt)
        return attempt if note == self._note(tried, pixels) else None

    def _note(self, wanted: Wanted, pixels: np.ndarray) -> dict[str, Any]:
        checksum = hashlib.sha256(self._key + repr(pixels.shape).encode())
        checksum.update(np.ascontiguousarray(pixels).data)
        return {
            "class": wanted.class_name,
            "seed": wanted.seed,
            "attempt": wanted.attempt,
            "sha256": checksum.hexdigest(),
        }

    def _made(
        self, generator: Generator, missing: Sequence[Wanted], batch_size: int
    ) -> Iterator[list[_Made]]:
        """Yields images batch by batch; the refused ones join the next batch."""
        queue = collections.deque(missing)
        while queue:
            batch = [queue.popleft() for _ in range(min(batch_size, len(queue)))]
            shown: list[_Made] = []
            refused: list[Wanted] = []
            for wanted, pixels in zip(batch, generator(batch), strict=True):
                if pixels is None:
                    refused.append(self._again(wanted))
                    continue
                if pixels.shape != self.plan.image_shape or pixels.dtype != np.uint8:
                    raise ValueError(f"{pixels.dtype} {pixels.shape} for {self.plan}")
                self.refused += wanted.attempt
                shown.append((wanted, pixels))
            queue.extendleft(reversed(refused))
            yield shown

    def _again(self, wanted: Wanted) -> Wanted:
        if wanted.attempt + 1 == _ATTEMPTS:
            raise UserError(
                f"image {wanted.number} of class {wanted.class_name!r} is refused by"
                f" the safety checker for {_ATTEMPTS} seeds in a row: use another"
                " --prompt, --seed or --model"
            )
        return self.plan.attempt(wanted.label, wanted.number, wanted.attempt + 1)

    def _progress(
        self, batches: Iterable[list[_Made]], total: int
    ) -> Iterator[list[_Made]]:
        """Says how many images there are, after the first batch and now and then."""
        started, said, count = time.monotonic(), -math.inf, 0
        kept = self.plan.count - total
        for batch in batches:
            yield batch
            count += len(batch)
            now = time.monotonic()
            if now - said > _SECONDS_BETWEEN_LINES and 0 < count < total:
                pace, said = (now - started) / count, now
                say(
                    f"bank {self.path}: {kept + count:,} of {self.plan.count:,} images,"
                    f" {1 / pace:.3g}/s, ETA {duration(pace * (total - count))}"
                )

    def _write(self, wanted: Wanted, pixels: np.ndarray) -> None:
        file = self._file(wanted)
        file.parent.mkdir(exist_ok=True)
        note = json.dumps(self._note(wanted, pixels))
        write_atomically(file, images.encode(pixels, {_KEYWORD: note}))

    def _write_manifest(self, *, finished: bool) -> dict[str, Any]:
        manifest = {
            "format": _FORMAT,
            "settings": self.settings,
            "finished": finished,
            "refused_by_safety_checker": self.refused if finished else None,
        }
        text = json.dumps(manifest, indent=2) + "\n"
        write_atomically(self.path / "manifest.json", text)
        return manifest


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
