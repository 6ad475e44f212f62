import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpmix_jax import UserError, conv, models, performance
from dpmix_jax.performance import PerformanceConfig, largest_microbatch
from tests import toy
from tests.test_training import DATA, GRADIENT, KEY, RECORD_SET, training

GIB = 2**30


def memory(base, each):
    return lambda size: int(base + each * size)


@pytest.mark.parametrize(
    ("budget", "devices", "expected"),
    [(1.0, 1, 90), (0.5, 1, 40), (0.111, 1, 1), (1.0, 4, 360), (100.0, 1, 430)],
)
def test_the_largest_microbatch_that_fits(budget, devices, expected):
    """0.1 GiB and 0.01 a record; never more than nearly every batch of 372 has."""
    found = largest_microbatch(
        memory(0.1 * GIB, 0.01 * GIB / devices),
        expected_batch_size=372.0,
        num_devices=devices,
        memory_gib=budget,
    )
    assert found % devices == 0
    assert expected - devices <= found <= expected


def test_nothing_fits():
    with pytest.raises(UserError, match=r"1 record\(s\) for each device need 0.51"):
        largest_microbatch(
            memory(0.5 * GIB, 0.01 * GIB),
            expected_batch_size=10,
            num_devices=1,
            memory_gib=0.5,
        )


def test_memory_of_a_microbatch_is_measured_and_grows():
    accumulate = training.Accumulate(
        GRADIENT, RECORD_SET, DATA, training.make_mesh(), key=KEY, l2_clip_norm=0.3
    )

    def needed(microbatch_size):
        nothing = np.full(microbatch_size, -1)
        return accumulate.bytes_needed(toy.init_params(), nothing)

    sizes = [needed(m) for m in (1, 8, 64)]
    assert 0 < sizes[0] < sizes[1] < sizes[2]
    found = largest_microbatch(
        needed,
        expected_batch_size=16,
        num_devices=1,
    )
    assert found == 28  # all of a batch of 16 + 3 sqrt(16)


def test_out_of_memory_names_the_knob():
    message = "out of memory with microbatches of 64 records: lower performance.micro"
    for error in (
        MemoryError(),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating"),
    ):
        with (
            pytest.raises(UserError, match=message),
            performance.explained_out_of_memory(64),
        ):
            raise error
    with (
        pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"),
        performance.explained_out_of_memory(64),
    ):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


@jax.numpy_dtype_promotion("standard")  # Flax's GroupNorm relies on it
@pytest.mark.parametrize("name", ["cnn", pytest.param("wrn", marks=pytest.mark.slow)])
def test_bfloat16_computes_in_half_and_keeps_float32_outside(name):
    options = {"features": (8, 8)} if name == "cnn" else {"depth": 10, "width": 1}
    config = PerformanceConfig(precision="bfloat16")
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    full = models.create(name, 3, **options)
    half = models.create(name, 3, dtype=config.dtype, **options)
    params = half.init(jax.random.key(0), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    logits = half.apply(params, images)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, full.apply(params, images), atol=0.1)

    def loss(params):
        return jnp.square(half.apply(params, images)).sum()

    text = str(jax.make_jaxpr(jax.grad(loss))(params))
    assert "bf16" in text.split("conv_general_dilated")[1][:40] or "bf16" in text
    gradients = jax.tree.leaves(jax.grad(loss)(params))
    assert {leaf.dtype for leaf in gradients} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("precision", "stored"), [("float32", "HIGHEST"), ("tensorfloat32", "HIGH")]
)
def test_precision_of_products_is_set_not_left_to_the_backend(precision, stored):
    """Forward and backward: an accelerator takes TF32 for float32 if not told."""
    config = PerformanceConfig(precision=precision)

    def loss(params, images, labels):
        with config.matmul_precision():
            return toy.loss_fn(params, images, labels)

    images, labels = jnp.ones((2, 6, 6, 1)), jnp.ones((2, 3)) / 3
    text = str(jax.make_jaxpr(jax.grad(loss))(toy.init_params(), images, labels))
    products = text.count("conv_general_dilated[") + text.count("dot_general[")
    assert products >= 5
    assert (
        text.count(f"Precision.{stored}\n")
        + text.count(f"Precision.{stored}, ")
        + text.count(f"Precision.{stored})")
        >= products
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"microbatch_size": 0}, "performance.microbatch_size is 0"),
        ({"microbatch_size": "many"}, "performance.microbatch_size is 'many'"),
        ({"precision": "float8"}, "performance.precision is 'float8': it must be one"),
        ({"convolutions": "fft"}, "performance.convolutions is 'fft'"),
        (
            {"clipping": "flat"},
            "performance.clipping is 'flat': it must be one of inst",
        ),
        (
            {"clipping": "ghost", "precision": "bfloat16"},
            "performance.clipping is 'ghost': performance.precision must be float32",
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
