"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009) straight from the official archives."""

import hashlib
import io
import pathlib
import pickle
from typing import Any

import numpy as np

from dpmix_jax.data.cache import say
from dpmix_jax.data.records import Records
from dpmix_jax.data.trees import Tree, open_tree, reading
from dpmix_jax.errors import UserError

MD5 = {
    "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
    "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
    "cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8",
    "cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85",
}
# By number of classes: the files of the splits (with .bin in the binary archive), and
# how many bytes of label precede an image there, of which the last is the fine one.
_FILES = {
    10: ([f"data_batch_{number}" for number in range(1, 6)], ["test_batch"], 1),
    100: (["train"], ["test"], 2),
}
_PIXELS = 3 * 32 * 32
_CLASSES = {
    10: "airplane automobile bird cat deer dog frog horse ship truck",
    100: """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach
couch crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster
house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear
pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket
rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip
turtle wardrobe whale willow_tree wolf woman worm""",
}


def class_names(num_classes: int) -> tuple[str, ...]:
    """Returns the 10 or 100 names in the order of the labels."""
    return tuple(_CLASSES[num_classes].split())


def load_cifar(
    path: pathlib.Path,
    *,
    num_classes: int,
    mean: tuple[float, ...],
    stddev: tuple[float, ...],
) -> tuple[Records, Records]:
    """Reads an archive or its extracted folder, binary or of Python pickles.

    Records are in the order of the files, the same in both. The MD5 checksum of an
    archive is printed, with whether it is the official one; any other is read as well.

    Args:
      path: of the archive, or of the folder that it holds.
      num_classes: 10, or 100 for the fine labels of CIFAR-100.
      mean, stddev: public constants.

    Raises:
      UserError: if a file is missing or damaged, holds no whole number of records, or a
        label is out of range.
    """
    tree = open_tree(path)
    if path.is_file():
        say(_checked(path))
    train, test, label_bytes = _FILES[num_classes]
    by_name = _by_name(tree)
    splits = []
    for names in (train, test):
        if all(f"{name}.bin" in by_name for name in names):
            read, wanted = _read_binary, [f"{name}.bin" for name in names]
        else:
            read, wanted = _read_pickle, names
        for name in wanted:
            if name not in by_name:
                raise UserError(f"data.path is {path}: {name} is missing")
        contents = dict(tree.contents([by_name[name] for name in wanted]))
        parts = [
            read(contents.pop(by_name[name]), label_bytes, path / by_name[name])
            for name in wanted
        ]
        splits.append(
            Records(
                images=np.concatenate([images for images, _ in parts]),
                labels=np.concatenate([labels for _, labels in parts]),
                class_names=class_names(num_classes),
                mean=mean,
                stddev=stddev,
            )
        )
    return splits[0], splits[1]


def _checked(path: pathlib.Path) -> str:
    with reading(path), open(path, "rb") as file:
        md5 = hashlib.file_digest(
            file, lambda: hashlib.md5(usedforsecurity=False)
        ).hexdigest()
    official = {checksum: name for name, checksum in MD5.items()}.get(md5)
    verdict = f"the official {official}" if official else "not an official archive"
    return f"{path}: MD5 {md5}, {verdict}"


def _by_name(tree: Tree) -> dict[str, str]:
    """Maps the last parts of names to names, which the archives have in one folder."""
    by_name: dict[str, str] = {}
    for name in tree.files:
        other = by_name.setdefault(name.split("/")[-1], name)
        if other != name:
            raise UserError(f"data.path is {tree.path}: it holds {other} and {name}")
    return by_name


def _read_binary(
    content: bytes, label_bytes: int, path: pathlib.Path
) -> tuple[np.ndarray, np.ndarray]:
    size = label_bytes + _PIXELS
    if len(content) % size:
        raise UserError(
            f"{path} has {len(content)} bytes, no multiple of a record's {size}"
        )
    table = np.frombuffer(content, np.uint8).reshape(-1, size)
    labels = table[:, label_bytes - 1].astype(np.int32)
    return _pixels(table[:, label_bytes:]), labels


def _read_pickle(
    content: bytes, label_bytes: int, path: pathlib.Path
) -> tuple[np.ndarray, np.ndarray]:
    key = b"labels" if label_bytes == 1 else b"fine_labels"
    try:
        batch = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
        pixels, labels = np.asarray(batch[b"data"]), np.asarray(batch[key])
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{path} cannot be read ({error})") from None
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (_PIXELS,):
        raise UserError(
            f"{path} holds images of {pixels.dtype} {pixels.shape}, they must be uint8"
            f" [N, {_PIXELS}]"
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != pixels.shape[:1]:
        raise UserError(
            f"{path} holds labels of {labels.dtype} {labels.shape}, they must be"
            f" integers, one for each of {len(pixels)} images"
        )
    labels = np.clip(labels, -1, 2**15)  # or the cast could wrap into range
    return _pixels(pixels), labels.astype(np.int32)


def _pixels(flat: np.ndarray) -> np.ndarray:
    """[N, 3072], red, green and blue planes by rows -> [N, 32, 32, 3]."""
    return np.ascontiguousarray(flat.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _latin1(text: str, encoding: str) -> bytes:
    """Does what Python 3 asks of `_codecs.encode` for bytes in an old protocol."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding}")
    return text.encode("latin1")


class _ArraysOnly(pickle.Unpickler):
    """Rebuilds NumPy arrays and plain containers, and calls nothing else."""

    _reconstruct: Any = np.zeros(0).__reduce__()[0]
    _allowed = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _latin1,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self._allowed[module, name]
