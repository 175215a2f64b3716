"""Plots of the masks of a source, and pictures of some of them.

Source: Kirillov et al. 2023, figures 2, 5 and 6.
"""

import os
from collections.abc import Sequence
from typing import Any

import einops
import numpy as np
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from sam_jax.visualize.overlay import draw_masks
from sam_jax.visualize.style import BLUE, DPI, new_figure, tidy

PICTURE_SIDE = 480  # pixels, the longer side of a sample's image
MASKS_PER_BIN = 8  # smallest mean in the plot of centers

Sample = tuple[UInt8[np.ndarray, "_ _ 3"], Sequence[dict[str, Any]]]  # an image, and run lengths


def save_plots(
    folder: str | os.PathLike[str], statistics: dict[str, Any], samples: Sequence[Sample]
) -> list[str]:
    """Writes samples.png, shapes.png and centers.png, and quality.png after a comparison.

    Args:
      folder: Created if it is missing.
      statistics: The result of `statistics.summarize`, with the name of the source under "source",
        and with the result of `quality.summarize` under "against" if annotations were compared.
      samples: Some images of the source and their masks. Without any there is no samples.png.

    Returns:
      The names of the files.
    """
    figures = {"samples.png": draw_samples(statistics["source"], samples)} if samples else {}
    figures |= {"shapes.png": draw_shapes(statistics), "centers.png": draw_centers(statistics)}
    if "against" in statistics:
        figures["quality.png"] = draw_quality(statistics["against"])
    os.makedirs(folder, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(os.path.join(folder, name), dpi=DPI)
    return list(figures)


def draw_samples(source: str, samples: Sequence[Sample]) -> Figure:
    """Draws images, each beside its masks, in rows of two samples.

    Args:
      source: The name of the source.
      samples: The images and their masks.
    """
    pictures = [draw_sample(*sample) for sample in samples]
    rows = [pictures[i : i + 2] for i in range(0, len(pictures), 2)]
    heights = [max(len(picture) for picture in row) / PICTURE_SIDE for row in rows]
    figure = new_figure(13, 3.2 * sum(heights) + 0.4 * len(rows) + 0.6)
    figure.set_layout_engine("constrained", wspace=0.04, hspace=0.03)
    figure.suptitle(f"Samples of {source}", fontsize=14)
    grid = figure.subplots(len(rows), 2, squeeze=False, height_ratios=heights)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, picture, (_, masks) in zip(grid.flat, pictures, samples, strict=False):
        axes.imshow(picture)
        axes.set_title(f"{len(masks)} masks", fontsize=12)
    return figure


def draw_sample(
    image: UInt8[np.ndarray, "h w 3"], masks: Sequence[dict[str, Any]]
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Draws an image at PICTURE_SIDE with, to the right of it, its masks."""
    height, width = image.shape[:2]
    scale = PICTURE_SIDE / max(height, width)
    size = max(1, round(scale * width)), max(1, round(scale * height))
    parts = (Image.fromarray(part).resize(size) for part in (image, draw_masks(image, masks)))
    return np.hstack([np.asarray(part) for part in parts])


def draw_shapes(statistics: dict[str, Any]) -> Figure:
    """Draws histograms of the masks per image, their relative size and their concavity."""
    figure = new_figure(13, 4.4)
    figure.set_layout_engine("constrained", wspace=0.06)
    figure.suptitle(describe_masks(statistics), fontsize=14)
    count, size, concavity = figure.subplots(1, 3)
    images = np.array(statistics["masks_per_image"]["images"])
    count.bar(statistics["masks_per_image"]["bins"], images / images.sum(), color=BLUE)
    count.set_xlabel("masks per image")
    count.set_ylabel("share of images")
    for axes, name, label in (
        (size, "relative_size", "relative size of a mask"),
        (concavity, "concavity", "concavity of a mask"),
    ):
        draw_histogram(axes, statistics[name]["bounds"], statistics[name]["masks"])
        axes.set_xlabel(label)
        axes.set_ylabel("share of masks")
    for axes in (count, size, concavity):
        format_percent(axes)
    return figure


def draw_centers(statistics: dict[str, Any]) -> Figure:
    """Draws the density of the centers of masks over the image.

    Bins are joined until they hold MASKS_PER_BIN masks on average, since fewer show mostly noise.
    """
    figure = new_figure(6, 5.4)
    figure.set_layout_engine("constrained")
    figure.suptitle(describe_masks(statistics), fontsize=12)
    axes = figure.add_subplot()
    masks = np.array(statistics["center"]["masks"])
    edges = statistics["center"]["bounds"]
    sides = (side for side in range(1, len(masks)) if len(masks) % side == 0)
    side = next((s for s in sides if masks.mean() * s**2 >= MASKS_PER_BIN), len(masks) // 2)
    masks = einops.reduce(masks, "(y dy) (x dx) -> y x", "sum", dy=side, dx=side)
    edges = edges[::side]
    mesh = axes.pcolormesh(edges, edges, masks / masks.mean(), cmap="cividis", vmin=0)
    axes.set_aspect("equal")
    axes.invert_yaxis()  # as in an image
    axes.set_xlabel("x / width")
    axes.set_ylabel("y / height")
    tidy(axes)
    axes.grid(visible=False)
    bar = figure.colorbar(mesh, ax=axes, shrink=0.85)
    bar.set_label("density of mask centers (mean = 1)", size=12)
    bar.ax.tick_params(labelsize=11)
    return figure


def draw_quality(quality: dict[str, Any]) -> Figure:
    """Draws a histogram of the IoU of matched masks; see `quality.summarize`."""
    figure = new_figure(6, 4.4)
    figure.set_layout_engine("constrained")
    figure.suptitle(f"{sum(quality['iou']['pairs'])} masks in two annotations", fontsize=12)
    axes = figure.add_subplot()
    draw_histogram(axes, quality["iou"]["bounds"], quality["iou"]["pairs"])
    axes.set_xlabel("IoU of two matched masks")
    axes.set_ylabel("share of pairs")
    format_percent(axes)
    return figure


def describe_masks(statistics: dict[str, Any]) -> str:
    """Returns the title of a plot."""
    images = sum(statistics["masks_per_image"]["images"])
    return f"{statistics['masks']:,} masks in {images:,} images of {statistics['source']}"


def draw_histogram(axes: Axes, edges: list[float], counts: list[int]) -> None:
    """Draws the share of each bin."""
    axes.stairs(np.array(counts) / sum(counts), edges, fill=True, color=BLUE)
    axes.set_xlim(edges[0], edges[-1])


def format_percent(axes: Axes) -> None:
    """Labels the y axis in percent and draws horizontal grid lines."""
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g} %")
    tidy(axes)
    axes.grid(visible=False, axis="x")
