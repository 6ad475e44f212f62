"""Experiments as validated dataclasses, built from ConfigDicts at the edge."""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

import optax
from flax import traverse_util

from dpmix_jax import models, optimizers
from dpmix_jax.augment import AugmentationConfig
from dpmix_jax.baselines import microbatch_mixup
from dpmix_jax.baselines.pretraining import PretrainConfig
from dpmix_jax.data import DataConfig
from dpmix_jax.data.public import PublicConfig
from dpmix_jax.errors import UserError, require, require_one_of
from dpmix_jax.mixup import METHODS, MethodConfig
from dpmix_jax.models.finetune import FinetuneConfig
from dpmix_jax.privacy import PrivacyConfig
from dpmix_jax.run.performance import PerformanceConfig

Method = MethodConfig | microbatch_mixup.MicrobatchMixupConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A model of `models.REGISTRY` and its options."""

    name: str
    options: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Steps at a constant rate, and the average of the iterates.

    Attributes:
      name: `sgd`, or `adam_bc`, see `optimizers.adam_bc`.
      learning_rate: positive.
      momentum: in [0, 1); of `adam_bc` the decay b1 of the first moment.
      second_moment_decay: in [0, 1), b2, of `adam_bc` alone.
      floor: positive, the least second moment, of `adam_bc` alone.
      filter: what the private mean passes first: `none`, `low_pass`, see
        `optimizers.low_pass`, of first order, or `kalman`, see `optimizers.kalman`.
        `adam_bc` takes none: it corrects for the noise before a filter.
      filter_gain: k in (0, 1], the weight of the newest gradient, of filters alone:
        `low_pass((k - 1,), (k / 2, k / 2))`, or for `kalman` its kappa.
      weight_decay: at least 0; this share of the weights is added to the private
        gradient.
      ema_decay: in [0, 1), the decay of the averaged weights.
    """

    name: str = "sgd"
    learning_rate: float
    momentum: float = 0.0
    second_moment_decay: float = 0.999
    floor: float = 1e-8
    filter: str = "none"
    filter_gain: float = 0.5
    weight_decay: float = 0.0
    ema_decay: float = 0.9999

    def __post_init__(self):
        require_one_of("optimizer.name", self.name, ("sgd", "adam_bc"))
        kind, filters = self.filter, ("none", "low_pass", "kalman")
        require_one_of("optimizer.filter", kind, filters)
        plain = "'none' for optimizer.name 'adam_bc', which knows the unfiltered noise"
        fits = kind == "none" or self.name == "sgd"
        require(fits, "optimizer.filter", kind, plain)
        for name in ("learning_rate", "floor"):
            value, allowed = getattr(self, name), "positive and finite"
            require(0 < value < math.inf, f"optimizer.{name}", value, allowed)
        gain, decay = self.filter_gain, self.weight_decay
        require(0 < gain <= 1, "optimizer.filter_gain", gain, "in (0, 1]")
        least = "at least 0 and finite"
        require(0 <= decay < math.inf, "optimizer.weight_decay", decay, least)
        for name in ("momentum", "second_moment_decay", "ema_decay"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name}", value, "in [0, 1)")

    def build(self, noise_stddev: float) -> optax.GradientTransformation:
        """Returns what follows the privatizer.

        Args:
          noise_stddev: of the noise on a coordinate of the private mean.
        """
        if self.name == "adam_bc":
            step = optimizers.adam_bc(
                self.learning_rate,
                noise_stddev=noise_stddev,
                b1=self.momentum,
                b2=self.second_moment_decay,
                floor=self.floor,
            )
        else:
            step = optax.sgd(self.learning_rate, self.momentum or None)
        if self.weight_decay:
            step = optax.chain(optax.add_decayed_weights(self.weight_decay), step)
        gain = self.filter_gain
        if self.filter == "low_pass":
            smooth = optimizers.low_pass(a=(gain - 1,), b=(gain / 2, gain / 2))
            return optax.chain(smooth, step)
        return optimizers.kalman(step, gain) if self.filter == "kalman" else step


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """How often, in updates, to log, to evaluate and to save.

    Attributes:
      log_every: updates between lines of `metrics.jsonl`.
      eval_every: updates between evaluations.
      checkpoint_every: updates between checkpoints.
    """

    log_every: int = 10
    eval_every: int = 50
    checkpoint_every: int = 50

    def __post_init__(self):
        for name, updates in dataclasses.asdict(self).items():
            require(updates >= 1, f"logging.{name}", updates, "at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How test and validation images are classified.

    Attributes:
      views: images that a prediction is averaged over: 1 classifies the image itself;
        for more, accuracies over so many views of each are reported beside those.
    """

    views: int = 1

    def __post_init__(self):
        require(self.views >= 1, "evaluate.views", self.views, "at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiagnosticsConfig:
    """What is measured of private records beside the training, for research alone.

    Attributes:
      gradients: whether to keep how large each parameter's gradient is before the clip
        (DP-Mix, Figure 2); see `run.diagnostics`.
    """

    gradients: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """One training run.

    Attributes:
      seed: non-negative, for a run that can be repeated; None draws a secret one from
        the operating system, which is what a release needs.
      public: images declared public, which `dp_mix_diff`, `pure_dp_mix_diff`,
        pre-training and whitening need and nothing else takes. A group of nothing but
        None is None, so that a config file can hold placeholders for flags.
    """

    seed: int | None = None
    data: DataConfig
    model: ModelConfig
    method: Method
    public: PublicConfig | None = None
    finetune: FinetuneConfig = dataclasses.field(default_factory=FinetuneConfig)
    pretrain: PretrainConfig = dataclasses.field(default_factory=PretrainConfig)
    augmentation: AugmentationConfig
    privacy: PrivacyConfig
    optimizer: OptimizerConfig
    performance: PerformanceConfig = dataclasses.field(
        default_factory=PerformanceConfig
    )
    logging: LoggingConfig = dataclasses.field(default_factory=LoggingConfig)
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    diagnostics: DiagnosticsConfig = dataclasses.field(
        default_factory=DiagnosticsConfig
    )

    def __post_init__(self):
        seed, validation = self.seed, self.data.validation_size
        require(seed is None or seed >= 0, "seed", seed, "at least 0, or None")
        require(
            self.privacy.selection is None or validation > 0,
            "data.validation_size",
            validation,
            "positive for privacy.selection, which compares runs by validation records",
        )
        updates, method = self.pretrain.num_updates, f"method.name {self.method.name!r}"
        public = self.public and self.public.name
        white = self.finetune.whitening
        if self.draws_public or white is not None:
            use = f"pretrain.num_updates {updates}" if updates else method
            use = use if self.draws_public else f"finetune.whitening {white}"
            allowed = f"the name of a public dataset for {use}"
            require(public is not None, "public.name", public, allowed)
        else:
            allowed = f"None for {method}, which takes no public images"
            require(public is None, "public.name", public, allowed)
        groups = isinstance(self.method, microbatch_mixup.MicrobatchMixupConfig)
        require(
            not groups or self.finetune.embeddings == "fresh",
            "finetune.embeddings",
            self.finetune.embeddings,
            f"'fresh' for {method}, whose groups are drawn anew in each update",
        )
        for key, plain in (("mechanism", "gaussian"), ("sampling", "poisson")):
            value = getattr(self.privacy, key)
            fits = not groups or value == plain
            require(fits, f"privacy.{key}", value, f"{plain!r} for {method}")
        seen, clipping = self.diagnostics.gradients, self.performance.clipping
        none = "False for {}, where no record has a gradient of its own".format
        require(not (seen and groups), "diagnostics.gradients", seen, none(method))
        ghost = f"performance.clipping {clipping!r}"
        for key, formed in (
            ("diagnostics.gradients", seen),
            ("privacy.per_layer", self.privacy.per_layer),
        ):
            valid = not (formed and clipping == "ghost")
            require(valid, key, formed, none(ghost))

    def check_processes(self, num_processes: int) -> None:
        """Raises `UserError` for what one process alone can do."""
        own = self.performance
        for key, value, allowed in (
            ("pretrain.num_updates", self.pretrain.num_updates, 0),
            ("finetune.embeddings", self.finetune.embeddings, "fresh"),
            ("diagnostics.gradients", self.diagnostics.gradients, False),
            ("performance.convolutions", own.convolutions, own.formulation),
        ):
            valid = num_processes == 1 or value == allowed
            require(valid, key, value, f"{allowed!r} in a run of several processes")

    @property
    def draws_public(self) -> bool:
        """Whether the method or a pre-training draws public images."""
        return self.method.num_public > 0 or self.pretrain.num_updates > 0


# Two starts of a run may differ in these settings, which change results by rounding at
# most, but not in `_FIXED`, which change rounding so that two sums under the same noise
# would show the records.
_FREE = ("performance", "logging", "evaluate", "data.download", "public.download")
_FIXED = tuple(f"performance.{x}" for x in ("clipping", "convolutions", "precision"))


def from_config_dict(values: Any, cls: Any = ExperimentConfig, prefix: str = "") -> Any:
    """Builds an `ExperimentConfig`, or another dataclass, from nested mappings.

    Args:
      values: what is to be built.
      cls: the dataclass.
      prefix: of the keys in messages.

    Raises:
      UserError: for an unknown or missing key, a value of a wrong type, or one that is
        not allowed; the message names the key.
    """
    if not isinstance(values, Mapping) and not hasattr(values, "items"):
        raise UserError(f"{prefix[:-1]} is {values!r}: it must be a group of settings")
    values = dict(values.items())
    if cls is ExperimentConfig and "rows" in values:
        raise UserError("the config is that of a sweep: it is for experiments/sweep.py")
    if cls is ModelConfig:
        return _build_model(values, prefix)
    if cls is MethodConfig:
        cls, values = _method(values)
    hints = typing.get_type_hints(cls)
    check_keys(values, hints, prefix)
    built = {}
    for field in dataclasses.fields(cls):
        name, hint = field.name, hints[field.name]
        if name not in values:
            if field.default is field.default_factory is dataclasses.MISSING:
                raise UserError(f"{prefix}{name} is missing from the config")
        elif group := _group(hint):
            if not (type(None) in typing.get_args(hint) and _is_none(values[name])):
                key = f"{prefix}{name}."
                built[name] = from_config_dict(values[name], group, key)
        else:
            built[name] = _typed(values[name], hint, prefix + name)
    return cls(**built)


def to_dict(config: ExperimentConfig) -> dict[str, Any]:
    """Returns the JSON-ready inverse of `from_config_dict`."""
    values = dataclasses.asdict(config)
    model = values["model"]
    values["model"] = {"name": model["name"], **model["options"]}
    return values


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lists the keys whose values differ, of those that change the outcome of a run."""
    there, here = (
        {k: list(v) if isinstance(v, tuple) else v for k, v in flatten(values).items()}
        for values in (old, new)  # JSON has no tuples
    )
    return [
        f"{key} ({there.get(key)} there, {here.get(key)} here)"
        for key in sorted({*there, *here})
        if (key in _FIXED or not {key, key.split(".")[0]} & set(_FREE))
        and there.get(key) != here.get(key)
    ]


def flatten(values: dict[str, Any]) -> dict[str, Any]:
    """Returns nested dicts as one, with dotted keys."""
    return traverse_util.flatten_dict(values, sep=".")


def _group(hint: Any) -> Any:
    """Returns the dataclass of `Group` or `Group | None`, or None for other hints."""
    groups = [
        t for t in typing.get_args(hint) or (hint,) if dataclasses.is_dataclass(t)
    ]
    return groups[0] if groups else None


def _is_none(values: Any) -> bool:
    if not hasattr(values, "values"):
        return values is None
    return all(value is None for value in values.values())


def _method(values: dict[str, Any]) -> tuple[type, dict[str, Any]]:
    """Returns the class of a method's settings, and those that it has."""
    name = values.get("name")
    if name != microbatch_mixup.NAME:
        if isinstance(name, str):  # of another type, it is refused with the rest
            require_one_of("method.name", name, (*METHODS, microbatch_mixup.NAME))
        return MethodConfig, values
    cls = microbatch_mixup.MicrobatchMixupConfig
    for key in set(values) & {"k_self", "k_diff"}:
        size, allowed = values[key], f"0 for method.name {name!r}"
        require(not size, f"method.{key}", size, allowed)
    names = {field.name for field in dataclasses.fields(cls)}
    every = names | {field.name for field in dataclasses.fields(MethodConfig)}
    check_keys(values, sorted(every), "method.")
    return cls, {key: value for key, value in values.items() if key in names}


def _build_model(values: dict[str, Any], prefix: str) -> ModelConfig:
    name = values.pop("name", None)
    check_keys(values, models.options(name), prefix)
    options = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in values.items()
    }
    return ModelConfig(name=name, options=options)


def _typed(value: Any, hint: Any, key: str) -> Any:
    """Returns a value of the annotated type; only an int is converted, to a float."""
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    names = ("None" if t is types.NoneType else t.__name__ for t in allowed)
    require(type(value) in allowed, key, value, f"of type {' or '.join(names)}")
    return value


def check_keys(keys: Iterable[str], valid: Iterable[str], prefix: str = "") -> None:
    """Raises `UserError` for the first unknown key, naming the nearest valid one."""
    valid = list(valid)
    for key in keys:
        if key not in valid:
            near = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
            hint = (
                f"did you mean {prefix}{near[0]}?"
                if near
                else f"valid are {', '.join(valid)}"
            )
            raise UserError(f"unknown key {prefix}{key}: {hint}")


def choose(rows: Mapping[str, Any], name: str, key: str = "epsilon") -> Any:
    """Returns the row that the argument of a config file names, or raises `UserError`.

    Args:
      rows: by name.
      name: what follows the colon in `--config=configs/digits.py:8`.
      key: what the names are.
    """
    require_one_of(key, name, rows)
    return rows[name]


def check_flags(argv: Iterable[str]) -> None:
    """Raises `UserError` for the first `--config.<path>` that is in no group."""
    paths = (re.match(r"--?config\.([^=]*)", arg) for arg in argv)
    for path in (match[1] for match in paths if match):
        group, *rest = path.split(".")
        check_keys([group], typing.get_type_hints(ExperimentConfig))
        if len(rest) > 1:
            raise UserError(f"unknown key {path}: keys are at most <group>.<name>")
