"""Image files whose labels are in their names: any tree of classes, and the layouts of
EuroSAT, Caltech256, SUN397 and Oxford-IIIT Pet.

Classes are those of the folders (or of the official list), which are public. Records
are in the order of (class, file name), as torchvision's ImageFolder has them.
"""

import collections
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from dpmix_jax.data import splits
from dpmix_jax.data.cache import Encoded, Example
from dpmix_jax.data.trees import Tree
from dpmix_jax.errors import UserError
from dpmix_jax.progress import say

SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".gif", ".bmp"),
    *(".ppm", ".pgm", ".tif", ".tiff", ".webp"),
)
_Split = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def eurosat(tree: Tree) -> Encoded:
    """EuroSAT, RGB (Helber et al., 2019): `2750/AnnualCrop/AnnualCrop_1.jpg`."""
    return _divided(tree, _classes(tree, _images(tree)), splits.stratified)


def caltech256(tree: Tree) -> Encoded:
    """Caltech256 (Griffin et al., 2007): `256_ObjectCategories/001.ak47/001_0001.jpg`.

    Only .jpg files directly in the folder of a class count: 30,607, and neither
    `198.spider/RENAME2` nor the subfolder `056.dog/greg`.
    """
    files = _images(tree, suffixes=[".jpg"])
    return _divided(tree, _classes(tree, files), splits.uniform)


def sun397(tree: Tree) -> Encoded:
    """SUN397 (Xiao et al., 2010): `SUN397/a/abbey/sun_<hash>.jpg`, and `ClassName.txt`.

    Classes may be nested (`/a/apartment_building/outdoor`); ClassName.txt lists them.
    """
    listed = [name for name in tree.files if name.endswith("ClassName.txt")]
    if not listed:
        raise UserError(f"data.path is {tree.path}: ClassName.txt is missing")
    top = listed[0].removesuffix("ClassName.txt")
    names = _lines(tree, listed[0])
    labels = {name.strip("/"): label for label, name in enumerate(names)}
    if len(labels) != len(names):
        raise UserError(f"{tree.path / listed[0]} lists a class twice")
    files = _images(tree)
    labelled = []
    for name in files.names:
        label = labels.get(str(pathlib.PurePosixPath(name.removeprefix(top)).parent))
        if label is None:
            files.skipped["in no folder of a class"] += 1
        else:
            labelled.append(Example(name, label))
    found = _Labelled(tuple(names), _complete(tree, labelled, names), files.skipped)
    return _divided(tree, found, splits.uniform)


def oxford_iiit_pet(images: Tree, annotations: Tree) -> Encoded:
    """Oxford-IIIT Pet (Parkhi et al., 2012): 37 breeds, 3,680 and 3,669 images.

    Args:
      images: `images/Abyssinian_1.jpg`; the breed is in the name.
      annotations: `annotations/trainval.txt` and `test.txt`, with lines such as
        `Abyssinian_100 1 1 1`, where the second word numbers the breeds from 1.
    """
    names: dict[int, str] = {}
    files = _images(images)
    places = {pathlib.PurePosixPath(name).stem: name for name in files.names}
    if len(places) != len(files.names):
        raise UserError(f"data.path is {images.path}: an image is in it twice")
    lists = {}
    for split in ("trainval", "test"):
        listed = [f for f in annotations.files if f.split("/")[-1] == f"{split}.txt"]
        if len(listed) != 1:
            raise UserError(
                f"data.path is {annotations.path}: there are {len(listed)} files"
                f" {split}.txt, there must be one"
            )
        lists[split] = [
            _pet(line, names, places, annotations.path / listed[0])
            for line in _lines(annotations, listed[0])
            if not line.startswith("#")
        ]
    _check_breeds(names, annotations.path)
    class_names = tuple(names[number] for number in sorted(names))
    for examples in lists.values():
        _complete(annotations, examples, class_names)
    files.skipped["on neither list"] += len(places)
    return Encoded(
        class_names=class_names,
        train=sorted(lists["trainval"], key=_by_class),
        test=sorted(lists["test"], key=_by_class),
        contents=images.contents,
        skipped=+files.skipped,
    )


def class_folders(tree: Tree) -> Encoded:
    """Any tree with a folder for each class.

    Either `train/<class>/<image>` and `test/<class>/<image>` with the same classes, or
    `<class>/<image>`, of which 20 % of each class become the test set.

    Raises:
      UserError: if a class is empty, or `train` comes without `test`.
    """
    files = _images(tree)
    if "train" not in files.folders:
        say(
            f"{tree.path} has no train/ and test/: 20 % of each class become the test"
            " set, which is not protected, and of which the report shows an image"
        )
        return _divided(tree, _classes(tree, files), splits.stratified)
    if "test" not in files.folders:
        raise UserError(f"data.path is {tree.path}: it has train/ but no test/")
    train, test = (_classes(tree, files.below(split)) for split in ("train", "test"))
    if train.class_names != test.class_names:
        only = min({*train.class_names} ^ {*test.class_names})
        raise UserError(
            f"data.path is {tree.path}: class {only!r} is in train/ or in test/ but not"
            " in both"
        )
    outside = len(files.names) - sum(
        len(found.examples) + sum(found.skipped.values()) for found in (train, test)
    )
    skipped = files.skipped + train.skipped + test.skipped
    skipped["in neither train/ nor test/"] += outside
    return Encoded(
        class_names=train.class_names,
        train=train.examples,
        test=test.examples,
        contents=tree.contents,
        skipped=+skipped,
    )


class _Files(NamedTuple):
    """Images of a tree and its folders, `top` being what all their names begin with."""

    top: str
    names: list[str]
    folders: set[str]  # relative to top
    skipped: collections.Counter

    def below(self, folder: str) -> "_Files":
        top = f"{self.top}{folder}/"
        return _Files(
            top,
            [name for name in self.names if name.startswith(top)],
            {
                name.removeprefix(f"{folder}/")
                for name in self.folders
                if name.startswith(f"{folder}/")
            },
            collections.Counter(),
        )


class _Labelled(NamedTuple):
    class_names: tuple[str, ...]
    examples: list[Example]
    skipped: collections.Counter


def _images(tree: Tree, suffixes: Iterable[str] = SUFFIXES) -> _Files:
    """Finds the images by their suffix, and what lies above all of the classes."""
    names = [
        f for f in tree.files if pathlib.PurePosixPath(f).suffix.lower() in suffixes
    ]
    skipped = collections.Counter(tree.skipped)
    skipped["not images by their suffix"] += len(tree.files) - len(names)
    top, folders = "", tree.folders
    while len(tops := {name.split("/")[0] for name in folders}) == 1:
        only = f"{tops.pop()}/"
        if only == "train/":  # a `test` is missing, which must not go unnoticed
            break
        folders = {f.removeprefix(only) for f in folders if f.startswith(only)}
        if not folders:  # the images are right here
            break
        top += only
    return _Files(top, names, folders if top or folders else tree.folders, skipped)


def _classes(tree: Tree, files: _Files) -> _Labelled:
    """Takes the folder that each image is directly in as its class."""
    class_names = sorted({name.split("/")[0] for name in files.folders})
    if len(class_names) < 2:
        raise UserError(
            f"data.path is {tree.path}: there must be two or more folders of classes in"
            f" it, there are {len(class_names)}"
        )
    labels = {name: label for label, name in enumerate(class_names)}
    skipped, labelled = collections.Counter(files.skipped), []
    for name in files.names:
        parts = name.removeprefix(files.top).split("/")
        if not name.startswith(files.top) or len(parts) == 1:
            skipped["in no folder of a class"] += 1
        elif len(parts) > 2:
            skipped["in a subfolder of a class"] += 1
        else:
            labelled.append(Example(name, labels[parts[0]]))
    return _Labelled(
        tuple(class_names), _complete(tree, labelled, class_names), skipped
    )


def _complete(
    tree: Tree, examples: list[Example], class_names: Iterable[str]
) -> list[Example]:
    """Returns the examples in order, if each class has one."""
    present = {example.label for example in examples}
    for label, name in enumerate(class_names):
        if label not in present:
            raise UserError(f"data.path is {tree.path}: class {name!r} has no images")
    return sorted(examples, key=_by_class)


def _by_class(example: Example) -> tuple[int, str]:
    return example.label, example.key.split("/")[-1]


def _divided(tree: Tree, found: _Labelled, split: _Split) -> Encoded:
    labels = np.array([example.label for example in found.examples])
    train, test = split(labels)
    skipped = collections.Counter(found.skipped)
    skipped["left out by the split"] += len(labels) - len(train) - len(test)
    return Encoded(
        class_names=found.class_names,
        train=[found.examples[index] for index in train],
        test=[found.examples[index] for index in test],
        contents=tree.contents,
        skipped=+skipped,
    )


def _lines(tree: Tree, name: str) -> list[str]:
    try:
        text = tree.read(name).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{tree.path / name} is not text: {error}") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def _pet(
    line: str, names: dict[int, str], places: dict[str, str], path: pathlib.Path
) -> Example:
    """Reads a line of a list; takes its image from `places`, notes its class."""
    words = line.split()
    if len(words) != 4 or not words[1].isdecimal() or "_" not in words[0]:
        raise UserError(f"{path}: {line!r} is not `<breed>_<number> <class> <n> <n>`")
    if words[0] not in places:
        raise UserError(f"{path}: {words[0]} has no image, or is listed twice")
    number, name = int(words[1]), words[0].rsplit("_", 1)[0]
    if names.setdefault(number, name) != name:
        raise UserError(
            f"{path}: class {number} is {names[number]} and, for {words[0]}, {name}"
        )
    return Example(places.pop(words[0]), number - 1)


def _check_breeds(names: Mapping[int, str], path: pathlib.Path) -> None:
    if sorted(names) != list(range(1, len(names) + 1)):
        raise UserError(f"{path}: classes are {sorted(names)}, they must be 1, 2, ...")
    if len(set(names.values())) != len(names):
        raise UserError(f"{path}: a breed has two classes")
