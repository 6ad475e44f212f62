"""The command `dpmix`, and the programs that came with it: predict and calibrate."""

import contextlib
import csv
import io
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile
from unittest import mock

import numpy as np
import pytest

import dpmix_jax as dpm
from dpmix_jax import UserError, calibrate, command, data
from dpmix_jax.data.images import encode
from dpmix_jax.files import write_atomically
from dpmix_jax.run import calibration, cli, predict
from tests import runs
from tests.conftest import ROOT
from tests.programs import call, forgotten_flags

PROGRAMS = {path.stem for path in (ROOT / "experiments").glob("*.py")}


def dpmix(*argv):
    """Returns status, output and errors of `dpmix <argv>`."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", ["dpmix", *argv]),
        mock.patch.object(sys, "path", [*sys.path]),
        forgotten_flags(),
        pytest.raises(SystemExit) as ended,
    ):
        command.main()
    return ended.value.code or 0, out.getvalue(), err.getvalue()


# --- The command ------------------------------------------------------------------


def test_every_command_is_a_program_and_is_told():
    status, told, _ = dpmix("--help")
    assert status == 0
    for name, (program, _) in command.COMMANDS.items():
        assert f"    dpmix {name} " in told
        assert program in PROGRAMS
    assert dpmix()[1] == told


def test_a_config_is_found_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DPMIX_JAX_LEDGER", str(tmp_path / "ledger"))
    status, told, _ = dpmix("budget", "digits:8", "--config.seed=1")
    assert status == 0
    assert told.endswith("0 runs: epsilon 0 together, at delta 1e-05\n")
    assert list(tmp_path.iterdir()) == []


def test_a_file_comes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known = str(ROOT / "configs" / "digits.py")
    for text in ("digits", "digits.py", "configs/digits.py"):
        assert cli.find_config(f"{text}:8") == f"{known}:8"
    assert cli.find_config(known) == known
    pathlib.Path("digits.py").touch()
    assert cli.find_config("digits.py:8") == "digits.py:8"
    assert cli.find_config("no_such:8") == "no_such:8"


def test_configs_and_completion_list_what_there_is():
    _, listed, _ = dpmix("configs")
    names = {path.stem for path in (ROOT / "configs").glob("[!_]*.py")}
    assert {line.split()[0] for line in listed.splitlines()} == names
    _, line, _ = dpmix("completion")
    words = re.fullmatch(r'complete -o default -W "(.*)" dpmix\n', line)[1].split()
    assert set(words) == names | {*command.COMMANDS, "configs"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian", "digits"], "dpmix trian is no command: it must be one of train, "),
        (["confgs"], "generate, configs, completion"),
        (["train", "digitz"], "there is no such file, nor a config of that name"),
        (["train", "digits", "fast"], "fast is not a flag: they begin with --"),
        (["sweep", "digits"], "the config is that of one run"),
    ],
)
def test_a_mistake_is_one_line(argv, message):
    status, out, errors = dpmix(*argv)
    assert (status, out) == (2, "")
    assert errors.startswith("error: ")
    assert message in errors
    assert errors.count("\n") == 1


@pytest.mark.slow
def test_a_wheel_works_without_a_checkout(tmp_path):
    def run(*argv):
        done = subprocess.run(
            [sys.executable, *argv],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    source = tmp_path / "source"
    built = shutil.ignore_patterns("build", ".*", "__pycache__", "*.egg-info", "runs")
    shutil.copytree(ROOT, source, ignore=built)
    run(*("-m", "pip", "wheel", "--no-deps", "--wheel-dir", "wheels", str(source)))
    (wheel,) = (tmp_path / "wheels").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
    assert "dpmix_jax/programs/configs/digits.py" in names
    assert {name.partition("/")[0] for name in names if "dist-info" not in name} == {
        "dpmix_jax"
    }
    told = run("-m", "dpmix_jax.command", "train", "digits:8", "--dry_run")
    assert re.search(r"noise +sigma = 1\.57", told)
    assert "table11" in run("-m", "dpmix_jax.command", "configs")


@pytest.mark.sampled("flags0-8")
@pytest.mark.parametrize(
    ("flags", "count"),
    [
        ([], 8),
        pytest.param(
            ["--config.method.name=microbatch_mixup", "--config.method.k_self=0"],
            8,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            [
                "--config.method.name=dp_mix_diff",
                "--config.method.k_diff=2",
                "--config.public.name=rendered_digits",
            ],
            10,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_set_of_a_test_image_is_drawn(tmp_path, flags, count):
    out = tmp_path / "set.png"
    status, told, errors = dpmix("show", "digits", f"--out={out}", *flags)
    assert (status, told) == (0, f"{count} images: {out}\n"), errors
    assert out.read_bytes().startswith(b"\x89PNG")


# --- Predictions ------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert runs.run(workdir).status == 0
    return workdir


def test_images_are_labelled_as_the_model_does(finished, tmp_path):
    test = data.load(data.DataConfig(name="digits")).test
    for number in range(5):
        path = tmp_path / "photos" / f"{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(test.images[number]))
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    out = tmp_path / "labels.csv"
    status, told, errors = dpmix(
        "predict", str(finished), str(tmp_path / "photos"), f"--out={out}"
    )
    assert (status, told) == (0, f"5 images: {out}\n"), errors
    header, *lines = csv.reader(out.read_text().splitlines())
    model = dpm.load(finished)
    assert header == ["file", "label", *model.class_names]
    assert [line[0] for line in lines] == [f"0/{n}.png" for n in (0, 2, 4)] + [
        f"1/{n}.png" for n in (1, 3)
    ]
    expected = model(test.images[[0, 2, 4, 1, 3]])
    found = np.array([line[2:] for line in lines], float)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    classes = [model.class_names[n] for n in expected.argmax(1)]
    assert [line[1] for line in lines] == classes


def test_what_cannot_be_labelled_is_one_line(finished, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.png").write_bytes(b"no image")
    (tmp_path / "good.png").write_bytes(encode(np.zeros((8, 8, 1), np.uint8)))
    for run, images, message in (
        (finished, "empty", "it has no file that ends in .jpg, "),
        (finished, "none", "it must be an image file or a folder"),
        (finished, "bad.png", "bad.png cannot be decoded: its 8 bytes are none of"),
        (tmp_path, "good.png", "model.json is missing or damaged: give a finished run"),
    ):
        flags = [f"--run={run}", f"--images={tmp_path / images}"]
        done = call("experiments/predict.py", [*flags, f"--out={tmp_path / 'out.csv'}"])
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out.csv").exists()
    good = tmp_path / "good.png"
    for out in (".", str(tmp_path), str(tmp_path / "none" / "out.csv")):
        with pytest.raises(UserError, match=r"--out is .* a file in a folder that can"):
            predict.predict(finished, good, pathlib.Path(out))
    with pytest.raises(IsADirectoryError, match=r"'\.'"):
        write_atomically(pathlib.Path(), "text")


# --- What would be done -----------------------------------------------------------


# Flags in a folder with a run and photos of two classes, which are as good as private.
WOULD = {
    "audit": "--config=configs/digits.py",
    "benchmark": "--cnn --k=1",
    "budget": "--config=configs/digits.py --declare=8 --config.data.name=folder"
    " --config.data.path=photos --config.data.image_size=8",
    "calibrate": "--epsilon=2 --n=1000 --batch=100 --updates=50 --plot=plot.png",
    "domain_gap": "--encoder=run --public=rendered_digits",
    "export": "--run=run --to=exported",
    "generate": "--out=bank --data=folder --path=photos --image_size=8"
    " --generator=render",
    "metrics": "--run=run --csv=metrics.csv --tensorboard=logs",
    "predict": "--run=run --images=photos",
    "prepare": "--name=digits --tfds_dir=prepared",
    "propose": "--images=photos --epsilon=4 --train",
    "report": "--config=configs/same_epsilon.py --runs=DIGITS --to=tables",
    "show": "--config=configs/digits.py",
    "table13": "--config=configs/vit_b16.py:caltech256-2",
}


@pytest.mark.parametrize("program", WOULD)
def test_a_dry_run_tells_and_leaves_nothing(program, finished, tmp_path, monkeypatch):
    for kept in ("LEDGER", "CACHE", "DATA"):
        monkeypatch.setenv(f"DPMIX_JAX_{kept}", str(tmp_path / kept))
    (tmp_path / "run").symlink_to(finished)
    for number in range(40):
        path = tmp_path / "photos" / f"{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(np.full((32, 32, 3), number, np.uint8)))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    runs_csv = str(ROOT / "docs" / "results" / "same_epsilon_digits.csv")
    flags = [*WOULD[program].replace("DIGITS", runs_csv).split(), "--dry_run"]
    done = call(f"experiments/{program}.py", flags, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    (told,) = (x for x in done.stdout.splitlines() if x.startswith("would "))
    for flag in flags:
        name, _, value = flag.partition("=")
        if name in ("--out", "--to", "--csv", "--plot", "--run", "--tfds_dir"):
            assert value in told
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    ("program", "flags", "message"),
    [
        ("audit", "--config=configs/digits.py --confidence=2", "--confidence"),
        ("calibrate", "--epsilon=0 --n=9 --batch=2 --updates=5", "--epsilon is 0.0"),
        ("domain_gap", "--encoder=pixels --data=digits --public=x", "public.name"),
        ("generate", "--out=x --generator=render", "--classes is missing"),
        ("generate", "--out=x --generator=diffusion", "--model is missing"),
        ("generate", "--out=x --generator=render --model=x", "--model is given"),
        ("prepare", "--name=cifar10 --path=nowhere --download", "data.path is nowhere"),
        ("prepare", "--name=tfds:mnist --download", "tfds:mnist"),
        ("prepare", "--name=cifar10", "data.download=True fetches it"),
    ],
)
def test_a_dry_run_refuses_what_is_cheap_to_refuse(
    program, flags, message, tmp_path, monkeypatch
):
    monkeypatch.setenv("DPMIX_JAX_DATA", str(tmp_path))
    done = call(f"experiments/{program}.py", [*flags.split(), "--dry_run"])
    assert done.returncode != 0
    assert "would" not in done.stdout
    assert message in done.stderr


def test_a_dataset_that_may_be_fetched_would_be(tmp_path, monkeypatch):
    monkeypatch.setenv("DPMIX_JAX_DATA", str(tmp_path))
    flags = ["--name=cifar10", "--download", "--dry_run"]
    done = call("experiments/prepare.py", flags)
    assert done.stdout == "would fetch cifar10, and decode it unless that was done\n"
    assert not any(tmp_path.iterdir())


def test_every_program_has_a_dry_run():
    tell_more = {"run", "sweep"}  # noise, work, memory and hours
    not_programs = {"timing", "torch_wrn"}
    assert {*WOULD} == PROGRAMS - tell_more - not_programs


# --- Calibration ------------------------------------------------------------------


@pytest.fixture
def few_trade_offs(monkeypatch):
    monkeypatch.setattr(calibration, "_OF_BATCH", (1, 4))
    monkeypatch.setattr(calibration, "_OF_UPDATES", (0.5, 1))


SETTING = calibration.Setting(num_records=1000, batch_size=100, num_updates=50)
FLAGS = ["--n=1000", "--batch=100", "--updates=50"]


@pytest.mark.sampled
@pytest.mark.usefixtures("few_trade_offs")
def test_calibrating_is_what_runs_do_and_spending_its_inverse():
    sigma = calibrate(epsilon=2.0, delta=1e-5, sampling_prob=0.1, num_updates=50)
    told = dpmix("calibrate", "--epsilon=2", *FLAGS)[1].splitlines()
    spent = re.match(
        r"sigma (\S+) spends epsilon (\S+) by PLD \((\S+) by RDP\)", told[0]
    )
    noise, by_pld, by_rdp = map(float, spent.groups())
    assert noise == pytest.approx(sigma.noise_multiplier, rel=1e-4)
    assert by_pld == pytest.approx(2.0, rel=1e-3)
    assert by_rdp == pytest.approx(sigma.epsilon(1e-5, accountant="rdp"), rel=1e-3)
    assert by_rdp > by_pld
    again = dpmix("calibrate", f"--sigma={noise}", *FLAGS)[1]
    again = re.match(r"sigma (\S+) spends epsilon (\S+) by PLD", again).groups()
    assert list(map(float, again)) == pytest.approx([noise, by_pld], rel=1e-3)


@pytest.mark.sampled
@pytest.mark.usefixtures("few_trade_offs")
def test_trade_offs_spend_the_budget_each(tmp_path):
    found = calibration.trade_offs(SETTING, 2.0)
    assert [(s.batch_size, s.num_updates) for s, _ in found] == [
        *((100, 25), (100, 50)),
        *((400, 25), (400, 50)),
    ]
    for setting, sigma in found:
        spent = setting.mechanism(sigma).epsilon(1e-5, accountant="rdp")
        assert spent == pytest.approx(2.0, rel=1e-3)
    text = calibration.table(found)
    assert "       100        50" in text
    calibration.draw(found, tmp_path / "trade-offs.png")
    assert (tmp_path / "trade-offs.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"^--plot is .*No such file"):
        calibration.draw(found, tmp_path / "none" / "x.png")


def test_neighbours_that_rdp_does_not_bound_have_noise_and_no_trade_offs():
    done = call(
        "experiments/calibrate.py",
        ["--epsilon=8", *FLAGS, "--updates=2", "--relation=replace_one"],
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"sigma .* spends epsilon .* by PLD .*\n", done.stdout)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch=2000"], "--batch is 2000.0: it must be positive and at most 1000"),
        (["--delta=1"], "--delta is 1.0: it must be in (0, 1)"),
        (["--sigma=2"], "give one of --epsilon and --sigma"),
        (
            ["--relation=replace_one", "--plot=x.png"],
            "--relation is replace_one: RDP tells no trade-offs to --plot",
        ),
        (["--epsilon=1e-9"], "no noise multiplier from"),
    ],
)
def test_a_setting_that_is_none_is_one_line(flags, message):
    done = call("experiments/calibrate.py", ["--epsilon=2", *FLAGS, *flags])
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
