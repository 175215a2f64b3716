"""Generates scenes of objects that overlap and contain parts, so that a click is ambiguous.

Every scene is a function of its index alone. An object is a shape. Many objects have parts (a disc
inside, a band across, a half, a cap), and some parts contain a smaller part. Each object and each
part has a mask, which includes the parts inside. Objects occlude those behind them: masks are the
visible pixels.
"""

import dataclasses
import re

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, UInt8

from sam_jax.data.example import Example, SourceError, check_index
from sam_jax.masks import rle

MIN_AREA = 0.015  # smallest area of a mask, as a fraction of the image
MIN_VISIBLE = 0.4  # smallest visible fraction of an object or part
MIN_CONTRAST = 90.0  # smallest distance in RGB between a color and the color around it
MIN_SCENE_SIDE, MAX_SCENE_SIDE = 16, 4096  # pixels


@dataclasses.dataclass(frozen=True)
class SyntheticScenes:
    """A source of generated scenes.

    Attributes:
      size: (height, width) of each scene.
      count: Number of scenes.
    """

    size: tuple[int, int] = (128, 128)
    count: int = 100_000

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        """Generates an example. See `Source`."""
        check_index(index, self.count)
        image, masks = draw_scene(np.random.default_rng(index), self.size)
        return Example(image=image, masks=[rle.encode(mask) for mask in masks])

    def image(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        """Generates the image of an example. See `Source`."""
        check_index(index, self.count)
        return draw_scene(np.random.default_rng(index), self.size)[0]

    def encoded(self, index: int) -> None:
        """Returns None: generated images have no files."""
        return None

    def name(self, index: int) -> str:
        """Returns the name of an example. See `Source`."""
        return f"scene {index}"


def open_scenes(location: str = "", decode_size: tuple[int, int] | None = None) -> SyntheticScenes:
    """Opens a source of generated scenes.

    Args:
      location: HEIGHTxWIDTH, such as 96x128; empty for the default size.
      decode_size: Ignored: scenes are always generated in full.

    Returns:
      The source.

    Raises:
      SourceError: If the size is not as described, or out of range.
    """
    del decode_size
    if not location:
        return SyntheticScenes()
    match = re.fullmatch("([0-9]{1,9})x([0-9]{1,9})", location)
    size = (int(match[1]), int(match[2])) if match else (0, 0)
    if not all(MIN_SCENE_SIDE <= side <= MAX_SCENE_SIDE for side in size):
        raise SourceError(
            f"scenes:{location} must be scenes:HEIGHTxWIDTH of {MIN_SCENE_SIDE} to "
            f"{MAX_SCENE_SIDE} pixels, for example scenes:96x128"
        )
    return SyntheticScenes(size)


def draw_scene(
    rng: np.random.Generator, size: tuple[int, int]
) -> tuple[UInt8[np.ndarray, "h w 3"], list[Bool[np.ndarray, "h w"]]]:
    """Draws a scene.

    Args:
      rng: The source of randomness.
      size: (height, width).

    Returns:
      The image and its masks.
    """
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


def draw_object(
    rng: np.random.Generator,
    image: Float64[np.ndarray, "h w 3"],
    background: Float64[np.ndarray, " 3"],
    x: Float32[np.ndarray, "h w"],
    y: Float32[np.ndarray, "h w"],
) -> list[Bool[np.ndarray, "h w"]]:
    """Paints an object and its parts into an image.

    Args:
      rng: The source of randomness.
      image: The image, which is changed.
      background: The color around the object.
      x: The column of each pixel.
      y: The row of each pixel.

    Returns:
      The regions of the object and of its parts, the object first.
    """
    height, width = x.shape
    radius = rng.uniform(0.22, 0.38) * min(height, width)
    cx = rng.uniform(0.6 * radius, width - 0.6 * radius)
    cy = rng.uniform(0.6 * radius, height - 0.6 * radius)
    u, v = rotate(rng, x - cx, y - cy)
    u, v = u / radius, v / (radius * rng.uniform(0.55, 1.0))
    outline = sample_outline(rng, u, v)
    color = paint(rng, image, outline, background, u, v)
    regions = [outline]
    if rng.random() < 0.4:
        for part in sample_parts(rng, outline, u, v):
            part_color = paint(rng, image, part, color, u, v)
            regions.append(part)
            if rng.random() < 0.25:
                inner = part & sample_sub_part(rng, part, x, y)
                paint(rng, image, inner, part_color, u, v)
                regions.append(inner)
    return regions


def rotate(
    rng: np.random.Generator, x: Float[np.ndarray, "h w"], y: Float[np.ndarray, "h w"]
) -> tuple[Float[np.ndarray, "h w"], Float[np.ndarray, "h w"]]:
    """Rotates coordinates by a random angle."""
    angle = rng.uniform(0, 2 * np.pi)
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return c * x + s * y, c * y - s * x


def sample_outline(
    rng: np.random.Generator, u: Float[np.ndarray, "h w"], v: Float[np.ndarray, "h w"]
) -> Bool[np.ndarray, "h w"]:
    """Samples an outline in coordinates in which its radius is about one."""
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


def sample_parts(
    rng: np.random.Generator,
    region: Bool[np.ndarray, "h w"],
    u: Float[np.ndarray, "h w"],
    v: Float[np.ndarray, "h w"],
) -> list[Bool[np.ndarray, "h w"]]:
    """Samples one or two parts of an object that do not overlap, in its coordinates."""
    kind = rng.integers(4)
    if kind == 0:  # a disc inside
        (du, dv), r = rng.uniform(-0.25, 0.25, 2), rng.uniform(0.5, 0.7)
        return [region & ((u - du) ** 2 + (v - dv) ** 2 < r**2)]
    if kind == 1:  # a band across
        middle, half = rng.uniform(-0.3, 0.3), rng.uniform(0.25, 0.35)
        return [region & (np.abs(v - middle) < half)]
    if kind == 2:  # one half
        return [region & (u > rng.uniform(-0.15, 0.3))]
    half = rng.uniform(0.2, 0.4)  # a cap on each of two sides
    return [region & (u > half), region & (u < -half)]


def sample_sub_part(
    rng: np.random.Generator,
    part: Bool[np.ndarray, "h w"],
    x: Float32[np.ndarray, "h w"],
    y: Float32[np.ndarray, "h w"],
) -> Bool[np.ndarray, "h w"]:
    """Samples a disc or a half plane through the middle of a part."""
    rows, columns = np.nonzero(part)
    if not len(rows):
        return part
    pixel = rng.integers(len(rows))
    cx, cy = (columns.mean() + columns[pixel]) / 2, (rows.mean() + rows[pixel]) / 2
    if rng.random() < 0.6:
        r = rng.uniform(0.4, 0.6) * np.sqrt(len(rows) / np.pi)
        return (x - cx) ** 2 + (y - cy) ** 2 < r**2
    u, _ = rotate(rng, x - cx, y - cy)
    return u > 0


def paint(
    rng: np.random.Generator,
    image: Float64[np.ndarray, "h w 3"],
    region: Bool[np.ndarray, "h w"],
    background: Float64[np.ndarray, " 3"],
    u: Float[np.ndarray, "h w"],
    v: Float[np.ndarray, "h w"],
) -> Float64[np.ndarray, " 3"]:
    """Paints a texture into a region, in a color that contrasts with the background.

    Args:
      rng: The source of randomness.
      image: The image, which is changed.
      region: The pixels to paint.
      background: The color around the region.
      u: First coordinate of the object.
      v: Second coordinate of the object.

    Returns:
      The mean color of the texture.
    """
    color = rng.uniform(15, 240, 3)
    while np.linalg.norm(color - background) < MIN_CONTRAST:
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
