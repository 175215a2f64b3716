"""Panels of objects: a part of the image with outlines, masks, clicks and boxes."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, UInt8
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from sam_jax.masks.boxes import box_of_mask
from sam_jax.visualize.style import BLUE, GREEN, ORANGE, RED

MAX_IMAGE_SIDE = 600  # pixels; larger images are drawn at a lower resolution
CROP_SIDES = 3  # side of a crop, in sides of the object's box
MIN_CROP = 24  # pixels
SMALL = 0.2  # of the image's longer side; the longer side of the box of a small object
DARK = 128  # the brightest value of a dark image
MIN_BRIGHTEST = 16  # limits how far noise is brightened

Click = tuple[int, int, int]  # x, y and the label: 1 on the object, 0 off it
Crop = tuple[slice, slice]  # rows and columns of an image

OUTLINE_KEY = Line2D([], [], color=ORANGE, linewidth=2.5, label="outline of the true mask")
MASK_KEY = Patch(facecolor=BLUE, alpha=0.6, label="predicted mask")


def crop_around(mask: Bool[np.ndarray, "h w"]) -> Crop:
    """Returns the part of an image around an object: a square as far as the image allows it."""
    left, top, right, bottom = box_of_mask(mask)
    side = max(MIN_CROP, CROP_SIDES * (max(right - left, bottom - top) + 1))
    slices = []
    for size, middle in zip(mask.shape, ((top + bottom) / 2, (left + right) / 2), strict=True):
        length = int(min(side, size))
        start = int(np.clip(round(middle - length / 2), 0, size - length))
        slices.append(slice(start, start + length))
    return slices[0], slices[1]


def crop_if_small(mask: Bool[np.ndarray, "h w"]) -> Crop:
    """Returns the part of an image around a small object, and else the entire image."""
    left, top, right, bottom = box_of_mask(mask)
    if max(right - left, bottom - top) + 1 < SMALL * max(mask.shape):
        return crop_around(mask)
    return slice(0, mask.shape[0]), slice(0, mask.shape[1])


def area_title(number: int, mask: Bool[np.ndarray, "h w"]) -> str:
    """Returns the title of an object's first panel: its number in the list, and its area."""
    area = mask.mean()
    return f"{number}: {area:.1%} of the image" if area >= 0.001 else f"{number}: under 0.1%"


def draw_panel(
    axes: Axes,
    image: UInt8[np.ndarray, "h w 3"],
    true_mask: Bool[np.ndarray, "h w"],
    crop: Crop,
    mask: Bool[np.ndarray, "h w"] | None = None,
    clicks: Sequence[Click] = (),
) -> None:
    """Draws the image and the outline of the true mask; a predicted mask is blue on gray.

    Dark parts of images are brightened.

    Args:
      axes: The panel.
      image: The image.
      true_mask: The true mask.
      crop: The part of the image to draw.
      mask: A predicted mask.
      clicks: Clicks, in pixels of the image. Those outside of the crop are not seen.
    """
    rows, columns = crop
    step = -(-max(rows.stop - rows.start, columns.stop - columns.start) // MAX_IMAGE_SIDE)
    pixels = slice(rows.start, rows.stop, step), slice(columns.start, columns.stop, step)
    extent = (columns.start - 0.5, columns.stop - 0.5, rows.stop - 0.5, rows.start - 0.5)
    shown = brighten(image[pixels])
    if mask is not None:
        gray = 0.5 * shown.mean(axis=-1, keepdims=True).repeat(3, axis=-1) + 127
        tint = [int(BLUE[i : i + 2], 16) for i in (1, 3, 5)]
        shown = np.where(mask[pixels][..., None], 0.4 * gray + 0.6 * np.array(tint), gray)
    axes.imshow(shown.astype(np.uint8), extent=extent)
    draw_outline(axes, true_mask[pixels], extent)
    for click_label, color, marker in ((1, GREEN, "o"), (0, RED, "X")):
        points = [(x, y) for x, y, label in clicks if label == click_label]
        if points:
            xs, ys = np.transpose(points)
            axes.scatter(xs, ys, s=50, c=color, marker=marker, edgecolors="white", zorder=3)
    axes.set_xlim(extent[:2])
    axes.set_ylim(extent[2:])
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def brighten(image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """Scales the values of a dark image to the entire range; others are returned as they are."""
    brightest = max(np.percentile(image, 99.5), MIN_BRIGHTEST)
    if brightest > DARK:
        return image
    return np.minimum(image * (255 / brightest), 255).astype(np.uint8)


def draw_outline(
    axes: Axes, mask: Bool[np.ndarray, "h w"], extent: tuple[float, float, float, float]
) -> None:
    """Draws the outline of a mask whose array covers the extent (left, right, bottom, top)."""
    if not mask.any():
        return  # too small for the resolution of the picture
    left, right, bottom, top = extent
    height, width = mask.shape
    x = left + (np.arange(-1, width + 1) + 0.5) * (right - left) / width
    y = top + (np.arange(-1, height + 1) + 0.5) * (bottom - top) / height
    border = axes.contour(x, y, np.pad(mask, 1).astype(float), [0.5], colors=ORANGE, linewidths=1.5)
    border.set_path_effects([withStroke(linewidth=2.7, foreground="black")])
