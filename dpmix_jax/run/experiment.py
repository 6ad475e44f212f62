"""One experiment from a config to a workdir: train, survive, evaluate, release."""

import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax

from dpmix_jax import data, privacy, training
from dpmix_jax.progress import Progress, say
from dpmix_jax.run import (
    build,
    convolutions,
    diagnostics,
    embeddings,
    evaluate,
    hosts,
    ledger,
    performance,
    start,
)
from dpmix_jax.run.checkpoint import Checkpoints
from dpmix_jax.run.config import ExperimentConfig, to_dict
from dpmix_jax.run.release import final_line, public_data_used, release
from dpmix_jax.run.workdir import Workdir

DIVERGED = 3  # the exit status if logits of a test image are not finite
STOPPING = signal.SIGTERM, signal.SIGINT  # the latter is Ctrl-C


def run(
    config: ExperimentConfig, workdir: Workdir, stopping: Sequence[int] = STOPPING
) -> int:
    """Runs an experiment, or goes on with it where it stopped.

    Args:
      config: what to run.
      workdir: receives `config.json`, `metrics.jsonl`, `checkpoints/`,
        `model.safetensors`, `model.json`, `privacy.json`, `PRIVACY.md`, `report.html`,
        with measured convolutions `convolutions.json`, and, last of all,
        `results.json`.
      stopping: signals at which it saves and stops.

    Returns:
      The exit status: 0, 3 if the released model gives a test image logits that are not
      finite, or 128 + n after signal n.

    Raises:
      UserError: for a config that cannot run here, or a workdir that is not writable,
        in use, or of another experiment, before anything of a run is written; later,
        for too little memory or a damaged checkpoint.
    """
    started = time.monotonic()
    dataset, public = start.read(config)
    config.augmentation.check_images(dataset.train.image_shape)
    config.performance.check_devices(jax.device_count())
    config.check_processes(jax.process_count())
    start.warn(config.privacy, len(dataset.train))
    held = workdir.locked() if hosts.is_first() else contextlib.nullcontext()
    explained = performance.explained_out_of_memory(config.performance)
    with held, caught_signals(stopping) as signals, explained:
        if jax.process_count() == 1:  # or else the cache must be one that all share
            performance.keep_compiled_code(workdir.path.parent / ".jax_cache")
        if hosts.of_first(lambda: workdir.is_finished(config)):
            say(f"finished before: {workdir.path}")
        elif not train_and_release(
            config,
            workdir,
            dataset,
            public,
            signals,
            started,
            book=ledger.of(dataset) if hosts.is_first() else None,
        ):
            return 128 + hosts.agreed(signals)[0]
        return hosts.of_first(lambda: conclude(workdir))


def conclude(workdir: Workdir) -> int:
    """Tells what came out of a finished run; returns its exit status."""
    results = workdir.results()
    assert results is not None
    workdir.clean_up()
    say(final_line(results), file=sys.stdout)
    return DIVERGED if results.get("diverged") else 0


def train_and_release(
    config: ExperimentConfig,
    workdir: Workdir,
    dataset: data.Dataset,
    public: data.Records | None,
    signals: list[int],
    started: float,
    *,
    book: ledger.Ledger | None,
) -> bool:
    """Trains and releases what comes out.

    Args:
      config: of the run.
      workdir: held by this process.
      dataset: of the config.
      public: public images of the config, or None.
      signals: those caught so far; after the first one the state is saved.
      started: when the run began.
      book: the ledger that records the run; None if nothing of the run will be
        released, and in all processes but the first.

    Returns:
      False if a signal came before the last update.
    """
    train_set, num_updates = dataset.train, config.privacy.num_updates

    # What can be refused is, before anything is written.
    sampling_prob = config.privacy.sampling_prob(len(train_set))
    model = build.classifier(config, train_set)
    given = config.finetune.load(model.shapes)
    _, frozen = config.finetune.split(model.shapes)
    drawn = {*frozen.get("params", {})} - {"whitening"}  # which is fitted
    if drawn and not (config.finetune.files or config.pretrain.num_updates):
        say("warning: what is frozen is random: finetune.encoder names a file for it")
    checksums = config.finetune.checksums()
    digest = start.data_digest(train_set, public, checksums)
    hosts.check_same(
        config=json.dumps(to_dict(config)),
        data=digest,
        software=start.software(),
    )
    build.make_pool(config, public if config.draws_public else None)
    given = embeddings.whitened(config, model, given, train_set, public, workdir)

    found, seed = hosts.of_first(
        lambda: start.begin(config, workdir, sampling_prob, digest, book=book)
    )
    mechanism = start.made_with(found, config.privacy, sampling_prob)
    if hosts.is_first():
        embeddings.save_whitening(given, workdir)
    say(
        f"{config.method.name}, K = {config.method.set_size}: {num_updates} updates of"
        f" {len(train_set)} records at q = {sampling_prob:.4g}, sigma ="
        f" {mechanism.noise_multiplier:.4g}"
        + f", {mechanism.bands} bands"
        * (mechanism.bands > 1)
    )
    parts = build.build(
        config,
        model,
        given,
        train_set,
        mechanism=mechanism,
        # The seed is None only after the last update, or `first_state` raises.
        seed=0 if seed is None else seed,
        public=public,
    )
    confusions = evaluate.make_confusions(config, model, dataset)
    checkpoints = Checkpoints(workdir.path / "checkpoints")
    state = hosts.arrays_of_first(
        lambda: start.first_state(
            config, parts, workdir, checkpoints, train_set, seed, signals, started
        ),
        like=parts.state,
    )
    if state is None:
        return False
    first = int(state.step)
    if first:
        say(f"going on after update {first}")
    began = started - (workdir.seconds() if hosts.is_first() else 0.0)
    log = evaluate.make_log(config, mechanism, workdir, began)

    if config.finetune.embeddings == "kept" and first < num_updates:
        assert seed is not None
        stop, path = lambda: bool(signals), workdir.embeddings
        rows = embeddings.keep(parts, config, model, path, len(train_set), stop)
        if rows is None:
            say("stopped: the same command goes on from there")
            return False
        parts = embeddings.on_kept(parts, config, model, rows, seed)

    every, counts, stopped = config.logging, evaluate.Counts(), hosts.agreed(signals)
    with Progress(first, num_updates, started) as progress:
        updates = updates_from(state, parts, config, workdir, lambda: bool(stopped))
        for replicated, sums in updates:
            state = hosts.local(replicated)
            step = int(state.step)
            last = step == num_updates
            progress.add(sums["records"])
            if hosts.is_first():
                evaluated = step % every.eval_every == 0 or last
                counts = evaluate.count(confusions, parts, state) if evaluated else {}
                if evaluated or step % every.log_every == 0:
                    log(state, sums, progress, counts)
                if last:  # what is left must hold no sum without noise
                    left = privacy.without_sums(state.opt_state)
                    checkpoints.save(state._replace(opt_state=left))
                elif step % every.checkpoint_every == 0:
                    checkpoints.save(state)
            stopped = hosts.agreed(signals)
    if int(state.step) < num_updates:
        if hosts.is_first():
            checkpoints.save(state)
        say(
            f"stopped after update {int(state.step)} of {num_updates}, which is saved:"
            " the same command goes on from there"
        )
        return False

    if not hosts.is_first():
        return True
    # Nothing is drawn from the seed any more: the secrets go before anything comes out.
    checkpoints.keep_last()
    workdir.forget_secrets()
    release(
        config,
        parts,
        workdir,
        dataset,
        state,
        counts or evaluate.count(confusions, parts, state),
        mechanism=mechanism,
        public_data=public_data_used(config, public, checksums),
        checksums=checksums,
        began=began,
    )
    return True


def updates_from(
    state: training.TrainState,
    parts: build.Parts,
    config: ExperimentConfig,
    workdir: Workdir,
    stop: Callable[[], bool],
) -> Iterable[tuple[training.TrainState, dict[str, Any]]]:
    """Returns what `training.train` yields from a state on, for these parts."""
    first, num_updates = int(state.step), config.privacy.num_updates
    if first == num_updates and not parts.magnitudes:
        return ()
    size = min(hosts.gather(parts.microbatch_size(config.performance)))
    if config.performance.microbatch_size == "auto":
        say(f"microbatches of {size} records")
    is_measured = config.performance.convolutions == performance.MEASURED
    if is_measured and first < num_updates:
        parts = convolutions.measured(
            parts, config.performance, size, workdir, goes_on=first > 0
        )
    updates = training.train(
        state,
        parts.accumulate,
        parts.apply_update,
        parts.inputs,
        mesh=parts.mesh,
        batches=parts.batches(size),
        num_updates=num_updates,
        magnitudes=parts.magnitudes,
        stop=stop,
    )
    if not parts.magnitudes:
        return updates
    return diagnostics.observed(
        updates,
        workdir.path / diagnostics.FOLDER,
        first=first,
        num_updates=num_updates,
        checkpoint_every=config.logging.checkpoint_every,
    )


@contextlib.contextmanager
def caught_signals(numbers: Sequence[int] = STOPPING) -> Iterator[list[int]]:
    """Collects signals, so that the run saves first; the same one again kills."""
    caught: list[int] = []

    def catch(number, frame):
        del frame
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)
        say(f"{signal.Signals(number).name}: saving; once more stops at once")

    previous = {n: signal.signal(n, catch) for n in numbers}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
