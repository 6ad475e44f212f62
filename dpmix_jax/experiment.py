"""One experiment from a config to a workdir: train, survive, evaluate, report."""

import contextlib
import fcntl
import json
import pathlib
import secrets
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpmix_jax import (
    data,
    evaluate,
    gradients,
    mixup,
    models,
    privacy,
    report,
    sampling,
    training,
)
from dpmix_jax.checkpoint import Checkpoints, export_weights, write_atomically
from dpmix_jax.config import ExperimentConfig, differences, to_dict
from dpmix_jax.errors import UserError


def run(config: ExperimentConfig, workdir: pathlib.Path) -> int:
    """Runs an experiment, or goes on with it where it stopped.

    Args:
      config: what to run.
      workdir: receives `config.json`, `metrics.jsonl`, `checkpoints/`,
        `model.safetensors`, `privacy.json`, `PRIVACY.md`, `report.html` and, last of
        all, `results.json`.

    Returns:
      The exit status: 0, or 128 + n after signal n.

    Raises:
      UserError: for a config that cannot run here, or a workdir that is not writable,
        in use, or of another experiment. Nothing has been written then.
    """
    started = time.time()
    dataset = data.load(config.data)
    num_records = len(dataset.train)
    sampling_prob = config.privacy.sampling_prob(num_records)
    config.performance.check_devices(jax.device_count())
    if config.privacy.delta >= 1 / num_records:
        _say(
            f"warning: privacy.delta is {config.privacy.delta:g}, not less than"
            f" 1/N = {1 / num_records:.3g}: such a guarantee allows to publish a record"
        )
    with _locked(workdir), _signals() as caught:
        _check_workdir(workdir, config)
        results_file = workdir / "results.json"
        if not results_file.exists():
            mechanism = privacy.calibrate(
                epsilon=config.privacy.epsilon,
                delta=config.privacy.delta,
                sampling_prob=sampling_prob,
                num_updates=config.privacy.num_updates,
                neighboring_relation=privacy.RELATIONS[
                    config.privacy.neighboring_relation
                ],
            )
            write_atomically(
                workdir / "config.json", json.dumps(to_dict(config), indent=2) + "\n"
            )
            _say(
                f"{config.method.name}, K = {config.method.set_size}:"
                f" {config.privacy.num_updates} updates of {num_records} records at q ="
                f" {sampling_prob:.4g}, sigma = {mechanism.noise_multiplier:.4g}"
            )
            run_ = _Run(config, workdir, dataset, mechanism, started)
            if not run_.train(stop=lambda: bool(caught)):
                return 128 + caught[0]
            run_.finish()
        (workdir / "secret_seed").unlink(missing_ok=True)
        _say(final_line(json.loads(results_file.read_text())), file=sys.stdout)
    return 0


def final_line(results: dict[str, Any]) -> str:
    return (
        f"test accuracy raw {100 * results['test_accuracy']:.2f} %,"
        f" EMA {100 * results['test_accuracy_ema']:.2f} %;"
        f" ({results['epsilon']:.4g}, {results['delta']:g})-DP,"
        f" sigma {results['noise_multiplier']:.4g}; {results['seconds']:.0f} s"
    )


class _Run:
    """The parts of one run, put together; `train` and `finish` use them."""

    def __init__(
        self,
        config: ExperimentConfig,
        workdir: pathlib.Path,
        dataset: data.Dataset,
        mechanism: privacy.Mechanism,
        started: float,
    ):
        self.config, self.workdir, self.dataset = config, workdir, dataset
        self.mechanism, self.started = mechanism, started
        self.seed = _seed(config, workdir)
        self.mesh = training.make_mesh()
        records = dataset.train
        model = models.create(
            config.model.name, records.num_classes, **config.model.options
        )

        def loss_fn(params, images, labels):
            logits = model.apply(params, images)
            return optax.softmax_cross_entropy(logits, labels).mean()

        gradient_fn = gradients.clipped_gradient(
            loss_fn, l2_clip_norm=config.privacy.l2_clip_norm
        )
        self.record_set = mixup.augmentation_set(config.method, config.augmentation)
        self.accumulate = training.make_accumulate(
            gradient_fn,
            self.record_set,
            records,
            self.mesh,
            key=sampling.stream_key(self.seed, "augmentation"),
            l2_clip_norm=config.privacy.l2_clip_norm,
        )
        optimizer = optax.chain(
            privacy.privatizer(
                gradient_fn,
                mechanism,
                expected_batch_size=config.privacy.expected_batch_size,
                key=sampling.stream_key(self.seed, "noise"),
            ),
            config.optimizer.build(),
        )
        self.update = training.make_update(
            optimizer, ema_decay=config.optimizer.ema_decay
        )
        blank = records.normalize(jnp.zeros((1, *records.images.shape[1:]), jnp.uint8))
        params = jax.jit(model.init)(sampling.stream_key(self.seed, "init"), blank)
        self.state = training.init_state(params, optimizer)
        self.confusions = {
            name: evaluate.make_confusion(model.apply, split)
            for name, split in (
                ("test", dataset.test),
                ("nonprivate/validation", dataset.validation),
            )
            if split is not None
        }
        self.checkpoints = Checkpoints(workdir / "checkpoints")
        self.metrics = _Metrics(workdir / "metrics.jsonl")

    def train(self, stop) -> bool:
        """Does the updates that are left; returns False if stopped before the last."""
        config, num_updates = self.config, self.config.privacy.num_updates
        every = config.logging
        self.state = self.checkpoints.restore(self.state)
        first = int(self.state.step)
        self.metrics.keep_until(first)
        if first:
            _say(f"going on after update {first}")
        progress = _Progress(first, num_updates)
        for state, sums in training.train(
            self.state,
            self.accumulate,
            self.update,
            mesh=self.mesh,
            seed=self.seed,
            num_records=len(self.dataset.train),
            sampling_prob=self.mechanism.sampling_prob,
            num_updates=num_updates,
            microbatch_size=config.performance.microbatch_size,
            stop=stop,
        ):
            self.state = state
            step = int(state.step)
            last = step == num_updates
            progress.add(sums["records"])
            evaluated = step % every.eval_every == 0 or last
            if evaluated or step % every.log_every == 0:
                self._log(step, sums, progress, evaluated)
            if step % every.checkpoint_every == 0 or last:
                self.checkpoints.save(state)
        done = int(self.state.step)
        if done < num_updates:
            self.checkpoints.save(self.state)
            _say(
                f"stopped after update {done} of {num_updates}, which is saved: the same"
                " command goes on from there"
            )
        return done == num_updates

    def _log(self, step, sums, progress, evaluated) -> None:
        """Writes one line of metrics and one of progress."""
        records = max(float(sums["records"]), 1.0)
        line = {
            "step": step,
            "epsilon": privacy.epsilon_after(
                self.mechanism, step, self.config.privacy.delta
            ),
            "nonprivate/loss": float(sums["loss"]) / records,
            "nonprivate/clipped_fraction": float(sums["clipped"]) / records,
        }
        if evaluated:
            for name, confusion in self.confusions.items():
                for suffix, params in (
                    ("", self.state.params),
                    ("_ema", self.state.ema_params),
                ):
                    line[f"{name}/accuracy{suffix}"] = evaluate.accuracy(
                        confusion(params)
                    )
        speed = progress.records_per_second() * self.config.method.set_size
        self.metrics.append(
            {**line, "images_per_second": speed, "seconds": time.time() - self.started}
        )
        _say(
            f"update {step:>{len(str(progress.last))}}/{progress.last}"
            f"  nonprivate loss {line['nonprivate/loss']:.4f}"
            f"  epsilon {line['epsilon']:.3f}  {speed:,.0f} images/s"
            f"  ETA {progress.eta()}"
            + (f"  test {line['test/accuracy_ema']:.2%} (EMA)" if evaluated else "")
        )

    def finish(self) -> None:
        """Evaluates the last state and writes everything that comes out of the run."""
        config, test = self.config, self.dataset.test
        raw = self.confusions["test"](self.state.params)
        ema = self.confusions["test"](self.state.ema_params)
        facts = privacy.privacy_report(
            config.privacy,
            self.mechanism,
            num_records=len(self.dataset.train),
            images_per_record=config.method.set_size,
            secret_seed=config.seed is None,
        )
        text = privacy.statement(facts)
        metrics = self.metrics.read()
        results = {
            "test_accuracy": evaluate.accuracy(raw),
            "test_accuracy_ema": evaluate.accuracy(ema),
            "per_class_accuracy_ema": evaluate.per_class_accuracy(ema).tolist(),
            "confusion_ema": ema.tolist(),
            "epsilon": facts["epsilon_pld"],
            "delta": facts["delta"],
            "noise_multiplier": facts["noise_multiplier"],
            "seconds": time.time() - self.started,
        }
        export_weights(self.workdir / "model.safetensors", self.state)
        write_atomically(
            self.workdir / "privacy.json", json.dumps(facts, indent=2) + "\n"
        )
        write_atomically(self.workdir / "PRIVACY.md", text)
        write_atomically(
            self.workdir / "report.html",
            report.render(
                title=f"{config.method.name} on {config.data.name}",
                results=results,
                metrics=metrics,
                sheet=self._sheet(),
                num_views=config.method.num_views,
                class_names=test.class_names,
                statement=text,
                config=to_dict(config),
            ),
        )
        self.checkpoints.keep_last()
        self.checkpoints.close()
        write_atomically(
            self.workdir / "results.json", json.dumps(results, indent=2) + "\n"
        )

    def _sheet(self) -> np.ndarray:
        """Makes the augmentation set of the first test image, pixels in [0, 1]."""
        test = self.dataset.test
        image = test.normalize(jnp.asarray(test.images[:1]))[0]
        label = jax.nn.one_hot(test.labels[0], test.num_classes)
        key = sampling.stream_key(0, "augmentation")  # public: nothing private here
        images, _ = self.record_set(key, image, label)
        return np.asarray(images) * np.array(test.stddev) + np.array(test.mean)


class _Metrics:
    """`metrics.jsonl`: one line a logged update, without gaps or repeats."""

    def __init__(self, path: pathlib.Path):
        self._path = path

    def read(self) -> list[dict[str, Any]]:
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        return [json.loads(line) for line in lines]

    def append(self, line: dict[str, Any]) -> None:
        with open(self._path, "a") as file:
            file.write(json.dumps(line) + "\n")

    def keep_until(self, step: int) -> None:
        """Drops what a killed run wrote after the update that it resumes from."""
        kept = []
        for line in self._path.read_text().splitlines() if self._path.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):  # cut off by the kill
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
        write_atomically(self._path, "".join(kept))


class _Progress:
    """Speed and remaining time, compilation of the first update left out."""

    def __init__(self, first: int, last: int):
        self.last = last
        self._first, self._done, self._records = first, first, 0.0
        self._start: float | None = None

    def add(self, records: jax.Array) -> None:
        count = float(records)  # waits for the update
        if self._start is None:
            self._start, self._first = time.time(), self._first + 1
        else:
            self._records += count
        self._done += 1

    def records_per_second(self) -> float:
        assert self._start is not None
        return self._records / max(time.time() - self._start, 1e-9)

    def eta(self) -> str:
        assert self._start is not None
        if self._done == self._first:
            return "-:--:--"
        pace = (time.time() - self._start) / (self._done - self._first)
        seconds = round(pace * (self.last - self._done))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def _say(text: str, file=None) -> None:
    print(text, file=file or sys.stderr, flush=True)


def _seed(config: ExperimentConfig, workdir: pathlib.Path) -> int:
    """Returns the seed of the run, which is drawn and kept aside if none is given."""
    if config.seed is not None:
        return config.seed
    path = workdir / "secret_seed"
    if not path.exists():
        path.touch(mode=0o600)
        write_atomically(path, f"{secrets.randbits(128)}\n")
        path.chmod(0o600)
    return int(path.read_text())


def _check_workdir(workdir: pathlib.Path, config: ExperimentConfig) -> None:
    """Refuses a workdir that another experiment has written into."""
    path = workdir / "config.json"
    if not path.exists():
        return
    try:
        changed = differences(json.loads(path.read_text()), to_dict(config))
    except (json.JSONDecodeError, AttributeError):
        raise UserError(f"{path} is not a config of ours: use another workdir") from None
    if changed:
        raise UserError(
            f"workdir {workdir} is of another experiment; these differ:"
            f" {', '.join(changed)}: use another workdir"
        )


@contextlib.contextmanager
def _locked(workdir: pathlib.Path) -> Iterator[None]:
    """Holds a workdir for one process; the system releases it when that is killed."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = open(workdir / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        raise UserError(
            f"workdir {workdir} is not writable: {error.strerror}"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"workdir {workdir} is in use by another run") from None
        yield


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGTERM and Ctrl-C, so that the run saves first; a second one kills."""
    caught: list[int] = []

    def catch(number, frame):
        del frame
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)
        _say(f"{signal.Signals(number).name}: saving; once more stops at once")

    previous = {n: signal.signal(n, catch) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
