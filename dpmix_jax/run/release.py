"""What a finished run gives away: weights, statement, results, report."""

import secrets
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dpmix_jax import accounting, data, training
from dpmix_jax.data.public import describe
from dpmix_jax.models import whitening
from dpmix_jax.progress import say
from dpmix_jax.run import build, evaluate, export, hosts, report, statement
from dpmix_jax.run.checkpoint import export_weights
from dpmix_jax.run.config import ExperimentConfig, to_dict
from dpmix_jax.run.workdir import Workdir

PyTree = Any


def release(
    config: ExperimentConfig,
    parts: build.Parts,
    workdir: Workdir,
    dataset: data.Dataset,
    state: training.TrainState,
    counts: evaluate.Counts,
    *,
    mechanism: accounting.Mechanism,
    public_data: str,
    checksums: Mapping[str, str],
    began: float,
) -> None:
    """Writes what comes out of a run: weights and statement first, results last.

    Args:
      config: of the run.
      parts: from `build.build`.
      workdir: receives the files.
      dataset: whose test records are evaluated and shown.
      state: after the last update.
      counts: of this state, from `evaluate.count`.
      mechanism: of the run.
      public_data: from `public_data_used`.
      checksums: from `FinetuneConfig.checksums`, when training began.
      began: when the run would have begun if it had never been stopped.
    """
    test = dataset.test
    facts = statement.privacy_report(
        config.privacy,
        mechanism,
        num_records=len(dataset.train),
        num_parameters=sum(p.size for p in jax.tree.leaves(state.params)),
        images_per_record=config.method.set_size,
        secret_seed=config.seed is None,
        sensitivity=parts.gradient_fn.sensitivity(config.privacy.relation),
        clipping=parts.clipping,
        precision=config.performance.precision,
        num_groups=int(parts.terms.expected) if build.has_groups(config) else None,
        public_data=public_data,
        kept_sets=config.finetune.sets * (config.finetune.embeddings == "kept"),
    )
    text = statement.statement(facts)
    weights = (parts.released(params) for params in (state.params, state.ema_params))
    workdir.write("model.safetensors", export_weights(*weights))
    workdir.write_json("model.json", export.describe(config, test, checksums))
    workdir.write_json("privacy.json", facts)
    workdir.write("PRIVACY.md", text)
    raw, ema = counts["test/accuracy"], counts["test/accuracy_ema"]
    results = {
        "test_accuracy": evaluate.accuracy(raw),
        "test_accuracy_ema": evaluate.accuracy(ema),
        "per_class_accuracy_ema": evaluate.per_class_accuracy(ema).tolist(),
        "confusion_ema": ema[:, :-1].tolist(),
        "epsilon": facts["epsilon"],
        "delta": facts["delta"],
        "noise_multiplier": facts["noise_multiplier"],
        "device": f"{parts.mesh.size} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "seconds": time.monotonic() - began,
    }
    for suffix in ("", "_ema"):
        if (of_views := counts.get(f"test_views/accuracy{suffix}")) is not None:
            results[f"test_accuracy{suffix}_views"] = evaluate.accuracy(of_views)
    if raw[:, -1].any() or ema[:, -1].any():
        results["diverged"] = True
    if facts["selection"]:
        correct = int(np.trace(counts["nonprivate/validation/accuracy_ema"]))
        results["score"] = score(correct, facts["selection"]["score_noise"], config)
    try:
        page = report.render(
            title=f"{config.method.name} on {config.data.name}",
            results=results,
            metrics=workdir.metrics(),
            confusion=ema,
            sheet=build.example_set(config, test, hosts.local(parts.inputs.pool)),
            method=config.method,
            class_names=test.class_names,
            statement=text,
            config=to_dict(config),
        )
        workdir.write("report.html", page)
    except Exception as error:  # a picture is not worth the run
        say(f"no report.html: {type(error).__name__}: {error}")
    workdir.write_json("results.json", results)  # the run is finished


def score(correct: int, noise: float, config: ExperimentConfig) -> int:
    """Returns what a private selection compares this run with others by.

    Args:
      correct: validation records that are classified correctly.
      noise: standard deviation on that number.
      config: of the run.
    """
    # Not from the seed of the run, which is forgotten by now.
    seed = secrets.randbits(256) if config.seed is None else config.seed
    return round(correct + np.random.default_rng(seed).normal(0.0, noise))


def public_data_used(
    config: ExperimentConfig, public: data.Records | None, checksums: Mapping[str, str]
) -> str:
    """Describes the public images and the weight files that a run used."""
    images = describe(
        config.public,
        public,
        config.method.num_public,
        config.pretrain.num_updates,
        whitened_by=whitening.chosen(len(public)).size
        if public is not None and config.finetune.whitening is not None
        else 0,
        checked=not (config.public and config.public.is_other_half(config.data)),
    )
    said = [images] if config.public else []
    said.append(config.finetune.describe(checksums))
    return "; ".join(filter(None, said)) or "none"


def final_line(results: dict[str, Any]) -> str:
    """Returns the line that a finished run ends with."""
    return (
        f"test accuracy raw {100 * results['test_accuracy']:.2f} %,"
        f" EMA {100 * results['test_accuracy_ema']:.2f} %;"
        f" ({statement.round_up(results['epsilon'])},"
        f" {statement.round_up(results['delta'])})-DP,"
        f" sigma {results['noise_multiplier']:.4g}; {results['seconds']:.0f} s"
        + "; diverged: the model is not finite"
        * bool(results.get("diverged"))
    )
