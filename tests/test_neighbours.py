"""Neighbouring batches on one device, on four, and on two processes."""

import functools
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from tests import clipped_sums
from tests.conftest import ROOT

TOPOLOGIES = list(clipped_sums.METHODS_ON)
SLOW = {"two processes": pytest.mark.slow}
SEVERAL = clipped_sums.METHODS_ON["four devices"]
FOUR_DEVICES = "--xla_force_host_platform_device_count=4"
BOUND = clipped_sums.CLIP_NORM * (1 + 1e-5)


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
def sums_on(tmp_path_factory):
    """A function from a topology and a method to sums, which are computed once."""

    @functools.cache
    def on_one_device(method):
        return clipped_sums.sums([method])

    @functools.cache
    def on_several(topology):
        folder = tmp_path_factory.mktemp("sums")
        if topology == "four devices":
            out = folder / "four.npz"
            return load(start(out, flags=FOUR_DEVICES), out)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        outs = [folder / "first.npz", folder / "second.npz"]
        processes = [start(out, address, "2", str(i)) for i, out in enumerate(outs)]
        first, second = map(load, processes, outs)
        for name in first:
            np.testing.assert_array_equal(first[name], second[name])
        return first

    def sums(topology, method=None):
        one = topology == "one device"
        return on_one_device(method) if one else on_several(topology)

    return sums


@pytest.mark.proves("training.make_clipped_sum", 2)
@pytest.mark.proves("training.make_accumulate", 1)
@pytest.mark.sampled(*(f"{on}-{method}" for on in TOPOLOGIES[:2] for method in SEVERAL))
@pytest.mark.parametrize(
    ("topology", "method"),
    [
        pytest.param(on, method, marks=SLOW.get(on, ()))
        for on in TOPOLOGIES
        for method in clipped_sums.METHODS_ON[on]
    ],
)
def test_a_changed_record_moves_the_sum_by_the_sensitivity(sums_on, topology, method):
    sums = sums_on(topology, method)
    prefixes = ["", "other_pool_"] if method in clipped_sums.WITH_PUBLIC else [""]

    for prefix in prefixes:  # other public images: another sum, the same bound

        def moved(variant, base="base", start=f"{method}/{prefix}"):
            return np.linalg.norm(sums[start + variant] - sums[start + base])

        for bad in clipped_sums.BAD:
            assert np.isfinite(sums[f"{method}/{prefix}{bad}"]).all()
            assert moved(bad) <= 2 * BOUND
        assert 0 < moved("replaced") <= 2 * BOUND  # replace one
        if method == clipped_sums.GROUPS:  # a term becomes another of its length
            assert 0 < moved("removed") <= 2 * BOUND
            continue
        # The clip is at work, so what is removed is a term of full length.
        assert moved("removed") == pytest.approx(clipped_sums.CLIP_NORM, rel=1e-4)
        assert moved("removed") <= BOUND  # add or remove one
        for variant in ("replaced", *clipped_sums.BAD):
            assert moved(variant, "removed") <= BOUND
    if len(prefixes) > 1:
        assert (sums[f"{method}/base"] != sums[f"{method}/other_pool_base"]).any()


@pytest.mark.proves("training.make_accumulate", 2)
@pytest.mark.proves("devices.sum_over_devices", 1)
@pytest.mark.parametrize(
    "topology", [pytest.param(on, marks=SLOW.get(on, ())) for on in TOPOLOGIES[1:]]
)
def test_topologies_agree(sums_on, topology):
    methods = clipped_sums.METHODS_ON[topology]
    one = {k: v for m in methods for k, v in sums_on("one device", m).items()}
    others = "shard_map", "rows"
    compared = [n for n in sums_on(topology) if not n.startswith(others)]
    assert {name.split("/")[0] for name in compared} == {*methods}
    assert "dp_sgd/host" in compared
    for name in compared:
        np.testing.assert_allclose(sums_on(topology)[name], one[name], atol=1e-6)


@pytest.mark.proves("models.kept.make_embed", 1)
def test_each_device_embeds_its_own_records(sums_on):
    """On four devices a row is what it is on one, and of its record alone."""
    found = sums_on("four devices")
    for name, rows in clipped_sums.rows().items():
        np.testing.assert_array_equal(found[name], rows)
    same = (found["rows/base"] == found["rows/replaced"]).all(1)
    assert list(np.flatnonzero(~same)) == [clipped_sums.CHANGED]


def test_the_check_catches_a_sum_before_the_clip(sums_on):
    """`jax.shard_map` with its default `check_vma` breaks the bound on four devices."""
    sums = sums_on("four devices")
    moved = np.linalg.norm(sums["shard_map/base"] - sums["shard_map/replaced"])
    assert moved > 3 * clipped_sums.CLIP_NORM  # of 2 that are allowed
