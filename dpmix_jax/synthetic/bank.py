"""A bank: `<class>/<number>.png` and `manifest.json`, written image by image.

Each PNG tells its seed and a checksum of its pixels, by which a resumed run knows which
images it can keep.
"""

import collections
import dataclasses
import hashlib
import io
import json
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from dpmix_jax.data import images
from dpmix_jax.data.folder import class_folder
from dpmix_jax.data.trees import reading
from dpmix_jax.errors import UserError
from dpmix_jax.files import locked, write_atomically
from dpmix_jax.progress import bar, say
from dpmix_jax.synthetic.plan import Plan, Wanted

_FORMAT = 1
_KEYWORD = "dpmix_jax"  # of the text in each PNG
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_ATTEMPTS = 10  # for an image that the generator refuses to show


class Generator(Protocol):
    """Makes images, each from its class and seed alone.

    Attributes:
      settings: everything else that the images depend on; JSON.
    """

    settings: dict[str, Any]

    def __call__(self, wanted: Sequence[Wanted]) -> list[np.ndarray | None]:
        """Returns uint8 [H, W, C] for each, None for what must not be shown."""


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
    bank = _Bank(path, plan, generator.settings)
    with locked(path, f"bank {path}"):
        try:
            bank.check()
            tries = {wanted: bank.tries(wanted) for wanted in plan.wanted()}
            missing = [wanted for wanted, count in tries.items() if count is None]
            if missing:
                bank.write_manifest(finished=False, refused=None)
            if len(missing) < plan.count:
                say(f"bank {path}: {plan.count - len(missing):,} images kept")
            refused = sum(count or 0 for count in tries.values())
            refused += _make(bank, plan, generator, missing, batch_size)
            return bank.write_manifest(finished=True, refused=refused)
        except OSError as error:
            raise UserError(
                f"bank {path} cannot be written: {error.strerror or error}"
            ) from None


def _make(
    bank: "_Bank",
    plan: Plan,
    generator: Generator,
    missing: Sequence[Wanted],
    batch_size: int,
) -> int:
    """Makes and writes images batch by batch; returns how many tries were refused."""
    queue, refused = collections.deque(missing), 0
    with bar(total=len(missing), desc=f"bank {bank.path}") as progress:
        while queue:
            batch = [queue.popleft() for _ in range(min(batch_size, len(queue)))]
            again = []
            for wanted, pixels in zip(batch, generator(batch), strict=True):
                if pixels is None:
                    again.append(_next_try(plan, wanted))
                    refused += 1
                else:
                    bank.write(wanted, pixels)
                    progress.update()
            queue.extendleft(reversed(again))
    return refused


def _next_try(plan: Plan, wanted: Wanted) -> Wanted:
    if wanted.attempt + 1 == _ATTEMPTS:
        raise UserError(
            f"image {wanted.number} of class {wanted.class_name!r} is refused by the"
            f" safety checker for {_ATTEMPTS} seeds in a row: use another --prompt,"
            " --seed or --model"
        )
    return plan.attempt(wanted.label, wanted.number, wanted.attempt + 1)


class _Bank:
    """The folder of a bank, which nobody else writes to meanwhile."""

    def __init__(self, path: pathlib.Path, plan: Plan, settings: dict[str, Any]):
        self.path, self._plan = path, plan
        self._manifest = path / "manifest.json"
        text = json.dumps({**settings, **dataclasses.asdict(plan)}, sort_keys=True)
        self._settings = json.loads(text)  # as they are read again
        self._key = hashlib.sha256(text.encode()).digest()

    def check(self) -> None:
        """Raises `UserError` if the folder holds anything but this bank."""
        known = {self._manifest}
        if self._manifest.exists():
            self._check_settings()
            known |= {self.file(wanted) for wanted in self._plan.wanted()}
            known |= {file.parent for file in known}
        for file in sorted(self.path.rglob("*")):
            # Hidden are the lock, and what a kill has left.
            if file not in known and not file.name.startswith("."):
                raise UserError(
                    f"bank {self.path} holds {file.relative_to(self.path)}, which is"
                    " not of it: use a new or empty --out"
                )

    def _check_settings(self) -> None:
        new = self._settings
        with reading(str(self._manifest)):
            old = dict(json.loads(self._manifest.read_text())["settings"])
        changed = [
            f"{key} was {old.get(key)!r:.40}, is {new.get(key)!r:.40}"
            for key in {**new, **old}
            if old.get(key) != new.get(key)
        ]
        if changed:
            raise UserError(
                f"bank {self.path} was begun with other settings, use another --out:"
                f" {'; '.join(changed)}"
            )

    def file(self, wanted: Wanted) -> pathlib.Path:
        folder = self.path / class_folder(wanted.class_name)
        return folder / f"{wanted.number:06}.png"

    def tries(self, wanted: Wanted) -> int | None:
        """Returns how often an image was refused, None if it is not as written."""
        try:
            content = self.file(wanted).read_bytes()
            with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
                note, pixels = json.loads(image.info[_KEYWORD]), np.asarray(image)
            attempt = int(note["attempt"])
            tried = self._plan.attempt(wanted.label, wanted.number, attempt)
            expected = self._note(tried, pixels.reshape(self._plan.image_shape))
        except Exception:  # Pillow's decoder raises whatever damage makes it
            return None
        return attempt if content.endswith(_PNG_END) and note == expected else None

    def write(self, wanted: Wanted, pixels: np.ndarray) -> None:
        assert (pixels.shape, pixels.dtype) == (self._plan.image_shape, np.uint8)
        file, note = self.file(wanted), json.dumps(self._note(wanted, pixels))
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, images.encode(pixels, {_KEYWORD: note}))

    def _note(self, wanted: Wanted, pixels: np.ndarray) -> dict[str, Any]:
        content = self._key + repr(pixels.shape).encode() + pixels.tobytes()
        return {
            "class": wanted.class_name,
            "seed": wanted.seed,
            "attempt": wanted.attempt,
            "sha256": hashlib.sha256(content).hexdigest(),
        }

    def write_manifest(self, *, finished: bool, refused: int | None) -> dict[str, Any]:
        """Writes and returns it; how many were refused is known at the end."""
        manifest = {
            "format": _FORMAT,
            "settings": self._settings,
            "finished": finished,
            "refused_by_safety_checker": refused,
        }
        write_atomically(self._manifest, json.dumps(manifest, indent=2) + "\n")
        return manifest
