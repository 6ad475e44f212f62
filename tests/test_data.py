"""What every dataset has: splits, halves, constants, digests; digits and `.npz`."""

import dataclasses

import numpy as np
import pytest

from dpmix_jax import UserError, data
from dpmix_jax.data import DataConfig


def arrays(**changes):
    rng = np.random.default_rng(0)
    content = {
        "train_images": rng.integers(0, 256, (20, 4, 4, 3)).astype(np.uint8),
        "train_labels": rng.integers(0, 2, 20),
        "test_images": rng.integers(0, 256, (6, 4, 4, 3)).astype(np.uint8),
        "test_labels": rng.integers(0, 2, 6),
        "class_names": np.array(["cat", "dog"]),
    } | changes
    return {name: value for name, value in content.items() if value is not None}


def load(tmp_path, **changes):
    path = tmp_path / "data.npz"
    np.savez(path, **arrays(**changes))
    return data.load(DataConfig(name="npz", path=str(path)))


def test_digits_are_whole_and_disjoint():
    dataset = data.load(DataConfig())
    assert (len(dataset.train), len(dataset.test)) == (1437, 360)
    assert dataset.train.images.shape[1:] == (8, 8, 1)
    assert np.bincount(dataset.test.labels).min() >= 34  # stratified, ten classes
    both = np.concatenate([dataset.train.images, dataset.test.images])
    assert both.max() == 240
    pixels = np.asarray(dataset.train.normalize(dataset.train.images[:2]))
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(
        pixels, (dataset.train.images[:2] / 255 - 0.5) / 0.5, atol=1e-6
    )


def test_validation_comes_from_training_never_from_test():
    whole, split = data.load(DataConfig()), data.load(DataConfig(validation_size=200))
    assert (len(split.train), len(split.validation)) == (1237, 200)
    np.testing.assert_array_equal(split.test.images, whole.test.images)
    parts = np.concatenate([split.train.images, split.validation.images])
    sort = lambda images: np.sort([image.tobytes() for image in images])  # noqa: E731
    np.testing.assert_array_equal(sort(parts), sort(whole.train.images))


def test_npz_round_trip(tmp_path):
    dataset = load(tmp_path)
    np.testing.assert_array_equal(dataset.train.images, arrays()["train_images"])
    np.testing.assert_array_equal(dataset.test.labels, arrays()["test_labels"])
    assert dataset.train.class_names == ("cat", "dog")
    of_bytes = load(tmp_path, class_names=np.array([b"cat", "caf\xe9".encode()]))
    assert of_bytes.train.class_names == ("cat", "caf\xe9")
    grey = arrays()["train_images"][..., 0], arrays()["test_images"][..., 0]
    dataset = load(
        tmp_path, train_images=grey[0], test_images=grey[1], class_names=["cat", "Cat"]
    )
    assert dataset.train.images.shape == (20, 4, 4, 1)
    assert dataset.train.class_names == ("cat", "Cat")  # case tells them apart


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_labels": None}, "test_labels is missing"),
        ({"class_names": None}, "class_names is missing"),
        ({"class_names": [["a", "b"]]}, r"class_names are \(1, 2\), not one for each"),
        ({"train_labels": np.zeros(20)}, "data.npz: train_labels are float64"),
        ({"train_labels": np.full(20, -1)}, r"labels are in \[-1, -1\]"),
        ({"train_labels": np.full(20, 2**32 + 1)}, r"labels are in \[2, 2\]"),
        ({"train_labels": np.zeros(19, int)}, "one for each of the 20 images"),
        ({"train_images": np.zeros((20, 4, 4, 3))}, "images are float64"),
        (
            {"train_images": np.zeros((20, 3, 8, 8), np.uint8)},
            r"\(20, 3, 8, 8\): they must be uint8 \[N, H, W, C\] .* the channels last",
        ),
        ({"train_images": np.zeros((20, 1, 1), np.uint8)}, "of at least 2x2 pixels"),
        ({"class_names": ["cat"]}, "class names are 'cat': there must be two or more"),
        ({"class_names": ["a", "b", "a"]}, "'a', 'b', 'a': .* which all differ"),
        ({"train_images": np.zeros((20, 5, 4, 3), np.uint8)}, "must be of one size"),
        (
            {
                "test_images": np.zeros((0, 4, 4, 3), np.uint8),
                "test_labels": np.zeros(0, int),
            },
            "it has no test records",
        ),
    ],
)
def test_npz_refuses(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, **changes)


def test_unreadable_files(tmp_path):
    np.save(tmp_path / "x.npy", arrays()["train_images"])
    with pytest.raises(
        UserError, match=r"x.npy: train_images is missing, .* an \.npz archive of"
    ):
        data.load(DataConfig(name="npz", path=str(tmp_path / "x.npy")))
    path = tmp_path / "data.npz"
    np.savez(path, **arrays())
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"hello", b"\x80\x04N."):
        path.write_bytes(content)
        for name in ("data.npz", "absent.npz", "."):
            with pytest.raises(UserError, match=r"data.path is .*: cannot be read"):
                data.load(DataConfig(name="npz", path=str(tmp_path / name)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "mnist3d"}, "data.name is 'mnist3d': it must be one of digits, npz"),
        ({"name": "npz"}, "data.path is None: it must be the path of a file"),
        ({"path": "x"}, "data.path is 'x': it must be None for data.name 'digits'"),
        (
            {"name": "npz", "path": "\udcff"},
            r"data.path is '\\udcff': it must be UTF-8",
        ),
        ({"image_size": 4000}, r"data.image_size is 4000: it must be in \[0, 2048\]"),
        (
            {"normalization": "x"},
            "data.normalization is 'x': it must be dataset or",
        ),
        ({"half": 3}, "data.half is 3: it must be 0 for all records, 1 or 2"),
        ({"validation_size": -1}, "data.validation_size is -1: it must be at least 0"),
        ({"validation_size": 1437}, "it must be less than 1437"),
    ],
)
def test_config_refuses(options, message):
    with pytest.raises(UserError, match=message):
        data.load(DataConfig(**options))


def test_digest_sees_every_pixel_and_label():
    records = data.load(DataConfig()).train
    images, labels = records.images.copy(), records.labels.copy()
    images[-1, -1, -1, 0] ^= 1
    labels[0] = (labels[0] + 1) % 10
    changes = [
        {"images": images},
        {"labels": labels},
        {"class_names": (*records.class_names, "x")},
    ]
    changed = [dataclasses.replace(records, **change).digest() for change in changes]
    assert len({records.digest(), *changed}) == 4


def test_blank_records_of_a_users_file_hold_nothing_of_it(tmp_path):
    load(tmp_path)
    blank = data.blank(
        DataConfig(name="npz", path=str(tmp_path / "data.npz"), validation_size=3)
    )
    assert blank.images.shape == (17, 4, 4, 3)
    assert not blank.images.any()
    assert not blank.labels.any()
