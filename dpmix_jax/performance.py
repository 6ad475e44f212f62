"""What makes a run fast and fit: precision, memory, compiled code kept on disk."""

import contextlib
import dataclasses
import math
import os
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dpmix_jax import conv
from dpmix_jax.errors import UserError

PRECISIONS = ("float32", "tensorfloat32", "bfloat16")
CLIPPINGS = ("instantiate", "ghost")
PLACES = ("auto", "device", "host")
_GIB = 2**30
_SHARE = 0.9  # of the memory of an accelerator; compilers underestimate a little
_SHARE_OF_HOST = 0.5
_SHARE_OF_DATASET = 0.25


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerformanceConfig:
    """What changes memory and speed only, never a result beyond rounding.

    Attributes:
      microbatch_size: records whose gradients are held at once, over all devices, or
        `auto` for the most that fit, see `largest_microbatch`.
      memory_gib: memory of one device for `auto`; 0 takes what there is.
      precision: of the model's forward and backward pass, one of `PRECISIONS`.
        Parameters, clipping, sums and noise are float32 whatever it is.
      convolutions: how per-record gradients of convolutions are computed, see
        `conv.fast_convolutions`.
      clipping: `instantiate` forms every record's gradient, `ghost` the norms only and
        then one gradient of all, see `ghost.ghost_clipped_gradient`; in float32 only.
        It treats records that are not finite, or cancel, differently, so a run cannot
        go on with another one; nor with another precision.
      dataset_on: where the training set lives: `device`, `host` (records are read
        ahead, a few microbatches at a time), or `auto`, on the device if, with the
        public images, it takes no more than a quarter of its memory. Public images
        always live on the device.
    """

    microbatch_size: int | str = "auto"
    memory_gib: float = 0.0
    precision: str = "float32"
    convolutions: str = "auto"
    clipping: str = "instantiate"
    dataset_on: str = "auto"

    def __post_init__(self):
        size = self.microbatch_size
        if isinstance(size, str) and size.isdecimal():  # as a flag may bring it
            object.__setattr__(self, "microbatch_size", int(size))
        elif isinstance(size, str) and size != "auto":
            raise UserError(
                f"performance.microbatch_size is {size!r}: it must be a number of"
                " records or 'auto'"
            )
        if self.microbatch_size != "auto" and int(self.microbatch_size) < 1:
            raise UserError(
                f"performance.microbatch_size is {size}: it must be at least 1"
            )
        if not 0 <= self.memory_gib < math.inf:
            raise UserError(
                f"performance.memory_gib is {self.memory_gib}: it must be positive, or"
                " 0 for what there is"
            )
        for name, allowed in (
            ("precision", PRECISIONS),
            ("convolutions", conv.FORMULATIONS),
            ("clipping", CLIPPINGS),
            ("dataset_on", PLACES),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"performance.{name} is {getattr(self, name)!r}: it must be one of"
                    f" {', '.join(allowed)}"
                )
        if self.clipping == "ghost" and self.precision != "float32":
            raise UserError(
                "performance.clipping is 'ghost': performance.precision must be"
                f" float32 then, it is {self.precision}"
            )

    def check_devices(self, num_devices: int) -> None:
        """Raises `UserError` if microbatches do not divide over the devices."""
        size = self.microbatch_size
        if size != "auto" and int(size) % num_devices:
            raise UserError(
                f"performance.microbatch_size is {size}: it must be a multiple of the"
                f" number of devices, {num_devices}"
            )

    def keeps_on_device(self, dataset_bytes: int, num_devices: int) -> bool:
        """Whether each device gets the whole training set."""
        if self.dataset_on != "auto":
            return self.dataset_on == "device"
        budget = self.memory_gib * _GIB or _device_bytes(num_devices)
        return dataset_bytes <= _SHARE_OF_DATASET * budget

    @property
    def dtype(self) -> jnp.dtype:
        """Of the model's computation."""
        return jnp.dtype(jnp.bfloat16 if self.precision == "bfloat16" else jnp.float32)

    def matmul_precision(self) -> contextlib.AbstractContextManager:
        """Sets the precision of products of float32 while a model is traced.

        Without it accelerators use TF32 or less for what is called float32.
        """
        return jax.default_matmul_precision(
            "tensorfloat32" if self.precision == "tensorfloat32" else "float32"
        )


def largest_microbatch(
    bytes_needed: Callable[[int], int],
    *,
    expected_batch_size: float,
    num_devices: int,
    step: int = 1,
    memory_gib: float = 0.0,
) -> int:
    """Picks the largest microbatch that fits the memory of a device.

    Memory grows in proportion to the records, so two small compilations tell. More
    records than nearly every Poisson batch has (B + 3 sqrt(B)) would only be padding.

    Args:
      bytes_needed: memory of one device for a microbatch size.
      expected_batch_size: B.
      num_devices: the result is a multiple of it.
      step: and of this, the records that a device must take together.
      memory_gib: budget of one device; 0 takes 0.9 of an accelerator's memory, or half
        of the host's, shared by its devices.

    Raises:
      UserError: if not even one record a device fits.
    """
    budget = memory_gib * _GIB or _device_bytes(num_devices)
    least = num_devices * step
    one, two = bytes_needed(least), bytes_needed(2 * least)
    each = max(two - one, 1)
    fit = 1 + math.floor((budget - one) / each)
    if fit < 1:
        raise UserError(
            f"{step} record(s) for each device need {one / _GIB:.2f} GiB, the budget is"
            f" {budget / _GIB:.2f} GiB: use a smaller model or fewer images a record,"
            " or raise performance.memory_gib"
        )
    most = math.ceil((expected_batch_size + 3 * expected_batch_size**0.5) / least)
    return min(fit, most) * least


def _device_bytes(num_devices: int) -> float:
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return _SHARE * stats["bytes_limit"]
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return _SHARE_OF_HOST * host / num_devices


def keep_compiled_code(folder: pathlib.Path) -> None:
    """Caches compiled code in a folder, unless JAX was told of another place."""
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(folder))


@contextlib.contextmanager
def explained_out_of_memory(microbatch_size: int):
    """Turns running out of memory into an error that says what to change."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        exhausted = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
        if not exhausted:
            raise
        raise UserError(
            f"out of memory with microbatches of {microbatch_size} records: lower"
            " performance.microbatch_size, or set it to auto"
        ) from None
