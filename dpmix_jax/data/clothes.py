"""Clothes, shoes and bags drawn from what their names mean, bright on black.

Each of the ten kinds is made of polygons and lines with random proportions, a shade,
folds and sometimes stripes, checks or a print. Nothing here was measured on photographs
or compared with a dataset: the proportions are common knowledge of garments.

Lengths are parts of the frame; (0, 0) is its top left corner, and y points down.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

Point = tuple[float, float]


class _Pen:
    """Draws on a black square, in shades relative to that of the item.

    Attributes:
      image: what is drawn, 0 to 255.
      rng: of all that is random about the item.
    """

    def __init__(self, size: int, rng: np.random.Generator):
        self.image, self.rng, self._size = Image.new("L", (size, size)), rng, size
        self._draw = ImageDraw.Draw(self.image)
        self._scale = rng.uniform(0.9, 1.02, 2)  # how much of the frame is filled
        self._shade = max(255 * rng.beta(2.5, 1.5), 50)

    def _pixels(self, points: Sequence[Point] | np.ndarray) -> list[Point]:
        placed = (np.array(points) - 0.5) * self._scale + 0.5
        return [(float(x), float(y)) for x, y in placed * self._size]

    def _grey(self, shade: float) -> int:
        """Returns 0 for 0, which cuts out, and else 1 to 255."""
        return round(np.clip(self._shade * shade, 1, 255)) if shade else 0

    def fill(self, points: Sequence[Point], shade: float = 1.0, *, rounds: int = 0):
        """Fills a polygon, its corners cut `rounds` times (Chaikin's curve)."""
        corners = np.array(points)
        for _ in range(rounds):
            following = np.roll(corners, -1, axis=0)
            cut = (0.75 * corners + 0.25 * following, 0.25 * corners + 0.75 * following)
            corners = np.stack(cut, axis=1).reshape(-1, 2)
        self._draw.polygon(self._pixels(corners), fill=self._grey(shade))

    def line(self, points: Sequence[Point], shade: float, width: float = 0.012):
        pixels = max(1, round(width * self._size))
        self._draw.line(self._pixels(points), self._grey(shade), pixels, joint="curve")

    def dots(self, points: Sequence[Point], shade: float, radius: float = 0.014):
        for x, y in points:
            square = ((x - radius, y - radius), (x + radius, y + radius))
            self._draw.ellipse(self._pixels(square), fill=self._grey(shade))

    def symmetric(self, half: Sequence[Point], shade: float = 1.0, *, rounds: int = 0):
        """Fills an outline of which the right half is given, x from the middle."""
        right = [(0.5 + x, y) for x, y in half]
        left = [(0.5 - x, y) for x, y in reversed(half)]
        self.fill(right + left, shade, rounds=rounds)

    def pair(self, half: Sequence[Point], shade: float = 1.0):
        """Fills a polygon on the right, x from the middle, and its mirror image."""
        for side in (1, -1):
            self.fill([(0.5 + side * x, y) for x, y in half], shade)

    def pair_of_lines(self, half: Sequence[Point], shade: float, width: float = 0.012):
        """Draws a line on the right, x from the middle, and its mirror image."""
        for side in (1, -1):
            self.line([(0.5 + side * x, y) for x, y in half], shade, width)


def _upper(
    pen: _Pen, sleeve: str, half: float, flare: tuple[float, float], bottom: float
) -> float:
    """Draws a trunk with sleeves; returns the y of the shoulders.

    Args:
      pen: draws.
      sleeve: `none`, `short` or `long`.
      half: half of the chest's width.
      flare: from and to which part of the chest's width the hem is wide.
      bottom: y of the hem.
    """
    uniform = pen.rng.uniform
    top, neck, shoulder = uniform(0.03, 0.07), uniform(0.08, 0.12), half * 0.95
    pit, out, middle = top + uniform(0.22, 0.28), uniform(0.4, 0.48), 0.4 * bottom + 0.2
    waist, hem = (half * uniform(0.87, 0.99), middle), (half * uniform(*flare), bottom)
    upper = [(neck, top), (shoulder, top + 0.04)]
    if sleeve == "short":
        end = uniform(0.28, 0.4)
        pen.pair([*upper, (out, end), (out - 0.13, end + 0.05), (half - 0.03, pit)])
    if sleeve == "long":
        end, elbow, wide = bottom - uniform(0, 0.18), (half + out) / 2 + 0.05, 0.115
        arm = [(elbow, 0.4), (out, end), (out - wide, end), (elbow - wide - 0.02, 0.45)]
        pen.pair([*upper, *arm, (half - 0.04, pit)], uniform(0.8, 1.0))
    pen.symmetric([*upper, (half, pit), waist, hem])
    if sleeve == "short":  # the seams
        pen.pair_of_lines([(shoulder, top + 0.05), (half, pit)], 0.8)
    if sleeve == "long":  # the gaps beside the trunk
        pen.pair_of_lines([(half, pit), waist, hem], 0.0, 0.02)
    return top


def _neck(pen: _Pen, top: float, depth: float, wide: float) -> None:
    """Cuts a neck out, more or less pointed, often with the back behind it."""
    point = (wide * pen.rng.uniform(0.3, 0.9), top + depth * 0.7)
    pen.symmetric([(wide, top - 0.03), point, (0.0, top + depth)], 0.0, rounds=2)
    if pen.rng.random() < 0.6:
        pen.symmetric([(wide * 0.8, top), (wide * 0.5, top + depth * 0.5)], 0.55)


def _front(pen: _Pen, top: float, bottom: float) -> None:
    """Draws an opening with a zip or with buttons."""
    x, dark = 0.5 + pen.rng.normal(0, 0.01), pen.rng.uniform(0.3, 0.7)
    pen.line([(x, top), (x, bottom)], dark, pen.rng.uniform(0.01, 0.025))
    if pen.rng.random() < 0.6:
        ys = np.arange(top + 0.1, bottom - 0.05, pen.rng.uniform(0.09, 0.15))
        pen.dots([(x + 0.03, y) for y in ys], pen.rng.choice([0.4, 1.5]))


def _t_shirt(pen: _Pen) -> None:
    uniform, sleeve = pen.rng.uniform, pen.rng.choice(["none", "short"], p=[0.15, 0.85])
    top = _upper(pen, sleeve, uniform(0.22, 0.28), (0.9, 1.08), uniform(0.9, 0.98))
    _neck(pen, top, uniform(0.06, 0.18), uniform(0.07, 0.11))


def _pullover(pen: _Pen) -> None:
    uniform = pen.rng.uniform
    half, bottom = uniform(0.22, 0.27), uniform(0.88, 0.98)
    top = _upper(pen, "long", half, (0.92, 1.02), bottom)
    _neck(pen, top, uniform(0.04, 0.1), uniform(0.07, 0.11))
    if uniform() < 0.7:  # ribs at the hem
        pen.pair_of_lines([(0, bottom - 0.06), (half * 0.95, bottom - 0.06)], 0.75)
    if uniform() < 0.3:  # a high collar
        pen.symmetric([(0.1, top + 0.05), (0.09, top - 0.02)], uniform(0.75, 1.0))


def _dress(pen: _Pen) -> None:
    uniform, half = pen.rng.uniform, pen.rng.uniform(0.13, 0.17)
    top, pit, middle = uniform(0.02, 0.05), uniform(0.2, 0.26), uniform(0.38, 0.46)
    waist, neck = half * uniform(0.72, 0.95), half * uniform(0.5, 0.75)
    hem = half * (uniform(0.95, 1.3) if uniform() < 0.6 else uniform(1.4, 2.1))
    low = pen.rng.choice([0.0, 0.22, uniform(0.4, 0.6)])
    if low:  # sleeves
        far = half + 0.05 + low / 10
        arm = [(half, top + 0.03), (far, low), (far - 0.07, low + 0.02)]
        pen.pair([(neck, top), *arm, (half - 0.02, pit)], 0.9)
    straps = [(neck, top), (half * 0.9, top + 0.03), (half * 0.85, pit - 0.06)]
    pen.symmetric([*straps, (half, pit), (waist, middle), (hem, uniform(0.93, 0.99))])
    _neck(pen, top, uniform(0.06, 0.16), neck)
    if uniform() < 0.5:  # a belt
        pen.pair_of_lines([(0, middle), (waist, middle)], 0.5, 0.025)


def _coat(pen: _Pen) -> None:
    uniform, half = pen.rng.uniform, pen.rng.uniform(0.21, 0.26)
    top = _upper(pen, "long", half, (1.0, 1.2), 0.99)
    _front(pen, top, 0.99)
    if uniform() < 0.3:  # a hood, else lapels
        pen.symmetric([(0.13, top + 0.08), (0.1, top - 0.04)], 0.85, rounds=1)
        pen.symmetric([(0.06, top), (0.03, top + 0.08)], 0.3, rounds=1)
    else:
        deep = top + uniform(0.12, 0.3)
        pen.symmetric([(0.06, top), (0.0, deep)], 0.25)
        lapel = [(0.07, top - 0.02), (0.13, top + 0.08), (0.01, deep)]
        pen.pair(lapel, uniform(0.7, 1.25))
    if uniform() < 0.7:  # pockets
        pocket = [(half * 0.4, 0.66), (half * 0.75, uniform(0.62, 0.7))]
        pen.pair_of_lines(pocket, 0.5, 0.02)


def _shirt(pen: _Pen) -> None:
    uniform, sleeve = pen.rng.uniform, pen.rng.choice(["long", "long", "short"])
    bottom = uniform(0.9, 0.98)
    top = _upper(pen, sleeve, uniform(0.21, 0.26), (0.92, 1.05), bottom)
    _neck(pen, top, uniform(0.06, 0.12), uniform(0.07, 0.11))
    collar = [(0.09, top - 0.02), (0.12, top + 0.06), (0.02, top + 0.1)]
    pen.pair(collar, uniform(0.75, 1.3))
    _front(pen, top + 0.1, bottom if uniform() < 0.8 else 0.45)
    if uniform() < 0.4:  # a breast pocket
        pocket = [(0.56, 0.3), (0.66, 0.3), (0.66, 0.42), (0.56, 0.42), (0.56, 0.3)]
        pen.line(pocket, 0.7)


def _trouser(pen: _Pen) -> None:
    uniform = pen.rng.uniform
    waist, hip, foot = uniform(0.12, 0.17), uniform(0.16, 0.21), uniform(0.15, 0.26)
    crotch, leg, bottom = uniform(0.28, 0.38), uniform(0.07, 0.12), uniform(0.94, 0.99)
    outer = [(waist, 0.03), (hip, 0.22), ((foot + hip) / 2, 0.62), (foot, bottom)]
    pen.pair([(0, 0.03), *outer, (foot - leg, bottom), (0.005, crotch)])
    pen.pair_of_lines([(0, 0.08), (waist, 0.08)], 0.6)
    pen.line([(0.5, 0.04), (0.5, crotch)], uniform(0.4, 0.8))
    if uniform() < 0.6:  # pockets
        pen.pair_of_lines([(waist * 0.6, 0.09), (hip, 0.2)], 0.6)


def _sneaker(pen: _Pen) -> None:
    uniform, choice = pen.rng.uniform, pen.rng.choice
    ground, high, shin = uniform(0.68, 0.74), uniform(0.26, 0.36), uniform(0.48, 0.6)
    sole, toe = ground - uniform(0.05, 0.09), ground - uniform(0.13, 0.2)
    vamp = [(0.02, sole), (0.03, sole - 0.02), (0.07, toe), (0.24, toe - 0.04)]
    collar = [(shin, high), (shin + 0.08, high), (shin + 0.2, high + 0.1)]
    heel = [(0.93, high + 0.02), (0.97, high + 0.16), (0.96, sole)]
    pen.fill([*vamp, *collar, *heel], rounds=1)
    pen.fill([(shin + 0.02, high + 0.02), *collar[1:]], 0.4)  # the tongue
    rubber = [(0.02, sole), (0.97, sole), (0.95, ground), (0.06, ground)]
    pen.fill(rubber, choice([0.5, 1.4, 2.0]), rounds=1)
    laces, contrast, start = choice([0.5, 1.6]), choice([0.55, 1.5]), uniform(0.45, 0.6)
    for part in np.linspace(0.2, 0.85, 4):
        x, y = 0.24 + part * (shin - 0.24), toe - 0.01 + part * (high - toe + 0.03)
        pen.line([(x, y), (x + 0.07, y + 0.06)], laces, 0.018)
    for x in start + 0.07 * np.arange(pen.rng.integers(0, 4)):  # stripes on the side
        pen.line([(x, sole), (x - 0.06, high + 0.17)], contrast, 0.025)
    if uniform() < 0.5:
        pen.fill([(0.84, sole), (0.95, sole), (0.94, high + 0.08)], contrast)


def _sandal(pen: _Pen) -> None:
    uniform, width, shade = pen.rng.uniform, pen.rng.uniform(0.03, 0.07), 1.0
    rise = pen.rng.choice([0.02, 0.1, 0.3]) * uniform(0.7, 1.2)
    ground = 0.62 + 0.5 * rise
    toe, thick = ground - uniform(0.03, 0.07), 0.05
    heel = toe - rise
    arch, wedge = (heel + toe) / 2, rise > 0.06 and uniform() < 0.5
    under = [(0.96, heel + thick), (0.65, arch + thick), (0.32, ground)]
    bed = [(0.03, toe), (0.3, toe), (0.65, arch - 0.01), (0.95, heel)]
    pen.fill([*bed, *([(0.94, ground)] if wedge else under), (0.05, ground)], 0.8)
    if rise > 0.06 and not wedge:  # a heel
        wide = uniform(0.04, 0.14)
        pen.fill([(0.96 - wide, heel), (0.96, heel), (0.94, ground), (0.9, ground)])
    for x in 0.1 + np.sort(uniform(0.0, 0.15, pen.rng.integers(1, 4))):  # on the toes
        band = [
            (x, toe),
            (x + 0.08, toe - 0.08),
            (x + 0.2, toe - 0.13),
            (x + 0.34, toe),
        ]
        pen.line(band, shade, width)
    if uniform() < 0.8:  # round the ankle
        back, front = (0.9, heel - uniform(0.15, 0.22)), (0.64, heel - 0.12)
        pen.line([(0.94, heel), back, front], shade, width)
        to = [(0.4, toe - 0.08), (0.66, arch), (0.5, toe - 0.03)][pen.rng.integers(3)]
        pen.line([front, to], shade, width)


def _ankle_boot(pen: _Pen) -> None:
    uniform = pen.rng.uniform
    top, front, back = uniform(0.03, 0.12), uniform(0.38, 0.48), uniform(0.88, 0.94)
    ground, heel, wide = uniform(0.9, 0.96), uniform(0.02, 0.14), uniform(0.12, 0.3)
    toe, raised = ground - uniform(0.14, 0.2), ground - heel
    instep = [(front, top), (front + 0.02, uniform(0.45, 0.52)), (0.2, toe - 0.08)]
    sole = [(0.06, toe), (0.03, ground - 0.04), (0.28, ground), (0.6, raised)]
    shaft = [(0.95, raised), (0.94, toe - 0.1), (back, top)]
    pen.fill([*instep, *sole, *shaft], rounds=1)
    pen.fill([(front, top), (back, top), (back, top + 0.08), (front, top + 0.08)])
    block = [(0.95 - wide, raised - 0.02), (0.95, raised - 0.02), (0.93, ground)]
    pen.fill([*block, (0.97 - wide, ground)], 0.7)
    pen.line([(0.04, ground - 0.02), (0.3, ground), (0.6, raised)], 0.6, 0.03)
    kind, contrast = pen.rng.choice(["plain", "zip", "laces", "strap"]), 0.5
    if kind == "zip":
        pen.line([(0.68, top + 0.04), (0.66, raised - 0.08)], contrast)
    if kind == "strap":
        pen.line([(front, 0.4), (back + 0.03, 0.45)], contrast, 0.04)
    for y in np.arange(top + 0.06, 0.5, 0.08) if kind == "laces" else ():
        pen.line([(front, y), (front + 0.12, y + 0.04)], contrast, 0.02)


def _bag(pen: _Pen) -> None:
    uniform, choice = pen.rng.uniform, pen.rng.choice
    half, bottom, upper = uniform(0.34, 0.47), uniform(0.84, 0.96), uniform(0.8, 1.02)
    high, handle = uniform(0.36, 0.55), choice([0.5, 0.9, 0.0])
    if not handle:  # a clutch lies in the middle
        bottom = 0.5 + high / 2
    top, flap = bottom - high, bottom - high * uniform(0.4, 0.6)
    if handle:
        foot, reach = half * handle, uniform(0.03, 0.1)
        rise = [(0.85 * foot, (top + reach) / 2), (0.7 * foot, reach + 0.04)]
        arch = [(foot, top + 0.03), *rise, (0.4 * foot, reach), (0.0, reach)]
        pen.pair_of_lines(arch, uniform(0.7, 1.1), uniform(0.025, 0.06))
    pen.symmetric([(half * upper, top), (half, bottom)], rounds=int(choice([0, 1])))
    detail = choice(["flap", "pocket", "seam", "none"])
    if detail == "flap":
        lid = [(half * upper, top), (half * 0.95, flap - 0.05), (half * 0.6, flap)]
        pen.symmetric(lid, choice([0.75, 1.25]))
        pen.dots([(0.5, flap - 0.02)], choice([0.3, 1.8]), 0.03)
    if detail == "pocket":
        pen.symmetric([(half * 0.6, flap), (half * 0.6, bottom - 0.05)], 0.8)
    if detail == "seam":
        pen.pair_of_lines([(0, top + 0.08), (half, top + 0.08)], 0.5, 0.02)


_KINDS = {
    "T-shirt/top": _t_shirt,
    "Trouser": _trouser,
    "Pullover": _pullover,
    "Dress": _dress,
    "Coat": _coat,
    "Sandal": _sandal,
    "Shirt": _shirt,
    "Sneaker": _sneaker,
    "Bag": _bag,
    "Ankle boot": _ankle_boot,
}
CLOTHES = tuple(_KINDS)
_PATTERNED = ("T-shirt/top", "Pullover", "Dress", "Shirt", "Bag")
_PATTERNS = {"plain": 0.58, "across": 0.14, "down": 0.06, "check": 0.08, "print": 0.14}


def draw(name: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """Returns an item of one of `CLOTHES`: float32 [size, size], from 0 to 255."""
    pen = _Pen(size, rng)
    _KINDS[name](pen)
    shades = np.asarray(pen.image, np.float32)
    coarse = rng.normal(0, rng.uniform(0.03, 0.12), (5, 5))
    light = 1 + ndimage.zoom(coarse, size / 5, order=3)  # folds
    if name in _PATTERNED:
        light *= _pattern(size, rng)
    edge = ndimage.gaussian_filter((shades > 0).astype(np.float32), 2.0)
    return np.clip(shades * light * (0.7 + 0.3 * edge), 0, 255).astype(np.float32)


def _pattern(size: int, rng: np.random.Generator) -> np.ndarray:
    """Returns factors [size, size] of stripes, checks, a print, or 1."""
    kind = rng.choice([*_PATTERNS], p=[*_PATTERNS.values()])
    depth, period, high = rng.uniform((0.15, 0.08, 0.06), (0.5, 0.25, 0.16))
    y, x = np.indices((size, size)) / size
    if kind == "print":  # on the chest
        blocks = ndimage.zoom(rng.uniform(-1, 1, (4, 4)), size / 4, order=0)
        return 1 + depth * blocks * ((abs(x - 0.5) < 0.13) & (abs(y - 0.45) < high))
    across, down = (1.0 * (np.sin(2 * np.pi * at / period) > 0) for at in (y, x))
    dark = {"across": across, "down": down, "check": across + down}
    return 1 - depth * dark.get(kind, np.zeros_like(x))
