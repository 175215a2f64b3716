"""Generated scenes: objects that overlap and contain parts, so that one click means many things.

Every scene is a function of its index alone. An object is a shape; many objects have parts (a disc
inside, a band across, a half, a cap), and some parts have a part of their own. There is a mask for
each object with its parts, for each part with its own, and for each of those. Objects hide what
lies behind them: masks are what is seen.
"""

import dataclasses

import numpy as np

from sam_jax.data.example import Example, check_index
from sam_jax.masks import rle

MIN_AREA = 0.015  # of the image, of a mask that is kept
MIN_VISIBLE = 0.4  # of an object or part, else it is hidden rather than seen
CONTRAST = 90.0  # least distance in RGB of a colour to the one around it


@dataclasses.dataclass(frozen=True)
class SyntheticScenes:
    """A source of generated scenes.

    Attributes:
      size: (height, width) of each.
      count: how many there are.
    """

    size: tuple[int, int] = (128, 128)
    count: int = 100_000

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        check_index(index, self.count)
        image, masks = draw_scene(np.random.default_rng(index), self.size)
        return Example(image=image, masks=[rle.encode(mask) for mask in masks])

    def image(self, index: int) -> np.ndarray:
        check_index(index, self.count)
        return draw_scene(np.random.default_rng(index), self.size)[0]

    def encoded(self, index: int) -> None:
        return None

    def name(self, index: int) -> str:
        return f"scene {index}"


def draw_scene(rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, list]:
    """Draws a scene -> 'h w 3' uint8 and its masks, each 'h w' bool."""
    x, y = np.meshgrid(np.arange(size[1], dtype=np.float32), np.arange(size[0], dtype=np.float32))
    color = rng.uniform(30, 225, 3)
    slope = rng.normal(0, 0.25, (3, 2))
    u, v = (x - size[1] / 2)[..., None], (y - size[0] / 2)[..., None]
    image = color + u * slope[:, 0] + v * slope[:, 1]
    regions: list[np.ndarray] = []
    areas: list[int] = []
    for _ in range(rng.integers(2, 4)):
        drawn = draw_object(rng, image, color, x, y)
        for region in regions:
            region &= ~drawn[0]
        regions += drawn
        areas += [int(region.sum()) for region in drawn]
    image += rng.normal(0, rng.uniform(1, 4), image.shape)
    masks: list[np.ndarray] = []
    for region, area in zip(regions, areas, strict=True):
        visible = int(region.sum())
        is_new = not any(np.array_equal(region, mask) for mask in masks)
        if visible >= max(MIN_AREA * region.size, MIN_VISIBLE * area) and is_new:
            masks.append(region)
    return np.clip(image, 0, 255).astype(np.uint8), masks


def draw_object(rng, image, around, x, y):
    """Paints an object with its parts into the image -> the regions of all of them, it first."""
    height, width = x.shape
    radius = rng.uniform(0.22, 0.38) * min(height, width)
    cx = rng.uniform(0.6 * radius, width - 0.6 * radius)
    cy = rng.uniform(0.6 * radius, height - 0.6 * radius)
    u, v = turn(rng, x - cx, y - cy)
    u, v = u / radius, v / (radius * rng.uniform(0.55, 1.0))
    whole = shape(rng, u, v)
    color = paint(rng, image, whole, around, u, v)
    regions = [whole]
    if rng.random() < 0.4:
        for part in parts(rng, whole, u, v):
            part_color = paint(rng, image, part, color, u, v)
            regions.append(part)
            if rng.random() < 0.25:
                inner = part & sub_part(rng, part, x, y)
                paint(rng, image, inner, part_color, u, v)
                regions.append(inner)
    return regions


def turn(rng, x, y):
    """Turns coordinates by a random angle."""
    angle = rng.uniform(0, 2 * np.pi)
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return c * x + s * y, c * y - s * x


def shape(rng, u, v):
    """An outline in coordinates where it is about one in radius -> 'h w' bool."""
    kind = rng.integers(4)
    if kind == 0:  # an ellipse
        return u**2 + v**2 < 1
    if kind == 1:  # a rectangle
        return (np.abs(u) < 0.9) & (np.abs(v) < 0.8)
    if kind == 2:  # a regular polygon
        normals = 2 * np.pi * (np.arange(n := rng.integers(3, 7)) + 0.5) / n
        inner = 0.65 if n == 3 else 0.85
        return np.all([np.cos(a) * u + np.sin(a) * v < inner for a in normals], axis=0)
    angle = np.arctan2(v, u)  # a blob
    lobes, depth, phase = rng.integers(2, 6), rng.uniform(0.1, 0.3), rng.uniform(0, 2 * np.pi)
    return u**2 + v**2 < (0.85 * (1 + depth * np.sin(lobes * angle + phase))) ** 2


def parts(rng, whole, u, v):
    """One to three regions of an object that do not overlap, in its coordinates."""
    kind = rng.integers(4)
    if kind == 0:  # a disc inside
        (du, dv), r = rng.uniform(-0.25, 0.25, 2), rng.uniform(0.5, 0.7)
        return [whole & ((u - du) ** 2 + (v - dv) ** 2 < r**2)]
    if kind == 1:  # a band across
        at, half = rng.uniform(-0.3, 0.3), rng.uniform(0.25, 0.35)
        return [whole & (np.abs(v - at) < half)]
    if kind == 2:  # one half
        return [whole & (u > rng.uniform(-0.15, 0.3))]
    half = rng.uniform(0.2, 0.4)  # a cap on each of two sides
    return [whole & (u > half), whole & (u < -half)]


def sub_part(rng, part, x, y):
    """A disc or a half plane through the middle of a part."""
    rows, columns = np.nonzero(part)
    if not len(rows):
        return part
    at = rng.integers(len(rows))
    cx, cy = (columns.mean() + columns[at]) / 2, (rows.mean() + rows[at]) / 2
    if rng.random() < 0.6:
        r = rng.uniform(0.4, 0.6) * np.sqrt(len(rows) / np.pi)
        return (x - cx) ** 2 + (y - cy) ** 2 < r**2
    u, _ = turn(rng, x - cx, y - cy)
    return u > 0


def paint(rng, image, region, around, u, v):
    """Colours a region unlike what is around it -> its colour."""
    color = rng.uniform(15, 240, 3)
    while np.linalg.norm(color - around) < CONTRAST:
        color = rng.uniform(15, 240, 3)
    texture = rng.random()
    if texture < 0.8:
        shade = np.float32(rng.uniform(-25, 25)) * u[region]
    else:
        period = rng.uniform(4, 7)
        stripes = np.sin(2 * np.pi * period / 2 * u[region])
        if texture > 0.9:
            stripes = stripes * np.sin(2 * np.pi * period / 2 * v[region])
        shade = rng.uniform(12, 28) * np.sign(stripes)
    image[region] = color + shade[:, None]
    return color
