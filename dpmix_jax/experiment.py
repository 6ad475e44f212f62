"""One experiment from a config to a workdir: train, survive, evaluate, report."""

import contextlib
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpmix_jax import (
    data,
    evaluate,
    performance,
    privacy,
    report,
    sampling,
    statement,
    training,
)
from dpmix_jax.checkpoint import Checkpoints, export_weights
from dpmix_jax.config import ExperimentConfig, to_dict
from dpmix_jax.data.public import describe, load_public
from dpmix_jax.errors import UserError
from dpmix_jax.pipeline import Model, Pipeline
from dpmix_jax.progress import Progress, say
from dpmix_jax.workdir import Workdir


def run(config: ExperimentConfig, workdir: Workdir) -> int:
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
        in use, or of another experiment. Nothing of a run has been written then.
    """
    started = time.time()
    dataset = data.load(config.data)
    public = load_public(config.public, config.data, dataset)
    num_records = len(dataset.train)
    sampling_prob = config.privacy.sampling_prob(num_records)
    config.performance.check_devices(jax.device_count())
    if config.privacy.delta >= 1 / num_records:
        say(
            f"warning: privacy.delta is {config.privacy.delta:g}, not below 1/N ="
            f" {1 / num_records:.3g}: such a promise allows publishing a whole record"
        )
    if config.privacy.selection is not None:
        say(
            "a candidate of a private selection: its guarantee holds only if"
            " experiments/sweep.py has selected it"
        )
    with workdir.locked(), caught_signals() as signals:
        performance.keep_compiled_code(workdir.path.parent / ".jax_cache")
        workdir.check(config)
        if workdir.results() is not None:
            say(f"finished before: {workdir.path}")
        else:
            model = Model(config, dataset.train)
            mechanism = _mechanism(config.privacy, sampling_prob, workdir)
            workdir.write_json("config.json", to_dict(config))
            say(
                f"{config.method.name}, K = {config.method.set_size}:"
                f" {config.privacy.num_updates} updates of {num_records} records at q ="
                f" {sampling_prob:.4g}, sigma = {mechanism.noise_multiplier:.4g}"
            )
            job = _Run(config, workdir, dataset, public, model, mechanism, started)
            if not job.train(stop=lambda: bool(signals)):
                return 128 + signals[0]
            job.finish()
        results = workdir.results()
        assert results is not None
        workdir.clean_up()
        say(final_line(results), file=sys.stdout)
    return 0


def _mechanism(
    config: privacy.PrivacyConfig, sampling_prob: float, workdir: Workdir
) -> privacy.Mechanism:
    """Returns the mechanism of a run: that it began with, or else calibrated."""
    kept = workdir.kept()
    if kept is None:
        say("calibrating the noise")
        return privacy.calibrate(
            epsilon=config.epsilon,
            delta=config.delta,
            sampling_prob=sampling_prob,
            num_updates=config.num_updates,
            neighboring_relation=config.relation,
            selection=config.private_selection,
        )
    mechanism = privacy.Mechanism(
        sampling_prob=sampling_prob,
        num_updates=config.num_updates,
        noise_multiplier=kept["noise_multiplier"],
        neighboring_relation=config.relation,
        selection=config.private_selection,
    )
    # Not to the last bit: accountants differ in it between processors.
    if mechanism.epsilon(config.delta) > config.epsilon * (1 + 1e-6):
        raise UserError(
            f"workdir {workdir.path} began with less noise than {config.epsilon:g}"
            " allows by this accountant: use another --workdir"
        )
    return mechanism


def data_digest(
    train: data.Records,
    public: data.Records | None,
    weights: Iterable[str] = (),
) -> str:
    """Returns a checksum of everything that noise is added to the gradients of.

    The same noise must not meet other public images or weights either: they change the
    sum, and its difference would be free of noise.
    """
    digests = [records.digest() for records in (train, public) if records is not None]
    return "+".join([*digests, *weights])


def final_line(results: dict[str, Any]) -> str:
    """Returns the line that a finished run ends with."""
    return (
        f"test accuracy raw {100 * results['test_accuracy']:.2f} %,"
        f" EMA {100 * results['test_accuracy_ema']:.2f} %;"
        f" ({statement.round_up(results['epsilon'])},"
        f" {statement.round_up(results['delta'])})-DP,"
        f" sigma {results['noise_multiplier']:.4g}; {results['seconds']:.0f} s"
    )


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collects SIGTERM and Ctrl-C, so that the run saves first; a second one kills."""
    caught: list[int] = []

    def catch(number, frame):
        del frame
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)
        say(f"{signal.Signals(number).name}: saving; once more stops at once")

    previous = {n: signal.signal(n, catch) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Run:
    """The parts of one run, put together; `train` and `finish` use them."""

    def __init__(
        self,
        config: ExperimentConfig,
        workdir: Workdir,
        dataset: data.Dataset,
        public: data.Records | None,
        model: Model,
        mechanism: privacy.Mechanism,
        started: float,
    ):
        self.config, self.workdir, self.dataset = config, workdir, dataset
        self.public, self.mechanism, self.started = public, mechanism, started
        self.weights = config.finetune.checksums()
        workdir.begin(
            config.seed,
            data=data_digest(dataset.train, public, self.weights),
            noise_multiplier=mechanism.noise_multiplier,
        )
        kept = workdir.kept()
        assert kept is not None
        # Forgotten once the last update is saved: nothing is drawn from it any more.
        self.forgotten = kept["seed"] is None
        self.seed = 0 if self.forgotten else kept["seed"]
        self.pipeline = Pipeline(
            config,
            model,
            dataset.train,
            mechanism=mechanism,
            seed=self.seed,
            public=public,
        )
        self.state = self.pipeline.state
        self.confusions = {
            name: evaluate.make_confusion(model.logits, split)
            for name, split in (
                ("test", dataset.test),
                ("nonprivate/validation", dataset.validation),
            )
            if split is not None
        }
        self.checkpoints = Checkpoints(workdir.path / "checkpoints")

    def train(self, stop) -> bool:
        """Does the updates that are left; returns False if stopped before the last."""
        num_updates = self.config.privacy.num_updates
        first = self.checkpoints.latest_step()
        if self.forgotten and first != num_updates:
            raise UserError(
                f"workdir {self.workdir.path} has lost the checkpoint of its last"
                " update: use another --workdir"
            )
        pretrains = self.config.pretrain.num_updates > 0 and first is None
        if pretrains and not self._pretrain(stop):
            return False
        self.state, first = self.checkpoints.restore(self.state), first or 0
        shutil.rmtree(self.workdir.path / "pretraining", ignore_errors=True)
        self.workdir.keep_metrics(first)
        if first:
            say(f"going on after update {first}")
        size = self.pipeline.microbatch_size()
        if self.config.performance.microbatch_size == "auto":
            say(f"microbatches of {size} records")
        progress = Progress(first, num_updates, self.started)
        with performance.explained_out_of_memory(size):
            self._updates(size, progress, stop)
        done = int(self.state.step)
        if done < num_updates:
            self.checkpoints.save(self.state)
            say(
                f"stopped after update {done} of {num_updates}, which is saved:"
                " the same command goes on from there"
            )
        return done == num_updates

    def _pretrain(self, stop) -> bool:
        """Trains the initial weights on public images; False if stopped before done."""
        config, every = self.config.pretrain, self.config.logging
        kept = Checkpoints(self.workdir.path / "pretraining")
        first = kept.restore(training.init_state(self.state.params, config.build()))
        progress = Progress(int(first.step), config.num_updates, self.started)
        state = first
        for state, loss in self.pipeline.pretrain(first):
            step = int(state.step)
            progress.add(config.batch_size)
            stopped = stop() and step < config.num_updates
            if step % every.log_every == 0 or step == config.num_updates:
                say(
                    f"pre-training {step}/{config.num_updates}  loss {loss:.4f}"
                    f"  ETA {progress.eta()}"
                )
            if step % every.checkpoint_every == 0 or stopped:
                kept.save(state)
            if stopped:
                say("stopped: the same command goes on from there")
                return False
        kept.close()
        params = jax.tree.map(jnp.copy, state.params)
        self.state = self.state._replace(params=params, ema_params=state.params)
        self.checkpoints.save(self.state)
        return True

    def _updates(self, microbatch_size: int, progress: Progress, stop) -> None:
        """Does, logs and saves one update after the other."""
        num_updates = self.config.privacy.num_updates
        every = self.config.logging
        for state, sums in training.train(
            self.state,
            self.pipeline.accumulate,
            self.pipeline.update,
            mesh=self.pipeline.mesh,
            draw=self.pipeline.batches(microbatch_size),
            num_updates=num_updates,
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
                        confusion(self.pipeline.all_params(params))
                    )
        speed = progress.records_per_second() * self.config.method.set_size
        self.workdir.add_metrics(
            {**line, "images_per_second": speed, "seconds": time.time() - self.started}
        )
        say(
            f"update {step:>{len(str(progress.last))}}/{progress.last}"
            f"  nonprivate loss {line['nonprivate/loss']:.4f}"
            f"  epsilon {line['epsilon']:.3f}  {speed:,.0f} images/s"
            f"  ETA {progress.eta()}"
            + (f"  test {line['test/accuracy_ema']:.2%} (EMA)" if evaluated else "")
        )

    def finish(self) -> None:
        """Erases the secrets, then writes everything that comes out of the run."""
        self.checkpoints.keep_last()
        self.workdir.forget_seed()
        config, test = self.config, self.dataset.test
        raw, ema = (
            self.confusions["test"](self.pipeline.all_params(params))
            for params in (self.state.params, self.state.ema_params)
        )
        facts = statement.privacy_report(
            config.privacy,
            self.mechanism,
            num_records=len(self.dataset.train),
            images_per_record=config.method.set_size,
            secret_seed=config.seed is None,
            sensitivity=self.pipeline.sensitivity,
            clipping=config.performance.clipping,
            precision=config.performance.precision,
            num_groups=self.pipeline.num_groups,
            public_data=self._public_data(),
        )
        text = statement.statement(facts)
        results = {
            "test_accuracy": evaluate.accuracy(raw),
            "test_accuracy_ema": evaluate.accuracy(ema),
            "per_class_accuracy_ema": evaluate.per_class_accuracy(ema).tolist(),
            "confusion_ema": ema.tolist(),
            "epsilon": facts["epsilon"],
            "delta": facts["delta"],
            "noise_multiplier": facts["noise_multiplier"],
            "device": f"{self.pipeline.mesh.size} x {jax.devices()[0].device_kind}",
            "jax": jax.__version__,
            "seconds": time.time() - self.started,
        }
        if facts["selection"]:
            results["score"] = self._score(facts["selection"]["score_noise"])
        page = report.render(
            title=f"{config.method.name} on {config.data.name}",
            results=results,
            metrics=self.workdir.metrics(),
            sheet=self._sheet(),
            method=config.method,
            class_names=test.class_names,
            statement=text,
            config=to_dict(config),
        )
        self.workdir.write("model.safetensors", export_weights(self.state))
        self.workdir.write_json("privacy.json", facts)
        self.workdir.write("PRIVACY.md", text)
        self.workdir.write("report.html", page)
        self.checkpoints.close()
        self.workdir.end(results)

    def _score(self, noise: float) -> int:
        """Returns what a private selection compares this run with others by."""
        params = self.pipeline.all_params(self.state.ema_params)
        correct = np.trace(self.confusions["nonprivate/validation"](params))
        # Not from the seed of the run, which is forgotten by now.
        seed = self.config.seed
        rng = np.random.default_rng(secrets.randbits(128) if seed is None else seed)
        return round(correct + rng.normal(0.0, noise))

    def _public_data(self) -> str:
        """Says what else entered than private records."""
        config = self.config
        images = describe(
            config.public,
            self.public,
            config.method.num_public,
            config.pretrain.num_updates,
            checked=not (config.public and config.public.is_other_half(config.data)),
        )
        said = [images] if config.public else []
        said.append(config.finetune.describe(self.weights))
        return "; ".join(filter(None, said)) or "none"

    def _sheet(self) -> np.ndarray:
        """Makes the set of the first test image, or images, with pixels in [0, 1]."""
        test, method = self.dataset.test, self.config.method
        count = method.group_size if method.mixes_records else 1
        images = test.normalize(jnp.asarray(test.images[:count]))
        labels = jax.nn.one_hot(test.labels[:count], test.num_classes)
        key = sampling.stream_key(0, "augmentation")  # public: nothing private here
        keys = sampling.record_keys(key, jnp.int32(0), jnp.arange(count))
        made_of = [keys, images, labels]
        if not method.mixes_records:
            made_of = [part[0] for part in made_of]
        images, _ = self.pipeline.record_set(*made_of, self.pipeline.accumulate.bank)
        return np.asarray(images) * np.array(test.stddev) + np.array(test.mean)
