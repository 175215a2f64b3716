"""Plots the predicted IoU of masks against the true one."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sam_jax.evaluate.object_scores import CALIBRATION_BINS
from sam_jax.visualize.style import BLUE, GRAY, ORANGE, new_figure, tidy

BAR_WIDTH = 0.4 / CALIBRATION_BINS
SERIES = (("1", "1 click", BLUE, "o", -0.5), ("box", "box", ORANGE, "s", 0.5))


def draw_calibration(evaluation: dict[str, Any]) -> Figure:
    """Draws the mean true IoU by predicted IoU, and below it the number of objects.

    Args:
      evaluation: The result of `evaluate_clicks`. With tiles, there is a second column for them.

    Returns:
      The figure.
    """
    columns = [("entire image", evaluation["calibration"])]
    if "tiles" in evaluation:
        tiles = evaluation["tiles"]
        columns.append((f"tiles: {tiles['size']}", tiles["calibration"]))
    figure = new_figure(1 + 5 * len(columns), 6.5)
    figure.set_layout_engine("constrained")
    axes = figure.subplots(
        2, len(columns), sharex=True, sharey="row", squeeze=False, height_ratios=(3, 1)
    )
    for (title, calibration), (iou, counts) in zip(columns, axes.T, strict=True):
        draw_column(iou, counts, calibration)
        if len(columns) > 1:
            iou.set_title(title, fontsize=12)
        counts.set_xlabel("predicted IoU")
        for row in (iou, counts):
            tidy(row)
    axes[0, 0].set_ylabel("true IoU")
    axes[1, 0].set_ylabel("objects")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=3, fontsize=11, frameon=False)
    return figure


def draw_column(iou: Axes, counts: Axes, calibration: dict[str, Any]) -> None:
    """Draws both plots of objects that were seen in the same way."""
    iou.plot([0, 1], [0, 1], color=GRAY, linestyle="--", label="predicted = true")
    for prompt, label, color, marker, side in SERIES:
        bins = calibration[prompt]
        predicted = np.array([row["predicted"] for row in bins])
        iou.plot(
            predicted,
            [row["true"] for row in bins],
            color=color,
            marker=marker,
            markersize=7,
            linewidth=1.5,
            clip_on=False,
            zorder=3,
            label=label,
        )
        # The middles of the bins. Those at the ends hold all lower and all higher values.
        bin_index = np.clip((predicted * CALIBRATION_BINS).astype(int), 0, CALIBRATION_BINS - 1)
        middles = (bin_index + 0.5) / CALIBRATION_BINS
        heights = [row["objects"] for row in bins]
        counts.bar(middles + side * BAR_WIDTH, heights, BAR_WIDTH, color=color)
    iou.set_xlim(0, 1)
    iou.set_ylim(0, 1)
