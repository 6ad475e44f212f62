"""Writes small datasets in the formats of the official files."""

import gzip
import io
import pickle
import struct
import tarfile
import zipfile

import numpy as np
from PIL import Image


def learnable(num_records, num_classes, size=32, seed=0):
    """Images whose class shows: each has a colour of its own, under noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(num_records) % num_classes
    colours = np.random.default_rng(99).integers(40, 215, (num_classes, 1, 1, 3))
    noise = rng.normal(0, 20, (num_records, size, size, 3))
    images = np.clip(colours[labels] + noise, 0, 255).astype(np.uint8)
    order = rng.permutation(num_records)
    return images[order], labels[order].astype(np.int64)


def tar(path, members, mode="w:gz"):
    """Writes a tar of pairs (name or TarInfo, content)."""
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def make_zip(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def flat(images):
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def cifar_members(num_classes, kind, train, test):
    """The files of an official archive, whose batches are `train` in five parts."""
    top = {
        (10, "binary"): "cifar-10-batches-bin",
        (10, "python"): "cifar-10-batches-py",
        (100, "binary"): "cifar-100-binary",
        (100, "python"): "cifar-100-python",
    }[num_classes, kind]
    parts = {"test_batch" if num_classes == 10 else "test": test}
    if num_classes == 100:
        parts["train"] = train
    else:
        cuts = zip(*(np.array_split(array, 5) for array in train), strict=True)
        for number, part in enumerate(cuts, start=1):
            parts[f"data_batch_{number}"] = part
    encode = cifar_binary if kind == "binary" else cifar_pickle
    suffix = ".bin" if kind == "binary" else ""
    return [
        (f"{top}/{name}{suffix}", encode(num_classes, *part))
        for name, part in parts.items()
    ]


def cifar_binary(num_classes, images, labels):
    columns = [labels] if num_classes == 10 else [labels // 5, labels]
    table = [column[:, None].astype(np.uint8) for column in columns]
    return np.concatenate([*table, flat(images)], axis=1).tobytes()


def cifar_pickle(num_classes, images, labels, protocol=2):
    names = ["labels"] if num_classes == 10 else ["fine_labels", "coarse_labels"]
    content = {name.encode(): [int(label) for label in labels] for name in names}
    return pickle.dumps({b"data": flat(images), **content}, protocol)


def cifar(path, num_classes=10, kind="binary", train=None, test=None):
    members = cifar_members(num_classes, kind, train, test)
    return tar(path / f"cifar-{num_classes}-{kind}.tar.gz", members)


def idx(folder, train, test, compress=True):
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, (images, labels) in (("train", train), ("t10k", test)):
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            shape = struct.pack(f">{array.ndim}I", *array.shape)
            header = bytes((0, 0, 8, array.ndim)) + shape
            content = header + array.astype(np.uint8).tobytes()
            name = f"{prefix}-{kind}-ubyte"
            if compress:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)
    return folder


def encoded(pixels, suffix=".png", **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    kind = {".jpg": "JPEG", ".tif": "TIFF"}.get(suffix, suffix[1:].upper())
    image.save(file, kind, **options)
    return file.getvalue()


def picture(number, shape=(8, 8)):
    """A uint8 image that no other number has."""
    return np.random.default_rng(number).integers(0, 256, (*shape, 3)).astype(np.uint8)


def put(root, members):
    """Writes pairs (name, content) below a folder."""
    for name, content in members:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def class_members(classes, count, top="", suffix=".png", shape=(8, 8)):
    """`count` images of each class: `<top><class>/<class>_<number><suffix>`."""
    return [
        (
            f"{top}{name}/{name.split('/')[-1]}_{number}{suffix}",
            encoded(picture(1000 * label + number, shape), suffix),
        )
        for label, name in enumerate(classes)
        for number in range(1, count + 1)
    ]


EUROSAT = (
    "AnnualCrop Forest HerbaceousVegetation Highway Industrial Pasture PermanentCrop"
    " Residential River SeaLake"
)


def eurosat_members(count=10):
    return class_members(EUROSAT.split(), count, top="2750/", suffix=".jpg")


CALTECH = ("001.ak47", "056.dog", "198.spider")


def caltech_members(count=6):
    """Three classes, with the two oddities of the official archive."""
    top = "256_ObjectCategories/"
    return [
        *class_members(CALTECH, count, top=top, suffix=".jpg"),
        (f"{top}056.dog/greg/vision301/056_0100.jpg", encoded(picture(5000), ".jpg")),
        (f"{top}198.spider/RENAME2", b"#!/usr/bin/perl\n"),
    ]


SUN = ("/a/abbey", "/a/apartment_building/outdoor", "/z/zen_garden")


def sun_members(count=5):
    names = [name.strip("/") for name in SUN]
    return [
        *class_members(names, count, top="SUN397/", suffix=".jpg"),
        ("SUN397/ClassName.txt", "\n".join(SUN).encode()),
        ("SUN397/README.txt", b"see the paper"),
    ]


PETS = ("Abyssinian", "american_bulldog", "Bengal")


def pet_members(count=4):
    """Half of each breed is for training; one file is a .mat, as in the original."""
    images, lists = [], {"trainval": ["#Image CLASS-ID SPECIES BREED ID"], "test": []}
    for label, breed in enumerate(PETS, start=1):
        for number in range(count):
            name = f"{breed}_{number}"
            pixels = picture(100 * label + number)
            images.append((f"images/{name}.jpg", encoded(pixels, ".jpg")))
            split = "trainval" if number < count // 2 else "test"
            lists[split].append(f"{name} {label} 1 {label}")
    images.append(("images/Abyssinian_0.mat", b"MATLAB 5.0"))
    return images, [
        (f"annotations/{split}.txt", "\n".join(lines).encode())
        for split, lines in lists.items()
    ]
