"""Prepared TensorFlow Datasets, read and written without TensorFlow."""

import shutil
import sys

import numpy as np
import pytest

from dpmix_jax import UserError, data
from dpmix_jax.data import DataConfig, Records, tfds
from dpmix_jax.data.folder import stratified
from tests import files
from tests.programs import call

tensorflow_datasets = pytest.importorskip("tensorflow_datasets")

TRAIN, TEST = files.learnable(600, 10, seed=0), files.learnable(100, 10, seed=1)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DPMIX_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))


def load(name, path, **options):
    return data.load(DataConfig(name=name, path=str(path), **options))


def records(images, labels, names="0123456789"):
    constants = (0.5,) * images.shape[-1]
    return Records(
        images=images,
        labels=labels.astype(np.int32),
        class_names=tuple(names),
        mean=constants,
        stddev=constants,
    )


def build(data_dir, name, features, examples, **options):
    """Prepares a dataset as tfds does: each split shuffled by the key of an example."""
    core, feature = tensorflow_datasets.core, tensorflow_datasets.features

    class Builder(core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = core.Version(options.pop("version", "2.0.0"))

        def _info(self):
            image = feature.Image(shape=(None, None, 3))
            label = feature.ClassLabel(names=options.pop("names", ["cat", "dog"]))
            found = feature.FeaturesDict({"image": image, "label": label, **features})
            return core.DatasetInfo(builder=self, features=found)

        def _split_generators(self, dl_manager):
            return {split: iter(found) for split, found in examples.items()}

        def _generate_examples(self):
            raise NotImplementedError

    Builder.name = name
    builder = Builder(data_dir=str(data_dir), file_format="array_record")
    builder.download_and_prepare()
    return builder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A CIFAR archive, what `prepare.py` makes of it, and what the program says."""
    root = tmp_path_factory.mktemp("cifar")
    archive = files.cifar(root, train=TRAIN, test=TEST)
    flags = ["--name=cifar10", f"--path={archive}", f"--tfds_dir={root / 'out'}"]
    done = call("experiments/prepare.py", flags)
    assert done.returncode == 0, done.stderr
    return archive, root / "out", done.stdout


@pytest.mark.sampled
def test_archive_and_prepared_dataset_are_the_same(prepared):
    archive, folder, shown = prepared
    one, other = load("cifar10", archive), load("tfds:cifar10", folder)
    for split in ("train", "test"):
        a, b = getattr(one, split), getattr(other, split)
        np.testing.assert_array_equal(a.images, b.images)
        np.testing.assert_array_equal(a.labels, b.labels)
        assert a.digest() == b.digest()  # so constants are the same, and a run is
        assert a.digest() in shown
    assert "600 images of (32, 32, 3), 10 classes" in shown
    assert "tfds:cifar10" in shown
    # Tfds has shuffled them: what comes back is in order by the ids.
    version = folder / "cifar10/1.0.0"
    source = tensorflow_datasets.builder_from_directory(version)
    ids = [example["id"] for example in source.as_data_source(split="train")]
    assert ids != sorted(ids)
    for name, path in (("tfds:cifar10:1.0.0", folder), ("tfds:cifar10", version)):
        assert load(name, path).train.digest() == one.train.digest()
    assert "tensorflow" not in sys.modules


def test_grey_images_keep_one_channel(tmp_path):
    grey = records(TRAIN[0][:60, ..., :1], TRAIN[1][:60])
    tfds.write("mnist", grey, grey, str(tmp_path))
    dataset = load("tfds:mnist", tmp_path)
    np.testing.assert_array_equal(dataset.train.images, grey.images)
    assert dataset.train.mean == (0.1307,)
    assert load("tfds:mnist", tmp_path, image_size=8).train.images.shape[1:] == (
        8,
        8,
        3,
    )
    with pytest.raises(UserError, match="is there already: delete it first"):
        tfds.write("mnist", grey, grey, str(tmp_path))


def named(names, feature="filename"):
    """Examples with file names, keyed in an order that is none of theirs."""
    return [
        (
            f"{(7 * number) % 11}-{number}",
            {
                "image": files.encoded(files.picture(number)),
                "label": number % 2,
                feature: f"{('cat', 'dog')[number % 2]}_{number:02d}.jpg",
            },
        )
        for number in names
    ]


def test_a_lone_training_split_is_split_as_eurosat_is(tmp_path):
    text = {"filename": tensorflow_datasets.features.Text()}
    build(tmp_path, "eurosat", text, {"train": named(range(20))})
    dataset = load("tfds:eurosat", tmp_path)
    ordered = [*range(0, 20, 2), *range(1, 20, 2)]
    train, test = stratified(np.repeat([0, 1], 10))
    for found, indices in ((dataset.train, train), (dataset.test, test)):
        expected = np.stack([files.picture(ordered[index]) for index in indices])
        np.testing.assert_array_equal(found.images, expected)


def test_validation_joins_training_where_there_is_a_test(tmp_path):
    text = {"file_name": tensorflow_datasets.features.Text()}
    parts = {
        split: named(numbers, "file_name")
        for split, numbers in (
            ("train", range(1, 6)),
            ("validation", [0]),
            ("test", range(6, 9)),
        )
    }
    build(tmp_path, "sun397", text, parts)
    dataset = load("tfds:sun397", tmp_path)
    expected = np.stack([files.picture(number) for number in (0, 2, 4, 1, 3, 5)])
    np.testing.assert_array_equal(dataset.train.images, expected)
    assert len(dataset.test) == 3


def test_versions_and_configs_are_chosen(tmp_path, monkeypatch):
    for version, count in (("9.0.0", 4), ("10.0.0", 6)):
        parts = {"train": named(range(count)), "test": named([0])}
        text = {"filename": tensorflow_datasets.features.Text()}
        build(tmp_path / "a", "pets", text, parts, version=version)
    assert len(load("tfds:pets", tmp_path / "a").train) == 6
    assert len(load("tfds:pets:9.0.0", tmp_path / "a").train) == 4
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "a"))
    assert len(data.load(DataConfig(name="tfds:pets")).train) == 6
    for config in ("large", "small"):
        (tmp_path / "a/pets" / config).mkdir()
    (tmp_path / "a/pets/9.0.0").rename(tmp_path / "a/pets/large/9.0.0")
    (tmp_path / "a/pets/10.0.0").rename(tmp_path / "a/pets/small/10.0.0")
    with pytest.raises(UserError, match="add one of the configs, large, small"):
        load("tfds:pets", tmp_path / "a")
    assert len(load("tfds:pets/large", tmp_path / "a").train) == 4


def test_what_cannot_be_read_is_refused(tmp_path, prepared, monkeypatch):
    _, folder, _ = prepared
    refused = call("experiments/prepare.py", [])
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert refused.stderr.startswith("error: --name is missing")
    with pytest.raises(UserError, match=r"catalog/cifar100, .*tfds build cifar100 "):
        load("tfds:cifar100", folder)
    with pytest.raises(UserError, match=r"it holds cifar10, not tfds:mnist"):
        load("tfds:mnist", folder / "cifar10/1.0.0")
    copy = tmp_path / "cifar10/1.0.0"
    shutil.copytree(folder / "cifar10/1.0.0", copy)
    info, shard = copy / "dataset_info.json", next(copy.glob("*train*"))
    text, content = info.read_text(), shard.read_bytes()
    for damaged in (text.replace("array_record", "tfrecord"), text[:50]):
        info.write_text(damaged)
        with pytest.raises(UserError, match=r"data.path is .*: cannot be read"):
            load("tfds:cifar10", tmp_path)
    info.write_text(text)
    for cut in (b"", content[: len(content) // 2]):
        shard.write_bytes(cut)
        with pytest.raises(UserError, match=r"data.path is .*: cannot be read"):
            load("tfds:cifar10", tmp_path)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match=r"pip install .dpmix_jax\[tfds\]"):
        load("tfds:cifar10", folder)
