"""Weights that training starts from, and which of them it changes."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import traverse_util
from jax_privacy import clipping

from dpmix_jax.errors import UserError, require, require_one_of
from dpmix_jax.models import adapters, pretrained

PyTree = Any
EMBEDDINGS = ("fresh", "kept")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Fine-tuning; with the defaults a model is trained from random weights.

    Weights from a file count as public: nothing of what they were trained on is
    protected, and the privacy statement names them.

    Attributes:
      encoder: path of a pretrained image tower for `vit` or `convnext`, see
        `pretrained.load_encoder`.
      weights: path of the `model.safetensors` of a run with the same model, of which
        the averaged weights are taken, or for `wrn` of De et al.'s, see
        `pretrained.load_weights`.
      skip: modules that `weights` does not bring, separated by commas: the last layer,
        for other classes, or what that run had frozen.
      trainable: `all`, or names of modules or of parameters separated by commas, such
        as `head` (a linear classifier on a frozen encoder), `head,ln_post,block_11`,
        `head,bias` (with the bias terms of all layers; BiTFiT, Bu et al., 2022,
        https://arxiv.org/abs/2210.00036) or `head,scale,bias` (with the scales of norms
        as well). Everything else is frozen: it has no gradient, no clip and no noise.
        What is frozen and in no file is drawn from a public key, so that anybody can
        draw it again.
      rank: r, to train a change of this rank of every frozen matrix as well, see
        `adapters.init`; None trains none. The average of the weights is of its two
        factors, not of their product.
      embeddings: for a head on a frozen encoder: `fresh` embeds a new augmentation set
        of a record in each update; `kept` embeds `sets` of each record once, before
        the first update, and each update draws one of them (see `models.kept`).
      sets: M, how many are kept of each record.
      whitening: for a head on a frozen encoder: whitens embeddings by those of the
        public images of the config, with this much regularization, such as 0.1 (see
        `models.whitening`); None leaves them as they are.
    """

    encoder: str | None = None
    weights: str | None = None
    skip: str = ""
    trainable: str = "all"
    rank: int | None = None
    embeddings: str = "fresh"
    sets: int = 1
    whitening: float | None = None

    def __post_init__(self):
        named = bool(_names(self.trainable))
        allowed = "'all' or names of modules or parameters separated by commas"
        require(named, "finetune.trainable", self.trainable, allowed)
        if self.skip:
            allowed = f"a file for finetune.skip {self.skip!r}"
            require(self.weights is not None, "finetune.weights", None, allowed)
        rank_ok = self.rank is None or self.rank >= 1
        require(rank_ok, "finetune.rank", self.rank, "at least 1, or None")
        require_one_of("finetune.embeddings", self.embeddings, EMBEDDINGS)
        require(self.sets >= 1, "finetune.sets", self.sets, "at least 1")
        if self.embeddings != "kept":
            allowed = "1 unless finetune.embeddings is 'kept'"
            require(self.sets == 1, "finetune.sets", self.sets, allowed)
        require(
            self.whitening is None or 1e-4 <= self.whitening < math.inf,
            "finetune.whitening",
            self.whitening,
            "at least 0.0001, or None",
        )

    def load(self, params: PyTree) -> PyTree:
        """Returns initial parameters with those of the files in their places.

        Args:
          params: `{"params": ...}` of a Flax model, or their shapes.

        Raises:
          UserError: for files that are missing, damaged or of another model.
        """
        if self.weights is not None:
            fitted = () if self.whitening is None else ("whitening",)
            require(
                not fitted or "head" in _names(self.skip),
                "finetune.skip",
                self.skip,
                "a list with 'head' for finetune.whitening: a head from a file belongs"
                " to embeddings that are whitened otherwise",
            )
            params = pretrained.load_weights(
                self.weights, params, skip=(*_names(self.skip), *fitted)
            )
        if self.encoder is not None:
            inner = params["params"]
            if "encoder" not in inner:
                raise UserError(
                    f"finetune.encoder is {self.encoder}: it must be None for a model"
                    " without an encoder, such as wrn and cnn"
                )
            encoder = pretrained.load_encoder(self.encoder, inner["encoder"])
            params = {"params": {**inner, "encoder": encoder}}
        return params

    @property
    def files(self) -> dict[str, str]:
        """The paths that weights come from, by setting."""
        named = {"weights": self.weights, "encoder": self.encoder}
        return {name: path for name, path in named.items() if path is not None}

    def checksums(self) -> dict[str, str]:
        """Returns the SHA-256 of each of `files`."""
        return {name: pretrained.checksum(path) for name, path in self.files.items()}

    def describe(self, checksums: Mapping[str, str]) -> str:
        """Says in a privacy statement which weights were there before; "" for none.

        Args:
          checksums: from `checksums`, when training began.
        """
        # Not the whole paths: the statement is released.
        files = [
            f"{pathlib.Path(path).name} (sha256 {checksums[name][:16]})"
            for name, path in self.files.items()
        ]
        if not files:
            return ""
        changes = f", and changes of rank {self.rank} of all frozen matrices"
        changes *= self.rank is not None
        return (
            f"training began from the weights in {' and '.join(files)}, of which"
            f" {self.trainable} were trained{changes}. They count as public: what they"
            " were trained on, which may hold the private images, is not protected by"
            " this guarantee, and if they were trained privately, their own guarantee"
            " comes on top"
        )

    def split(self, params: PyTree) -> tuple[PyTree, PyTree]:
        """Divides parameters into those to be trained and those that are frozen.

        Raises:
          UserError: for a name that nothing of the model has, for a linear head that
            is zero and would stay so, for a rank that does not fit, or for kept or
            whitened embeddings of a model of which more than a head is trained.
        """
        trained, frozen = self._split(params)
        no_head = self.weights is None or "head" in _names(self.skip)
        require(
            not (no_head and "kernel" in frozen.get("params", {}).get("head", ())),
            "finetune.trainable",
            self.trainable,
            "'all' or a list with 'head', which is zero where no file brings it",
        )
        if self.rank is not None:
            added = adapters.init(traverse_util.flatten_dict(frozen), self.rank)
            trained = traverse_util.unflatten_dict(
                traverse_util.flatten_dict(trained) | added
            )
        more = "where more is trained than a head on a frozen encoder"
        for key, allowed in (("embeddings", "fresh"), ("whitening", None)):
            value = getattr(self, key)
            require(
                value == allowed or is_head(trained, frozen),
                f"finetune.{key}",
                value,
                f"{allowed!r} {more}, see finetune.trainable and finetune.rank",
            )
        return trained, frozen

    def _split(self, params: PyTree) -> tuple[PyTree, PyTree]:
        flat, names = traverse_util.flatten_dict(params), _names(self.trainable)
        if names == ("all",):
            names = tuple({path[1] for path in flat} - {"whitening"})
        for name in names:
            if not any(name in path for path in flat):
                top, leaves = (sorted({path[i] for path in flat}) for i in (1, -1))
                raise UserError(
                    f"finetune.trainable has {name!r}: it must be the name of a module"
                    f" of the model, such as {', '.join(top)}, or of parameters, such"
                    f" as {', '.join(leaves)}"
                )
        trained = {p: v for p, v in flat.items() if any(name in p for name in names)}
        frozen = {p: v for p, v in flat.items() if p not in trained}
        return tuple(map(traverse_util.unflatten_dict, (trained, frozen)))


def join(trained: PyTree, frozen: PyTree | None = None) -> PyTree:
    """Puts together what `split` has divided, to whole parameters of the model."""
    if not frozen:
        return trained
    flat = [traverse_util.flatten_dict(part) for part in (trained, frozen)]
    return traverse_util.unflatten_dict(adapters.merged(flat[0] | flat[1]))


def released(trained: PyTree, frozen: PyTree) -> PyTree:
    """Returns what a file of weights must hold.

    That is what was trained, and a whitening, which no other file holds. Where matrices
    have adapters it is the whole model: hardly anything of it is as it was.
    """
    if adapters.are_in(traverse_util.flatten_dict(trained)):
        return join(trained, frozen)
    fitted = frozen.get("params", {}).get("whitening")
    return join(trained, fitted and {"params": {"whitening": fitted}})


def is_head(trained: PyTree, frozen: PyTree) -> bool:
    """Whether these are a whole head, and what its encoder has of parameters."""
    trained, frozen = trained["params"], (frozen or {"params": {}})["params"]
    return set(trained) == {"head"} and set(frozen) <= {"encoder", "whitening"}


def is_linear_head(trained: PyTree, frozen: PyTree) -> bool:
    """Whether these are a head of one matrix and one bias, and its encoder."""
    if not is_head(trained, frozen):
        return False
    axes = jax.tree.map(lambda leaf: leaf.ndim, trained["params"]["head"])
    return axes == {"kernel": 2, "bias": 1}


def on_embeddings(
    gradient_fn: clipping.BoundedSensitivityCallable,
    encode: Callable[[PyTree, jax.Array], jax.Array],
) -> clipping.BoundedSensitivityCallable:
    """Makes a clipped sum over embeddings one over images, encoded before any gradient.

    Formal guarantees:
      - Record i's term depends on the embeddings of its own images alone, and each of
        them on its image and the encoder's parameters alone.

    Args:
      gradient_fn: from `gradients.clipped_gradient`, of a loss of a head over
        embeddings [K, ...] and labels [K, O].
      encode: `f(frozen params, images [N, H, W, C]) -> [N, ...]`, each from its
        image alone.

    Returns:
      A clipped sum over images [B, K, H, W, C] and labels [B, K, O], of the same
      sensitivity; the one constant is the tree of frozen parameters, if there are any.
    """

    def clipped_sum(params, images, labels, *, constants, is_padding_example=None):
        records, members, *shape = images.shape
        (frozen,) = constants or ({},)
        embeddings = encode(frozen, images.reshape(-1, *shape))
        return gradient_fn(
            params,
            embeddings.reshape(records, members, *embeddings.shape[1:]),
            labels,
            is_padding_example=is_padding_example,
        )

    return clipping.BoundedSensitivityCallable(
        clipped_sum, gradient_fn.l2_norm_bound, has_aux=True
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
