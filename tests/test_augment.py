import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpmix_jax import AugmentationConfig, UserError, random_view, views


def key(seed=0):
    return jax.random.key(seed)


@pytest.mark.sampled("5-9-4")
@pytest.mark.proves("augment.random_view", 1)
@pytest.mark.proves("augment.views", 1)
@pytest.mark.parametrize(
    ("height", "width", "reach"), [(2, 2, 1), (5, 9, 4), (8, 3, 2), (4, 4, 0)]
)
def test_whole_shifts_are_reflect_padded_crops(height, width, reach):
    """Every view is one of the crops of `np.pad(..., "reflect")`, maybe mirrored."""
    image = np.arange(height * width * 2, dtype=np.uint8).reshape(height, width, 2)
    pad = [(reach, reach), (reach, reach), (0, 0)]
    padded = np.pad(image, pad, mode="reflect")
    crops = set()
    for i in range(2 * reach + 1):
        for j in range(2 * reach + 1):
            crop = padded[i : i + height, j : j + width]
            crops |= {crop.tobytes(), crop[:, ::-1].tobytes()}
    drawn = views(
        key(height),
        jnp.asarray(image),
        32,
        augmentation=AugmentationConfig(max_shift=reach),
    )
    assert drawn.shape == (32, height, width, 2)
    assert drawn.dtype == jnp.uint8
    assert {np.asarray(view).tobytes() for view in drawn} <= crops


def test_every_crop_and_both_mirrors_are_reached_uniformly():
    """Shifts of one pixel with a flip: 18 views, each 1 in 18 of the time."""
    image = jnp.arange(16.0).reshape(4, 4, 1)
    drawn = views(key(), image, 9000, augmentation=AugmentationConfig(max_shift=1))
    _, counts = np.unique(np.asarray(drawn), axis=0, return_counts=True)
    assert len(counts) == 18
    chi2 = np.sum((counts - 500.0) ** 2 / 500.0)
    assert 4.0 < chi2 < 45.0  # 17 degrees of freedom, p of 0.0005 on either side


def test_nothing_to_draw_returns_the_image():
    image = jnp.arange(16.0).reshape(4, 4, 1)
    none = AugmentationConfig(flip=False, max_shift=0)
    np.testing.assert_array_equal(random_view(key(), image, augmentation=none), image)


@pytest.mark.proves("augment.random_view", 1)
@pytest.mark.proves("augment.views", 1)
@pytest.mark.parametrize("reach", [0.5, 1.0, 1.75])
def test_subpixel_shift_interpolates_a_ramp_exactly(reach):
    """Away from the edges a linear image moves by the offset, which fills the range."""
    ramp = jnp.broadcast_to(jnp.arange(12.0)[None, :, None], (5, 12, 1))
    some = AugmentationConfig(flip=False, max_shift=reach, subpixel=True)
    drawn = np.asarray(views(key(1), ramp, 500, augmentation=some))
    again = np.asarray(views(key(1), ramp, 500, augmentation=some))
    np.testing.assert_array_equal(drawn, again)
    moved = drawn[:, :, 3:9] - np.asarray(ramp)[None, :, 3:9]
    offsets = moved.mean(axis=(1, 2, 3))
    np.testing.assert_allclose(
        moved, np.broadcast_to(offsets[:, None, None, None], moved.shape), atol=1e-5
    )
    assert np.abs(offsets).max() <= reach
    assert offsets.min() < -0.9 * reach
    assert offsets.max() > 0.9 * reach
    assert abs(offsets.mean()) < 5 * reach / np.sqrt(3 * 500)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_shift": -1}, "augmentation.max_shift is -1: it must be at least 0"),
        (
            {"max_shift": 0.5},
            "augmentation.max_shift is 0.5: it must be a whole number",
        ),
    ],
)
def test_refuses(options, message):
    with pytest.raises(UserError, match=message):
        AugmentationConfig(**options)


def test_integers_are_not_moved_by_parts_of_pixels():
    change = AugmentationConfig(max_shift=0.5, subpixel=True)
    with pytest.raises(UserError, match="image is 'uint8': it must be floating-point"):
        random_view(key(), jnp.zeros((4, 4, 1), jnp.uint8), augmentation=change)


def test_a_batch_is_no_image():
    """It would be moved along its records, which would mix them."""
    with pytest.raises(UserError, match=r"is \(4, 6, 6, 1\): it must be \(H, W, C\)"):
        views(key(), jnp.ones((4, 6, 6, 1)), 2, augmentation=AugmentationConfig())


@pytest.mark.parametrize("reach", [4, 100])
def test_a_shift_must_be_smaller_than_the_image(reach):
    message = rf"max_shift is {reach}: it must be smaller than the images, .* 9x4"
    with pytest.raises(UserError, match=message):
        views(
            key(),
            jnp.ones((9, 4, 1)),
            2,
            augmentation=AugmentationConfig(max_shift=reach),
        )
