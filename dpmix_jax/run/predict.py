"""Labels and probabilities of a folder of images, by a finished run or its export."""

import csv
import io
import os
import pathlib

import numpy as np

from dpmix_jax.data import images
from dpmix_jax.errors import UserError, require
from dpmix_jax.files import write_atomically
from dpmix_jax.progress import bar
from dpmix_jax.run import export

_AT_A_TIME = 256  # images that are in memory


def predict(
    run: pathlib.Path,
    source: pathlib.Path,
    out: pathlib.Path,
    *,
    encoder: str | None = None,
    weights: str | None = None,
) -> int:
    """Writes a line for each image: its file, its label, a probability for each class.

    For a model of square images any image is resized and cropped to their size, as
    `data.image_size` does it; for another model it must have the size of its images.

    Args:
      run: workdir of a finished run, or an export.
      source: an image file, or a folder, with those below it.
      out: CSV file to write, once all images are done.
      encoder: see `export.load`.
      weights: see `export.load`.

    Returns:
      How many images there were.

    Raises:
      UserError: for a folder without a model or without images, for an image that
        cannot be decoded or has another size, or if `out` cannot be written.
    """
    able = os.access(out.parent, os.W_OK) and not out.is_dir()
    require(able, "--out", str(out), "a file in a folder that can be written")
    model = export.load(run, encoder=encoder, weights=weights)
    height, width, channels = export.read_about(run)["stored_shape"]
    paths = image_files(source)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    names = model.class_names  # type: ignore[attr-defined]
    table.writerow(["file", "label", *names])
    with bar(total=len(paths)) as progress:
        for start in range(0, len(paths), _AT_A_TIME):
            part = paths[start : start + _AT_A_TIME]
            pixels = [
                _decoded(path, (height, width, channels), fit=height == width)
                for path in part
            ]
            for path, found in zip(part, model(np.stack(pixels)), strict=True):
                file = path.name if path == source else path.relative_to(source)
                shown = [f"{value:.6f}" for value in found]
                table.writerow([file, names[int(found.argmax())], *shown])
            progress.update(len(part))
    try:
        write_atomically(out, text.getvalue())
    except OSError as error:
        raise UserError(f"--out is {out}: {error.strerror}") from None
    return len(paths)


def image_files(source: pathlib.Path) -> list[pathlib.Path]:
    """Returns the file that `source` is, or the images in and below the folder.

    Raises:
      UserError: if there is none.
    """
    if source.is_file():
        return [source]
    require(source.is_dir(), "--images", str(source), "an image file or a folder")
    found = [
        path
        for path in sorted(source.rglob("*"))
        if path.suffix.lower() in images.SUFFIXES and path.is_file()
    ]
    if not found:
        known = ", ".join(images.SUFFIXES)
        raise UserError(f"--images is {source}: it has no file that ends in {known}")
    return found


def _decoded(
    path: pathlib.Path, shape: tuple[int, int, int], *, fit: bool
) -> np.ndarray:
    try:
        pixels = images.decode(
            path.read_bytes(), image_size=shape[0] * fit, channels=shape[2]
        )
    except Exception as error:  # decoders raise whatever damage makes them
        why = str(error) or type(error).__name__
        raise UserError(f"{path} cannot be decoded: {why}") from None
    if pixels.shape != shape:
        raise UserError(f"{path} is {pixels.shape}: it must be {shape} for this model")
    return pixels
