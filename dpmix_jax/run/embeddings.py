"""Whitened and kept embeddings of a run, as its config asks for them."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax_privacy.clipping import BoundedSensitivityCallable

from dpmix_jax import conv, devices
from dpmix_jax.data import Records
from dpmix_jax.errors import UserError
from dpmix_jax.models import kept, whitening
from dpmix_jax.models.classifier import Classifier
from dpmix_jax.run import hosts
from dpmix_jax.run.build import (
    Indices,
    Parts,
    accumulate,
    classifier,
    head_gradient,
    initial_params,
)
from dpmix_jax.run.config import ExperimentConfig
from dpmix_jax.run.workdir import Workdir

PyTree = Any

_EMBEDDED = 2048  # images, about, that are embedded before they are written
_AT_A_TIME = 256  # public images, which large encoders embed as well


def whitened(
    config: ExperimentConfig,
    model: Classifier,
    given: PyTree,
    records: Records,
    public: Records | None,
    workdir: Workdir,
) -> PyTree:
    """Returns weights to start from, with those that whiten by the public images.

    A run that goes on takes the whitening that it began with: to fit it again, on
    another machine or by another version, would put other sums under the same noise.

    Args:
      config: of the experiment.
      model: from `build.classifier`.
      given: `config.finetune.load(model.shapes)`.
      records: the training set, of which nothing but its public constants is used.
      public: public images.
      workdir: of the run.

    Raises:
      UserError: for public images whose embeddings cannot be whitened, or a run that
        has lost the whitening it began with, or has one of another version.
    """
    if config.finetune.whitening is None:
        return given
    fitted = hosts.arrays_of_first(
        lambda: _fitted(config, model, given, records, public, workdir),
        like=model.shapes["params"]["whitening"],
    )
    return {"params": {**given["params"], "whitening": fitted}}


def _fitted(
    config: ExperimentConfig,
    model: Classifier,
    given: PyTree,
    records: Records,
    public: Records | None,
    workdir: Workdir,
) -> dict[str, np.ndarray]:
    """Returns the whitening that a run began with, or fits that of a new one."""
    if workdir.kept() is not None and workdir.whitening.exists():
        try:
            fitted = safetensors.numpy.load_file(workdir.whitening)
        except safetensors.SafetensorError:
            raise UserError(
                f"{workdir.whitening} is damaged: use another --workdir"
            ) from None
        wanted = model.shapes["params"]["whitening"]
        shapes = {name: array.shape for name, array in fitted.items()}
        if shapes != {name: leaf.shape for name, leaf in wanted.items()}:
            raise UserError(
                f"workdir {workdir.path} began with another kind of whitening: use"
                " another --workdir"
            )
    else:
        begun = (workdir.path / "checkpoints").exists() or workdir.embeddings.exists()
        if workdir.kept() is not None and begun:
            raise UserError(
                f"workdir {workdir.path} has lost {workdir.whitening.name}: use another"
                " --workdir"
            )
        plain = classifier(config, records, whitened=False)
        assert plain.encode is not None  # the config has seen to both
        assert public is not None
        assert config.finetune.whitening is not None
        _, frozen = initial_params(config.finetune, model, given, seed=0)
        encode = jax.jit(plain.encode)
        chosen = public.images[whitening.chosen(len(public))]
        found = [
            np.asarray(encode(frozen, records.normalize(jnp.asarray(part))))
            for part in np.array_split(chosen, -(-len(chosen) // _AT_A_TIME))
        ]
        fitted = whitening.fit(np.concatenate(found), config.finetune.whitening)
    return fitted


def save_whitening(given: PyTree, workdir: Workdir) -> None:
    """Keeps what `whitened` returned for the next start of a run that has begun."""
    fitted = given["params"].get("whitening")
    if fitted is not None and not workdir.whitening.exists():
        workdir.write("whitening.safetensors", safetensors.numpy.save(fitted))


def keep(
    parts: Parts,
    config: ExperimentConfig,
    model: Classifier,
    path: pathlib.Path,
    num_records: int,
    stop: Callable[[], bool],
) -> np.ndarray | None:
    """Embeds the sets of all records, see `kept.keep`; None if stopped."""
    each = max(_EMBEDDED // config.method.set_size // parts.mesh.size, 1)
    return kept.keep(
        path,
        embed(parts, model),
        parts.put,
        parts.inputs,
        num_records=num_records,
        num_sets=config.finetune.sets,
        microbatch_size=each * parts.mesh.size,
        stop=stop,
    )


def blank_rows(
    parts: Parts, config: ExperimentConfig, model: Classifier, num_records: int
) -> np.ndarray:
    """Returns zeros of the size of what `keep` returns."""
    batch = parts.put(np.full(parts.mesh.size, -1))
    row = kept.row_type(embed(parts, model), batch, parts.inputs)
    return np.zeros(config.finetune.sets * num_records, row)


def embed(parts: Parts, model: Classifier) -> kept.Embed:
    """Compiles the embedding of a microbatch of these parts; see `kept.make_embed`."""
    assert model.encode is not None  # the config has seen to it
    return kept.make_embed(parts.sets, model.encode, parts.mesh)


def on_kept(
    parts: Parts,
    config: ExperimentConfig,
    model: Classifier,
    rows: np.ndarray,
    seed: int,
) -> Parts:
    """Returns parts that train on kept embeddings in the place of images.

    Args:
      parts: from `build`, whose sets have been embedded.
      config: of the experiment.
      model: from `classifier`.
      rows: from `kept.keep`.
      seed: of the run.
    """
    num_sets, of_records = config.finetune.sets, parts.terms.indices

    def indices(microbatch_size: int) -> Indices:
        draw = of_records(microbatch_size)
        return lambda step: kept.rows_of(
            draw(step),
            seed=seed,
            step=step,
            num_records=len(rows) // num_sets,
            num_sets=num_sets,
        )

    arrays = tuple(rows[name] for name in rows.dtype.names or ())
    on_device = config.performance.keeps_on_device(rows.nbytes, parts.mesh.size)
    platform = devices.platform(parts.mesh)

    def gradient_by(formulation: conv.Formulation) -> BoundedSensitivityCallable:
        return head_gradient(config, model, platform, formulation)

    def accumulate_by(formulation: conv.Formulation) -> Any:
        return accumulate(config, kept.sets, gradient_by(formulation), parts.mesh)

    formulation = config.performance.formulation
    return dataclasses.replace(
        parts,
        terms=dataclasses.replace(parts.terms, indices=indices),
        inputs=parts.inputs._replace(
            records=devices.put_everywhere(arrays, parts.mesh) if on_device else ()
        ),
        host_records=() if on_device else arrays,
        sets=kept.sets,
        gradient_fn=gradient_by(formulation),
        accumulate=accumulate_by(formulation),
        accumulate_by=accumulate_by,
        expected_records=config.privacy.expected_batch_size,
    )
