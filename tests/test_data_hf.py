"""Parquet files of the Hugging Face hub, as `datasets` writes them."""

import io
import json
import sys
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from dpmix_jax import UserError, data
from dpmix_jax.data import hf
from tests.files import learnable

NAMES = ("cat", "dog", "mouse")


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def write(path, images, labels, *, names=NAMES, features=None, plain=False, **columns):
    """Writes a Parquet file with the columns `img` and `label`, and others."""
    content = [png(image) for image in images]
    values = content if plain else [{"bytes": c, "path": None} for c in content]
    table = pa.table({"img": values, "label": list(labels), **columns})
    if features is None:
        kind = {"names": list(names), "_type": "ClassLabel"}
        features = {"img": {"_type": "Image"}, "label": kind}
    written = json.dumps({"info": {"features": features}})
    path.parent.mkdir(parents=True, exist_ok=True)
    table = table.replace_schema_metadata({"huggingface": written} if features else {})
    pyarrow.parquet.write_table(table, path, row_group_size=7)
    return path


def load(path, **options):
    return data.load(data.DataConfig(name="hf:a/pets", path=str(path), **options))


def examples(count, seed=0):
    return learnable(count, 3, size=9, seed=seed)


@pytest.mark.parametrize(
    ("first", "second", "test"),
    [
        (
            "data/train-00000-of-00002.parquet",
            "data/train-00001-of-00002.parquet",
            "data/test-00000-of-00001.parquet",
        ),
        ("train/0000.parquet", "train/0001.parquet", "test/0000.parquet"),
        ("train-a.parquet", "train-b.parquet", "validation.parquet"),
    ],
)
def test_splits_are_read_in_the_order_of_files_and_rows(tmp_path, first, second, test):
    parts = [examples(count, seed) for seed, count in enumerate((20, 10, 8))]
    for name, part in zip((first, second, test), parts, strict=True):
        write(tmp_path / name, *part)
    found = load(tmp_path)
    for records, own in ((found.train, parts[:2]), (found.test, parts[2:])):
        images, labels = (np.concatenate(x) for x in zip(*own, strict=True))
        np.testing.assert_array_equal(records.images, images)
        np.testing.assert_array_equal(records.labels, labels)
        assert records.class_names == NAMES


def test_validation_rows_are_for_training_where_there_is_a_test_set(tmp_path):
    for name, count in (("train", 20), ("validation", 9), ("test", 6)):
        write(tmp_path / f"{name}.parquet", *examples(count))
    found = load(tmp_path)
    assert (len(found.train), len(found.test)) == (29, 6)


def test_without_a_test_set_a_fifth_of_each_class_is_split_off(tmp_path):
    write(tmp_path / "data.parquet", *examples(60))
    found = load(tmp_path)
    assert np.bincount(found.train.labels).tolist() == [16] * 3
    assert np.bincount(found.test.labels).tolist() == [4] * 3


@pytest.mark.parametrize("plain", [False, True])
def test_columns_are_named_by_the_config(tmp_path, plain):
    """Classes are those that the files declare, also those that no image has."""
    images, labels = examples(30)
    fine = {"names": ["x", "y", "z", "none"], "_type": "ClassLabel"}
    coarse = {"names": ["one", "other"], "_type": "ClassLabel"}
    features = {"img": {"_type": "Image"}, "label": fine, "coarse": coarse, "id": [{}]}
    for split in ("train", "test"):
        path = tmp_path / f"{split}.parquet"
        half = [int(label > 1) for label in labels]
        write(path, images, labels, features=features, plain=plain, coarse=half)
    by_fine, by_coarse = (
        load(tmp_path, columns=f"img,{label}") for label in ("label", "coarse")
    )
    np.testing.assert_array_equal(by_fine.train.images, images)
    assert by_fine.train.class_names == ("x", "y", "z", "none")
    assert by_coarse.train.class_names == ("one", "other")
    np.testing.assert_array_equal(by_coarse.train.labels, half)
    with pytest.raises(UserError, match=r"data.columns is '': it must be <image>,<la"):
        load(tmp_path)


def test_what_images_hold_decides_nothing_of_others(tmp_path):
    """Grey are those that are declared so: one image of colour changes no other."""
    images, labels = examples(12)
    grey = [*images[:1], *images[1:, ..., 0]]
    declared = {
        "img": {"_type": "Image", "mode": "L"},
        "label": {"names": list(NAMES), "_type": "ClassLabel"},
    }
    for split in ("train", "test"):
        write(tmp_path / "any" / f"{split}.parquet", grey, labels)
        write(tmp_path / "grey" / f"{split}.parquet", grey, labels, features=declared)
    for first in (grey[0], grey[1]):
        write(tmp_path / "any/train.parquet", [first, *grey[1:]], labels)
        found = load(tmp_path / "any").train.images
        np.testing.assert_array_equal(found[1:], np.repeat(images[1:, ..., :1], 3, 3))
    np.testing.assert_array_equal(
        load(tmp_path / "grey").train.images[1:], images[1:, ..., :1]
    )
    assert load(tmp_path / "grey", image_size=4).train.images.shape == (12, 4, 4, 3)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train-00000-of-00002", "test"], "not its part 00001-of-00002"),
        (["train-00001-of-00002", "test"], "not its part 00000-of-00002"),
        (["train", "test", "extra"], r"extra.parquet names none of the splits train,"),
    ],
)
def test_what_is_not_whole_is_refused(tmp_path, names, message):
    for name in names:
        write(tmp_path / f"{name}.parquet", *examples(12))
    with pytest.raises(UserError, match=message):
        load(tmp_path)


def test_a_config_is_a_folder(tmp_path):
    for config, count in (("full", 12), ("small", 6)):
        for split in ("train", "test"):
            write(tmp_path / config / f"{split}.parquet", *examples(count))
    small = data.DataConfig(name="hf:pets:small", path=str(tmp_path))
    assert len(data.load(small).train) == 6
    with pytest.raises(UserError, match=r"it has the folders full, small: name one"):
        load(tmp_path)


def test_the_hub_is_asked_only_if_the_config_allows_it(tmp_path, monkeypatch):
    asked = []

    def snapshot_download(repository, **options):
        asked.append((repository, options))
        if options["local_files_only"]:
            raise RuntimeError("not in the cache")
        return str(tmp_path)

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    write(tmp_path / "train.parquet", *examples(12))
    write(tmp_path / "test.parquet", *examples(12))
    with pytest.raises(UserError, match=r"'hf:a/pets': it is not there \(not in the"):
        data.load(data.DataConfig(name="hf:a/pets"))
    assert len(data.load(data.DataConfig(name="hf:a/pets", download=True)).train) == 12
    options = {"repo_type": "dataset", "allow_patterns": "*.parquet"}
    assert asked == [
        ("a/pets", {**options, "local_files_only": only}) for only in (True, False)
    ]


@pytest.mark.parametrize("module", ["pyarrow.parquet", "huggingface_hub"])
def test_a_missing_extra_is_named(tmp_path, monkeypatch, module):
    write(tmp_path / "train.parquet", *examples(12))
    monkeypatch.setitem(sys.modules, module, None)
    path = None if module == "huggingface_hub" else str(tmp_path)
    with pytest.raises(UserError, match=r'pip install "dpmix_jax\[hf\]"'):
        data.load(data.DataConfig(name="hf:pets", path=path))


def test_what_cannot_be_read_is_one_line(tmp_path):
    images, labels = examples(12)

    def refused(message, path=tmp_path, **options):
        with pytest.raises(UserError, match=message) as error:
            load(path, **options)
        assert "\n" not in str(error.value)

    refused("it must be a folder of Parquet files", tmp_path / "none")
    refused("it has no Parquet files")
    write(tmp_path / "train.parquet", images, labels, features={})
    refused("data.columns is '': it must be <image>,<label>; Image columns: none;")
    write(tmp_path / "train.parquet", images, labels)
    refused("Image columns: img; ClassLabel columns: label", columns="img,kind")
    refused("data.columns is 'img': it must be", columns="img")
    refused("data.columns is 'label,img': it must be", columns="label,img")
    write(tmp_path / "train.parquet", images, [*labels[:3], None, *labels[4:]])
    refused("row 3: it has no label")
    (tmp_path / "train.parquet").write_bytes(b"PAR1 and no more")
    refused("cannot be read")
    with pytest.raises(UserError, match=r"data.columns is 'a,b': it must be empty unl"):
        data.DataConfig(name="digits", columns="a,b")
    write(tmp_path / "test.parquet", images, labels)
    table = pyarrow.parquet.read_table(tmp_path / "test.parquet")
    nothing = pa.array([{"bytes": None, "path": "x"}] * 12)
    pyarrow.parquet.write_table(
        table.set_column(0, "img", nothing), tmp_path / "train.parquet"
    )
    refused(r"row 0: it has no bytes of an image")


@pytest.mark.parametrize("name", ["hf:", "hf:a/b/c", "hf:a b", "hf"])
def test_names_that_are_none(name):
    assert hf.repository_of(name) is None
    with pytest.raises(UserError, match=r"data\.name is"):
        data.DataConfig(name=name)
