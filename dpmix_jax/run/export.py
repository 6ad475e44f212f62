"""A finished run as a model: what may be released of it, and how it predicts."""

import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from dpmix_jax.data import Records
from dpmix_jax.errors import UserError, require
from dpmix_jax.models import finetune, pretrained
from dpmix_jax.models.classifier import Classifier, make_classifier
from dpmix_jax.run import build
from dpmix_jax.run.config import (
    ExperimentConfig,
    ModelConfig,
    from_config_dict,
    to_dict,
)
from dpmix_jax.run.workdir import Workdir

PyTree = Any

RELEASED = ("model.safetensors", "model.json", "privacy.json", "PRIVACY.md")
_OF_IMAGES = ("resize", "mean", "stddev", "class_names")
_AT_A_TIME = 128  # images in one call of the model


def described(config: ExperimentConfig) -> finetune.FinetuneConfig:
    """Returns how the released weights of a run become a model, and of which files.

    With adapters the file of weights holds the whole model, as if all was trained.
    """
    whole = config.finetune.rank is not None
    return finetune.FinetuneConfig() if whole else config.finetune


def describe(
    config: ExperimentConfig, records: Records, checksums: Mapping[str, str]
) -> dict[str, Any]:
    """Returns what `load` needs beside the weights, JSON-ready: `model.json`.

    Args:
      config: of the run.
      records: of the test set; nothing but its public constants is taken.
      checksums: from `FinetuneConfig.checksums`, when training began.
    """
    tuning = described(config)
    sums = checksums if tuning.files else {}
    return {
        "model": to_dict(config)["model"],
        "finetune": {
            **{
                name: getattr(tuning, name)
                for name in ("trainable", "skip", "whitening")
            },
            **{name: sums.get(name) for name in ("encoder", "weights")},
        },
        "stored_shape": records.images.shape[1:],
        **{name: getattr(records, name) for name in _OF_IMAGES},
    }


def load(
    folder: str | os.PathLike,
    *,
    encoder: str | None = None,
    weights: str | None = None,
) -> Callable[[np.ndarray], np.ndarray]:
    """Loads the model of a finished run, or of its export, with the averaged weights.

    Args:
      folder: of the run or the export.
      encoder: path of the `finetune.encoder` that the run began with, if it had one.
      weights: path of its `finetune.weights`, likewise.

    Returns:
      `f(images uint8 [n, H, W, C]) -> probabilities float32 [n, O]`, which resizes and
      normalises images as the run did. The attribute `f.class_names` names the classes.

    Raises:
      UserError: if `folder` holds no model, or if `encoder` or `weights` is not the
        file that the run began with.
    """
    model, params, like = restore(pathlib.Path(folder), encoder, weights)

    @jax.jit
    def of_some(params, images):
        return jax.nn.softmax(model.logits(params, like.normalize(images)))

    def probabilities(images: np.ndarray) -> np.ndarray:
        if images.dtype != np.uint8 or images.shape[1:] != like.images.shape[1:]:
            raise UserError(
                f"images are {images.dtype} {images.shape}: they must be uint8"
                f" (n, {', '.join(map(str, like.images.shape[1:]))})"
            )
        found = np.zeros((len(images), like.num_classes), np.float32)
        for start in range(0, len(images), _AT_A_TIME):
            part = images[start : start + _AT_A_TIME]
            whole = np.pad(part, [(0, _AT_A_TIME - len(part)), (0, 0), (0, 0), (0, 0)])
            found[start : start + len(part)] = of_some(params, whole)[: len(part)]
        return found

    probabilities.class_names = like.class_names  # type: ignore[attr-defined]
    return probabilities


def restore(
    path: pathlib.Path, encoder: str | None = None, weights: str | None = None
) -> tuple[Classifier, PyTree, Records]:
    """Returns the model of a finished run, its averaged weights, and blank records.

    Args:
      path: of the run or its export.
      encoder: as for `load`.
      weights: as for `load`.

    Raises:
      UserError: as `load`.
    """
    about = read_about(path)
    given = {"encoder": encoder, "weights": weights}
    for name, file in given.items():
        began = about["finetune"][name]
        found = file and pretrained.checksum(file)
        allowed = f"the file with sha256 {began}" if began else "None for this model"
        require(found == began, name, file, allowed)
    tuning = finetune.FinetuneConfig(**{**about["finetune"], **given})
    like = Records(
        images=np.zeros((0, *about["stored_shape"]), np.uint8),
        labels=np.zeros(0, np.int32),
        class_names=tuple(about["class_names"]),
        mean=tuple(about["mean"]),
        stddev=tuple(about["stddev"]),
        resize=about["resize"],
    )
    try:
        config = from_config_dict(about["model"], ModelConfig)
    except UserError as error:
        raise UserError(f"{path / 'model.json'}: {error}") from None
    model = make_classifier(
        config.name,
        config.options,
        image_shape=like.image_shape,
        num_classes=like.num_classes,
        whitening=tuning.whitening is not None,
    )
    trained, frozen = build.initial_params(
        tuning, model, tuning.load(model.shapes), seed=0
    )
    released = finetune.released(trained, frozen)
    found = pretrained.load_weights(path / "model.safetensors", released)
    return model, finetune.join(frozen, found), like


def read_about(folder: pathlib.Path) -> dict[str, Any]:
    """Returns what `describe` said of the model of a run or its export.

    Raises:
      UserError: for a folder without a model.
    """
    about = _read(folder / "model.json")
    known = {"model", "finetune", "stored_shape", *_OF_IMAGES}
    if not isinstance(about, dict) or not known <= about.keys():
        raise UserError(f"{folder / 'model.json'} is damaged: give a finished run")
    return about


def check(run: pathlib.Path, folder: pathlib.Path) -> dict[str, Any]:
    """Returns the results of a run that can be exported into a folder.

    Raises:
      UserError: for a run that is not finished, lacks a file or has weights that are
        not finite, or a folder that exists.
    """
    results = Workdir(run).results()
    if results is None or results.get("diverged"):
        state = "not finished" if results is None else "of weights that are not finite"
        raise UserError(f"--run is {run}: it is {state}")
    for name in RELEASED:
        require((run / name).is_file(), "--run", str(run), f"a folder with {name}")
    require(not folder.exists(), "--to", str(folder), "a folder that does not exist")
    return results


def export(run: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes what may be released of a finished run, and nothing else.

    Formal guarantees:
      - The folder holds the weights, how to load them, the privacy statement and a
        model card: no seed, no key, no path, and nothing named `nonprivate/...`.

    Args:
      run: workdir of the run.
      folder: is made; it must not exist.

    Raises:
      UserError: as `check`, or for a folder that cannot be made.
    """
    results = check(run, folder)
    about, facts = read_about(run), _read(run / "privacy.json")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as name:
            partial = pathlib.Path(name) / folder.name
            partial.mkdir()
            for file in RELEASED:
                shutil.copyfile(run / file, partial / file)
            promise = (run / "PRIVACY.md").read_text().splitlines()[2]
            text = card(about, facts, results, promise, folder.name)
            (partial / "README.md").write_text(text)
            os.replace(partial, folder)
    except OSError as error:
        raise UserError(f"--to is {folder}: {error.strerror}") from None


def card(
    about: Mapping[str, Any],
    facts: Mapping[str, Any],
    results: Mapping[str, Any],
    promise: str,
    name: str,
) -> str:
    """Returns the model card, Markdown."""
    shape = "x".join(map(str, about["stored_shape"]))
    files = "".join(
        f', {key}="..."'
        for key in ("encoder", "weights")
        if about["finetune"][key] is not None
    )
    return "\n".join(
        [
            f"# {name}",
            "",
            f"A classifier ({about['model']['name']}) of {shape} images into"
            f" {len(about['class_names'])} classes: {', '.join(about['class_names'])}.",
            "",
            f"{promise} That is for each of {facts['num_records']:,} training images;"
            " PRIVACY.md says what it covers and what not. Accuracy on test images,"
            f" which are not protected: {100 * results['test_accuracy_ema']:.2f} %"
            " (averaged weights, the ones that are loaded),"
            f" {100 * results['test_accuracy']:.2f} % (last weights).",
            "",
            "```python",
            "import dpmix_jax as dpm",
            "",
            f'model = dpm.load("{name}"{files})',
            f"probabilities = model(images)  # uint8, n images of {shape}",
            "```",
            "",
        ]
    )


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        raise UserError(f"{path} is missing or damaged: give a finished run") from None
