"""Plots of the masks of a source.

Source: Kirillov et al. 2023, figures 5 and 6.
"""

import os
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sam_jax.visualize.style import BLUE, DPI, new_figure, tidy


def save_plots(folder: str | os.PathLike[str], statistics: dict[str, Any]) -> list[str]:
    """Writes shapes.png and centers.png, and quality.png if two annotations were compared.

    Args:
      folder: Created if it is missing.
      statistics: The result of `statistics.summarize`, with that of `quality.summarize` under
        "against" if there is one.

    Returns:
      The names of the files.
    """
    figures = {"shapes.png": draw_shapes(statistics), "centers.png": draw_centers(statistics)}
    if "against" in statistics:
        figures["quality.png"] = draw_quality(statistics["against"])
    os.makedirs(folder, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(os.path.join(folder, name), dpi=DPI)
    return list(figures)


def draw_shapes(statistics: dict[str, Any]) -> Figure:
    """Draws histograms of the masks per image, their relative size and their concavity."""
    figure = new_figure(13, 4)
    figure.set_layout_engine("constrained", wspace=0.06)
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
    """Draws the density of the centres of masks over the image."""
    figure = new_figure(6, 5)
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    masks = np.array(statistics["center"]["masks"])
    edges = statistics["center"]["bounds"]
    mesh = axes.pcolormesh(edges, edges, masks / masks.mean(), cmap="cividis", vmin=0)
    axes.set_aspect("equal")
    axes.invert_yaxis()  # as in an image
    axes.set_xlabel("x / width")
    axes.set_ylabel("y / height")
    tidy(axes)
    axes.grid(visible=False)
    bar = figure.colorbar(mesh, ax=axes, shrink=0.85)
    bar.set_label("density of mask centres (mean = 1)", size=12)
    bar.ax.tick_params(labelsize=11)
    return figure


def draw_quality(quality: dict[str, Any]) -> Figure:
    """Draws a histogram of the IoU of matched masks; see `quality.summarize`."""
    figure = new_figure(6, 4)
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    draw_histogram(axes, quality["iou"]["bounds"], quality["iou"]["pairs"])
    axes.set_xlabel("IoU of two matched masks")
    axes.set_ylabel("share of pairs")
    format_percent(axes)
    return figure


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
