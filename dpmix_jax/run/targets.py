"""Devices that are not here, for which a run's step is compiled all the same.

What a compiler says is an estimate: on a GPU nothing is tuned without the device, and
the memory that cuDNN works in counts as none.
"""

import collections
import dataclasses
import os
import re
from collections.abc import Iterator

import jax
from jax import stages
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dpmix_jax.errors import UserError
from dpmix_jax.models.classifier import Classifier
from dpmix_jax.run import build, performance
from dpmix_jax.run.config import ExperimentConfig
from dpmix_jax.training import Batch

_MANY_GROUPS = 2000

# From openxla/xla, xla/backends/gpu/target_config/specs: h100_sxm and a100_sxm_80.
_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  threads_per_core_limit: 2048 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 {}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{}"
"""
_H100 = """
  shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448 core_count: 132
  fpus_per_core: 128 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84942979072
  cuda_compute_capability { major: 9 }
"""
_A100 = """
  shared_memory_per_core: 167936 shared_memory_per_block_optin: 166912 core_count: 108
  fpus_per_core: 64 memory_bandwidth: 2039040000000 l2_cache_size: 41943040
  clock_rate_ghz: 1.41 device_memory_size: 85100068864
  cuda_compute_capability { major: 8 }
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of device.

    Attributes:
      platform: `cuda` or `tpu`, as `jax.export` names it.
      num_bytes: of its memory.
      topology: what `topologies.get_topology_desc` takes.
    """

    platform: str
    num_bytes: int
    topology: dict[str, str]

    def mesh(self) -> Mesh:
        """Returns a mesh of one such device; JAX runs on CPUs from then on.

        Raises:
          UserError: if what compiles for it is not installed.
        """
        jax.config.update("jax_platforms", "cpu")  # a GPU's plugin wants cuDNN if not
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # it asks the cloud otherwise
        try:
            found = topologies.get_topology_desc(
                platform=self.platform, **self.topology
            )
        except (NotImplementedError, RuntimeError) as error:
            raise UserError(
                f"nothing here compiles for {self.platform} with jax {jax.__version__}:"
                f" pip install 'dpmix_jax[targets]' ({error})"
            ) from None
        return Mesh(found.devices[:1], ("records",), axis_types=(AxisType.Auto,))


def _gpu(device_info: str, name: str, num_bytes: int) -> Target:
    text = _GPU.format(device_info, name)
    return Target(
        platform="cuda",
        num_bytes=num_bytes,
        topology={"target_config": text, "topology": "1x1x1"},
    )


TARGETS = {
    "h100": _gpu(_H100, "NVIDIA H100 80GB HBM3", 84_942_979_072),
    "a100": _gpu(_A100, "NVIDIA A100-SXM4-80GB", 85_100_068_864),
    "v5e": Target(
        platform="tpu", num_bytes=16 * 2**30, topology={"topology_name": "v5e:2x2"}
    ),
}


def for_target(
    config: ExperimentConfig, model: Classifier, target: Target
) -> ExperimentConfig:
    """Returns the config of a run on such a device, with what `auto` comes to there."""
    own = config.performance
    return dataclasses.replace(
        config,
        performance=dataclasses.replace(
            own,
            memory_gib=own.memory_gib or performance.SHARE * target.num_bytes / 2**30,
            clipping=own.clipping_of(build.suits_ghost(config, model), target.platform),
        ),
    )


def compiled(
    parts: build.Parts, config: ExperimentConfig, microbatch_size: int, mesh: Mesh
) -> stages.Compiled:
    """Compiles the clipped sum of a run for a device that is not here.

    Args:
      parts: of the run, built with its training set on the host.
      config: from `for_target`; it says whether that set lives on the device.
      microbatch_size: m.
      mesh: from `Target.mesh`.
    """
    *others, batch, inputs = parts.arguments(microbatch_size)
    records = parts.host_records
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves((records, inputs.pool)))
    if config.performance.keeps_on_device(num_bytes, mesh.size):
        batch, inputs = Batch(batch.indices), inputs._replace(records=records)

    def there(leaf):
        here = getattr(leaf, "sharding", None)
        spec = here.spec if isinstance(here, NamedSharding) else PartitionSpec()
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    arguments = jax.tree.map(there, (*others, batch, inputs))
    step = build.accumulate(config, parts.sets, parts.gradient_fn, mesh)
    return step.lower(*arguments).compile()


def facts(
    parts: build.Parts, config: ExperimentConfig, name: str, mesh: Mesh
) -> dict[str, str]:
    """Returns lines on what a run would take of a device: memory, work, red flags.

    Args:
      parts: see `compiled`.
      config: see `compiled`.
      name: of `TARGETS`.
      mesh: from `Target.mesh`.

    Raises:
      UserError: if not even the smallest microbatch fits.
    """
    target, own = TARGETS[name], config.performance
    programs: dict[int, stages.Compiled] = {}

    def bytes_needed(size: int) -> int:
        programs[size] = compiled(parts, config, size, mesh)
        return build.num_bytes(programs[size])

    if own.microbatch_size == "auto":
        size = performance.largest_microbatch(
            bytes_needed,
            expected_batch_size=config.privacy.expected_batch_size,
            least=parts.terms.least,
            budget=own.budget(mesh.size),
        )
    else:
        size = int(own.microbatch_size)
        bytes_needed(size)
    traced = parts.accumulate.trace(*parts.arguments(size))
    lowered = traced.lower(lowering_platforms=(target.platform,))
    flops = lowered.cost_analysis()["flops"]
    each = ", ".join(
        f"{n} {kind}" for kind, n in kernels(programs[size].as_text() or "")
    )
    found = red_flags(lowered.as_text(), len(parts.terms.padding(size)))
    return {
        "device": f"{mesh.devices.flat[0].device_kind}, which is not here",
        "memory": f"at least {build.num_bytes(programs[size]) / 2**30:.3g} GiB of"
        f" {own.budget(mesh.size) / 2**30:.2f} for microbatches of {size} records",
        "work": f"{flops / size:.3g} FLOPs a record",
        "kernels": each,
        "red flags": "; ".join(found) or "none",
    }


def kernels(text: str) -> list[tuple[str, int]]:
    """Counts the calls of libraries and the fusions of a compiled program, by kind."""
    calls = re.findall(r'custom_call_target="([^"]+)"', text)
    kinds = [
        f"fusions ({kind})" for kind in re.findall(r" fusion\(.*kind=k(\w+)", text)
    ]
    return collections.Counter(calls + kinds).most_common()


def red_flags(text: str, records: int) -> list[str]:
    """Says what is likely to be slow in a lowered program.

    Args:
      text: of the program.
      records: of a microbatch.
    """
    loops = list(trip_counts(text)).count(records) if records > 1 else 0
    groups = max(group_counts(text), default=0)
    found = {
        f"loops over records: {loops}": loops,
        f"groups of a convolution: {groups:,}": groups >= _MANY_GROUPS,
    }
    return [flag for flag, is_there in found.items() if is_there]


def trip_counts(text: str) -> Iterator[int]:
    """Yields how often each counted loop of a lowered program goes round."""
    numbers: dict[str, int] = {}
    for line in text.splitlines():
        if found := re.search(r"(%\w+) = stablehlo.constant dense<(\d+)> : ", line):
            numbers[found[1]] = int(found[2])
        elif found := re.search(r"stablehlo.compare +LT, %iterArg\w*, (%\w+),", line):
            yield numbers[found[1]]


def group_counts(text: str) -> Iterator[int]:
    """Yields the numbers of groups of the convolutions of a lowered program."""
    for found in re.finditer(r"(?:batch|feature)_group_count = (\d+)", text):
        yield int(found[1])
