"""What every config compiles to for devices that are not here."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.experimental import topologies

from dpmix_jax import UserError, accounting, data, ghost_clipped_gradient, privacy
from dpmix_jax.data.public import blank_public
from dpmix_jax.run import build, embeddings
from dpmix_jax.run.dry_run import dry_run
from dpmix_jax.run.targets import TARGETS, group_counts, red_flags, trip_counts
from tests import test_configs
from tests.programs import call

RECORDS = 7  # of a microbatch; no other loop is as long
MOST_GROUPS = 1024  # ConvNeXt-Base has so many channels


def configs():
    """Every run, every method of every sweep but `rates`, and ConvNeXt as a whole."""
    of = {name: lambda n=name: first(n) for name in test_configs.RUNS}
    of["convnext_base, all"] = lambda: trained_as_a_whole(first("convnext_base"))
    sweeps = (("table11",), ("table10", "digits"), ("baselines", "digits"))
    for name in (*sweeps, ("fashion_mnist_ladder", "methods")):
        for row, settings in test_configs.grid(*name).rows.items():
            method = settings["method.name"]
            of[f"{name[0]}, {method}"] = functools.partial(row_of, name, row)
    return of


def first(name):
    return test_configs.load(name, test_configs.arguments(name)[0])


def row_of(name, row):
    return next(run for run in test_configs.grid(*name).runs() if run.row == row).config


def trained_as_a_whole(config):
    everything = dataclasses.replace(config.finetune, trainable="all")
    return dataclasses.replace(config, finetune=everything)


def with_performance(config, **settings):
    performance = dataclasses.replace(config.performance, **settings)
    return dataclasses.replace(config, performance=performance)


def programs(config, platform):
    """Exports what a run compiles, of black records and weights that are 0.

    Returns:
      Texts by name: of the clipped sum, the update, and the embedding if it is apart.
    """
    records = data.blank(config.data).subset(np.arange(RECORDS))
    public = blank_public(config.public, config.data, records)
    model = build.classifier(config, records)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), model.shapes)
    model = dataclasses.replace(model, init=lambda key: zeros)
    clipping = config.performance.clipping_of(
        build.suits_ghost(config, model), platform
    )
    config = with_performance(config, clipping=clipping)
    parts = build.build(
        config,
        model,
        model.shapes,
        records,
        mechanism=accounting.Mechanism(
            sampling_prob=0.1, num_updates=1, noise_multiplier=1.0
        ),
        seed=0,
        public=public,
    )

    def exported(function, *args):
        return export.export(function, platforms=(platform,))(*args).mlir_module()

    found = {}
    if config.finetune.embeddings == "kept":
        _, _, step, batch, inputs = parts.arguments(RECORDS)
        found["embed"] = exported(embeddings.embed(parts, model), step, batch, inputs)
        rows = embeddings.blank_rows(parts, config, model, RECORDS)
        parts = embeddings.on_kept(parts, config, model, rows, seed=0)
    arguments = parts.arguments(RECORDS * parts.terms.least)
    found["sum"] = exported(parts.accumulate, *arguments)
    gradients = arguments[0].gradients
    found["update"] = exported(parts.apply_update, parts.state, gradients)
    return found


QUICK = ("digits", "baselines, microbatch_mixup")
CONFIGS = configs()


@pytest.mark.sampled
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CONFIGS],
)
def test_a_step_for_accelerators_has_no_loop_over_records_and_few_groups(name):
    for platform in ("cuda", "tpu"):
        for part, text in programs(CONFIGS[name](), platform).items():
            assert RECORDS not in set(trip_counts(text)), (platform, part)
            assert max(group_counts(text), default=0) <= MOST_GROUPS, (platform, part)


@pytest.mark.sampled
def test_what_that_test_would_find():
    """On CPUs there are loops over records; JAX's own rule has groups of all."""
    config = CONFIGS["digits"]()
    assert RECORDS in set(trip_counts(programs(config, "cpu")["sum"]))
    plain = programs(with_performance(config, convolutions="plain"), "cuda")["sum"]
    assert max(group_counts(plain)) == RECORDS
    assert max(group_counts(programs(config, "cpu")["sum"])) == 1


@pytest.mark.slow
def test_what_that_test_would_find_in_depthwise_convolutions():
    config = CONFIGS["convnext_base, all"]()
    plain = programs(with_performance(config, convolutions="plain"), "cuda")["sum"]
    assert max(group_counts(plain)) == RECORDS * MOST_GROUPS


def test_ghost_clipping_takes_small_blocks_on_cpus_alone():
    """64 gradients of 2^16 numbers, of which 16 go into a CPU's cache."""
    gradient_fn = ghost_clipped_gradient(lambda b, g: (b * g).sum(), l2_clip_norm=1.0)
    shapes = [jax.ShapeDtypeStruct((*n, 2**16), jnp.float32) for n in ((), (64,))]
    traced = jax.jit(gradient_fn).trace(*shapes)
    for platform, blocks in {"cpu": 4, "cuda": 2, "tpu": 2}.items():
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert list(trip_counts(text)) == [blocks]


@pytest.fixture
def calibrated(monkeypatch):
    mechanism = accounting.Mechanism(
        sampling_prob=256 / 1437, num_updates=100, noise_multiplier=2.6903
    )
    monkeypatch.setattr(privacy, "calibrate", lambda **kwargs: mechanism)


@pytest.mark.slow
@pytest.mark.usefixtures("calibrated")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("size", ["32", "auto"])
def test_the_digits_compile_for_a_device_that_is_not_here(target, size):
    """Needs the extra `targets`, and `JAX_PLATFORMS=cpu` if not run alone."""
    try:
        TARGETS[target].mesh()
    except UserError as reason:
        pytest.skip(str(reason))
    config = with_performance(CONFIGS["digits"](), microbatch_size=size)
    text = dry_run(config, target)
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in text.splitlines())
    assert "which is not here" in lines["device"]
    assert lines["red flags"] == "none"
    gib, records = re.search(
        r"least (\S+) GiB .* of (\d+) rec", lines["memory"]
    ).groups()
    assert 0 < float(gib) < 1
    assert int(records) == (32 if size == "32" else 304)  # B + 3 sqrt(B)
    assert target == "v5e" or " 2 __cudnn$convBackwardFilter" in lines["kernels"]


def test_without_its_compiler_it_says_what_to_install(monkeypatch):
    def missing(**kwargs):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(UserError, match=r"pip install 'dpmix_jax\[targets\]' \(topol"):
        dry_run(CONFIGS["digits"](), "h100")


def test_a_target_is_for_dry_runs_alone():
    done = call("experiments/run.py", ["--config=configs/digits.py", "--target=h100"])
    assert done.returncode == 2
    assert done.stderr == "error: --target is for --dry_run alone\n"


def test_red_flags():
    def slow(x, kernel):
        x = lax.map(jnp.sin, x)
        return lax.conv_general_dilated(
            x, kernel, (1,), "SAME", feature_group_count=2048
        )

    shapes = [
        jax.ShapeDtypeStruct(n, jnp.float32) for n in ((3, 2048, 5), (2048, 1, 3))
    ]
    text = jax.jit(slow).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    expected = ["loops over records: 1", "groups of a convolution: 2,048"]
    assert red_flags(text, records=3) == expected
    assert red_flags(text, records=4) == expected[1:]
