"""Audits of the run that a config describes: its canaries, and what comes out."""

import dataclasses
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Sequence

import jax
import matplotlib.figure
import numpy as np

from dpmix_jax import data
from dpmix_jax.audit import Audit, audit, gradient_canaries
from dpmix_jax.data.public import load_public
from dpmix_jax.errors import UserError, require
from dpmix_jax.files import replacing, write_atomically
from dpmix_jax.progress import say
from dpmix_jax.run import experiment, export, performance
from dpmix_jax.run.config import ExperimentConfig
from dpmix_jax.run.workdir import Workdir

Train = Callable[[np.ndarray], np.ndarray]
CANARIES = ("gradient", "mislabelled", "crafted")
_PRIVATE = "Made of training records without any privacy: not to be released."


def check(config: ExperimentConfig, kind: str) -> None:
    """Raises `UserError` for a config whose runs cannot be audited by such canaries."""
    if config.privacy.selection is not None:
        raise UserError("privacy.selection must be None: an audit is of one run")
    # Allocation needs a number of records that is known before the coins are thrown.
    whole = config.privacy.sampling == "allocation" and kind != "gradient"
    allowed = f"'poisson' for {kind} canaries: how many are trained on is random"
    require(not whole, "privacy.sampling", config.privacy.sampling, allowed)


def run(
    config: ExperimentConfig,
    folder: pathlib.Path,
    *,
    kind: str,
    num_canaries: int,
    repeats: int,
    confidence: float = 0.95,
) -> bool:
    """Audits a run several times, and writes what was found.

    Args:
      config: of the run; its seed is that of the first audit, 0 if there is none.
      folder: receives `audit.json`, `audit.md` and `audit.png`.
      kind: `gradient` (see `audit.gradient_canaries`; the config's q, T, sigma and C,
        without its model, method and data), `mislabelled` (training records with
        another label) or `crafted` (random pixels, random labels). The last two are
        trained on as `experiments/run.py` trains, and scored by the released weights.
        Their q is B over the records that are there, so it depends on how many
        canaries are included; the claim takes that number as public.
      num_canaries: m.
      repeats: audits, each with other coins, batches and noise.
      confidence: of each bound.

    Returns:
      Whether every bound is at most the claim.

    Raises:
      UserError: as `check`, for a config that cannot run, or for canaries that it has
        no room for.
    """
    check(config, kind)
    dataset = data.load(config.data)
    config.augmentation.check_images(dataset.train.image_shape)
    config.performance.check_devices(jax.device_count())
    room = len(dataset.train) - config.privacy.expected_batch_size
    if kind != "gradient":
        allowed = f"at most {room}, so that records for an expected batch remain"
        require(num_canaries <= room, "--canaries", num_canaries, allowed)
    mechanism = config.privacy.calibrate(
        config.privacy.sampling_prob(len(dataset.train))
    )
    claim = mechanism.epsilon(config.privacy.delta)
    folder.mkdir(parents=True, exist_ok=True)
    require(os.access(folder, os.W_OK), "--workdir", str(folder), "writable")
    found: list[Audit] = []
    for repeat in range(repeats):
        started, seed = time.monotonic(), (config.seed or 0) + repeat
        rng = np.random.default_rng([seed, num_canaries])
        of_repeat = dataclasses.replace(config, seed=seed)
        if kind == "gradient":
            train = gradient_canaries(
                mechanism,
                num_canaries,
                seed=seed,
                l2_clip_norm=config.privacy.l2_clip_norm,
            )
        else:
            train = _of_records(of_repeat, dataset, kind, num_canaries, rng)
        found.append(
            audit(
                train,
                num_canaries,
                delta=config.privacy.delta,
                rng=rng,
                confidence=confidence,
            )
        )
        _write(folder, kind, claim, found)
        say(
            f"audit {repeat + 1}/{repeats}: epsilon at least {found[-1].epsilon:.3f}"
            f" (claimed {claim:.3f}), AUROC {found[-1].auroc:.3f},"
            f" {time.monotonic() - started:.0f} s"
        )
    return all(each.epsilon <= claim for each in found)


def _of_records(
    config: ExperimentConfig,
    dataset: data.Dataset,
    kind: str,
    num_canaries: int,
    rng: np.random.Generator,
) -> Train:
    """Trains as `experiments/run.py` does, on the others and the included canaries."""
    records, classes = dataset.train, dataset.train.num_classes
    public = load_public(
        config.public, config.data, dataset, labelled=config.draws_public
    )
    chosen = rng.permutation(len(records))
    others = records.subset(np.sort(chosen[num_canaries:]))
    canaries = records.subset(np.sort(chosen[:num_canaries]))
    if kind == "mislabelled":
        wrong = canaries.labels + rng.integers(1, classes, num_canaries)
        labels = (wrong % classes).astype(canaries.labels.dtype)
        canaries = dataclasses.replace(canaries, labels=labels)
    else:
        labels = rng.integers(0, classes, num_canaries)
        canaries = dataclasses.replace(
            canaries,
            images=rng.integers(0, 256, canaries.images.shape).astype(np.uint8),
            labels=labels.astype(canaries.labels.dtype),
        )

    def train(included: np.ndarray) -> np.ndarray:
        inside = canaries.subset(np.flatnonzero(included))
        records = dataclasses.replace(
            others,
            images=np.concatenate([others.images, inside.images]),
            labels=np.concatenate([others.labels, inside.labels]),
        )
        with tempfile.TemporaryDirectory() as name:
            workdir = Workdir(pathlib.Path(name))
            training = dataset._replace(train=records)
            with performance.explained_out_of_memory(config.performance):
                experiment.train_and_release(
                    config, workdir, training, public, [], time.monotonic(), book=None
                )
            return _log_likelihoods(config, canaries, workdir)

    return train


def _log_likelihoods(
    config: ExperimentConfig, canaries: data.Records, workdir: Workdir
) -> np.ndarray:
    """Returns that of each canary's label by the averaged weights of a run, [m]."""
    files = export.described(config).files
    found = export.load(workdir.path, **files)(np.asarray(canaries.images))
    of_labels = found[np.arange(len(canaries)), canaries.labels]
    return np.log(np.maximum(of_labels, np.finfo(np.float32).tiny))


def _write(
    folder: pathlib.Path, kind: str, claim: float, audits: Sequence[Audit]
) -> None:
    numbers = [dataclasses.asdict(each) for each in audits]
    report = {"canaries": kind, "claim": claim, "audits": numbers}
    text = json.dumps(report, indent=2, default=np.ndarray.tolist) + "\n"
    write_atomically(folder / "audit.json", text, mode=0o600)
    write_atomically(folder / "audit.md", table(kind, claim, audits), mode=0o600)
    with replacing(folder / "audit.png", mode=0o600) as file:
        plot(claim, audits).savefig(file, format="png", dpi=150)


def table(kind: str, claim: float, audits: Sequence[Audit]) -> str:
    """Returns what was found in Markdown, a line for each audit."""
    first = audits[0]
    lines = [
        f"# Audit with {first.num_canaries} {kind} canaries",
        "",
        f"Claimed: ({claim:.4g}, {first.delta:g})-differential privacy. Lower bounds on"
        f" epsilon at {first.confidence:.0%} confidence each: one above the claim"
        " shows a fault, one below it shows nothing.",
        "",
        *([] if kind == "gradient" else [_PRIVATE, ""]),
        "| audit | epsilon at least | if no worse than a Gaussian mechanism | AUROC |",
        "| --- | --- | --- | --- |",
    ]
    for number, each in enumerate(audits, 1):
        lines.append(
            f"| {number} | {each.epsilon:.3f} | {each.epsilon_gaussian:.3f}"
            f" | {each.auroc:.3f} |"
        )
    return "\n".join([*lines, ""])


def plot(claim: float, audits: Sequence[Audit]) -> matplotlib.figure.Figure:
    """Plots the ROC curves of the guesses below the line that the claim allows."""
    figure = matplotlib.figure.Figure(figsize=(5, 4.5), layout="constrained")
    axes, delta = figure.subplots(), audits[0].delta
    least = 0.5 / audits[0].num_canaries
    for number, each in enumerate(audits, 1):
        axes.step(each.false_positives, each.true_positives, label=f"audit {number}")
    rates = np.geomspace(least, 1.0, 400)
    allowed = np.minimum(
        np.exp(claim) * rates + delta, 1 - np.exp(-claim) * (1 - delta - rates)
    )
    axes.plot(rates, np.minimum(allowed, 1.0), "k--", label=f"epsilon = {claim:.3g}")
    axes.plot(rates, rates, color="0.7", label="a coin")
    axes.set(xscale="log", yscale="log", xlim=(least, 1), ylim=(least, 1.2))
    axes.set(xlabel="false positive rate", ylabel="true positive rate")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
