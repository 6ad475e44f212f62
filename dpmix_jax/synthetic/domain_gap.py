"""How far a public bank is from a dataset: Fréchet distances between their features.

The Fréchet distance between Gaussian fits of features (Heusel et al., 2017, Eq. 6) is
called FID when an Inception network makes the features. Here an encoder of the user's
own makes them, so distances are FID-like: those by one encoder can be compared, and
with nothing else. DP-Mix (Bao et al., 2023, Appendix B.1) explains by the FID of its
synthetic images where DP-Mix_diff helps and where it fails.

Features are taken of public and of test images only. The weights of a finished run are
covered by its guarantee, so an encoder made of them is post-processing and costs no
further privacy. The distances do depend on the test images, which nothing protects, as
test accuracy does.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dpmix_jax import data
from dpmix_jax.data import DataConfig, Dataset, Records, hf, tfds
from dpmix_jax.data.public import PublicConfig, load_public
from dpmix_jax.errors import UserError

PyTree = Any
Function = Callable[[PyTree, jax.Array], jax.Array]
_BATCH = 128  # images in one call of an encoder


class Gap(NamedTuple):
    """Distances of a bank to a test set, and of halves of that test set for scale.

    Attributes:
      num_images: in each of the two sets of every draw.
      bank: for each draw, the distance of images of the bank to half the test set.
      halves: for each draw, the distance of that half to another, disjoint one: what no
        gap looks like at this number of images.
    """

    num_images: int
    bank: list[float]
    halves: list[float]


def load_images(config: DataConfig, public: PublicConfig) -> tuple[Records, Records]:
    """Reads a test set, and a bank normalised by the same constants.

    That no image of the bank is a copy of a training record is not checked here, since
    it takes looking at those: training with the bank checks it.

    Formal guarantees:
      - Given the split, what is returned does not depend on the images or labels of
        training records, nor of validation records, which are some of them. (A dataset
        without a test split is divided by its labels.)

    Args:
      config: of the dataset; its `validation_size` is passed over.
      public: of the bank.

    Raises:
      UserError: for what `load_public` refuses, or a public dataset by the name of the
        private one, wherever it is.
    """
    ours, theirs = (
        # One dataset has several owners and spellings there.
        (hf.repository_of(name) or tfds.builder_of(name) or name)
        .split("/")[-1]
        .casefold()
        for name in (public.name, config.name)
    )
    if ours == theirs and public.name not in ("bank", "npz", "folder"):
        raise UserError(
            f"public.name is {public.name!r}: its training records are those of"
            f" data.name {config.name!r}, of which no features may be taken"
        )
    config = dataclasses.replace(config, validation_size=0)
    test = data.load(config).test
    none = dataclasses.replace(test, images=test.images[:0], labels=test.labels[:0])
    bank = load_public(public, config, Dataset(none, test, None))
    assert bank is not None
    return test, bank


def penultimate(logits_fn: Function) -> Function:
    """Returns what the last Dense layer of a Flax Linen model is given, flat: [B, D].

    Args:
      logits_fn: `f(params, images [B, H, W, C]) -> logits [B, O]`.

    Raises:
      UserError: when it is called, if that layer does not give the logits.
    """

    def features_fn(params: PyTree, images: jax.Array) -> jax.Array:
        last: list[jax.Array] = []

        def catch(function, args, kwargs, context):
            result = function(*args, **kwargs)
            if isinstance(context.module, nn.Dense):
                last[:] = [args[0], result]
            return result

        with nn.intercept_methods(catch):
            logits = logits_fn(params, images)
        if not last or last[1].shape != logits.shape:
            raise UserError(
                "the encoder's last layer is not a Dense: it has no features"
            )
        return last[0].reshape(len(images), -1).astype(jnp.float32)

    return features_fn


def features(features_fn: Function, params: PyTree, records: Records) -> np.ndarray:
    """Returns the features [N, D] of all images, in their order.

    Args:
      features_fn: `f(params, normalised images [B, H, W, C]) -> [B, D]`.
      params: its first argument.
      records: N of them, at least 1.

    Raises:
      UserError: if they are not finite.
    """
    compute = jax.jit(lambda params, x: features_fn(params, records.normalize(x)))
    starts = range(0, len(records), _BATCH)
    batches = (records.images[start : start + _BATCH] for start in starts)
    result = np.concatenate([compute(params, images) for images in batches])
    if not np.isfinite(result).all():
        raise UserError("features are not finite: the encoder's weights may be damaged")
    return result


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """Returns the squared Fréchet distance between Gaussian fits of two sets.

    |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) for the covariances A and B (with
    divisors N - 1 and M - 1), as FID is defined by Heusel et al. (2017), Eq. 6. Of
    centred features X and Y, scaled so that A = X' X and B = Y' Y, the trace of the
    root is the sum of the singular values of X Y'. So no root of a covariance is taken,
    and it may be singular, as it is for N <= D.

    The estimate is biased: it is positive for two samples of one distribution, the
    more so the fewer they are. Compare distances at equal numbers of images only.

    Args:
      features_a: [N, D], N at least 2.
      features_b: [M, D], M at least 2.
    """
    means, roots = [], []
    for found in (features_a, features_b):
        mean = found.mean(axis=0, dtype=np.float64)
        centred = (found - mean) / np.sqrt(len(found) - 1)
        means.append(mean)
        roots.append(np.linalg.qr(centred)[1])  # the same products, fewer rows
    distance = np.square(means[0] - means[1]).sum()
    distance += sum(np.square(root).sum() for root in roots)
    distance -= 2 * np.linalg.norm(roots[0] @ roots[1].T, "nuc")
    return max(0.0, float(distance))  # rounding can take that of equal sets below 0


def compare(
    bank: np.ndarray, test: np.ndarray, *, num_draws: int, seed: int | list[int] = 0
) -> Gap | None:
    """Compares a bank and a test set, and two halves of that test set, at equal sizes.

    Args:
      bank: features [N, D].
      test: features [M, D].
      num_draws: how often images are drawn, min(N, M // 2) for each set of a draw.
      seed: of the draws, which are no secret.

    Returns:
      None if sets would have less than 2 images.
    """
    rng, count = np.random.default_rng(seed), min(len(bank), len(test) // 2)
    if count < 2:
        return None
    gap = Gap(count, [], [])
    for _ in range(num_draws):
        order = rng.permutation(len(test))
        half, other = test[order[:count]], test[order[count : 2 * count]]
        drawn = bank[rng.permutation(len(bank))[:count]]
        gap.bank.append(frechet_distance(drawn, half))
        gap.halves.append(frechet_distance(half, other))
    return gap


def table(gaps: dict[str, Gap | None], encoder: str) -> str:
    """Shows gaps by the name of what was compared, and says what they are not."""
    width = max(map(len, gaps))
    lines = [f"{'':<{width}}  images  {'bank to test':<28}  half to other half of test"]
    for name, gap in gaps.items():
        line = f"{name:<{width}}  "
        if gap is None:
            lines.append(line + "too few")
            continue
        line += f"{gap.num_images:>6}"
        for values in (gap.bank, gap.halves):
            spread = f"({min(values):.4g} to {max(values):.4g})"
            line += f"  {f'{np.median(values):.4g} {spread}':<28}"
        lines.append(line.rstrip())
    return "\n".join(lines) + (
        f"\n\nSquared Fréchet distances of features by {encoder}: the median (range) of"
        " draws of that many images a set.\nThey grow as images get fewer: two halves"
        " of the test set, which have no gap, show by how much.\nFID-like, not FID:"
        " features are not Inception's, and only distances by this encoder compare."
    )
