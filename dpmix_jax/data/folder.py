"""Image files whose labels are in their names: any tree of classes, the layouts of
EuroSAT, Caltech256, SUN397 and Oxford-IIIT Pet, and banks.

Classes are those of the folders (or of the official list), which are public. Records
are in the order of (class, file name), as torchvision's ImageFolder has them. What
lists an official dataset trusts it, and may raise anything if it is damaged.

Where a dataset comes without a test set, it is split as in DP-Mix's script, by
scikit-learn's `train_test_split` with random_state 42; records of either side stay in
the order that they had.
"""

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
from sklearn.model_selection import train_test_split

from dpmix_jax.data import images
from dpmix_jax.data.cache import Listing, decoded
from dpmix_jax.data.images import SUFFIXES
from dpmix_jax.data.records import Records
from dpmix_jax.data.trees import Tree, identity, reading, scan
from dpmix_jax.errors import UserError
from dpmix_jax.progress import say

_PLAIN = " !&'()+,=@"  # in a folder's name, beside letters, digits and `_.-~`


def stratified(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns indices of 80 % and 20 % of the records, every class in proportion.

    EuroSAT's 27,000 become 21,600 and 5,400.

    Raises:
      UserError: if there are too few of a class.
    """
    count = len(labels)
    try:
        return _split(count, test_size=count // 5, stratify=labels)
    except ValueError as error:
        raise UserError(
            f"{count} images cannot be split by class into 80 % for training and 20 %"
            f" for test: {error}"
        ) from None


def uniform(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns indices of 80 % and 20 % of the records, whatever their class.

    Both are rounded down, so one record may be in neither: Caltech256's 30,607 become
    24,485 and 6,121, and SUN397's 108,754 become 87,003 and 21,750.
    """
    count = len(labels)
    return _split(count, train_size=4 * count // 5, test_size=count // 5)


def _split(count: int, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    train, test = train_test_split(np.arange(count), random_state=42, **options)
    return np.sort(train), np.sort(test)


def eurosat(tree: Tree) -> Listing:
    """EuroSAT, RGB (Helber et al., 2019): `2750/AnnualCrop/AnnualCrop_1.jpg`."""
    return divided(_class_folders(tree, _top(tree)), stratified)


def caltech256(tree: Tree) -> Listing:
    """Caltech256 (Griffin et al., 2007): `256_ObjectCategories/001.ak47/001_0001.jpg`.

    Only images directly in the folder of a class count: 30,607, and neither
    `198.spider/RENAME2` nor the subfolder `056.dog/greg`.
    """
    return divided(_class_folders(tree, _top(tree)), uniform)


def sun397(tree: Tree) -> Listing:
    """SUN397 (Xiao et al., 2010): `SUN397/a/abbey/sun_<hash>.jpg`, and `ClassName.txt`.

    Classes may be nested (`/a/apartment_building/outdoor`); ClassName.txt lists them.
    """
    top = tree.named("ClassName.txt").removesuffix("ClassName.txt")
    names = tree.lines("ClassName.txt")
    folders = {f"{top}{name.strip('/')}": label for label, name in enumerate(names)}
    return divided(_labelled(tree, names, folders), uniform)


def oxford_iiit_pet(images: Tree, annotations: Tree) -> Listing:
    """Oxford-IIIT Pet (Parkhi et al., 2012): 37 breeds, 3,680 and 3,669 images.

    Args:
      images: `images/Abyssinian_1.jpg`; the breed is in the name.
      annotations: `annotations/trainval.txt` and `test.txt`, with lines such as
        `Abyssinian_100 1 1 1`, where the second word numbers the breeds from 1.
    """
    paths = map(pathlib.PurePosixPath, images.files)
    files = {p.stem: str(p) for p in paths if p.suffix.lower() in SUFFIXES}
    breeds: dict[int, str] = {}
    splits = []
    for name in ("trainval.txt", "test.txt"):
        lines = [line.split() for line in annotations.lines(name) if line[0] != "#"]
        breeds |= {int(line[1]): line[0].rsplit("_", 1)[0] for line in lines}
        examples = [(files[line[0]], int(line[1]) - 1) for line in lines]
        splits.append(sorted(examples, key=_by_class))
    class_names = tuple(breeds[number] for number in range(1, len(breeds) + 1))
    return Listing(class_names, splits[0], splits[1], images.contents)


def class_folders(tree: Tree) -> Listing:
    """Any tree with a folder for each class.

    Either `train/<class>/<image>` and `test/<class>/<image>` with the same classes, or
    `<class>/<image>`, of which 20 % of each class become the test set.

    Raises:
      UserError: if a class is empty, or `train` comes without `test`.
    """
    top = _top(tree)
    splits = _below(tree, top)
    if "train" not in splits:
        say(
            f"{tree.path} has no train/ and test/: 20 % of each class become the test"
            " set, which is not protected, and of which the report shows an image"
        )
        listing = divided(_class_folders(tree, top), stratified)
    elif "test" not in splits:
        raise UserError("it has train/ but no test/")
    else:
        train, test = (_class_folders(tree, f"{top}{s}/") for s in ("train", "test"))
        unlike = {*train.class_names} ^ {*test.class_names}
        if unlike:
            raise UserError(
                f"class {min(unlike)!r} is in train/ or in test/ but not in both"
            )
        listing = train._replace(test=test.train)
    unused = len(tree.files) - len(listing.train) - len(listing.test)
    if unused:
        say(
            f"{tree.path}: {unused} files are not used, they are no images in folders"
            " of classes, of train/ or of test/"
        )
    return listing


def class_folder(name: str) -> str:
    """Returns the name of the folder of a class in a bank, which `unquote` inverts.

    Percent-encoded are slashes, what is not ASCII, and what would hide the folder:
    `T-shirt/top` is in `T-shirt%2Ftop`.
    """
    quoted = quote(name, safe=_PLAIN)
    if name.startswith(".") or name == "__MACOSX":
        quoted = f"%{ord(name[0]):02X}{quoted[1:]}"
    return quoted


def bank_classes(path: str | pathlib.Path) -> tuple[str, ...]:
    """Returns the classes that a bank has folders of."""
    tree = scan(pathlib.Path(path).expanduser())
    return tuple(sorted({unquote(name.split("/")[0]) for name in tree.folders}))


def load_bank(
    path: str | pathlib.Path,
    class_names: Sequence[str],
    image_size: int = 0,
    *,
    channels: int = 3,
    mean: tuple[float, ...] | None = None,
    stddev: tuple[float, ...] | None = None,
) -> Records:
    """Reads a bank: public images in a folder for each class, all of them one set.

    `dpmix_jax.synthetic` writes banks; any other folders of images will do as well.

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
    path, names = pathlib.Path(path).expanduser(), tuple(class_names)
    with reading(f"bank {path}"):
        found = decoded(
            "bank",
            [identity(path), names, image_size, channels],
            lambda: _bank(scan(path), names),
            functools.partial(images.decode, image_size=image_size, channels=channels),
        )
    return Records(
        images=found.train[0],
        labels=found.train[1],
        class_names=names,
        mean=mean or (0.5,) * channels,
        stddev=stddev or (0.5,) * channels,
    )


def _bank(tree: Tree, class_names: Sequence[str]) -> Listing:
    labels = {name: label for label, name in enumerate(class_names)}
    for name in sorted(tree.folders):
        if unquote(name.split("/")[0]) not in labels:
            some = ", ".join(map(repr, class_names[:10]))
            more = ", ..." if len(class_names) > 10 else ""
            raise UserError(f"folder {name!r} is of no class; classes are {some}{more}")
    folders = {name: labels[unquote(name)] for name in _below(tree, "")}
    return _labelled(tree, class_names, folders)


def _top(tree: Tree) -> str:
    """Returns what lies above the folders of all classes: archives often have one."""
    top, below = "", _below(tree, "")
    # A lone `train` is no such folder: that `test` is missing must not go unnoticed.
    while len(below) == 1 and below != ["train"]:
        deeper = _below(tree, f"{top}{below[0]}/")
        if not deeper:  # the images are in this very folder
            break
        top, below = f"{top}{below[0]}/", deeper
    return top


def _below(tree: Tree, top: str) -> list[str]:
    """Returns the names of the folders directly in a folder, sorted."""
    inside = (name.removeprefix(top) for name in tree.folders if name.startswith(top))
    return sorted({name for name in inside if name and "/" not in name})


def _class_folders(tree: Tree, top: str) -> Listing:
    """Takes the folder that each image is directly in as its class."""
    names = _below(tree, top)
    if len(names) < 2:
        raise UserError(
            "there must be two or more folders of classes in it, there are"
            f" {len(names)}"
        )
    folders = {f"{top}{name}": label for label, name in enumerate(names)}
    return _labelled(tree, names, folders)


def _labelled(
    tree: Tree, class_names: Sequence[str], folders: Mapping[str, int]
) -> Listing:
    """Lists the images directly in the folders of classes, as a training set.

    Args:
      tree: that the folders are in.
      class_names: each must have an image.
      folders: the label of each.
    """
    examples = []
    for name in tree.files:
        path = pathlib.PurePosixPath(name)
        if path.suffix.lower() in SUFFIXES and str(path.parent) in folders:
            examples.append((name, folders[str(path.parent)]))
    present = {label for _, label in examples}
    for label, name in enumerate(class_names):
        if label not in present:
            raise UserError(f"class {name!r} has no images")
    examples.sort(key=_by_class)
    return Listing(tuple(class_names), examples, [], tree.contents)


def _by_class(example: tuple[str, int]) -> tuple[int, str]:
    return example[1], example[0].split("/")[-1]


def divided(whole: Listing, split: Any) -> Listing:
    """Moves a part of the training set to the test set."""
    train, test = split(np.array([label for _, label in whole.train]))
    return whole._replace(
        train=[whole.train[index] for index in train],
        test=[whole.train[index] for index in test],
    )
