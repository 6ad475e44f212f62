"""Neighbouring batches on one device, on four, and on two processes."""

import itertools
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from dpmix_jax.mixup import METHODS, OF_GROUPS, WITH_PUBLIC
from tests import clipped_sums
from tests.conftest import ROOT

FOUR_DEVICES = "--xla_force_host_platform_device_count=4"


def start(out, *coordinates, flags=""):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.clipped_sums", str(out), *coordinates],
        cwd=ROOT,
        env={
            **os.environ,
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {flags}",
            "JAX_PLATFORMS": "cpu",
        },
        stderr=subprocess.PIPE,
        text=True,
    )


def load(process, out):
    try:
        _, errors = process.communicate(timeout=900)
    finally:
        process.kill()
    assert process.returncode == 0, errors[-2000:]
    with np.load(out) as file:
        return dict(file)


@pytest.fixture(scope="module")
def by_topology(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sums")
    found = {"one device": clipped_sums.sums()}
    out = folder / "four.npz"
    found["four devices"] = load(start(out, flags=FOUR_DEVICES), out)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    outs = [folder / f"process{i}.npz" for i in range(2)]
    both = [start(out, address, "2", str(i)) for i, out in enumerate(outs)]
    first, second = (load(p, out) for p, out in zip(both, outs, strict=True))
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
    found["two processes"] = first
    return found


TOPOLOGIES = ["one device", "four devices", "two processes"]


@pytest.mark.proves("training.Accumulate", 1)
@pytest.mark.parametrize(
    ("topology", "method"),
    [
        *itertools.product(TOPOLOGIES[:1], METHODS),
        *itertools.product(TOPOLOGIES[1:], clipped_sums.ON_MANY),
    ],
)
def test_a_changed_record_moves_the_sum_by_the_sensitivity(
    by_topology, topology, method
):
    sums = by_topology[topology]
    bound = clipped_sums.CLIP_NORM * (1 + 1e-5)

    def moved(variant, base="base"):
        return np.linalg.norm(sums[f"{method}/{variant}"] - sums[f"{method}/{base}"])

    for bad in clipped_sums.BAD if topology != "two processes" else ():
        assert np.isfinite(sums[f"{method}/{bad}"]).all()
        assert moved(bad, "float") <= 2 * bound
    if method in OF_GROUPS:  # one group's term becomes another of its length
        assert 0 < moved("removed") <= 2 * bound
        assert 0 < moved("replaced") <= 2 * bound
        return
    # The clip is at work, so what is removed is a term of full length.
    assert moved("removed") == pytest.approx(clipped_sums.CLIP_NORM, rel=1e-4)
    assert moved("removed") <= bound  # add or remove one
    assert moved("replaced", "removed") <= bound
    assert 0 < moved("replaced") <= 2 * bound  # replace one
    if method in WITH_PUBLIC:  # other public images: another sum, the same bound
        other = "other_bank_base"
        assert moved(other) > 0
        assert moved("other_bank_removed", other) <= bound
        assert moved("other_bank_replaced", "other_bank_removed") <= bound
        assert 0 < moved("other_bank_replaced", other) <= 2 * bound


@pytest.mark.proves("training.Accumulate", 2)
@pytest.mark.proves("training.sum_over_devices", 1)
@pytest.mark.parametrize("topology", TOPOLOGIES[1:])
def test_topologies_agree(by_topology, topology):
    one = by_topology["one device"]
    compared = [name for name in by_topology[topology] if "shard_map" not in name]
    assert {name.split("/")[0] for name in compared} >= {*clipped_sums.ON_MANY}
    for name in compared:
        np.testing.assert_allclose(by_topology[topology][name], one[name], atol=1e-6)


def test_the_check_catches_a_sum_before_the_clip(by_topology):
    """`jax.shard_map` with its default `check_vma` breaks the bound on four devices."""
    sums = by_topology["four devices"]
    moved = np.linalg.norm(sums["shard_map/base"] - sums["shard_map/replaced"])
    assert moved > 3 * clipped_sums.CLIP_NORM  # of 2 that are allowed


def test_the_check_catches_a_bank_made_of_the_batch():
    """Public images that are the batch's own records put one into many sets."""
    sums = clipped_sums.sums_with_a_leaking_bank()
    moved = np.linalg.norm(sums["leak/base"] - sums["leak/replaced"])
    assert moved > 3 * clipped_sums.CLIP_NORM  # of 2 that are allowed
