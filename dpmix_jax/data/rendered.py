"""Public images drawn by this program: digits, and the clothes of `data.clothes`.

A digit of a random font of matplotlib is drawn large, as if written by hand: its stroke
thickened, bent by a smooth random displacement, turned, sheared and stretched, then
brought to the size of the dataset. Clothes are drawn large too, bent less, and fill the
image.
"""

import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import PIL
import scipy
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from scipy import ndimage

from dpmix_jax.data import clothes
from dpmix_jax.data.cache import Listing, decoded
from dpmix_jax.errors import UserError

DIGITS = tuple("0123456789")
# What each `public.name` draws.
RENDERED = {"rendered_digits": DIGITS, "rendered_clothes": clothes.CLOTHES}
_FONTS = (  # of matplotlib; its monospaced DejaVu has a dot in the zero
    *("DejaVuSans", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSerif-Italic"),
    *("STIXGeneral", "STIXGeneralItalic", "cmr10", "cmss10", "cmtt10"),
)
_CANVAS = 96  # pixels on which is drawn
_FONT_SIZE = 60
# What part of the height a digit fills, and how much narrower it becomes: those of
# scikit-learn touch the borders and are narrow, those of MNIST have 20 of 28 pixels.
_SMALL = 16
_HEIGHT_SMALL, _HEIGHT = (0.9, 1.05), (0.62, 0.8)
_NARROW_SMALL, _NARROW = (0.9, 1.25), (0.8, 1.15)
_BRIGHTEST = 240  # as in the digits
_LESS = 0.25  # how much clothes are bent, of what digits are
# What a drawing depends on, its seed aside. Read once: a file may be edited meanwhile.
_DRAWN_BY = (
    *(pathlib.Path(str(x)).read_bytes() for x in (__file__, clothes.__file__)),
    *(x.__version__ for x in (matplotlib, np, PIL, scipy)),
)


def image_seed(bank_seed: int, label: int, number: int, attempt: int = 0) -> int:
    """Returns the seed of an image, of 63 bits: of the `number`-th of a class, from 1.

    It does not depend on what else is made, nor in which order.
    """
    key = f"{bank_seed}/{label}/{number}/{attempt}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1


def rendered(
    class_names: tuple[str, ...], image_shape: tuple[int, ...], count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draws one image of each class in turn, as a bank of seed 0 has them.

    What is drawn once stays in the cache of decoded images, if it can be written.

    Returns:
      Images uint8 [count, H, W, C] and labels int32 [count].

    Raises:
      UserError: as for `Render`.
    """
    render = Render(class_names=class_names, image_shape=image_shape)
    wanted = []
    for index in range(count):
        number, label = divmod(index, len(class_names))
        wanted.append(((class_names[label], image_seed(0, label, number + 1)), label))
    listing = Listing(class_names, wanted, [], lambda keys: ((k, k) for k in keys))
    identity = [class_names, image_shape, count, *_DRAWN_BY]
    try:
        return decoded(
            "rendered", identity, lambda: listing, lambda key: render.draw(*key)
        ).train
    except (UserError, OSError):  # nobody needs the cache but for speed
        images = np.stack([render.draw(*key) for key, _ in wanted])
        return images, np.array([label for _, label in wanted], np.int32)


class Render:
    """Draws digits or clothes, bright on black. A `synthetic.Generator`.

    Args:
      class_names: digits, or names of `clothes.CLOTHES`.
      image_shape: height, width (equal to the height) and channels.

    Raises:
      UserError: for a class that is neither.
    """

    def __init__(self, *, class_names: Sequence[str], image_shape: Sequence[int]):
        for name in class_names:
            if name not in DIGITS + clothes.CLOTHES:
                raise UserError(
                    "--generator is render: it draws the digits 0 to 9 and the clothes"
                    f" {', '.join(clothes.CLOTHES)}; class {name!r} is none of them"
                )
        self._size, _, self._channels = image_shape
        self._fonts = [
            ImageFont.truetype(
                f"{matplotlib.get_data_path()}/fonts/ttf/{name}.ttf", _FONT_SIZE
            )
            for name in _FONTS
        ]
        self.settings: dict[str, Any] = {
            "generator": "render",
            "matplotlib": matplotlib.__version__,  # its fonts
            "pillow": PIL.__version__,
        }

    def __call__(self, wanted: Sequence[Any]) -> list[np.ndarray | None]:
        """Draws what is `synthetic.Wanted`, by its class and seed."""
        return [self.draw(each.class_name, each.seed) for each in wanted]

    def draw(self, class_name: str, seed: int) -> np.ndarray:
        """Returns uint8 [H, W, C]."""
        rng = np.random.default_rng(seed)
        of_kind = self._digit if class_name in DIGITS else self._clothes
        grey = of_kind(class_name, rng).round().astype(np.uint8)[..., None]
        return np.repeat(grey, self._channels, axis=-1)

    def _digit(self, digit: str, rng: np.random.Generator) -> np.ndarray:
        """Returns float [H, W] from 0 to 255, as `_clothes` does."""
        canvas = Image.new("L", (_CANVAS, _CANVAS))
        ImageDraw.Draw(canvas).text(
            (_CANVAS // 2, _CANVAS // 2),
            digit,
            fill=255,
            font=self._fonts[rng.integers(len(self._fonts))],
            anchor="mm",
            stroke_width=int(rng.integers(0, 4)),
        )
        bent = _bent(np.asarray(canvas, np.float32), rng)
        pixels = _placed(bent, self._size, rng)
        return np.clip(pixels * rng.uniform(1.0, 1.4), 0, 1) * _BRIGHTEST

    def _clothes(self, name: str, rng: np.random.Generator) -> np.ndarray:
        bent = _bent(clothes.draw(name, _CANVAS, rng), rng, _LESS)
        to_size = (self._size, self._size), Image.Resampling.BILINEAR
        return np.asarray(Image.fromarray(bent).resize(*to_size))


def _bent(
    canvas: np.ndarray, rng: np.random.Generator, strength: float = 1.0
) -> np.ndarray:
    """Turns, shears, stretches and bends what is on the canvas."""
    angle, shear = rng.normal(0, 0.12 * strength), rng.normal(0, 0.2 * strength)
    turn = np.array(
        [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    ) @ np.array([[1, 0], [shear, 1]])
    middle = (_CANVAS - 1) / 2
    grid = np.indices((_CANVAS, _CANVAS)) - middle
    points = np.einsum("ij,jhw->ihw", turn, grid) + middle
    coarse = rng.normal(0, 3.0 * strength, (2, 4, 4))
    points += np.stack([ndimage.zoom(part, _CANVAS / 4, order=3) for part in coarse])
    return ndimage.map_coordinates(canvas, points, order=1)


def _placed(canvas: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Brings the drawn part to the middle of an image in [0, 1]."""
    small = size <= _SMALL
    height = rng.uniform(*(_HEIGHT_SMALL if small else _HEIGHT)) * size
    rows, columns = (np.flatnonzero((canvas > 64).any(axis)) for axis in (1, 0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    scale = (bottom - top) / height  # canvas pixels for each of the image
    across = scale * rng.uniform(*(_NARROW_SMALL if small else _NARROW))
    shift = rng.normal(0, 0.04 * size, 2)
    x = (left + right) / 2 - across * (size / 2 + shift[0])
    y = (top + bottom) / 2 - scale * (size / 2 + shift[1])
    blurred = Image.fromarray(canvas.round().astype(np.uint8)).filter(
        ImageFilter.GaussianBlur(float(rng.uniform(0, 2)))
    )
    # Drawn at four times the size, then averaged, as the digits were counted in blocks.
    large = blurred.transform(
        (4 * size, 4 * size),
        Image.Transform.AFFINE,
        (across / 4, 0, x, 0, scale / 4, y),
        Image.Resampling.BILINEAR,
    )
    return np.asarray(large.resize((size, size), Image.Resampling.BOX)) / 255.0
