"""Public images: what is refused, and what is said."""

import dataclasses
import json

import numpy as np
import pytest
from ml_collections import config_dict

from dpmix_jax import UserError, data
from dpmix_jax.data.clothes import CLOTHES
from dpmix_jax.data.images import encode
from dpmix_jax.data.public import PublicConfig, blank_public, describe, load_public
from dpmix_jax.data.rendered import Render, rendered
from dpmix_jax.run import start
from dpmix_jax.run.cli import load_experiment
from dpmix_jax.run.config import from_config_dict, to_dict
from dpmix_jax.run.workdir import Workdir
from dpmix_jax.synthetic import Plan, fill
from tests import files
from tests.conftest import ROOT
from tests.test_config import load as load_config

CLASSES = tuple(map(str, range(10)))
DIGITS = data.DataConfig(name="digits")


def blobs(num, seed=0, size=8):
    """Random spots of light, made of nothing private: uint8 [num, size, size, 1]."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size]
    centres = rng.uniform(1, size - 1, (num, 2, 1, 1))
    squares = (rows - centres[:, 0]) ** 2 + (columns - centres[:, 1]) ** 2
    return (255 * np.exp(-squares / 6))[..., None].astype(np.uint8)


def write(path, images=None, labels=None, class_names=CLASSES, test_images=None):
    images = blobs(30) if images is None else images
    labels = np.arange(len(images)) % len(class_names) if labels is None else labels
    test_images = images[:0] if test_images is None else test_images
    np.savez(
        path,
        train_images=images,
        train_labels=labels,
        test_images=test_images,
        test_labels=np.zeros(len(test_images), int),
        class_names=class_names,
    )
    return str(path)


def npz(path, **content):
    return PublicConfig(name="npz", path=write(path, **content))


def test_a_bank_is_scaled_as_the_training_set(tmp_path):
    dataset = data.load(DIGITS)
    bank = load_public(npz(tmp_path / "bank.npz"), DIGITS, dataset)
    np.testing.assert_array_equal(bank.images, blobs(30))
    assert (bank.mean, bank.stddev) == (dataset.train.mean, dataset.train.stddev)
    assert load_public(None, DIGITS, dataset) is None
    blank = blank_public(npz(tmp_path / "bank.npz"), DIGITS, dataset.train)
    assert blank.images.shape == bank.images.shape


def test_a_bank_for_classes_that_are_not_known_yet(tmp_path):
    """A dry run has numbers for the names of Caltech256's classes."""
    for name in ("ak47", "zebra"):
        file = tmp_path / name / "0.png"
        file.parent.mkdir()
        file.write_bytes(encode(blobs(1)[0]))
    like = data.DataConfig(name="caltech256", image_size=8, path=str(tmp_path))
    config = PublicConfig(name="bank", path=str(tmp_path))
    assert blank_public(config, like, data.blank(like)).images.shape == (2, 8, 8, 3)
    with pytest.raises(UserError, match="folder 'ak47' is of no class"):
        blank_public(config, DIGITS, data.blank(DIGITS))


def test_images_that_only_whiten_may_be_of_any_classes(tmp_path):
    dataset = data.load(DIGITS)
    others = npz(tmp_path / "bank.npz", class_names=("cat", "dog"))
    with pytest.raises(UserError, match="its classes must be those of the training"):
        load_public(others, DIGITS, dataset)
    found = load_public(others, DIGITS, dataset, labelled=False)
    np.testing.assert_array_equal(found.images, blobs(30))
    assert found.class_names == dataset.train.class_names
    assert not found.labels.any()
    alike = PublicConfig(name="rendered_digits", count=30)
    digests = {
        load_public(alike, DIGITS, dataset, labelled=labelled).digest()
        for labelled in (True, False)
    }
    assert len(digests) == 1  # so that a run that goes on finds what it began with


def test_rendered_digits_are_those_of_a_bank(tmp_path, monkeypatch):
    """Of seed 0; drawn once for the private classes, their order and their shape."""
    monkeypatch.setenv("DPMIX_JAX_CACHE", str(tmp_path / "cache"))
    config, dataset = PublicConfig(name="rendered_digits", count=30), data.load(DIGITS)
    pool = load_public(config, DIGITS, dataset)
    plan = Plan(class_names=CLASSES, count=30, seed=0, image_shape=(8, 8, 1))
    render = Render(class_names=CLASSES, image_shape=(8, 8, 1))
    fill(tmp_path / "bank", plan, render, batch_size=8)
    bank = data.load_bank(tmp_path / "bank", CLASSES, channels=1)
    order = np.argsort(pool.labels, kind="stable")
    np.testing.assert_array_equal(bank.images, pool.images[order])
    np.testing.assert_array_equal(bank.labels, pool.labels[order])
    monkeypatch.setattr(Render, "draw", None)
    again = load_public(config, DIGITS, dataset)
    np.testing.assert_array_equal(again.images, pool.images)
    np.testing.assert_array_equal(again.labels, pool.labels)
    monkeypatch.undo()
    monkeypatch.setenv("DPMIX_JAX_CACHE", "/dev/null/nowhere")
    without = load_public(config, DIGITS, dataset)
    np.testing.assert_array_equal(without.images, pool.images)
    np.testing.assert_array_equal(without.labels, pool.labels)
    other = dataclasses.replace(dataset.train, class_names=(*CLASSES[:9], "ten"))
    with pytest.raises(UserError, match="the private classes must be digits 0 to 9"):
        load_public(config, DIGITS, dataset._replace(train=other))


def test_rendered_clothes_are_of_no_photograph():
    """Their classes are those of Fashion-MNIST; the statement says what they are."""
    config = PublicConfig(name="rendered_clothes", count=20)
    private = data.DataConfig(name="fashion_mnist")
    pool = blank_public(config, private, data.blank(private))
    assert pool.images.shape == (20, 28, 28, 1)
    assert not pool.images.any()  # a dry run draws none
    assert pool.class_names == CLOTHES
    images, labels = rendered(CLOTHES, (28, 28, 1), 20)
    assert images.any(axis=(1, 2, 3)).all()
    assert labels.tolist() == [*range(10)] * 2
    with pytest.raises(
        UserError, match=r"must be among T-shirt/top, .*, Ankle boot, in"
    ):
        load_public(config, DIGITS, data.load(DIGITS))
    with pytest.raises(UserError, match=r"public.half is 1: it must be None for"):
        PublicConfig(name="rendered_clothes", half=1)
    text = describe(config, pool, 2)
    assert "rendered_clothes, 20 images declared public" in text
    assert (
        "for what they do not reveal already: they were drawn by this program from what"
        " the names of the classes mean, and no photograph was used. That none" in text
    )
    assert "generative" not in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"images": blobs(20, size=9)},
            "public.image_size is None: images of npz are (9, 9, 1), they must be"
            " (8, 8, 1) as training images are",
        ),
        (
            {"class_names": (*CLASSES[:8], "9", "8")},
            "public.name is 'npz': its classes must be those of the training set in the"
            " same order, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, but they are 0, 1, 2, 3, 4, 5,"
            " 6, 7, 9, 8 (10 instead of 10)",
        ),
        ({"images": blobs(0)}, "public.name is 'npz': it has no training records"),
    ],
)
def test_a_bank_unlike_the_training_set_is_refused(tmp_path, content, message):
    config = npz(tmp_path / "bank.npz", **content)
    with pytest.raises(UserError) as error:
        load_public(config, DIGITS, data.load(DIGITS))
    assert str(error.value) == message


def test_what_cannot_be_read_is_named_public(tmp_path):
    config = PublicConfig(name="npz", path=str(tmp_path / "none.npz"))
    with pytest.raises(UserError, match=r"^public.path is .*: cannot be read"):
        load_public(config, DIGITS, data.load(DIGITS))
    for options, message in (
        ({"name": "npz"}, "path is None: it must be the path"),
        ({"name": "bank"}, "path is None: it must be the path"),
        ({"name": "bank", "path": "\udcff"}, "path is '.udcff': it must be UTF-8"),
        ({"name": "cifar10", "image_size": -1}, "image_size is -1: it must be in"),
        ({"name": "cifar10", "half": 3}, "half is 3: it must be 0 for all"),
        ({"name": "rendered_digits", "path": "x"}, "path is 'x': it must be None for"),
        ({"name": "rendered_digits", "count": 0}, "count is 0: it must be at least 1"),
        ({"name": "cifar10", "count": 9}, "count is 9: it must be None for public.na"),
    ):
        with pytest.raises(UserError, match=f"^public.{message}"):
            PublicConfig(**options)


def test_a_folder_of_class_folders_is_a_bank(tmp_path):
    """All its images, by the classes of the training set; none of the private ones."""
    images = blobs(20)
    named = [(f"bank/{i % 10}/{i}.png", encode(images[i])) for i in range(20)]
    files.put(tmp_path, named)
    config = PublicConfig(name="bank", path=str(tmp_path / "bank"))
    dataset = data.load(DIGITS)
    bank = load_public(config, DIGITS, dataset)
    np.testing.assert_array_equal(bank.labels, np.repeat(np.arange(10), 2))
    np.testing.assert_array_equal(bank.images[:2], images[[0, 10]])
    assert (bank.mean, bank.stddev) == (dataset.train.mean, dataset.train.stddev)
    assert len(blank_public(config, DIGITS, data.blank(DIGITS))) == 20
    files.put(tmp_path, [("bank/9/copy.png", encode(dataset.train.images[0]))])
    with pytest.raises(UserError, match="has an image of the private training set"):
        load_public(config, DIGITS, dataset)


def test_the_private_data_are_refused_as_public(tmp_path):
    """By name, by path, through a link, and as a file inside them."""
    with pytest.raises(UserError, match="digits there is the private training set"):
        load_public(PublicConfig(name="digits"), DIGITS, data.load(DIGITS))
    path = write(tmp_path / "mine.npz", images=blobs(40, 1), test_images=blobs(9, 2))
    private = data.DataConfig(name="npz", path=path)
    dataset = data.load(private)
    link = tmp_path / "link.npz"
    link.symlink_to(path)
    for same in (path, f"{tmp_path}/../{tmp_path.name}/mine.npz", link):
        config = PublicConfig(name="npz", path=str(same))
        with pytest.raises(UserError) as error:
            load_public(config, private, dataset)
        assert str(error.value) == (
            f"public.path is {same}: npz there is the private training set, data.name"
            " 'npz', or a part of it; public images must come from elsewhere"
        )


@pytest.mark.parametrize(
    ("change", "other"),
    [({}, True), ({"half": 1}, False), ({"columns": "image,coarse"}, False)],
)
def test_halves_are_of_the_same_split(change, other):
    """By other labels each class is divided otherwise, so that halves may overlap."""
    source = {"name": "hf:a/pets", "path": "pets", "columns": "image,fine"}
    private = data.DataConfig(**source, half=1)
    public = PublicConfig(**{**source, "half": 2, **change})
    assert public.is_other_half(private) == other


def test_what_lies_in_the_private_folder_is_refused(tmp_path, monkeypatch):
    """A file or a bank, by a name with `~` too."""
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "private/extra"
    folder.mkdir(parents=True)
    private = data.DataConfig(name="folder", path="~/private")
    bank = PublicConfig(name="bank", path="~/private/extra")
    for inside in (npz(folder / "bank.npz"), bank):
        with pytest.raises(UserError, match="or a part of it; public images must come"):
            load_public(inside, private, data.load(DIGITS))
    beside = npz(tmp_path / "private.npz")  # a name that begins alike is no part of it
    assert len(load_public(beside, private, data.load(DIGITS))) == 30


@pytest.mark.parametrize("validation_size", [0, 1400])
def test_copies_of_private_images_are_refused(tmp_path, validation_size):
    """One is enough, wherever it lies; of validation records too."""
    private = dataclasses.replace(DIGITS, validation_size=validation_size)
    dataset = data.load(private)
    everything = data.load(DIGITS)
    images = blobs(30)
    images[17] = everything.train.images[123]
    config = npz(tmp_path / "bank.npz", images=images)
    with pytest.raises(UserError, match="npz has an image of the private training set"):
        load_public(config, private, dataset)
    images[17, 0, 0] ^= 1  # which is what it can see: exact copies
    assert load_public(npz(tmp_path / "other.npz", images=images), private, dataset)
    images[17] = everything.test.images[5]
    with pytest.raises(UserError, match="npz has 1 of the test images"):
        load_public(npz(tmp_path / "test.npz", images=images), private, dataset)


def values(**public):
    config = to_dict(from_config_dict(load_config()))
    config["method"] |= {"name": "dp_mix_diff", "k_diff": 2}
    config["public"] = public
    return config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            values(),
            "public.name is None: it must be the name of a public dataset for"
            " method.name 'dp_mix_diff'",
        ),
        (
            {**values(name="cifar10"), "method": {"name": "self_aug"}},
            "public.name is 'cifar10': it must be None for method.name 'self_aug',"
            " which takes no public images",
        ),
        (values(name="imagnet"), "public.name is 'imagnet': it must be one of digits"),
        (values(nme="npz"), "unknown key public.nme: did you mean public.name?"),
        (values(name=None, path="x"), "public.name is None: it must be of type str"),
        (values(path="x"), "public.name is missing from the config"),
        ({**values(), "public": 3}, "public is 3: it must be a group of settings"),
    ],
)
def test_configs_that_are_refused(config, message):
    with pytest.raises(UserError) as error:
        from_config_dict(config)
    assert str(error.value).startswith(message)


def test_a_group_of_placeholders_is_none():
    config = load_config()
    config.public = {"name": config_dict.placeholder(str)}
    assert from_config_dict(config).public is None
    old = json.loads(json.dumps(to_dict(from_config_dict(config))))
    assert old["public"] is None
    assert from_config_dict(old).public is None
    del old["public"], old["method"]["k_diff"], old["method"]["draw"]  # as before them
    assert from_config_dict(old) == from_config_dict(config)


def test_flags_set_the_public_data():
    public = {"name": "folder", "path": "made/by/a/model", "image_size": 32}
    method = {"name": "pure_dp_mix_diff", "k_diff": 3, "draw": "class"}
    flags = [f"--config.public.{key}={value}" for key, value in public.items()]
    flags += [f"--config.method.{key}={value}" for key, value in method.items()]
    config = load_experiment([f"--config={ROOT}/configs/wrn16_4_cifar10.py", *flags])
    assert config.public == PublicConfig(**public)
    assert config.method.set_size == 3 + 18
    assert from_config_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_the_statement_says_what_was_public(tmp_path):
    config = PublicConfig(name="npz", path=write(tmp_path / "blobs.npz"), half=2)
    public = load_public(config, DIGITS, data.load(DIGITS))
    text = describe(config, public, 2, 7)
    for words in (
        "npz (blobs.npz), half 2 of its training records, 15 images declared public",
        "of which 2 enter each record's set in every update",
        "and on which the initial weights were trained for 7 updates without noise",
        "if a generative model made them, its own training set may hold the private"
        " images",
        "was checked before training, other copies not; the outcome of that check is"
        " not covered",
    ):
        assert words in text, words
    assert str(tmp_path) not in text
    unchecked = describe(config, public, 2, checked=False)
    assert "Copies of training or test records among them were not looked" in unchecked
    assert describe(None, None, 0) == "none"


def test_a_run_does_not_go_on_with_other_public_images(tmp_path):
    """Its noise would meet two sums, and their difference be free of it."""
    dataset = data.load(DIGITS)
    first, second = (
        load_public(npz(tmp_path / f"{i}.npz", images=blobs(30, i)), DIGITS, dataset)
        for i in range(2)
    )
    workdir = Workdir(tmp_path)
    for public in (first, None):
        digest = start.data_digest(dataset.train, public, {})
        assert digest != start.data_digest(dataset.train, second, {})
    assert start.data_digest(dataset.train, None, {}) == dataset.train.digest()
    began = start.data_digest(dataset.train, first, {})
    workdir.begin(3, data=began, noise_multiplier=1.0)
    with pytest.raises(UserError, match="holds a run that began with other data"):
        workdir.begin(
            3, data=start.data_digest(dataset.train, second, {}), noise_multiplier=1.0
        )
