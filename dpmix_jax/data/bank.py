"""Banks: public images in a folder for each class, all of them one set.

`dpmix_jax.synthetic` writes them; any other folders of images will do as well.
"""

import functools
import pathlib
import urllib.parse
from collections.abc import Sequence

from dpmix_jax.data import cache, folder, images
from dpmix_jax.data.records import Records
from dpmix_jax.data.trees import ARCHIVES, Tree, open_tree
from dpmix_jax.errors import UserError

_PLAIN = " !&'()+,=@"  # beside letters, digits and `_.-~`


def class_folder(name: str) -> str:
    """Returns the name of the folder of a class, from which `class_of` gets it back.

    Percent-encoded are slashes, what is not ASCII, and what would hide the folder:
    `T-shirt/top` is in `T-shirt%2Ftop`.

    Raises:
      UserError: if the name is empty, or too long for a folder.
    """
    quoted = urllib.parse.quote(name, safe=_PLAIN)
    if name.startswith(".") or name == "__MACOSX":
        quoted = f"%{ord(name[0]):02X}{quoted[1:]}"
    if not 0 < len(quoted) < 256:
        raise UserError(
            f"class {name!r} has a name of {len(quoted)} bytes: a folder can have 1 to"
            " 255"
        )
    return quoted


def class_of(folder_name: str) -> str:
    """Returns the class whose folder this is."""
    return urllib.parse.unquote(folder_name)


def load_bank(
    path: str | pathlib.Path,
    class_names: Sequence[str],
    image_size: int = 0,
    *,
    channels: int = 3,
    mean: tuple[float, ...] | None = None,
    stddev: tuple[float, ...] | None = None,
) -> Records:
    """Reads all images of a bank, through the cache of decoded images.

    Args:
      path: of a folder or archive with `<class>/<image>`. What is not an image by its
        suffix is passed over, such as `manifest.json`.
      class_names: of the dataset that the bank is for, whose labels it gets.
      image_size: 0 keeps images as they are, which must then be of one size; else see
        `images.fit`.
      channels: 3, or 1 for grey.
      mean, stddev: [channels] public constants, those of the dataset; by default 0.5.

    Returns:
      Images in the order of (class, file name).

    Raises:
      UserError: if it cannot be read, has a folder of another class, or no images of
        one.
    """
    place = pathlib.Path(path).expanduser()
    if not (place.is_dir() or (place.exists() and place.name.endswith(ARCHIVES))):
        raise UserError(f"bank {place}: there is no such folder or archive")
    tree, names = open_tree(place), tuple(class_names)
    found = cache.decoded(
        "bank",
        [tree.identity(), names, image_size, channels],
        lambda: _listed(tree, names),
        functools.partial(images.decode, image_size=image_size, channels=channels),
    )
    pixels, labels = found.train
    return Records(
        images=pixels,
        labels=labels,
        class_names=names,
        mean=(0.5,) * channels if mean is None else mean,
        stddev=(0.5,) * channels if stddev is None else stddev,
    )


def _listed(tree: Tree, class_names: tuple[str, ...]) -> cache.Encoded:
    labels = {name: label for label, name in enumerate(class_names)}
    for name in sorted(tree.folders):
        if class_of(name.split("/")[0]) not in labels:
            some = ", ".join(repr(known) for known in class_names[:10])
            raise UserError(
                f"bank {tree.path}: folder {name!r} is of no class; classes are {some}"
                f"{', ...' if len(class_names) > 10 else ''}"
            )
    examples = []
    for name in tree.files:
        parts = pathlib.PurePosixPath(name).parts
        if len(parts) == 2 and pathlib.Path(name).suffix.lower() in folder.SUFFIXES:
            examples.append(cache.Example(name, labels[class_of(parts[0])]))
    for label in sorted({*labels.values()} - {label for _, label in examples}):
        raise UserError(f"bank {tree.path}: class {class_names[label]!r} has no images")
    return cache.Encoded(
        class_names=class_names,
        train=sorted(examples, key=lambda example: (example.label, example.key)),
        test=[],
        contents=tree.contents,
        skipped={},
        splits=("train",),
    )
