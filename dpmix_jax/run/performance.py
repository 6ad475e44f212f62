"""What makes a run fast and fit: precision, memory, compiled code kept on disk."""

import contextlib
import dataclasses
import math
import os
import pathlib
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dpmix_jax import conv
from dpmix_jax.errors import UserError, require, require_one_of
from dpmix_jax.run import hosts

PRECISIONS = ("float32", "tensorfloat32", "bfloat16")
MEASURED = "measured"
CLIPPINGS = ("auto", "instantiate", "ghost")
PLACES = ("auto", "device", "host")
_GIB = 2**30
SHARE = 0.9  # of the memory of an accelerator; compilers underestimate a little
_SHARE_OF_HOST = 0.5
# Bytes of intermediate results of a microbatch on a CPU, beyond which small networks
# get slower (docs/results/speed.md). A few records are taken anyway: the more of them
# are added up at once, the less their sum rounds.
CACHE, FEW = 8 * 2**20, 16
_SHARE_OF_DATASET = 0.25


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerformanceConfig:
    """What changes memory and speed, and results by rounding at most.

    A run that goes on must keep its `clipping`, `convolutions` and `precision`: other
    rounding under the same noise would show the records.

    Attributes:
      microbatch_size: records whose gradients are held at once, over all devices, or
        `auto` for the most that fit, on a CPU into its cache; see
        `largest_microbatch`.
      memory_gib: memory of one device for `auto`; 0 takes what there is, or a CPU's
        cache.
      precision: of the model's forward and backward pass, one of `PRECISIONS`.
        Parameters, clipping, sums and noise are float32 whatever it is.
      convolutions: how per-record gradients of convolutions are computed, see
        `conv.fast_convolutions`, or `measured`: before its first update a run of one
        process times the formulations of each convolution on its device, and keeps the
        fastest; see `run.convolutions`.
      clipping: `instantiate` forms every record's gradient, `ghost` keeps factors of
        large matrices, see `ghost.ghost_clipped_gradient`; in float32 only. `auto` is
        `ghost` where a linear head on a frozen encoder is trained in float32, whose
        factors are the embeddings themselves, and `instantiate` elsewhere.
      dataset_on: where the training set lives: `device`, `host` (records are read
        ahead, a few microbatches at a time), or `auto`, on the device if, with the
        public images, it takes no more than a quarter of its memory. Public images
        always live on the device.
    """

    microbatch_size: int | str = "auto"
    memory_gib: float = 0.0
    precision: str = "float32"
    convolutions: str = "auto"
    clipping: str = "auto"
    dataset_on: str = "auto"

    def __post_init__(self):
        size, memory = self.microbatch_size, self.memory_gib
        if isinstance(size, str) and size.isdecimal():  # as a flag may bring it
            size = int(size)
            object.__setattr__(self, "microbatch_size", size)
        fits = size == "auto" if isinstance(size, str) else size >= 1
        require(fits, "performance.microbatch_size", size, "at least 1, or 'auto'")
        allowed = "positive, or 0 for what there is"
        require(0 <= memory < math.inf, "performance.memory_gib", memory, allowed)
        require_one_of("performance.precision", self.precision, PRECISIONS)
        formulations = (*conv.FORMULATIONS, MEASURED)
        require_one_of("performance.convolutions", self.convolutions, formulations)
        require_one_of("performance.clipping", self.clipping, CLIPPINGS)
        require_one_of("performance.dataset_on", self.dataset_on, PLACES)
        require(
            self.clipping != "ghost" or self.precision == "float32",
            "performance.precision",
            self.precision,
            "float32 for performance.clipping 'ghost'",
        )

    @property
    def formulation(self) -> str:
        """Of convolutions, as long as nothing is measured."""
        return "auto" if self.convolutions == MEASURED else self.convolutions

    def clipping_of(self, linear_head: bool, platform: str) -> str:
        """Returns what `clipping` comes to, for a linear head or another model."""
        if self.clipping != "auto":
            return self.clipping
        # The bound of its norms needs IEEE arithmetic, which TPUs do not have.
        exact = platform != "tpu" and self.precision == "float32"
        is_cheap = linear_head and exact
        return "ghost" if is_cheap else "instantiate"

    def check_devices(self, num_devices: int) -> None:
        """Raises `UserError` if microbatches do not divide over the devices."""
        size = self.microbatch_size
        divides = size == "auto" or int(size) % num_devices == 0
        allowed = f"a multiple of the number of devices, {num_devices}"
        require(divides, "performance.microbatch_size", size, allowed)

    def keeps_on_device(self, dataset_bytes: int, num_devices: int) -> bool:
        """Whether each device gets the whole training set."""
        if self.dataset_on != "auto":
            return self.dataset_on == "device"
        return dataset_bytes <= _SHARE_OF_DATASET * self.budget(num_devices)

    def budget(self, num_devices: int) -> float:
        """Returns the bytes that a run may take of one device.

        Without `memory_gib`, 0.9 of an accelerator's memory, or half of the host's,
        shared by its devices.
        """
        return self.memory_gib * _GIB or _device_bytes(num_devices)

    @property
    def dtype(self) -> jnp.dtype:
        """Of the model's computation."""
        return jnp.dtype(jnp.bfloat16 if self.precision == "bfloat16" else jnp.float32)

    @property
    def matmul_precision(self) -> str:
        """Of products of float32: accelerators take TF32 or less if not told."""
        return "tensorfloat32" if self.precision == "tensorfloat32" else "float32"


def largest_microbatch(
    bytes_needed: Callable[[int], int],
    *,
    expected_batch_size: float,
    least: int,
    budget: float,
    start: int = 1,
) -> int:
    """Finds the largest microbatch that fits the memory of a device.

    Memory need not grow in proportion to the records, so each size is compiled to
    measure it: the size that is returned was compiled, and fits. The search ends where
    less than a tenth more is to be expected. More records than
    nearly every Poisson batch has (B + 3 sqrt(B)) would only be padding.

    Args:
      bytes_needed: memory of one device for a microbatch size.
      expected_batch_size: B.
      least: the smallest size; the result is a multiple of it.
      budget: bytes of one device.
      start: times `least`, the first size that is compiled; more than 1 must be known
        to fit, and to be at most B.

    Raises:
      UserError: if not even the first size fits.
    """
    most = math.ceil((expected_batch_size + 3 * expected_batch_size**0.5) / least)
    needed: dict[int, int] = {}  # bytes by size, in units of `least`
    fits, too_large, size = 0, most + 1, start
    while size > 1.1 * fits:
        needed[size] = bytes_needed(size * least)
        if needed[size] <= budget:
            fits = size
        else:
            too_large = size
        if not fits:
            raise UserError(
                f"a microbatch of {size * least} record(s) needs"
                f" {needed[size] / _GIB:.2f} GiB a device, the budget is"
                f" {budget / _GIB:.2f} GiB: use a smaller model or fewer images a"
                " record, or raise performance.memory_gib"
            )
        reached = 2 * size
        if len(needed) > 1:  # the line through the two sizes nearest to the budget
            low, high = sorted(
                sorted(needed, key=lambda known: abs(needed[known] - budget))[:2]
            )
            each = max((needed[high] - needed[low]) / (high - low), 1.0)
            reached = low + math.floor((budget - needed[low]) / each)
        # Half way to what is too large, for memory may jump there.
        half = (fits + too_large) // 2 if too_large in needed else most
        size = min(reached, 8 * fits, half)
    return fits * least


def _device_bytes(num_devices: int) -> float:
    stats = jax.local_devices()[0].memory_stats() or {}
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    of_host = _SHARE_OF_HOST * host / num_devices
    found = SHARE * stats["bytes_limit"] if "bytes_limit" in stats else of_host
    return min(hosts.gather(found))


def keep_compiled_code(folder: pathlib.Path) -> None:
    """Caches compiled code in a folder, unless JAX was told of another place."""
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(folder))


@contextlib.contextmanager
def explained_out_of_memory(config: PerformanceConfig):
    """Turns running out of memory into an error that says what to change."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        # The CPU calls it INTERNAL in some versions, so that words decide, not codes.
        words = "MemoryError|RESOURCE_EXHAUSTED|out of memory|bad_alloc"
        if not re.search(words, repr(error), re.IGNORECASE):
            raise
        raise UserError(
            f"out of memory: lower performance.microbatch_size, which is"
            f" {config.microbatch_size}, or, if that is auto, performance.memory_gib"
        ) from None
