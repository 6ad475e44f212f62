"""Other steps from the same private means: what may follow `privacy.privatizer`.

Each takes private means, so that all of it is post-processing: epsilon, delta and the
privacy statement are those of plain SGD. They know that the noise is there: Adam whose
second moment leaves it out, and two filters that average it away.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.signal

from dpmix_jax.errors import require

PyTree = Any


def adam_bc(
    learning_rate: optax.ScalarOrSchedule,
    *,
    noise_stddev: float,
    b1: float = 0.9,
    b2: float = 0.999,
    floor: float = 1e-8,
) -> optax.GradientTransformation:
    """DP-AdamBC: Adam with the variance of the noise taken off its second moment.

    Noise adds its variance to the square of each coordinate. Where that variance is
    more than the gradient's own square, Adam divides all coordinates by about
    `noise_stddev`, and becomes SGD with momentum. Here the step is
    m / sqrt(max(v - noise_stddev^2, floor)), where m and v are Adam's moments with
    Adam's bias correction (Tang, Shpilevskiy and Lecuyer, "DP-AdamBC", AAAI 2024, arXiv
    2312.14334, Algorithm 1).

    Args:
      learning_rate: positive, or a schedule of optax.
      noise_stddev: standard deviation of the noise on a coordinate of the private mean:
        that of the noise on the sum, divided by the expected batch size. Chain nothing
        that changes the noise, such as a filter, between the privatizer and `adam_bc`.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      floor: the least second moment, in squared units of the gradient, positive. No
        coordinate moves by more than `learning_rate` times m / sqrt(floor).

    Raises:
      UserError: for an argument out of its range.

    Example:
      >>> stddev = 2.0 * 1.0 / 100  # noise multiplier, sensitivity, expected batch size
      >>> step = dpm.optimizers.adam_bc(1e-3, noise_stddev=stddev)
      >>> state = step.init(jnp.zeros(3))
      >>> updates, state = step.update(jnp.array([0.1, -0.1, 0.0]), state)
      >>> print(updates.round(5))
      [-0.00102  0.00102 -0.     ]
    """
    for name, value, valid, allowed in (
        ("noise_stddev", noise_stddev, 0 <= noise_stddev < math.inf, "at least 0"),
        ("b1", b1, 0 <= b1 < 1, "in [0, 1)"),
        ("b2", b2, 0 <= b2 < 1, "in [0, 1)"),
        ("floor", floor, 0 < floor < math.inf, "positive and finite"),
    ):
        require(valid, name, value, allowed)
    noise_variance = float(noise_stddev) ** 2  # not of a type of NumPy

    def update(updates, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment(updates, state.nu, b2, 2)
        done = count.astype(jnp.float32)  # optax would promote an integer
        steps = jax.tree.map(
            lambda m, v: m / jnp.sqrt(jnp.maximum(v - noise_variance, floor)),
            optax.tree.bias_correction(mu, b1, done),
            optax.tree.bias_correction(nu, b2, done),
        )
        return steps, optax.ScaleByAdamState(count, mu, nu)

    return optax.chain(
        optax.GradientTransformation(optax.scale_by_adam().init, update),
        optax.scale_by_learning_rate(learning_rate),
    )


class LowPassState(NamedTuple):
    """What a `low_pass` filter remembers: pairs of a pytree and a scalar.

    Attributes:
      inputs: the last private means g_t, the latest first, each paired with 1 (with 0
        before the first update).
      outputs: the last m_t, before the division by c_t, each paired with its c_t.
    """

    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]


_FIRST = 10_000  # updates of a filter that are looked at, after which it has settled


def low_pass(a: Sequence[float], b: Sequence[float]) -> optax.GradientTransformation:
    """DOPPLER: a linear filter in time, as gradients change slowly and noise does not.

    The filter is m_t = sum_r b_r g_{t-r} - sum_r a_r m_{t-r} of the private means g,
    with zeros before the first. The output is m_t / c_t, where c_t is the same filter
    applied to ones, so a constant passes unchanged from the first update on (Zhang, Bu,
    Hong and Razaviyayn, "DOPPLER", NeurIPS 2024, arXiv 2408.13460, Algorithm 1). Chain
    it between the privatizer and any optimizer. It keeps `len(a) + len(b) - 1` copies
    of the parameters.

    `low_pass((k - 1,), (k,))` is `optax.ema(1 - k)`, which leaves k / (2 - k) of the
    variance of the noise. `low_pass((k - 1,), (k / 2, k / 2))`, with weight k / 2 for
    each of the last two means, also removes what alternates from update to update, and
    leaves k / 2 of the variance.

    Args:
      a: a_1, a_2, ..., the weights of earlier m_t; every root of z^n + a_1 z^(n-1)
        + ... is inside the unit circle, or else the filter would never forget the past.
      b: b_0, b_1, ..., the weights of the private means; b_0 is not 0.

    Raises:
      UserError: for a filter that is not stable, has no b_0, or makes 0 of ones at any
        update, so that c_t is 0.

    Example:
      >>> smooth = dpm.optimizers.low_pass(a=(-0.9,), b=(0.05, 0.05))
      >>> optimizer = optax.chain(smooth, optax.sgd(1.0))  # after the privatizer
    """
    a, b = tuple(map(float, a)), tuple(map(float, b))
    require(bool(b) and b[0] != 0, "b", b, "numbers of which the first is not 0")
    stable = bool(np.isfinite(a).all()) and bool((np.abs(np.roots([1, *a])) < 1).all())
    require(stable, "a", a, "of a stable filter, all poles inside the unit circle")
    of_ones = scipy.signal.lfilter(b, (1.0, *a), np.ones(_FIRST))
    lasts = bool(np.abs(of_ones).min() > 1e-6 * np.abs(b).sum())
    require(lasts, "b", b, "of a filter that never makes 0 of ones")

    def init(params):
        def zeros():
            return optax.tree.zeros_like(params), jnp.zeros(())

        return LowPassState(
            inputs=tuple(zeros() for _ in b[1:]), outputs=tuple(zeros() for _ in a)
        )

    def update(updates, state, params=None):
        del params
        inputs = ((updates, jnp.ones(())), *state.inputs)
        weights = (*b, *(-past for past in a))

        def weighted(*leaves):
            return sum(w * x for w, x in zip(weights, leaves, strict=True))

        output = jax.tree.map(weighted, *inputs, *state.outputs)
        filtered, of_ones = output
        unbiased = jax.tree.map(lambda m: m / of_ones.astype(m.dtype), filtered)
        outputs = (output, *state.outputs)
        return unbiased, LowPassState(inputs[: len(b) - 1], outputs[: len(a)])

    return optax.GradientTransformation(init, update)


class KalmanState(NamedTuple):
    """What `kalman` remembers.

    Attributes:
      step: scalar int32, updates done.
      weights: the iterate x_t, of which `params` are the extrapolation.
      filtered: the estimate of the gradient there, like the parameters.
      inner_state: of the optimizer that moves the iterate.
    """

    step: jax.Array
    weights: PyTree
    filtered: PyTree
    inner_state: PyTree


def kalman(
    inner: optax.GradientTransformation, kappa: float
) -> optax.GradientTransformation:
    """DiSK: a Kalman filter of the gradient, which moves with the weights.

    An average of past gradients lags: it belongs to where the weights were. DiSK looks
    ahead by as much: it averages gradients at
    y_t = x_t + (1 - kappa) / kappa (x_t - x_{t-1}),

        f_t = (1 - kappa) f_{t-1} + kappa g_t,    g_t a private mean at y_t,

    so that for a quadratic loss f_t is the gradient at x_t, its noise averaged; `inner`
    takes f_t and moves x_t (Zhang et al., "DiSK", ICLR 2025, arXiv 2410.03883, with
    their gamma at (1 - kappa) / kappa, where one gradient is enough). The first f is
    the first private mean, as in the authors' program.

    The parameters that `update` moves are y_t, where the next gradient must be taken;
    they start as the given parameters. The iterate x_t itself is
    `optax.tree.get(state, "KalmanState").weights`. Both y_t and x_t may be released.

    Args:
      inner: any optimizer; its parameters are x_t.
      kappa: the gain, in (0, 1]; 1 is `inner` alone.

    Returns:
      A transform whose `update` needs the parameters.

    Raises:
      UserError: for another gain; when called, without parameters.

    Example:
      >>> step = dpm.optimizers.kalman(optax.sgd(1.0), kappa=0.5)
      >>> state = step.init(jnp.zeros(2))
      >>> updates, state = step.update(jnp.ones(2), state, jnp.zeros(2))
      >>> print(updates, state.weights)  # it looks ahead by one step
      [-2. -2.] [-1. -1.]
    """
    require(0 < kappa <= 1, "kappa", kappa, "in (0, 1]")
    ahead = (1 - kappa) / kappa

    def init(params):
        return KalmanState(
            step=jnp.zeros((), jnp.int32),
            weights=jax.tree.map(jnp.copy, params),
            filtered=optax.tree.zeros_like(params),
            inner_state=inner.init(params),
        )

    def update(updates, state, params=None):
        require(params is not None, "params", params, "the point of this gradient")
        gain = jnp.where(state.step == 0, 1.0, kappa)
        filtered = optax.incremental_update(updates, state.filtered, gain)
        steps, inner_state = inner.update(filtered, state.inner_state, state.weights)
        weights = optax.apply_updates(state.weights, steps)
        moves = jax.tree.map(
            lambda new, old, point: new + ahead * (new - old) - point,
            weights,
            state.weights,
            params,
        )
        step = optax.safe_increment(state.step)
        return moves, KalmanState(step, weights, filtered, inner_state)

    return optax.GradientTransformation(init, update)
