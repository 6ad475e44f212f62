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
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import linen as nn

from dpmix_jax import data
from dpmix_jax.config import ExperimentConfig, from_config_dict
from dpmix_jax.data import DataConfig, Dataset, Records, tfds
from dpmix_jax.data.public import PublicConfig, load_public
from dpmix_jax.errors import UserError
from dpmix_jax.pipeline import Model
from dpmix_jax.workdir import Workdir

PyTree = Any
FeaturesFn = Callable[[PyTree, jax.Array], jax.Array]


class Encoder(NamedTuple):
    """What makes features of images.

    Attributes:
      name: to be printed.
      features_fn: `f(params, normalised images [B, H, W, C]) -> [B, D]`.
      params: its parameters.
    """

    name: str
    features_fn: FeaturesFn
    params: PyTree


@dataclasses.dataclass(frozen=True)
class Gap:
    """Distances of a bank to a test set, and of halves of that test set for scale.

    Attributes:
      num_images: in each of the two sets of every draw.
      bank: for each draw, the distance of images of the bank to half the test set.
      halves: for each draw, the distance of that half to another, disjoint one: what no
        gap looks like at this number of images.
    """

    num_images: int
    bank: tuple[float, ...]
    halves: tuple[float, ...]


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

    Raises:
      UserError: for other shapes, or values that are not finite.
    """
    a, b = _checked("features_a", features_a), _checked("features_b", features_b)
    if a.shape[1] != b.shape[1]:
        raise UserError(
            f"features_b are {b.shape}: they must be [M, {a.shape[1]}] as features_a"
            f" are {a.shape}"
        )
    (mean_a, x), (mean_b, y) = _gaussian(a), _gaussian(b)
    root = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    means = np.square(mean_a - mean_b).sum()
    distance = means + np.square(x).sum() + np.square(y).sum() - 2 * root
    return max(0.0, float(distance))  # rounding can take that of equal sets below 0


def _checked(name: str, features: np.ndarray) -> np.ndarray:
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise UserError(
            f"{name} are {features.shape}: they must be [N, D], with N at least 2 for a"
            " covariance"
        )
    if not np.isfinite(features).all():
        raise UserError(f"{name} have values that are not finite")
    return features


def _gaussian(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean [D], and X [min(N, D), D] of which X' X is the covariance."""
    mean = features.mean(axis=0)
    centred = (features - mean) / np.sqrt(len(features) - 1)
    if len(centred) > centred.shape[1]:
        centred = np.linalg.qr(centred, mode="r")  # the same products, fewer rows
    return mean, centred


def pixels(params: PyTree, images: jax.Array) -> jax.Array:
    """Returns normalised images themselves as features [B, H W C]."""
    del params
    return images.reshape(images.shape[0], -1)


def penultimate(logits_fn: Callable[[PyTree, jax.Array], jax.Array]) -> FeaturesFn:
    """Returns what the last Dense layer of a Flax Linen model is given, [B, D].

    Args:
      logits_fn: `f(params, images [B, H, W, C]) -> logits [B, O]`.

    Raises:
      UserError: when it is called, if that layer does not give the logits.
    """

    def features_fn(params: PyTree, images: jax.Array) -> jax.Array:
        calls: list[tuple[jax.Array, jax.Array]] = []

        def catch(function, args, kwargs, context):
            result = function(*args, **kwargs)
            if isinstance(context.module, nn.Dense):
                calls.append(([*args, *kwargs.values()][0], result))
            return result

        with nn.intercept_methods(catch):
            logits = logits_fn(params, images)
        if not calls or calls[-1][1].shape != logits.shape:
            raise UserError(
                "the encoder's last layer is not a Dense: it has no features"
            )
        return calls[-1][0].astype(jnp.float32)

    return features_fn


def features(
    features_fn: FeaturesFn, params: PyTree, records: Records, *, batch_size: int = 512
) -> np.ndarray:
    """Returns the features [N, D] float32 of all images, in their order.

    Args:
      features_fn: `f(params, normalised images [B, H, W, C]) -> [B, D]`.
      params: its first argument.
      records: N of them, at least 1; the last partial batch counts too.
      batch_size: images in one call.

    Raises:
      UserError: if they are not finite.
    """
    batch_size = min(batch_size, len(records))

    @jax.jit
    def compute(params, images):
        return features_fn(params, records.normalize(images))

    found = []
    for start in range(0, len(records), batch_size):
        images = records.images[start : start + batch_size]
        padding = [(0, batch_size - len(images))] + [(0, 0)] * (images.ndim - 1)
        computed = np.asarray(compute(params, np.pad(images, padding)))
        found.append(computed[: len(images)])
    result = np.concatenate(found)
    if not np.isfinite(result).all():
        raise UserError("features are not finite: the encoder's weights may be damaged")
    return result


def load_images(config: DataConfig, public: PublicConfig) -> tuple[Records, Records]:
    """Reads a test set and a bank, and refuses the training set in the place of either.

    That no image of the bank is a copy of a training record is not checked here, since
    it takes looking at those: training with the bank checks it.

    Formal guarantees:
      - What is returned does not depend on the images or labels of training records,
        nor of validation records, which are some of them.

    Args:
      config: of the dataset; its `validation_size` is passed over.
      public: of the bank.

    Returns:
      The test records, and the bank normalised by the same constants.

    Raises:
      UserError: for what `load_public` refuses, or a public dataset by the name of the
        private one, wherever it is.
    """
    names = [_builder(name) for name in (public.name, config.name)]
    if names[0] == names[1] and names[0] not in ("bank", "npz", "folder"):
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


def _builder(name: str) -> str:
    match = tfds.NAME.fullmatch(name)
    return match["builder"] if match else name


def read_config(workdir: Workdir) -> ExperimentConfig:
    """Returns the config of a finished run.

    Raises:
      UserError: if there is none.
    """
    path = workdir.path / "config.json"
    if not path.is_file():
        raise UserError(
            f"encoder {workdir.path} is no workdir: it must have a config.json"
        )
    try:
        return from_config_dict(json.loads(path.read_text()))
    except (ValueError, AttributeError, OSError) as error:
        raise UserError(f"{path} is not a config: {error}") from None


def load_encoder(workdir: Workdir, image_shape: Sequence[int]) -> Encoder:
    """Makes an encoder of the EMA weights of a finished run, without reading its data.

    Args:
      workdir: of the run.
      image_shape: [H, W, C] of the images to come.

    Raises:
      UserError: if the run is not finished, or its weights cannot be read or do not fit
        such images.
    """
    config = read_config(workdir)
    try:
        results = workdir.results()
        num_classes = (
            None if results is None else len(results["per_class_accuracy_ema"])
        )
    except (ValueError, KeyError, TypeError, OSError):
        raise UserError(f"encoder {workdir.path}: results.json is damaged") from None
    if num_classes is None:
        raise UserError(f"encoder {workdir.path} is not finished: no results.json yet")
    like = Records(
        images=np.zeros((0, *image_shape), np.uint8),
        labels=np.zeros(0, np.int32),
        class_names=tuple(map(str, range(num_classes))),
        mean=(0.0,),
        stddev=(1.0,),
    )
    model = Model(config, like)
    params = _ema_params(workdir.path / "model.safetensors", model, image_shape)
    return Encoder(f"{workdir.path}", penultimate(model.logits), params)


def _ema_params(path: pathlib.Path, model: Model, image_shape: Sequence[int]) -> PyTree:
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    try:
        with safetensors.safe_open(path, "np") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"encoder {path}: cannot be read ({error})") from None

    def weight(keys, wanted):
        name = jax.tree_util.keystr(keys, simple=True, separator="/")
        found = weights.get(f"ema_params/{name}")
        if found is None or found.shape != wanted.shape:
            has = "is missing" if found is None else f"is {found.shape}"
            raise UserError(
                f"encoder {path} does not fit images of {tuple(image_shape)}: {name}"
                f" {has}, it must be {wanted.shape}"
            )
        return found

    return jax.tree_util.tree_map_with_path(weight, shapes)


def compare(
    bank: np.ndarray, test: np.ndarray, *, num_draws: int, rng: np.random.Generator
) -> Gap:
    """Compares a bank and a test set, and two halves of that test set, at equal sizes.

    Args:
      bank: features [N, D], N at least 2.
      test: features [M, D], M at least 4.
      num_draws: how often images are drawn, min(N, M // 2) for each set of a draw.
      rng: of the draws, which are no secret.

    Raises:
      UserError: for fewer images, or what `frechet_distance` refuses.
    """
    count = min(len(bank), len(test) // 2)
    if count < 2:
        raise UserError(
            f"bank and test set have {len(bank)} and {len(test)} images: it takes 2"
            " and 4 to compare them"
        )
    distances = []
    for _ in range(num_draws):
        order = rng.permutation(len(test))
        half, other = test[order[:count]], test[order[count : 2 * count]]
        drawn = bank[rng.permutation(len(bank))[:count]]
        distances.append((frechet_distance(drawn, half), frechet_distance(half, other)))
    to_bank, to_other = zip(*distances, strict=True)
    return Gap(count, to_bank, to_other)


def measure(
    encoder: Encoder,
    bank: Records,
    test: Records,
    *,
    num_draws: int = 10,
    per_class: bool = False,
    batch_size: int = 512,
) -> dict[str, Any]:
    """Measures the gap between a bank and a test set, for all images and by class.

    Args:
      encoder: what makes features.
      bank: public images.
      test: test images of the same classes.
      num_draws: as for `compare`.
      per_class: whether to compare the images of each class too.
      batch_size: images in one call of the encoder.

    Returns:
      What `table` shows, ready for JSON. Classes of too few images have None.

    Raises:
      UserError: for too few images, or features that are not finite.
    """
    found_bank, found_test = (
        features(encoder.features_fn, encoder.params, records, batch_size=batch_size)
        for records in (bank, test)
    )
    gap = compare(
        found_bank, found_test, num_draws=num_draws, rng=np.random.default_rng(0)
    )
    result: dict[str, Any] = {
        "encoder": encoder.name,
        "num_features": found_test.shape[1],
        "num_bank_images": len(bank),
        "num_test_images": len(test),
        "distance_of_all_images": frechet_distance(found_bank, found_test),
        "matched": dataclasses.asdict(gap),
    }
    if not per_class:
        return result
    result["classes"] = {}
    for label, name in enumerate(test.class_names):
        a, b = found_bank[bank.labels == label], found_test[test.labels == label]
        rng = np.random.default_rng([0, label])
        result["classes"][name] = (
            dataclasses.asdict(compare(a, b, num_draws=num_draws, rng=rng))
            if len(a) >= 2 and len(b) >= 4
            else None
        )
    return result


def table(result: dict[str, Any]) -> str:
    """Shows what `measure` has found, and says what it is not."""
    rows = {"all": result["matched"], **result.get("classes", {})}
    width = max(map(len, ["class", *rows]))
    lines = [
        f"encoder {result['encoder']}, {result['num_features']:,} features",
        "",
        f"{'class':<{width}}  images  {'bank to test':<28}  test half to other half",
    ]
    for name, gap in rows.items():
        if gap is None:
            lines.append(f"{name:<{width}}  too few")
            continue
        bank, halves = _spread(gap["bank"]), _spread(gap["halves"])
        lines.append(f"{name:<{width}}  {gap['num_images']:>6}  {bank:<28}  {halves}")
    lines += [
        "",
        f"All {result['num_bank_images']:,} bank and {result['num_test_images']:,} test"
        f" images: {result['distance_of_all_images']:.4g}, to be compared with no row"
        " above.",
        "",
        f"Squared Fréchet distances, medians of {len(result['matched']['bank'])} draws"
        " of that many images a set (range).",
        "They grow as images get fewer: two halves of the test set, which have no gap,"
        " show by how much.",
        "FID-like, not FID: features are not Inception's, and only distances by this"
        " encoder compare.",
    ]
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    median, low, high = np.median(values), min(values), max(values)
    return f"{median:.4g} ({low:.4g} to {high:.4g})"
