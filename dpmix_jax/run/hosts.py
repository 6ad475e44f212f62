"""Several processes in one run, on one host or many: the first speaks for all.

Every process computes its devices' part of each sum, by the same steps. What a step
needs of the workdir (the seed, the noise, the state) is told by the first process,
which alone reads there, writes, evaluates and prints. A process that cannot go on says
so where the others next listen, and all end. With one process nothing here has an
effect.
"""

import contextlib
import hashlib
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dpmix_jax import progress
from dpmix_jax.errors import UserError, require

PyTree = Any

_NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_MESSAGE = 2**16  # bytes, so that all messages are gathered by one compiled program
_PATIENCE = 60.0  # seconds for the others to hear of a mistake


class _EndedError(UserError):
    """A mistake that all processes have heard of."""


def initialize() -> None:
    """Joins the processes of a run, before JAX touches a device.

    `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` tell who they
    are, as Kubeflow sets them; without all three JAX asks the cluster (Slurm, Open MPI,
    Cloud TPU, Kubernetes).

    Raises:
      UserError: if neither tells.
    """
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is for the run
    address, count, rank = (os.environ.get(name) for name in _NAMES)
    try:
        if address and count and rank:
            jax.distributed.initialize(
                *(address, int(count), int(rank)),
                cluster_detection_method="deactivate",
            )
        else:
            jax.distributed.initialize()
    except (ValueError, TypeError) as error:
        raise UserError(
            f"--distributed finds no other processes ({error}): give"
            f" {', '.join(_NAMES)}, or start it by a cluster that JAX knows"
        ) from None
    progress.silence(not is_first())


def is_first() -> bool:
    """Whether this process is the one that reads, writes and prints."""
    return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """Sends a value to all processes; returns the values of all, in order of process.

    Args:
      value: JSON-ready, at most 64 kB as JSON. All processes must call `gather` alike.

    Raises:
      UserError: in all processes, if one of them ends by a mistake; see `together`.
    """
    return [value] if jax.process_count() == 1 else _exchange(value, None)


def _exchange(value: Any, mistake: str | None) -> list[Any]:
    message = json.dumps([value, mistake]).encode().ljust(_MESSAGE)
    size = len(message)
    require(size == _MESSAGE, "a message's size", size, f"at most {_MESSAGE}")
    rows = multihost_utils.process_allgather(np.frombuffer(message, np.uint8))
    told = [json.loads(row.tobytes()) for row in np.asarray(rows)]
    for rank, (_, line) in enumerate(told):
        if line is not None:
            raise _EndedError(f"process {rank}: {line}" if rank else line)
    return [theirs for theirs, _ in told]


def of_first(function: Callable[[], Any]) -> Any:
    """Calls a function in the first process; all return what it returns, see `gather`.

    What it returns may be secret: it goes over the network that sums go over, too.
    """
    return gather(function() if is_first() else None)[0]


def arrays_of_first(make: Callable[[], PyTree], like: PyTree) -> PyTree:
    """Calls a function in the first process; all return its arrays, bit for bit.

    Args:
      make: returns arrays.
      like: a tree of their shapes and types.
    """
    if jax.process_count() == 1:
        return make()
    made: list[PyTree] = []
    of_first(lambda: made.append(make()))
    blank = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), like)
    content = jax.tree.map(
        lambda leaf: np.frombuffer(np.asarray(leaf).tobytes(), np.uint8),
        made[0] if made else blank,
    )
    return jax.tree.map(
        lambda leaf, found: found.view(leaf.dtype).reshape(leaf.shape),
        like,
        multihost_utils.broadcast_one_to_all(content),
    )


def local(tree: PyTree) -> PyTree:
    """Returns this process's own copy of arrays that are whole on every device.

    The process can compute with that copy without the other processes.
    """
    return jax.tree.map(
        lambda leaf: (
            leaf
            if getattr(leaf, "is_fully_addressable", True)
            else leaf.addressable_data(0)
        ),
        tree,
    )


def check_same(**facts: str) -> None:
    """Raises `UserError` if processes were not started alike, or read other data.

    Args:
      **facts: whatever must be the same in all, by its name.
    """
    sums = {
        name: hashlib.sha256(text.encode()).hexdigest() for name, text in facts.items()
    }
    of_all = gather(sums)
    for rank, theirs in enumerate(of_all):
        for name, checksum in theirs.items():
            if checksum != of_all[0][name]:
                raise UserError(f"process {rank} has another {name} than process 0")


def agreed(signals: list[int]) -> list[int]:
    """Returns the signals that any process has caught, so that all stop together.

    Args:
      signals: caught by this process; alone, that very list, which may yet grow.
    """
    if jax.process_count() == 1:
        return signals
    return [number for theirs in gather(signals) for number in theirs]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Ends all processes if one of them fails.

    A mistake is told where the others next gather: the first process raises it, the
    others exit with status 2. After any other error this process is gone at once, and
    with it the sums of the others, which JAX then ends.

    Raises:
      UserError: in the first process, for a mistake in any of them.
    """
    if jax.process_count() == 1:
        yield
        return
    try:
        try:
            yield
        except (UserError, OSError) as error:
            if isinstance(error, _EndedError):
                raise
            line = str(error)[:256]  # a character takes up to twelve bytes
            with _at_most(_PATIENCE, line):
                _exchange(None, line)
    except _EndedError:
        if is_first():
            raise
        sys.exit(2)
    except Exception:
        traceback.print_exc()
        _exit(1)
    except KeyboardInterrupt:
        _exit(130)


@contextlib.contextmanager
def _at_most(seconds: float, line: str) -> Iterator[None]:
    """Exits if the others do not listen: they wait for a sum, and would for ever."""

    def give_up():
        print("error:", line, file=sys.stderr)
        _exit(2)

    timer = threading.Timer(seconds, give_up)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _exit(status: int) -> None:
    """Exits without waiting for the other processes, as Python's own exit does."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
