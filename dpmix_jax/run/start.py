"""How a run starts: what it says and writes down first, and what it goes on from."""

import importlib.metadata
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dpmix_jax import (
    accounting,
    data,
    devices,
    factorization,
    privacy,
    sampling,
    training,
)
from dpmix_jax.baselines import pretraining
from dpmix_jax.data.public import load_public
from dpmix_jax.errors import UserError
from dpmix_jax.progress import Progress, say
from dpmix_jax.run import build, ledger, plan
from dpmix_jax.run.checkpoint import Checkpoints
from dpmix_jax.run.config import ExperimentConfig, to_dict
from dpmix_jax.run.workdir import Workdir


def read(config: ExperimentConfig) -> tuple[data.Dataset, data.Records | None]:
    """Returns the records of a run, and its public images, if any.

    Raises:
      UserError: for files that cannot be read, or do not fit.
    """
    dataset, labelled = data.load(config.data), config.draws_public
    public = load_public(config.public, config.data, dataset, labelled=labelled)
    return dataset, public


def warn(config: privacy.PrivacyConfig, num_records: int) -> None:
    """Warns of a guarantee that is weak or conditional."""
    if config.delta >= 1 / num_records:
        say(
            f"warning: privacy.delta is {config.delta:g}, not below 1/N ="
            f" {1 / num_records:.3g}: such a promise allows publishing a whole record"
        )
    if config.selection is not None:
        say(
            "a candidate of a private selection: its guarantee holds only if"
            " experiments/sweep.py has selected it"
        )


def software() -> str:
    """Returns versions of the libraries that draw or account, and the sources."""
    names = ("dp_accounting", "jax", "jax_privacy", "jaxlib", "numpy")
    found = [importlib.metadata.version(name) for name in names]
    sources = sorted(pathlib.Path(__file__).parents[1].rglob("*.py"))
    return str([*found, *(path.read_text() for path in sources)])


def data_digest(
    train: data.Records, public: data.Records | None, weights: Mapping[str, str]
) -> str:
    """Returns a checksum of all that gradients are made of.

    A run goes on only with the same data: two sums under the same noise would show
    their difference without any noise.

    Args:
      train: the training set.
      public: public images, or None.
      weights: from `FinetuneConfig.checksums`.
    """
    digests = [records.digest() for records in (train, public) if records is not None]
    return "+".join([*digests, *weights.values()])


def begin(
    config: ExperimentConfig,
    workdir: Workdir,
    sampling_prob: float,
    digest: str,
    *,
    book: ledger.Ledger | None,
) -> tuple[dict[str, Any], int | None]:
    """Writes a run down before it trains, or finds how it began.

    Args:
      config: of the run.
      workdir: receives its config and its secret.
      sampling_prob: q.
      digest: from `data_digest`.
      book: see `experiment.train_and_release`.

    Returns:
      What `made_with` takes, and the seed, None once it is forgotten.
    """
    mechanism = mechanism_of(config.privacy, sampling_prob, workdir)
    begins = workdir.kept() is None
    if book is not None and begins and not plan.claims(config, workdir.path):
        book.spend(
            mechanism,
            epsilon=config.privacy.epsilon,
            delta=config.privacy.delta,
            workdir=str(workdir.path.resolve()),
        )
    workdir.write_json("config.json", to_dict(config), mode=0o600)
    found: dict[str, Any] = {"noise_multiplier": mechanism.noise_multiplier}
    if mechanism.bands > 1:
        found["strategy"] = list(mechanism.strategy)
    return found, workdir.begin(config.seed, data=digest, **found)


def mechanism_of(
    config: privacy.PrivacyConfig, sampling_prob: float, workdir: Workdir
) -> accounting.Mechanism:
    """Returns the mechanism that a run began with, or calibrates that of a new one."""
    kept = workdir.kept()
    if kept is None:
        say("calibrating the noise")
        return config.calibrate(sampling_prob)
    mechanism = made_with(kept, config, sampling_prob)
    # Not to the last bit: accountants differ in it between processors.
    if mechanism.epsilon(config.delta) > config.epsilon * (1 + 1e-6):
        raise UserError(
            f"workdir {workdir.path} began with less noise than {config.epsilon:g}"
            " allows by this accountant: use another --workdir"
        )
    return mechanism


def made_with(
    found: Mapping[str, Any], config: privacy.PrivacyConfig, sampling_prob: float
) -> accounting.Mechanism:
    """Returns the mechanism of a config that has this noise and strategy."""
    return accounting.Mechanism(
        sampling_prob=sampling_prob,
        num_updates=config.num_updates,
        noise_multiplier=found["noise_multiplier"],
        neighboring_relation=config.relation,
        selection=config.private_selection,
        strategy=tuple(found.get("strategy", factorization.INDEPENDENT)),
        allocated=config.sampling == "allocation",
    )


def first_state(
    config: ExperimentConfig,
    parts: build.Parts,
    workdir: Workdir,
    checkpoints: Checkpoints,
    train_set: data.Records,
    seed: int | None,
    signals: list[int],
    started: float,
) -> training.TrainState | None:
    """Returns the state of the last checkpoint, or of the initial weights.

    Pre-trains these first if the config asks for it, and forgets metrics of updates
    after the checkpoint.

    Returns:
      None if a signal came before the last update of a pre-training.

    Raises:
      UserError: if updates are left and the seed is forgotten, or for a damaged
        checkpoint.
    """
    state = checkpoints.restore(parts.state)
    if seed is None and (state is None or int(state.step) < config.privacy.num_updates):
        raise UserError(
            f"workdir {workdir.path} has lost the checkpoint of its last update: use"
            " another --workdir"
        )
    if state is None and config.pretrain.num_updates:
        assert seed is not None
        state = pretrain(config, parts, workdir, train_set, seed, signals, started)
        if state is None:
            return None
        checkpoints.save(state)
    state = state or parts.state
    shutil.rmtree(workdir.path / "pretraining", ignore_errors=True)
    workdir.keep_metrics(int(state.step))
    return state


def pretrain(
    config: ExperimentConfig,
    parts: build.Parts,
    workdir: Workdir,
    train_set: data.Records,
    seed: int,
    signals: list[int],
    started: float,
) -> training.TrainState | None:
    """Trains the initial weights on public images; None if stopped before the end."""
    phase, every = config.pretrain, config.logging
    checkpoints = Checkpoints(workdir.path / "pretraining")
    like = training.init_state(parts.state.params, phase.build())
    state = checkpoints.restore(like) or like
    assert parts.inputs.pool is not None  # the config has seen to it
    updates = pretraining.pretrain(
        jax.device_put(state, devices.everywhere(parts.mesh)),
        parts.loss_fn,
        phase,
        config.augmentation,
        parts.inputs.pool,
        constants=parts.inputs.constants,
        normalize=train_set.normalize,
        key=sampling.stream_key(seed, "pretraining"),
    )
    first = int(state.step)
    with Progress(first, phase.num_updates, started) as progress:
        for state, loss in updates:
            step = int(state.step)
            last = step == phase.num_updates
            progress.add(phase.batch_size)
            if step % every.log_every == 0 or last:
                say(
                    f"pre-training {step}/{phase.num_updates}  loss {loss:.4f}"
                    f"  ETA {progress.eta()}"
                )
            stopped = bool(signals) and not last
            if step % every.checkpoint_every == 0 or stopped:
                checkpoints.save(state)
            if stopped:
                say("stopped: the same command goes on from there")
                return None
    params = jax.tree.map(jnp.copy, state.params)
    return parts.state._replace(params=params, ema_params=state.params)
