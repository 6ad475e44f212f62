import re
from unittest import mock

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpmix_jax import Mechanism, UserError, conv, data, models
from dpmix_jax.run import build, performance
from dpmix_jax.run.performance import PerformanceConfig, largest_microbatch
from tests import runs, toy

GIB = 2**30


@pytest.mark.parametrize(
    ("budget", "least", "most", "expected"),
    [
        (1.0, 1, 372, 90),
        (0.5, 1, 372, 40),
        (0.111, 1, 372, 1),
        (1.0, 4, 372, 88),
        (100.0, 1, 372, 430),
        (100.0, 4, 16, 28),
        (100.0, 1, 1, 4),
    ],
)
def test_the_largest_microbatch_that_fits(budget, least, most, expected):
    """0.1 GiB and 0.01 a record; never more than nearly every batch has."""
    found = largest_microbatch(
        lambda size: int((0.1 + 0.01 * size) * GIB),
        expected_batch_size=most,
        least=least,
        budget=budget * GIB,
    )
    assert expected - 1 <= found <= expected


@hypothesis.given(
    power=st.sampled_from([0.0, 0.5, 1.0, 1.4, 2.0]),
    jump=st.integers(2, 200),
    budget=st.floats(2.0, 500.0),
)
def test_the_size_was_compiled_and_fits(power, jump, budget):
    """However memory grows, and if it jumps where XLA changes its mind."""
    compiled = {}

    def memory(size):
        return int((1 + size**power + 5 * (size >= jump)) * GIB)

    def needed(size):
        assert size not in compiled
        compiled[size] = memory(size)
        return compiled[size]

    budget = budget * GIB
    found = largest_microbatch(needed, expected_batch_size=1000, least=1, budget=budget)
    assert compiled[found] <= budget
    assert len(compiled) <= 12
    if memory(jump) - 5 * GIB > budget:  # the jump is out of reach
        fit = [n for n in range(1, min(jump, 1096)) if memory(n) <= budget]
        assert found >= 0.85 * max(fit)


def test_nothing_fits():
    with pytest.raises(UserError, match=r"a microbatch of 4 record\(s\) needs 0.51"):
        largest_microbatch(
            lambda _: 0.51 * GIB, expected_batch_size=10, least=4, budget=0.5 * GIB
        )


@pytest.mark.sampled
def test_memory_of_a_microbatch_is_measured_and_grows():
    config, records = runs.config(), data.load(data.DataConfig()).train
    model = build.classifier(config, records)
    mechanism = Mechanism(sampling_prob=0.1, num_updates=1, noise_multiplier=1.0)
    parts = build.build(
        config, model, model.shapes, records, mechanism=mechanism, seed=0
    )
    sizes = [parts.bytes_needed(m) for m in (1, 8, 64)]
    assert 0 < sizes[0] < sizes[1] < sizes[2]


def automatic_size(monkeypatch, mib, **settings):
    """Returns what `auto` takes where a microbatch needs `mib(size)` to work in."""
    config = runs.config(performance__microbatch_size="auto", **settings)
    records = data.blank(config.data)
    model = build.classifier(config, records)
    mechanism = Mechanism(sampling_prob=0.1, num_updates=12, noise_multiplier=1.0)
    parts = build.build(
        config, model, model.shapes, records, mechanism=mechanism, seed=0
    )

    def compiled(_, size):
        work = int(mib(size) * 2**20)
        memory = mock.Mock(argument_size_in_bytes=2**20, temp_size_in_bytes=work)
        return mock.Mock(memory_analysis=lambda: memory)

    monkeypatch.setattr(build.Parts, "_compiled", compiled)
    return parts.microbatch_size(config.performance)


@pytest.mark.parametrize(
    ("mib_of_one", "mib_a_record", "memory_gib", "expected"),
    [
        (0, 0.125, 0.0, 64),  # 8 MiB of intermediate results
        (0, 0.17, 0.0, 48),
        (0, 2.0, 0.0, performance.FEW),
        (0, 1e6, 0.0, 0),  # not even one fits: it is told of memory, not of the cache
        (0, 0.125, 4.0, 243),  # nearly every batch
        (0, 1000.0, 4.0, 4),
        (32, 1.0, 0.0, performance.FEW),  # one is not asked for
    ],
)
def test_auto_takes_what_stays_in_the_cache_of_a_cpu_or_a_few(
    monkeypatch, mib_of_one, mib_a_record, memory_gib, expected
):
    def mib(size):
        return max(mib_a_record * size, mib_of_one * (size == 1))

    def found():
        return automatic_size(monkeypatch, mib, performance__memory_gib=memory_gib)

    if not expected:
        with pytest.raises(UserError, match=r"a microbatch of 1 .* needs 976.56 GiB"):
            found()
    else:
        assert 0.9 * expected <= found() <= expected


@pytest.mark.parametrize("batch", [1, 4, 40])
def test_auto_refuses_no_batch_that_is_small(monkeypatch, batch):
    """Where XLA takes more memory for fewer records, as it does for one."""

    def mib(size):
        return 32 if size < performance.FEW else size

    found = automatic_size(monkeypatch, mib, privacy__expected_batch_size=batch)
    assert 1 <= found <= max(performance.FEW, batch + 3 * batch**0.5)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating"),
        jax.errors.JaxRuntimeError("INTERNAL: Out of memory allocating 27827628240"),
    ],
)
def test_out_of_memory_names_the_knob(error):
    message = "out of memory: lower performance.microbatch_size, which is auto, or, if"
    with (
        pytest.raises(UserError, match=message),
        performance.explained_out_of_memory(PerformanceConfig()),
    ):
        raise error


def test_other_errors_are_left_alone():
    with (
        pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"),
        performance.explained_out_of_memory(PerformanceConfig()),
    ):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


@pytest.mark.sampled
@jax.numpy_dtype_promotion("standard")  # Flax's GroupNorm relies on it
@pytest.mark.parametrize("name", ["cnn", pytest.param("wrn", marks=pytest.mark.slow)])
def test_bfloat16_computes_in_half_and_keeps_float32_outside(name):
    options = {"features": (8, 8)} if name == "cnn" else {"depth": 10, "width": 1}
    config = PerformanceConfig(precision="bfloat16")
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    full = models.create(name, 3, **options)
    half = models.create(name, 3, dtype=config.dtype, **options)
    params = jax.jit(half.init)(jax.random.key(0), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    logits = jax.jit(half.apply)(params, images)
    assert logits.dtype == jnp.float32
    expected = jax.jit(full.apply)(params, images)
    np.testing.assert_allclose(logits, expected, atol=0.1)

    def loss(params):
        return jnp.square(half.apply(params, images)).sum()

    closed = jax.make_jaxpr(jax.grad(loss))(params)
    assert "bf16" in str(closed)
    assert {aval.dtype for aval in closed.out_avals} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("precision", "stored"), [("float32", "HIGHEST"), ("tensorfloat32", "HIGH")]
)
def test_precision_of_products_is_set_not_left_to_the_backend(precision, stored):
    """Forward and backward: an accelerator takes TF32 for float32 if not told."""
    config = PerformanceConfig(precision=precision)

    def loss(params, images, labels):
        with jax.default_matmul_precision(config.matmul_precision):
            return toy.loss_fn(params, images, labels)

    images, labels = jnp.ones((2, 6, 6, 1)), jnp.ones((2, 3)) / 3
    text = str(jax.make_jaxpr(jax.grad(loss))(toy.init_params(), images, labels))
    products = text.count("conv_general_dilated[") + text.count("dot_general[")
    assert products >= 5
    assert len(re.findall(rf"Precision\.{stored}\b", text)) >= products


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"microbatch_size": 0}, "performance.microbatch_size is 0"),
        ({"microbatch_size": "many"}, "performance.microbatch_size is 'many'"),
        ({"precision": "float8"}, "performance.precision is 'float8': it must be one"),
        ({"convolutions": "fft"}, "performance.convolutions is 'fft'"),
        (
            {"clipping": "flat"},
            "performance.clipping is 'flat': it must be one of auto",
        ),
        (
            {"clipping": "ghost", "precision": "bfloat16"},
            "performance.precision is 'bfloat16': it must be float32 for .* 'ghost'",
        ),
        ({"memory_gib": -1.0}, "performance.memory_gib is -1.0"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(UserError, match=message):
        PerformanceConfig(**options)


def test_a_number_may_come_as_text():
    assert PerformanceConfig(microbatch_size="16").microbatch_size == 16
    assert PerformanceConfig().microbatch_size == "auto"
    assert conv.FORMULATIONS[0] == PerformanceConfig().convolutions


def test_a_microbatch_must_divide_over_the_devices():
    PerformanceConfig(microbatch_size=8).check_devices(4)
    PerformanceConfig().check_devices(3)
    with pytest.raises(UserError, match="a multiple of the number of devices, 4"):
        PerformanceConfig(microbatch_size=6).check_devices(4)


@pytest.mark.parametrize(
    ("settings", "of_a_head", "elsewhere"),
    [
        ({}, "ghost", "instantiate"),
        ({"precision": "bfloat16"}, "instantiate", "instantiate"),
        ({"clipping": "instantiate"}, "instantiate", "instantiate"),
        ({"clipping": "ghost"}, "ghost", "ghost"),
    ],
)
def test_what_clipping_comes_to(settings, of_a_head, elsewhere):
    config = PerformanceConfig(**settings)
    for platform in ("cpu", "gpu"):
        assert config.clipping_of(True, platform) == of_a_head
        assert config.clipping_of(False, platform) == elsewhere


def test_what_clipping_comes_to_without_exact_arithmetic():
    assert PerformanceConfig().clipping_of(True, "tpu") == "instantiate"
    assert PerformanceConfig(clipping="ghost").clipping_of(True, "tpu") == "ghost"
