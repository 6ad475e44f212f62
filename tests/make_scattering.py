"""Makes the fixture of scattering coefficients, with kymatio.

    pip install -e ".[peers]" && python -m tests.make_scattering

writes `tests/fixtures/scattering.npz`: made with kymatio 0.3.0, its NumPy backend in
float64, SciPy 1.17.1. By the name of each case in `CASES` it has images [N, H, W, C],
uint8, to be divided by 255, and coefficients [N, h, w, C * P] in float32. No code of
`dpmix_jax` is used.
"""

import pathlib

import numpy as np

# J, L, order, and the shape of the images.
CASES = {
    "fashion_mnist": (2, 8, 2, (2, 28, 28, 1)),
    "cifar10": (2, 8, 1, (1, 32, 32, 3)),
    "odd": (3, 3, 2, (1, 25, 19, 1)),
}


def draw(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Returns uint8 images of discs and noise: structure of several scales."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[1], : shape[2]][..., None]
    images = np.zeros(shape)
    for image in images:
        for _ in range(4):
            centre, radius = rng.uniform(0, shape[1], 2), rng.uniform(2, 9)
            disc = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2
            image += disc * rng.uniform(0, 80, shape[-1])
    return np.clip(images + rng.uniform(0, 20, shape), 0, 255).astype(np.uint8)


def coefficients(images: np.ndarray, scales: int, angles: int, order: int):
    """Returns kymatio's coefficients in float64: [N, H, W, C] -> [N, h, w, C * P]."""
    import scipy.special

    scipy.special.sph_harm = None  # kymatio imports it, and SciPy 1.17 has it no more
    from kymatio.numpy import Scattering2D

    transform = Scattering2D(scales, images.shape[1:3], L=angles, max_order=order)
    found = transform(np.moveaxis(images, -1, 1) / 255.0)  # [N, C, P, h, w]
    return np.moveaxis(found.reshape(len(found), -1, *found.shape[-2:]), 1, -1)


if __name__ == "__main__":
    content = {}
    for name, (*options, shape) in CASES.items():
        content[f"{name}_images"] = draw(shape)
        found = coefficients(content[f"{name}_images"], *options)
        content[name] = found.astype(np.float32)
    path = pathlib.Path(__file__).parent / "fixtures/scattering.npz"
    np.savez_compressed(path, allow_pickle=False, **content)
