"""What a config would cost, told without data."""

import re

import numpy as np
import pytest

from dpmix_jax import UserError, accounting, data, privacy
from dpmix_jax.run.cli import load_experiment
from dpmix_jax.run.dry_run import dry_run
from tests.conftest import ROOT
from tests.programs import call

SMALL = (
    "--config.data.name=cifar10",
    "--config.model.features=4,8",
    "--config.model.groups=2",
    "--config.method.k_base=1",
    "--config.method.k_self=1",
    "--config.method.distinct_pairs=False",
    "--config.privacy.expected_batch_size=4096",
    "--config.privacy.num_updates=2600",
    "--config.performance.microbatch_size=4",
)


@pytest.mark.sampled
def test_it_tells_noise_work_memory_and_hours_without_data(tmp_path, monkeypatch):
    monkeypatch.setenv("DPMIX_JAX_DATA", str(tmp_path))  # there is nothing in it
    monkeypatch.setenv("DPMIX_JAX_CACHE", str(tmp_path))
    mechanism = accounting.Mechanism(
        sampling_prob=4096 / 50_000, num_updates=2600, noise_multiplier=2.6224
    )
    monkeypatch.setattr(privacy, "calibrate", lambda **kwargs: mechanism)
    text = dry_run(load_experiment([f"--config={ROOT}/configs/digits.py:8", *SMALL]))
    lines = dict(re.split(r"\s+", line, maxsplit=1) for line in text.splitlines())
    assert lines["guarantee"].startswith("(8, 1e-05)-DP")
    assert lines["noise"] == "sigma = 2.6224, C = 1"
    assert lines["updates"] == "2,600 of 4,096 expected records, q = 0.08192"
    assert lines["images"] == "8,192 an update (K = 2, dp_mix_self)"
    assert lines["parameters"] == "20,910 to be trained"
    assert re.fullmatch(
        r"0\.\d\d GiB a device for microbatches of 4 records", lines["memory"]
    )
    seconds, hours = map(float, re.findall(r"([\d.e-]+) (?:s|h) ", lines["time"])[:2])
    assert hours == pytest.approx(2600 * seconds / 3600, rel=0.01)
    assert 0.01 < seconds < 10_000


@pytest.mark.sampled
def test_it_writes_nothing(tmp_path):
    workdir = tmp_path / "run"
    flags = [flag for flag in SMALL if "data.name" not in flag]
    command = ["--config=configs/digits.py", "--dry_run", f"--workdir={workdir}"]
    done = call("experiments/run.py", [*command, *flags])
    assert done.returncode == 2  # B is larger than N: it is told as in a run
    done = call("experiments/run.py", command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("guarantee   (3, 1e-05)-DP")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("cifar100", (49_000, 32, 32, 3)),
        ("tfds:cifar10", (49_000, 32, 32, 3)),
        ("fashion_mnist", (59_000, 28, 28, 1)),
    ],
)
def test_blank_records_are_as_many_and_as_large(name, shape):
    records = data.blank(data.DataConfig(name=name, validation_size=1000))
    assert records.images.shape == shape
    assert records.images.base is not None  # of no size in memory
    assert len(records.labels) == shape[0]


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("digits", "0", "9"),
        ("cifar10", "airplane", "truck"),
        ("tfds:cifar100", "apple", "worm"),
        ("fashion_mnist", "T-shirt/top", "Ankle boot"),
        ("eurosat", "AnnualCrop", "SeaLake"),
        ("sun397", "0", "396"),  # not known without its files
    ],
)
def test_blank_records_have_the_classes_that_are_constants(name, first, last):
    class_names = data.blank(data.DataConfig(name=name, image_size=8)).class_names
    assert (class_names[0], class_names[-1]) == (first, last)


def test_blank_digits_are_like_the_digits():
    config = data.DataConfig(name="digits", validation_size=37)
    blank, train = data.blank(config), data.load(config).train
    assert blank.images.shape == train.images.shape
    assert (blank.class_names, blank.mean, blank.stddev) == (
        *(train.class_names, train.mean, train.stddev),
    )


def test_photographs_need_a_size():
    with pytest.raises(UserError, match="images of sun397 differ in size"):
        data.blank(data.DataConfig(name="sun397"))
    records = data.blank(data.DataConfig(name="sun397", image_size=224))
    assert records.images.nbytes == 87_003 * 224 * 224 * 3
    assert not np.any(records.images[:2])
