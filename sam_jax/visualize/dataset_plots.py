"""Plots of the masks of a source, as figures 5 and 6 of Kirillov et al. 2023, and how plots look.

Colours are Okabe and Ito's (2008), which colour-blind people can tell apart; what matters differs
in shape or in words too. Pictures are drawn without pyplot, whose state is the process's.
"""

import os

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

BLUE, GREEN, ORANGE, RED, GREY = "#0072B2", "#009E73", "#E69F00", "#D55E00", "#666666"
DPI = 120


def new_figure(width: float, height: float) -> Figure:
    """An empty picture of a size in inches."""
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def tidy(axes: Axes) -> None:
    """Light grid, no frame, text of a readable size."""
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=11)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_fontsize(12)


def save_plots(folder: str, statistics: dict) -> None:
    """Writes shapes.png and centers.png, and quality.png where there is something to compare with.

    Args:
      folder: made if it is missing; statistics: see `statistics.collect`, and "against", if it is
        there, `quality.collect`.
    """
    figures = {"shapes.png": draw_shapes(statistics), "centers.png": draw_centers(statistics)}
    if "against" in statistics:
        figures["quality.png"] = draw_quality(statistics["against"])
    os.makedirs(folder, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(os.path.join(folder, name), dpi=DPI)


def draw_shapes(statistics: dict) -> Figure:
    """How many masks images have, how large they are, how concave; see `statistics.collect`."""
    figure = new_figure(13, 4)
    figure.set_layout_engine("constrained", wspace=0.06)
    count, size, concavity = figure.subplots(1, 3)
    images = np.array(statistics["masks_per_image"]["images"])
    count.bar(statistics["masks_per_image"]["bins"], images / images.sum(), color=BLUE)
    count.set_xlabel("masks in an image")
    count.set_ylabel("of images")
    for axes, name, label in (
        (size, "relative_size", "relative size of a mask"),
        (concavity, "concavity", "concavity of a mask"),
    ):
        draw_histogram(axes, statistics[name]["bounds"], statistics[name]["masks"])
        axes.set_xlabel(label)
        axes.set_ylabel("of masks")
    for axes in (count, size, concavity):
        show_percent(axes)
    return figure


def draw_centers(statistics: dict) -> Figure:
    """Where in their images masks have their centres; see `statistics.collect`."""
    figure = new_figure(6, 5)
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    masks = np.array(statistics["center"]["masks"])
    bounds = statistics["center"]["bounds"]
    shown = axes.pcolormesh(bounds, bounds, masks / masks.mean(), cmap="cividis", vmin=0)
    axes.set_aspect("equal")
    axes.invert_yaxis()  # as in an image
    axes.set_xlabel("x / width")
    axes.set_ylabel("y / height")
    tidy(axes)
    axes.grid(visible=False)
    bar = figure.colorbar(shown, ax=axes, shrink=0.85)
    bar.set_label("density of centres, 1 on average", size=12)
    bar.ax.tick_params(labelsize=11)
    return figure


def draw_quality(quality: dict) -> Figure:
    """The IoU of pairs; see `quality.collect`."""
    figure = new_figure(6, 4)
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    draw_histogram(axes, quality["iou"]["bounds"], quality["iou"]["pairs"])
    axes.set_xlabel("IoU of a pair of masks")
    axes.set_ylabel("of pairs")
    show_percent(axes)
    return figure


def draw_histogram(axes: Axes, bounds: list[float], counts: list[int]) -> None:
    """What share of all is in each bin."""
    axes.stairs(np.array(counts) / sum(counts), bounds, fill=True, color=BLUE)
    axes.set_xlim(bounds[0], bounds[-1])


def show_percent(axes: Axes) -> None:
    """Shares on the y axis, and lines across to read them by."""
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g} %")
    tidy(axes)
    axes.grid(visible=False, axis="x")
