"""Images of one's own: what is found, what is proposed, and that it trains."""

import os
import pathlib
import sys

import numpy as np
import pytest

from dpmix_jax.data.images import encode
from dpmix_jax.run import proposal
from dpmix_jax.run.cli import load_experiment
from dpmix_jax.run.proposal import Found, expect, look, propose
from tests.conftest import ROOT
from tests.files import learnable
from tests.programs import call
from tests.test_command import dpmix


def photos(path, sides=(20,), count=60, num_classes=3):
    """Writes a folder for each class, of images of these sizes in turn."""
    for number, side in enumerate(np.resize(sides, count)):
        images, labels = learnable(count, num_classes, int(side))
        file = path / f"class {labels[number]}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode(images[number]))
    return path


def found(num_records=1000, side=32):
    return Found(num_records, num_records // 9, 5, side)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("sides", "side"), [((20,), 32), ((30, 60, 40), 32), ((20, 70, 90), 64)]
)
def test_a_fifth_is_for_test_a_tenth_for_validation(tmp_path, sides, side):
    """Of the rest; images are brought to 64 pixels if most have that many."""
    assert look(photos(tmp_path / "photos", sides)) == Found(44, 4, 3, side)


def test_what_is_proposed_is_a_config(tmp_path):
    """Its values are those of the nearest measurement, its batch a part of N."""
    file = tmp_path / "photos.py"
    file.write_text(propose(tmp_path / "photos", found(side=64), epsilon=3.5))
    config = load_experiment([f"--config={file}"])
    like = next(m for m in proposal._MEASURED if m.num_records == 1000)
    assert config.data.path == str(tmp_path / "photos")
    assert (config.data.image_size, config.data.validation_size) == (64, 111)
    assert (config.privacy.epsilon, config.privacy.delta) == (3.5, 1e-5)
    assert config.privacy.expected_batch_size == 1000 * like.sampling_prob
    assert config.privacy.num_updates == like.num_updates
    assert config.optimizer.learning_rate == like.learning_rates[4.0]
    assert config.model.options["scales"] == 3
    assert config.privacy.uncovered
    compile(file.read_text(), file, "exec")


@pytest.mark.parametrize("name", ["📷 pics", "it's", 'a "b"', "l'\"x", "\udcff"])
def test_a_folder_may_have_any_name(tmp_path, name):
    file = tmp_path / "photos.py"
    file.write_text(propose(pathlib.Path("/") / name, found(), epsilon=3.0))
    scope = {}
    exec(compile(file.read_text(), file, "exec"), scope)
    assert scope["get_config"]()["data"]["path"] == f"/{name}"


@pytest.mark.parametrize(("records", "delta"), [(1000, 1e-5), (50_000, 1e-6)])
def test_delta_is_below_a_tenth_of_a_record(tmp_path, records, delta):
    text = propose(tmp_path, found(records), epsilon=1.0)
    assert f'"delta": {delta!r},' in text
    assert '"delta": 0.001,' in propose(tmp_path, found(), epsilon=1.0, delta=1e-3)


def test_more_records_and_more_epsilon_promise_more():
    for measured in proposal._MEASURED:
        accuracies = list(measured.accuracies.values())
        assert min(np.diff(accuracies)) > -0.2  # what two seeds do not tell apart
        assert accuracies[-1] < measured.without_noise
        assert measured.learning_rates.keys() == measured.accuracies.keys()
        text = expect(found(measured.num_records), 8.0)
        assert f"came to {accuracies[-1]:.0f} % at epsilon 8, and to" in text
    by_records = [[*m.accuracies.values()] for m in proposal._MEASURED]
    assert (np.diff(by_records, axis=0) > 0).all()


def test_a_proposal_is_printed_and_kept(tmp_path):
    photos(tmp_path / "photos")

    def proposed(epsilon):
        flags = ["--images=photos", f"--epsilon={epsilon}"]
        return call("experiments/propose.py", flags, folder=tmp_path)

    done = proposed(4)
    assert done.returncode == 0, done.stderr
    kept = (tmp_path / "photos.py").read_text()
    assert kept in done.stdout
    assert "44 training records" in kept
    assert proposed(4).returncode == 0
    refused = proposed(8)
    assert refused.returncode == 2
    last = refused.stderr.splitlines()[-1]
    assert last.startswith("error: --out is photos.py: it is there, and not")
    assert (tmp_path / "photos.py").read_text() == kept


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epsilon=0"], "--epsilon is 0.0: it must be positive and finite"),
        (["--epsilon=1", "--delta=1"], "--delta is 1.0: it must be in (0, 1)"),
        (["--epsilon=1", "--images=none"], "--images is none: "),
        (["--epsilon=1", "--images=."], "--images is .: it must not hold the present"),
        (["--epsilon=1", "--out=a:b.py"], "--out is 'a:b.py': it must be a name that"),
        (["--epsilon=1", "--out=photos"], "--out is 'photos': it must be a name that"),
        (
            ["--epsilon=1", "--images=bad"],
            "--images is bad: class 0/0.png cannot be re",
        ),
    ],
)
def test_mistakes_are_one_line(tmp_path, flags, message):
    photos(tmp_path / "photos")
    for file in photos(tmp_path / "bad").glob("class 0/*"):
        file.write_text("no image")
    done = call("experiments/propose.py", ["--images=photos", *flags], folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {message}")
    assert not list(tmp_path.glob("*.py"))


def test_train_of_a_folder_trains_the_proposal(tmp_path, monkeypatch):
    photos(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    started = []

    def execv(program, argv):
        started.append((program, argv))
        sys.exit(0)

    monkeypatch.setattr(os, "execv", execv)
    assert dpmix("train", "photos/", "--epsilon=4")[0] == 0
    script = f"{ROOT}/experiments/run.py"
    assert started == [(sys.executable, [sys.executable, script, "--config=photos.py"])]
    started.clear()
    status, told, _ = dpmix("propose", "photos", "--epsilon=4")
    assert (status, started) == (0, [])
    assert told.startswith('"""Images of 3 classes at epsilon 4.')
    (tmp_path / "photos").rename(tmp_path / "digits")
    said = dpmix("train", "digits", "--no_such_flag")[2]  # the config is meant
    assert "Unknown command line flag 'no_such_flag'" in said
    assert dpmix("train", "digits/", "--epsilon=4")[0] == 0
    assert started[-1][1][-1] == "--config=digits.py"
    said = dpmix("train", "no-photos/", "--epsilon=4")[2]
    assert said.startswith("error: --images is no-photos: it must be a folder")


@pytest.mark.slow
def test_a_proposal_trains_and_says_what_it_looked_at(tmp_path):
    """On classes that colours tell apart; a kept embedding a record, no view."""
    photos(tmp_path / "photos", count=300)
    flags = ["--images=photos", "--epsilon=8"]
    assert call("experiments/propose.py", flags, folder=tmp_path).returncode == 0
    flags = ["--config=photos.py", "--config.privacy.num_updates=20"]
    done = call("experiments/run.py", flags, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    text = " ".join((tmp_path / "runs/photos/PRIVACY.md").read_text().split())
    assert "looking at private records:** image size, scales, batch, updates," in text
    assert float(done.stdout.split("EMA ")[1].split()[0]) > 60
