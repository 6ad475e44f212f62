"""Evaluation of classifiers on whole datasets, and what a run logs."""

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpmix_jax import accounting, augment, sampling, training
from dpmix_jax.data import Dataset, Records
from dpmix_jax.models import finetune
from dpmix_jax.models.classifier import Classifier
from dpmix_jax.progress import Progress, say
from dpmix_jax.run.build import Parts
from dpmix_jax.run.config import ExperimentConfig
from dpmix_jax.run.workdir import Workdir

PyTree = Any
Function = Callable[[PyTree, jax.Array], jax.Array]
Confusions = dict[str, Callable[[Sequence[PyTree]], np.ndarray]]
Counts = dict[str, np.ndarray]  # confusion matrices by the name of their accuracy


def make_confusion(
    encode: Function, classify: Function, records: Records, *, batch_size: int = 512
) -> Callable[[Sequence[PyTree]], np.ndarray]:
    """Compiles the evaluation of models of one encoder on every record of a dataset.

    Args:
      encode: `f(params, images [B, H, W, C]) -> embeddings`, the same for all models,
        which are the images where models share nothing.
      classify: `f(params, embeddings) -> logits [B, O]`.
      records: M of them; the last partial batch counts too.
      batch_size: images in one call.

    Returns:
      `f([params, ...]) -> [n, O, O + 1]` int64 counts of each of n models, true classes
      along rows, predicted ones along columns; the last one is of images whose logits
      are not finite.
    """
    num_classes = records.num_classes
    batch_size = min(batch_size, max(len(records), 1))

    @jax.jit
    def embed(params, images):
        return encode(params, records.normalize(images))

    @jax.jit
    def predict(params, embeddings):
        logits = classify(params, embeddings)
        finite = jnp.isfinite(logits).all(axis=-1)
        return jnp.where(finite, jnp.argmax(logits, axis=-1), num_classes)

    def confusion(models: Sequence[PyTree]) -> np.ndarray:
        counts = np.zeros((len(models), num_classes, num_classes + 1), np.int64)
        for start in range(0, len(records), batch_size):
            images = records.images[start : start + batch_size]
            labels = records.labels[start : start + batch_size]
            padding = [(0, batch_size - len(images))] + [(0, 0)] * (images.ndim - 1)
            embeddings = embed(models[0], np.pad(images, padding))
            for each, params in zip(counts, models, strict=True):
                predicted = np.asarray(predict(params, embeddings))
                np.add.at(each, (labels, predicted[: len(labels)]), 1)
        return counts

    return confusion


def accuracy(confusion: np.ndarray) -> float:
    """Returns the fraction of records on the diagonal of a confusion matrix."""
    return float(np.trace(confusion) / max(confusion.sum(), 1))


def per_class_accuracy(confusion: np.ndarray) -> np.ndarray:
    """Returns the fraction of each true class that is recognised, [O]."""
    return np.diag(confusion) / np.maximum(confusion.sum(axis=1), 1)


def make_confusions(
    config: ExperimentConfig, model: Classifier, dataset: Dataset
) -> Confusions:
    """Returns `make_confusion` of each split that is there, by its name in metrics.

    With more than one view, `..._views` are of predictions averaged over them. Weights
    of which only a head was trained share the embeddings of the records.
    """
    splits = {"test": dataset.test, "nonprivate/validation": dataset.validation}
    there = {name: x for name, x in splits.items() if x is not None}
    functions: tuple[Function, Function] = (lambda _, images: images, model.logits)
    if model.encode and finetune.is_head(*config.finetune.split(model.shapes)):
        functions = model.encode, model.classify
    found = {name: make_confusion(*functions, x) for name, x in there.items()}
    views = config.evaluate.views
    if views > 1:
        functions = over_views(*functions, views, config.augmentation)
        size = max(512 // views, 1)
        for name, x in there.items():
            found[f"{name}_views"] = make_confusion(*functions, x, batch_size=size)
    return found


def over_views(
    encode: Function,
    classify: Function,
    num_views: int,
    augmentation: augment.AugmentationConfig,
) -> tuple[Function, Function]:
    """Returns functions that average probabilities over views of an image.

    What is released does not change by it: this is post-processing.

    Args:
      encode: `f(params, images [B, H, W, C]) -> embeddings`.
      classify: `f(params, embeddings) -> logits [B, O]`.
      num_views: V.
      augmentation: how views are drawn, from a key that anybody knows.

    Returns:
      `f(params, images [B, H, W, C]) -> embeddings` of all views, and
      `f(params, embeddings) -> log probabilities [B, O]`.
    """

    def encode_views(params, images):
        keys = jax.random.split(sampling.stream_key(0, "augmentation"), len(images))
        view = functools.partial(augment.views, k=num_views, augmentation=augmentation)
        views = jax.vmap(view)(keys, images)
        return encode(params, views.reshape(-1, *images.shape[1:]))

    def classify_views(params, embeddings):
        logits = classify(params, embeddings)
        of_views = jax.nn.log_softmax(logits.reshape(-1, num_views, logits.shape[-1]))
        return jax.nn.logsumexp(of_views, axis=1) - math.log(num_views)

    return encode_views, classify_views


def count(confusions: Confusions, parts: Parts, state: training.TrainState) -> Counts:
    """Evaluates raw and EMA weights, the latter under names that end in `_ema`."""
    weights = [parts.all_params(x) for x in (state.params, state.ema_params)]
    return {
        f"{name}/accuracy{suffix}": counts
        for name, confusion in confusions.items()
        for suffix, counts in zip(("", "_ema"), confusion(weights), strict=True)
    }


def make_log(
    config: ExperimentConfig,
    mechanism: accounting.Mechanism,
    workdir: Workdir,
    began: float,
) -> Callable[[training.TrainState, dict[str, jax.Array], Progress, Counts], None]:
    """Returns the function that writes a line of metrics and one of progress.

    Args:
      config: of the run.
      mechanism: of the run.
      workdir: receives the metrics.
      began: when the run would have begun if it had never been stopped.

    Returns:
      `log(state, sums, progress, counts)`; `sums` are the nonprivate ones of the update
      that led to `state`, `counts` from `count`, or none.
    """

    def log(state, sums, progress, counts):
        step, records = int(state.step), max(float(sums["records"]), 1.0)
        line = {
            "step": step,
            "epsilon": accounting.epsilon_after(mechanism, step, config.privacy.delta),
            "nonprivate/loss": float(sums["loss"]) / records,
            "nonprivate/clipped_fraction": float(sums["clipped"]) / records,
        }
        if "gradient_stddev" in sums:  # of `diagnostics.observed`
            line["nonprivate/gradient_stddev"] = float(sums["gradient_stddev"])
        line |= {name: accuracy(confusion) for name, confusion in counts.items()}
        speed = progress.records_per_second() * config.method.set_size
        seconds = time.monotonic() - began
        workdir.add_metrics(
            {**line, "nonprivate/images_per_second": speed, "seconds": seconds}
        )
        say(_progress_line(line, progress, speed))
        progress.show(
            f"nonprivate loss {line['nonprivate/loss']:.3f}"
            f"  epsilon {line['epsilon']:.2f} of {config.privacy.epsilon:g}"
            f"  {speed:,.0f} images/s"
        )

    return log


def _progress_line(line: dict[str, float], progress: Progress, speed: float) -> str:
    """Writes a line of metrics for a terminal."""
    accuracy = line.get("test/accuracy_ema")
    loss = line["nonprivate/loss"]
    return (
        f"update {line['step']:>{len(str(progress.last))}}/{progress.last}"
        f"  nonprivate loss {loss:.4f}"
        f"  epsilon {line['epsilon']:.3f}  {speed:,.0f} images/s"
        f"  ETA {progress.eta()}"
        + ("" if accuracy is None else f"  test {accuracy:.2%} (EMA)")
        + ("" if np.isfinite(loss) else "  diverging: lower optimizer.learning_rate")
    )
