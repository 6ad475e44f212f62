"""Whole runs: what they write, what they refuse, and that they survive."""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import time

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors
import safetensors.numpy

from dpmix_jax import UserError, noise_key, training
from dpmix_jax.noise import next_key
from dpmix_jax.run import start
from dpmix_jax.run.checkpoint import Checkpoints
from dpmix_jax.run.cli import load_experiment
from dpmix_jax.run.config import to_dict
from dpmix_jax.run.workdir import Workdir
from tests.conftest import ROOT
from tests.programs import call
from tests.runs import Done, config, flags, kill_when, metrics, outcome, program, run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished") / "run"
    done = call("experiments/run.py", [f"--workdir={workdir}", *flags()])
    return workdir, Done(done.returncode, done.stdout, done.stderr)


def test_what_a_run_writes_and_prints(finished):
    workdir, done = finished
    assert done.status == 0, done.err
    assert re.fullmatch(
        r"test accuracy raw [\d.]+ %, EMA [\d.]+ %; \(0\.5, 1e-05\)-DP, sigma [\d.]+;"
        r" \d+ s\n",
        done.out,
    )
    assert re.search(
        r"update  4/12  nonprivate loss [\d.]+  epsilon [\d.]+  [\d,]+ images/s"
        r"  ETA \d:\d\d:\d\d  test [\d.]+% \(EMA\)\n",
        done.err,
    )
    assert {path.name for path in workdir.iterdir() if path.name[0] != "."} == {
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "model.safetensors",
        "model.json",
        "privacy.json",
        "PRIVACY.md",
        "report.html",
        "results.json",
    }
    assert [line["step"] for line in metrics(workdir)] == [2, 4, 6, 8, 10, 12]
    epsilons = [line["epsilon"] for line in metrics(workdir)]
    assert epsilons == sorted(epsilons)
    facts = json.loads((workdir / "privacy.json").read_text())
    assert facts["epsilon_pld"] == pytest.approx(0.5, rel=1e-3)
    # The statement counts what noise on the grid takes of delta; on the way it is not.
    assert epsilons[-1] < facts["epsilon_pld"]
    assert epsilons[-1] == pytest.approx(facts["epsilon_pld"], rel=1e-8)
    assert facts["images_per_record"] == 3
    assert facts["num_records"] == 1437
    assert "(0.5, 1e-05)-differentially private" in (workdir / "PRIVACY.md").read_text()
    evaluated = [line for line in metrics(workdir) if "test/accuracy" in line]
    assert [line["step"] for line in evaluated] == [4, 8, 12]
    results = json.loads((workdir / "results.json").read_text())
    assert results["test_accuracy_ema"] == evaluated[-1]["test/accuracy_ema"]
    assert np.sum(results["confusion_ema"]) == 360


def test_the_report_stands_alone_and_keeps_secrets(finished):
    workdir, _ = finished
    page = (workdir / "report.html").read_text()
    assert page.count("<svg ") == 3
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    for words in ("Privacy statement</h2>", "EMA", "view(s), 1 mix(es)", "k_self"):
        assert words in page
    results = json.loads((workdir / "results.json").read_text())
    counts = np.array(results["confusion_ema"])
    assert f"Confusion matrix of {counts.sum()} test images, by EMA weights" in page
    drawn = re.findall(r">(\d+)</text>", page.split("</svg>")[1])
    names = 2 * [str(digit) for digit in range(10)]  # of rows and columns
    assert drawn == [*names, *map(str, counts[counts > 0])]
    for secret in ("nonprivate/loss", "nonprivate/clipped", '"seed"'):
        assert secret not in page.replace("&quot;", '"')


def test_weights_are_released_and_secrets_are_not_left(finished):
    workdir, _ = finished
    weights = safetensors.numpy.load_file(workdir / "model.safetensors")
    raw = {name for name in weights if name.startswith("params/")}
    assert raw
    assert {f"ema_{name}" for name in raw} == set(weights) - raw
    assert [p.name for p in (workdir / "checkpoints").iterdir()] == ["12.safetensors"]
    modes = {"checkpoints": 0o700, "config.json": 0o600, "metrics.jsonl": 0o600}
    for name, mode in modes.items():  # not for release
        assert stat.S_IMODE((workdir / name).stat().st_mode) == mode
    assert not (workdir / "secret.json").exists()


def test_a_finished_run_is_not_repeated(finished):
    workdir, first = finished
    before = outcome(workdir)
    assert run(workdir) == Done(0, first.out, f"finished before: {workdir}\n")
    assert outcome(workdir) == before


def test_a_workdir_of_another_experiment_is_refused(finished):
    workdir, _ = finished
    before = outcome(workdir)
    refused = run(workdir, privacy__delta=1e-3, seed=4)
    assert refused.status == 2
    assert refused.err == (
        "warning: privacy.delta is 0.001, not below 1/N = 0.000696: such a promise"
        " allows publishing a whole record\n"
        f"error: workdir {workdir} is of another experiment, use another --workdir;"
        " these differ: privacy.delta (1e-05 there, 0.001 here), seed (3 there, 4"
        " here)\n"
    )
    assert outcome(workdir) == before


def test_a_stopped_run_saves_first(finished, tmp_path, monkeypatch):
    """At a signal; the same command then ends with the same bits."""
    workdir, said = tmp_path / "run", Workdir.add_metrics

    def stop_after_four(self, line):
        said(self, line)
        if line["step"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Workdir, "add_metrics", stop_after_four)
        stopped = run(workdir)
    assert stopped.status == 128 + signal.SIGTERM
    assert "stopped after update 4 of 12, which is saved" in stopped.err
    assert (workdir / "checkpoints/4.safetensors").exists()
    with open(workdir / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "epsi')  # as a kill cuts off
    done = run(workdir)
    assert "going on after update 4" in done.err
    assert outcome(workdir) == outcome(finished[0])


class KilledError(BaseException):
    pass


def kill_at(monkeypatch, method, workdir, **overrides):
    """Runs until a method of `dpmix_jax.run` would be called."""

    def killed(*_, **__):
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(f"dpmix_jax.run.{method}", killed)
        with pytest.raises(KilledError):
            run(workdir, **overrides)


@pytest.mark.sampled
@pytest.mark.parametrize("damage", ["empty", "flipped", "older"])
def test_a_damaged_checkpoint_is_not_gone_on_from(
    finished, tmp_path, monkeypatch, damage
):
    """The one before it is taken, and the same bits come out; of two, it is refused."""
    workdir = tmp_path / "run"
    kill_at(monkeypatch, "checkpoint.Checkpoints.keep_last", workdir)
    last, before = (workdir / f"checkpoints/{n}.safetensors" for n in (12, 9))
    for path in (last, before) if damage == "older" else (last,):
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(b"" if damage == "empty" else content)
    done = run(workdir)
    assert f"{last} is damaged: going on from the checkpoint before it" in done.err
    if damage == "older":
        assert done.status == 2
        assert f"{before} is damaged, and there is no checkpoint before it" in done.err
        assert not (workdir / "results.json").exists()
    else:
        assert "going on after update 9" in done.err
        assert outcome(workdir) == outcome(finished[0])


@pytest.mark.parametrize("name", ["secret.json", "results.json", "config.json"])
def test_a_damaged_file_is_one_line(tmp_path, name):
    values = json.dumps(to_dict(config()))
    (tmp_path / "config.json").write_text(values)
    (tmp_path / name).write_text("{")
    done = run(tmp_path)
    assert done.status == 2
    assert re.search(rf"^error: .*{name} is (damaged|not a config): use", done.err)


@pytest.mark.slow
def test_a_kill_while_the_results_are_written(finished, tmp_path, monkeypatch):
    """Between any two files: the same command ends with the same bits, nothing left."""
    expected = outcome(finished[0])
    workdir = tmp_path / "run"
    replace, attempts = os.replace, []
    for allowed in (3, 6, 9, 10, 11, 12, 13, 99):
        left = iter(range(allowed))

        def counted(source, target, left=left):
            if next(left, None) is None:
                raise KilledError
            replace(source, target)

        attempts.append(None)
        with monkeypatch.context() as patch, contextlib.suppress(KilledError):
            patch.setattr("dpmix_jax.files.os.replace", counted)
            attempts[-1] = run(workdir).status
    assert attempts[0] is None
    assert attempts[-1] == 0
    assert outcome(workdir) == expected
    assert not (workdir / "secret.json").exists()
    assert not list(workdir.rglob(".*.partial"))


@pytest.mark.sampled
def test_resuming_on_other_data_is_refused(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)

    def write():
        np.savez(
            tmp_path / "data.npz",
            train_images=rng.integers(0, 256, (1437, 8, 8, 1)).astype(np.uint8),
            train_labels=rng.integers(0, 2, 1437),
            test_images=rng.integers(0, 256, (9, 8, 8, 1)).astype(np.uint8),
            test_labels=rng.integers(0, 2, 9),
            class_names=["cat", "dog"],
        )

    options = {"data__name": "npz", "data__path": tmp_path / "data.npz"}
    workdir = tmp_path / "run"
    write()
    kill_at(monkeypatch, "workdir.Workdir.keep_metrics", workdir, **options)
    write()
    refused = run(workdir, **options)
    assert refused.status == 2
    assert "holds a run that began with other data: put those back" in refused.err


def test_what_sets_cannot_be_made_of_is_refused_before_the_run_begins(tmp_path):
    """Neither the workdir nor the ledger then knows of it."""
    wrong = {"method__name": "dp_mix_diff", "method__draw": "class"}
    wrong |= {"public__name": "rendered_digits", "public__count": 5}
    refused = run(tmp_path / "run", method__k_diff=1, **wrong)
    assert refused.status == 2
    assert "every class must have a public image, but '5' has none" in refused.err
    assert not [path for path in (tmp_path / "run").iterdir() if path.name[0] != "."]


def test_a_run_does_not_go_on_with_less_noise_than_it_promises(tmp_path):
    """As when the accountant that it began with is found to be wrong."""
    enough, less = (Workdir(tmp_path / name) for name in ("enough", "less"))
    for workdir, noise in ((enough, 5.0), (less, 0.5)):
        workdir.path.mkdir()
        workdir.begin(3, data="", noise_multiplier=noise)
    mechanism = start.mechanism_of(config().privacy, 0.1, enough)
    assert mechanism.noise_multiplier == 5.0
    with pytest.raises(UserError, match=r"began with less noise than 0\.5 allows"):
        start.mechanism_of(config().privacy, 0.1, less)


def test_a_workdir_in_use_or_with_other_files_is_refused(tmp_path):
    with Workdir(tmp_path).locked():
        second = run(tmp_path)
    message = f"error: workdir {tmp_path} is in use by another run\n"
    assert second == Done(2, "", message)
    (tmp_path / "thesis.tex").touch()
    done = run(tmp_path)
    assert done.status == 2
    assert "holds thesis.tex but no config.json: use a new or empty" in done.err


@pytest.mark.sampled
def test_a_workdir_that_is_deleted_is_one_line(tmp_path, monkeypatch):
    workdir, said = tmp_path / "run", Workdir.add_metrics

    def deleted(self, line):
        said(self, line)
        shutil.rmtree(workdir)

    monkeypatch.setattr(Workdir, "add_metrics", deleted)
    done = run(workdir)
    assert done.status == 2
    assert done.err.endswith(f"error: workdir {workdir} was deleted\n")
    assert not workdir.exists()


def test_names_that_are_not_utf8_are_written(tmp_path):
    """As when a class is named by a folder, or a statement names a file of weights."""
    Workdir(tmp_path).write("report.html", os.fsdecode(b"caf\xe9"))
    assert (tmp_path / "report.html").read_text() == "caf\\udce9"


def test_a_run_is_repeated_from_its_config_json(finished, tmp_path):
    workdir, _ = finished
    saved = f"--config={workdir}/config.json"
    assert load_experiment([saved]) == config()
    other = {"method__name": "dp_mix_diff", "method__k_diff": 2, "public__name": "npz"}
    flags = [f"--config.{k.replace('__', '.')}={v}" for k, v in other.items()]
    changed = load_experiment([saved, *flags, "--config.public.path=x.npz"])
    assert changed == config(**other, public__path="x.npz")


@pytest.mark.sampled
def test_a_run_that_diverges_says_so_and_ends_with_another_status(tmp_path):
    diverging = {"optimizer__learning_rate": 1e30}
    done = run(tmp_path / "run", **diverging)
    assert done.status == 3
    assert "diverging: lower optimizer.learning_rate" in done.err
    assert done.out.endswith("; diverged: the model is not finite\n")
    assert run(tmp_path / "run", **diverging).status == 3


@pytest.mark.sampled
def test_a_picture_that_fails_costs_a_line(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no fonts")

    monkeypatch.setattr("dpmix_jax.run.build.example_set", fail)
    done = run(tmp_path / "run")
    assert done.status == 0
    assert "no report.html: RuntimeError: no fonts" in done.err
    assert (tmp_path / "run/PRIVACY.md").exists()


def test_a_checkpoint_that_cannot_be_read_stays(tmp_path, monkeypatch):
    """As with too many open files: it is not damaged."""
    path = tmp_path / "checkpoints/3.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"whole")

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    checkpoints = Checkpoints(path.parent)
    monkeypatch.setattr(checkpoints, "steps", lambda: [3])
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, most))
    try:
        with pytest.raises(OSError, match=f"Too many open files: '{path}'"):
            checkpoints.restore(None)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    assert path.read_bytes() == b"whole"


def test_out_of_memory_is_explained_wherever_it_happens(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr("dpmix_jax.run.start.first_state", fail)
    done = run(tmp_path / "run")
    assert done.status == 2
    assert "error: out of memory: lower performance.microbatch_size" in done.err


@pytest.mark.sampled
def test_out_of_memory_is_one_line_that_names_the_knob(tmp_path):
    """Really out of memory: ten thousand mixes for each of a thousand records."""
    huge = {"method__k_self": 10**7, "performance__microbatch_size": 1000}
    done = run(tmp_path / "run", **huge)
    assert done.status == 2
    assert done.err.endswith(
        "error: out of memory: lower performance.microbatch_size, which is 1000, or, if"
        " that is auto, performance.memory_gib\n"
    )


# Processes, where the process is the point.


@pytest.mark.parametrize("seconds", [0.3, 1.0])
def test_ctrl_c_during_imports_is_no_traceback(tmp_path, seconds):
    command = program(tmp_path / "run")
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) as process:
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, 128 + signal.SIGINT)
    assert b"Traceback" not in err


def test_secrets_are_for_their_owner_alone_and_of_256_bits(tmp_path):
    workdir = Workdir(tmp_path / "run")
    secret = workdir.path / "secret.json"
    with workdir.locked():
        seed = workdir.begin(None, data="d")
        assert 2**200 < seed < 2**256
        assert str(seed) in secret.read_text()
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
        workdir.forget_secrets()
        assert str(seed) not in secret.read_text()
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    state = training.init_state({"w": jnp.ones(3)}, optax.identity())
    Checkpoints(tmp_path / "states").save(state)
    [path] = (tmp_path / "states").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.sampled
def test_killed_a_run_keeps_its_secret_seed_and_then_forgets_it(tmp_path, monkeypatch):
    """It goes on with its own randomness; another run has another."""
    workdir = tmp_path / "run"
    assert kill_when("update  4/12", workdir, seed=None) == -signal.SIGKILL
    secret = workdir / "secret.json"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    for saved in (workdir / "checkpoints").iterdir():
        assert stat.S_IMODE(saved.stat().st_mode) == 0o600
    seed = json.loads(secret.read_text())["seed"]
    assert seed > 2**64
    kill_at(monkeypatch, "experiment.release", workdir, seed=None)
    assert json.loads(secret.read_text())["seed"] is None  # before anything comes out
    done = run(workdir, seed=None)
    assert done.status == 0, done.err
    assert "going on after update" in done.err
    assert not secret.exists()
    left = [path.read_bytes() for path in workdir.rglob("*") if path.is_file()]
    assert not any(str(seed).encode() in content for content in left)
    key = noise_key(seed)
    for _ in range(12):  # of each update that was made
        assert not any(key.tobytes() in content for content in left)
        key = next_key(key)
    assert any(key.tobytes() in content for content in left)  # of one that was not
    assert "256 secret bits" in (workdir / "PRIVACY.md").read_text()
    other = tmp_path / "other"
    assert run(other, seed=None).status == 0
    weights = [(w / "model.safetensors").read_bytes() for w in (workdir, other)]
    assert weights[0] != weights[1]


@pytest.mark.sampled
def test_on_four_devices_the_same_run_comes_out(tmp_path):
    """To float rounding; both compiled as users compile, whose tolerance it is."""
    count = "--xla_force_host_platform_device_count"
    processes = {
        name: subprocess.Popen(
            program(tmp_path / name),
            cwd=ROOT,
            stderr=subprocess.PIPE,
            env={**os.environ, "XLA_FLAGS": f"{flag} {os.environ['USERS_XLA_FLAGS']}"},
        )
        for name, flag in {"one": f"{count}=1", "four": f"{count}=4"}.items()
    }
    for process in processes.values():
        _, err = process.communicate()
        assert process.returncode == 0, err
    one, of_four = (
        safetensors.numpy.load_file(tmp_path / name / "model.safetensors")
        for name in processes
    )
    for name, value in one.items():
        np.testing.assert_allclose(of_four[name], value, atol=1e-5)


def test_a_checkpoint_of_another_version_is_one_line(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    params = {"w": jnp.zeros(3)}
    checkpoints.save(training.init_state(params, optax.sgd(1.0)))
    like = training.init_state(params, optax.sgd(1.0, momentum=0.9))
    with pytest.raises(UserError, match=r"0.safetensors is of another version: use an"):
        checkpoints.restore(like)


MISTAKES = (
    ([], "--config is missing: give a file, or a name of `dpmix configs`"),
    (
        ["--config=none.py:8"],
        "--config is none.py: there is no such file, nor a config of that name",
    ),
    (
        ["--config=configs/digits.py:5"],
        "--config cannot be loaded: epsilon is '5': it must be one of 1, 2, 3, 4, 6, 8",
    ),
    (
        ["--config=configs/digits.py", "--config.method.nme=x"],
        "unknown key method.nme: did you mean method.name?",
    ),
    (
        ["--config=configs/digits.py", "--config.metod.name=x"],
        "unknown key metod: did you mean method?",
    ),
    (
        ["--config=configs/digits.py", "--config.privacy.epsilon=much"],
        "flag --config.privacy.epsilon=much: could not convert string to float: 'much'",
    ),
    (
        ["--config=configs/digits.py", "privacy.epsilon=8"],
        "privacy.epsilon=8 is not a flag: they begin with --",
    ),
    (["--confg=x"], "Unknown command line flag 'confg'. Did you mean: config ?"),
    (
        ["--config=configs/digits.py", "--config.privacy.epsilon=0"],
        "privacy.epsilon is 0.0: it must be positive and finite",
    ),
    (
        ["--config=configs/digits.py", "--config.method.name=self_aug"],
        "method.k_self is 4: it must be 0 for method.name 'self_aug'",
    ),
    (
        ["--config=configs/digits.py", "--config.model.groups=7"],
        "model 'cnn' with options {'features': (16, 32), 'groups': 7} does not fit"
        " images of (8, 8, 1): Number of groups (7) does not divide the number of"
        " channels (16).",
    ),
    (
        [
            "--config=configs/digits.py",
            "--config.privacy.expected_batch_size=1438",
        ],
        "privacy.expected_batch_size is 1438: it must be at most the number of"
        " training records, 1437",
    ),
    (
        ["--config=configs/digits.py", "--workdir=README.md/run"],
        "workdir README.md/run is not writable: Not a directory",
    ),
    (
        ["--config=configs/digits.py", "--workdir=README.md"],
        "workdir README.md is a file: it must be a folder",
    ),
    (
        ["--config=configs/table11.py"],
        "the config is that of a sweep: it is for experiments/sweep.py",
    ),
    (
        ["--config=none.json"],
        "--config is none.json: there is no such file, nor a config of that name",
    ),
    (
        ["--config=caf\udce9.py"],  # bytes that are not UTF-8, as Python hands them on
        "--config is caf\udce9.py: there is no such file, nor a config of that name",
    ),
    (
        ["--config=configs/digits.py", "--config.augmentation.max_shift=8"],
        "augmentation.max_shift is 8.0: it must be smaller than the images, which are"
        " 8x8",
    ),
)


@pytest.mark.parametrize(("given", "message"), MISTAKES)
def test_a_mistake_is_one_line(tmp_path, given, message):
    workdir = f"--workdir={tmp_path}/run"
    done = call("experiments/run.py", [workdir, *given])  # of two, the last one counts
    assert (done.returncode, done.stderr) == (2, f"error: {message}\n")
    assert done.stdout == ""
    assert {path.name for path in tmp_path.rglob("*")} <= {"run", ".lock"}


def test_the_config_of_a_run_is_not_one_of_a_sweep():
    done = call("experiments/sweep.py", ["--config=configs/digits.py"])
    message = "error: the config is that of one run: it is for experiments/run.py\n"
    assert (done.returncode, done.stderr) == (2, message)


def test_help_tells_flags_and_configs():
    done = call("experiments/run.py", ["--help"])
    assert done.returncode == 0
    for words in ("--workdir", "--dry_run", "--config.<group>", "  digits  "):
        assert words in done.stdout
