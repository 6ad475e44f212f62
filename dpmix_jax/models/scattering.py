"""The wavelet scattering transform: an encoder without weights and without data."""

import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dpmix_jax.errors import require
from dpmix_jax.models.layers import max_pool

_SIGMA, _FREQUENCY = 0.8, 0.75 * np.pi  # of the finest wavelet, in pixels and radians
_PI = 3.1415  # in the norm of Gaussians, as kymatio has it: coefficients are the same


class Scattering(nn.Module):
    """Scattering coefficients (Mallat, 2012; Oyallon and Mallat, 2015), normalised.

    Each channel of an image is filtered by Morlet wavelets of several scales and
    angles, the moduli are filtered again by all coarser wavelets, and the image and all
    moduli are averaged by a Gaussian. The coefficients are those of kymatio's
    `Scattering2D` with J `scales` and L `angles`. Groups of channels of each image are
    then normalised by their own mean and variance, without parameters (Tramer and
    Boneh, 2021, https://arxiv.org/abs/2011.11660). The transform is linear but for the
    moduli, so that images with the mean and standard deviation of their dataset taken
    out, which a run gives to every model, do as well as pixels in [0, 1].

    There are no parameters: nothing is learned, and nothing to be protected or loaded.

    Attributes:
      scales: J, at least 1; the result has one value for 2^J x 2^J pixels.
      angles: L, at least 1.
      order: 1, or 2 for moduli of moduli as well.
      roots: whether square roots are taken of all coefficients but the averaged image,
        which evens out how much strong and weak edges vary.
      groups: at most so many groups of consecutive channels are normalised, as many as
        divide the channels; 0 leaves normalisation out.
      epsilon: added to the variance of a group, so that groups with less, such as
        second-order ones of smooth images, stay small.
      dtype: of the head; coefficients are float32 whatever it is.

    Raises:
      ValueError: for options out of range, or images smaller than 2^J x 2^J pixels.
    """

    # More images of three colours at a time leave a CPU's caches.
    CPU_IMAGES: ClassVar[int | None] = 16

    scales: int = 2
    angles: int = 8
    order: int = 2
    roots: bool = False
    groups: int = 27
    epsilon: float = 1e-5
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H // 2^J, W // 2^J, C * P].

        P is 1 + J L, and L^2 J (J - 1) / 2 more with order 2: the averaged image, then
        by scale and angle of the first wavelet, then by those of both. Channels of one
        colour lie together.
        """
        self._check(images.shape)
        found = coefficients(images, self.scales, self.angles, self.order)
        if self.roots:
            found = roots(found, images.shape[-1])
        return normalize(found, self.groups, self.epsilon) if self.groups else found

    def _check(self, shape: tuple[int, ...]) -> None:
        require(self.scales >= 1, "scales", self.scales, "at least 1")
        require(self.angles >= 1, "angles", self.angles, "at least 1")
        require(self.order in (1, 2), "order", self.order, "1 or 2")
        require(self.groups >= 0, "groups", self.groups, "at least 0")
        require(0 < self.epsilon < math.inf, "epsilon", self.epsilon, "positive")
        if min(shape[1:3]) < 2**self.scales:
            raise ValueError(
                f"images are {shape[1]}x{shape[2]} pixels: they must be at least"
                f" {2**self.scales}x{2**self.scales} for scales {self.scales}"
            )


class ScatteringCNN(nn.Module):
    """A small CNN on scattering coefficients (Tramer and Boneh, 2021, Appendix C).

    The defaults are theirs for 28x28 pixels; for CIFAR-10 they have `features`
    (64, 64), `pool` and `hidden` 0.

    Attributes:
      num_classes: O.
      features: channels of each 3x3 convolution; tanh follows each.
      pool: whether a 2x2 max pool after the first convolution halves the grid, or its
        stride.
      hidden: size of a layer with tanh before the last; 0 leaves it out.
      dtype: of the computation; parameters and logits are float32.
    """

    num_classes: int
    features: Sequence[int] = (16, 32)
    pool: bool = False
    hidden: int = 32
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Coefficients [B, h, w, channels] -> logits [B, O]."""
        for index, channels in enumerate(self.features):
            halves = index == 0
            stride = 2 if halves and not self.pool else 1
            x = nn.Conv(channels, (3, 3), stride, padding=1, dtype=self.dtype)(x)
            x = nn.tanh(x)
            if halves and self.pool:
                x = max_pool(x)
        x = x.reshape(x.shape[0], -1)
        if self.hidden:
            x = nn.tanh(nn.Dense(self.hidden, dtype=self.dtype)(x))
        return nn.Dense(self.num_classes)(x.astype(jnp.float32))


def normalize(x: jax.Array, groups: int, epsilon: float = 1e-5) -> jax.Array:
    """Normalises groups of channels of each image by their own mean and variance.

    Args:
      x: [B, h, w, channels].
      groups: the largest number of groups; the one taken divides the channels.
      epsilon: added to the variance.
    """
    channels = x.shape[-1]
    number = max(n for n in range(1, groups + 1) if channels % n == 0)
    grouped = x.reshape(*x.shape[:-1], number, -1)
    centred = grouped - grouped.mean((1, 2, 4), keepdims=True)
    variance = jnp.square(centred).mean((1, 2, 4), keepdims=True)
    return (centred * jax.lax.rsqrt(variance + epsilon)).reshape(x.shape)


def roots(x: jax.Array, colours: int) -> jax.Array:
    """Takes square roots of coefficients [B, h, w, C * P] but for the averaged images.

    Args:
      x: from `coefficients`; averages of moduli below 0 by rounding become 0.
      colours: C.
    """
    by_colour = x.reshape(*x.shape[:-1], colours, -1)
    image, moduli = by_colour[..., :1], by_colour[..., 1:]
    moduli = jnp.sqrt(jnp.maximum(moduli, 0.0))
    return jnp.concatenate([image, moduli], axis=-1).reshape(x.shape)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def coefficients(images: jax.Array, scales: int, angles: int, order: int) -> jax.Array:
    """Returns scattering coefficients: [B, H, W, C] -> [B, h, w, C * P].

    See `Scattering` for what they are. Images are small, so that a Fourier transform is
    two products with small matrices, which take a CPU half the time of FFTs. They are
    Hartley matrices, which are real. Images lie in the last axis, and every product is
    by a constant from the left: none mixes images.
    """

    @jax.custom_batching.custom_vmap
    def of_batch(images):
        count, height, width, channels = images.shape
        x = jnp.transpose(images.astype(jnp.float32), (1, 2, 0, 3))
        x = _scattering(x.reshape(height, width, -1), scales, angles, order)
        x = jnp.transpose(x.reshape(*x.shape[:3], count, channels), (3, 0, 1, 4, 2))
        return x.reshape(*x.shape[:3], -1)

    @of_batch.def_vmap
    def of_batches(size, in_batched, images):
        # Without this rule `jax.vmap` would move images out of the last axis.
        del in_batched
        found = of_batch(images.reshape(-1, *images.shape[2:]))
        return found.reshape(size, -1, *found.shape[1:]), True

    return of_batch(images)


def _scattering(x: jax.Array, scales: int, angles: int, order: int) -> jax.Array:
    """[H, W, N] -> [h, w, P, N]."""
    sides = [_Side(side, scales) for side in x.shape[:2]]
    height, width = (side.padded for side in sides)
    wavelets = [_wavelets(height, width, j, angles) for j in range(scales)]

    def spectrum(x):
        return _both([_hartley(side) for side in x.shape[:2]], x)

    def average(x, j):
        return _both([s.average(j) for s in sides], x)

    padded = _both([side.padding() for side in sides], x)
    image = spectrum(padded)
    found, second = [average(padded[:, :, None], 0)], []
    for j in range(scales):
        moduli = _moduli(image, wavelets[j], 2**j)
        found.append(average(moduli, j))
        if order == 1 or j == scales - 1:
            continue
        again = spectrum(moduli)
        coarser = [
            average(_moduli(again, _low(wavelets[k], 2**j), 2 ** (k - j)), k)
            for k in range(j + 1, scales)
        ]  # each [h, w, second angle, first angle, N]
        paths = jnp.concatenate([jnp.swapaxes(x, 2, 3) for x in coarser], axis=3)
        second.append(paths.reshape(*paths.shape[:2], -1, paths.shape[-1]))
    return jnp.concatenate([*found, *second], axis=2)


def _moduli(spectrum: jax.Array, wavelets: np.ndarray, step: int) -> jax.Array:
    """Filters images and takes every `step`-th pixel of the modulus.

    Taking every `step`-th pixel is to average the frequencies that become one. In the
    basis of products of two `cas`, a filter mixes each frequency with those of other
    signs: see `_mixing`.

    Args:
      spectrum: [M, N, ...], Hartley transforms of images.
      wavelets: [L, M, N], real spectra.
      step: divides M and N.

    Returns:
      [M / step, N / step, L, ...].
    """
    flips = _flip(spectrum, 0), _flip(spectrum, 1)
    sources: Any = (spectrum, _flip(flips[0], 1)), flips
    side = spectrum.shape[0] // step, spectrum.shape[1] // step
    matrices = [_hartley(n) for n in side]

    def aliases(x):  # [2, M, N, ...] -> [M / step, N / step, 2 step^2, ...]
        x = x.reshape(2, step, side[0], step, side[1], *x.shape[3:])
        x = x.transpose(2, 4, 0, 1, 3, *range(5, x.ndim))
        return x.reshape(*side, -1, *x.shape[5:])

    parts = []  # real and imaginary
    for mixing, pair in zip(_mixing(wavelets), sources, strict=True):
        by_angle = np.stack([aliases(m) for m in mixing], axis=2)
        mixed = _product("klaq,klq...->kla...", by_angle, aliases(jnp.stack(pair)))
        parts.append(jnp.square(_both(matrices, mixed)))
    return jnp.sqrt(parts[0] + parts[1])


def _mixing(wavelets: np.ndarray) -> np.ndarray:
    """Returns the weights of frequencies in real and imaginary parts: [2, L, 2, M, N].

    With T(k, l) = sum x(m, n) cas(2 pi k m / M) cas(2 pi l n / N), cas = cos + sin, a
    filter with the even and real spectrum p makes of T(k, l)
    ((p(k, l) + p(-k, l)) T(k, l) + (p(-k, l) - p(k, l)) T(-k, -l)) / 2,
    and one with the odd and imaginary spectrum -i q
    ((q(k, l) - q(-k, l)) T(-k, l) + (q(k, l) + q(-k, l)) T(k, -l)) / 2.
    The real part of a wavelet is such a p, and its imaginary part such a q. The factor
    of the inverse transform is in the weights.
    """
    turned = _flip(_flip(wavelets, 1), 2)
    p, q = (wavelets + turned) / 2, (wavelets - turned) / 2
    p_flip, q_flip = _flip(p, 1), _flip(q, 1)
    pairs = (p + p_flip, p_flip - p), (q - q_flip, q + q_flip)
    return np.stack([np.stack(x, axis=1) for x in pairs]) / (2 * wavelets[0].size)


def _flip(x: Any, axis: int) -> Any:
    """Takes index -k for k along an axis, modulo its length; NumPy or JAX."""
    xp: Any = np if isinstance(x, np.ndarray) else jnp
    zero, others = xp.split(x, [1], axis)
    return xp.concatenate([zero, xp.flip(others, axis)], axis)


def _both(matrices: Sequence[np.ndarray], x: jax.Array) -> jax.Array:
    """Multiplies both sides of images [M, N, ...] by matrices [m, M] and [n, N]."""
    rows, columns = matrices
    x = _product("km,mn...->kn...", rows, x)
    # One product for each row, from the left: otherwise XLA transposes the images.
    columns = np.broadcast_to(columns, (x.shape[0], *columns.shape))
    return _product("kln,kn...->kl...", columns, x)


def _product(subscripts: str, constant: np.ndarray, x: jax.Array) -> jax.Array:
    """Multiplies in float32, also where an accelerator would take fewer bits."""
    weights = jnp.asarray(constant, jnp.float32)
    return jnp.einsum(subscripts, weights, x, precision="highest")


def _hartley(size: int) -> np.ndarray:
    """Returns cas(2 pi k n / size), which divided by `size` is its own inverse."""
    angle = 2 * np.pi / size * (np.outer(np.arange(size), np.arange(size)) % size)
    return np.cos(angle) + np.sin(angle)


class _Side:
    """Height or width of images: padded, and averaged and subsampled without margins.

    Attributes:
      size: in pixels.
      scales: J.
      padded: the next size above `size` that leaves a margin on both sides which the
        results, one for 2^J pixels, have to drop.
    """

    def __init__(self, size: int, scales: int):
        self.size, self.scales = size, scales
        self.padded = (size // 2**scales + 2) * 2**scales

    def padding(self) -> np.ndarray:
        """Returns the matrix [padded, size] of reflections at both ends."""
        before = (self.padded - self.size) // 2
        margins = before, self.padded - self.size - before
        return np.eye(self.size)[np.pad(np.arange(self.size), margins, mode="reflect")]

    def average(self, scale: int) -> np.ndarray:
        """Returns the Gaussian average [size // 2^J, padded / 2^scale], a matrix.

        Averages in two dimensions are the products of two such.
        """
        sigma = _SIGMA * 2 ** (self.scales - 1)
        gaussian = np.exp(-(_positions(self.padded) ** 2) / (2 * sigma**2))
        gaussian = gaussian.reshape(-1, self.padded).sum(0)
        spectrum = np.fft.fft(gaussian / np.sqrt(2 * _PI * sigma**2)).real
        kernel = np.fft.ifft(_low(spectrum, 2**scale)).real
        centres = np.arange(1, self.size // 2**self.scales + 1)
        centres *= 2 ** (self.scales - scale)
        return kernel[(centres[:, None] - np.arange(len(kernel))) % len(kernel)]


def _wavelets(height: int, width: int, scale: int, angles: int) -> np.ndarray:
    """Returns real spectra of Morlet wavelets of all angles, [L, height, width]."""
    sigma, slant = _SIGMA * 2**scale, 4 / angles
    y, x = _positions(height)[:, None], _positions(width)[None]

    def wavelet(angle):
        along = np.cos(angle) * y + np.sin(angle) * x
        across = np.cos(angle) * x - np.sin(angle) * y
        gaussian = np.exp(-(along**2 + (slant * across) ** 2) / (2 * sigma**2))
        wave = gaussian * np.exp(1j * _FREQUENCY / 2**scale * along)
        # Without a mean, as a wavelet must be; then periodic.
        wave = (wave - wave.sum() / gaussian.sum() * gaussian) * slant
        wave = wave.reshape(-1, height, x.size // width, width).sum((0, 2))
        return np.fft.fft2(wave / (2 * _PI * sigma**2)).real

    first = int(angles / 2 - 1)
    return np.stack([wavelet((first - k) * np.pi / angles) for k in range(angles)])


def _positions(size: int) -> np.ndarray:
    """Returns pixels of five periods, which Gaussians of these widths do not leave."""
    return np.arange(-2 * size, 3 * size, dtype=np.float64)


def _low(spectra: np.ndarray, step: int) -> np.ndarray:
    """Cuts spectra to the low frequencies, 1 / step of each axis but a first of three.

    What is high and would be mixed with them is left out, as kymatio does.
    """
    for axis in range(-min(spectra.ndim, 2), 0):
        half = spectra.shape[axis] // step // 2
        first, _, last = np.split(spectra, [half, spectra.shape[axis] - half], axis)
        spectra = np.concatenate([first, last], axis)
    return spectra
