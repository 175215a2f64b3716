"""Plots of a run: loss and mean IoU by step, and mean IoU by the number of clicks."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sam_jax.visualize.style import BLUE, GRAY, ORANGE, new_figure, tidy
from train.rows import Row

DARK_ORANGE = "#8A5F00"  # for text


def draw_curves(rows: list[Row], evaluations: list[Row]) -> Figure:
    """Draws loss and mean IoU by step.

    Args:
      rows: The rows of metrics.jsonl.
      evaluations: The rows of evaluations.jsonl, and one for the last evaluation.

    Returns:
      The figure.
    """
    figure = new_figure(8, 7)
    figure.set_layout_engine("constrained")
    loss, iou = figure.subplots(2, 1, sharex=True)
    rows = finite_rows(rows)
    steps = [row["step"] for row in rows]
    draw_curve(loss, steps, [row["loss"] for row in rows], "black", None)
    for r, color, label in ((0, BLUE, "first round"), (-1, ORANGE, "last round")):
        values = [row["miou_of_rounds"][r] for row in rows]
        draw_curve(iou, steps, values, color, f"training, {label}")
    evaluated = [row["step"] for row in evaluations]
    few, *_, many = evaluations[-1]["clicks"]
    for clicks, color, marker in ((few, BLUE, "o"), (many, ORANGE, "s")):
        values = [row["clicks"][clicks]["chosen"] for row in evaluations]
        draw_markers(iou, evaluated, values, color, marker, f"held out, {count_clicks(clicks)}")
    loss.set_ylabel("loss")
    loss.set_ylim(bottom=0, top=1.1 * max(loss.get_ylim()))
    iou.set_ylabel("mean IoU")
    iou.set_ylim(0, 1)
    label_steps(iou, [*steps, *evaluated])
    for axes in (loss, iou):
        tidy(axes)
    iou.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=11, frameon=False, borderpad=0
    )
    return figure


def draw_loss(rows: list[Row], evaluations: list[Row]) -> Figure:
    """Draws the loss by step.

    Args:
      rows: The rows of metrics.jsonl; their "step" and "loss" are used.
      evaluations: The evaluations, with the same keys.

    Returns:
      The figure.
    """
    figure = new_figure(8, 4)
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    rows = finite_rows(rows)
    steps = [row["step"] for row in rows]
    draw_curve(axes, steps, [row["loss"] for row in rows], BLUE, "training")
    evaluated = [row["step"] for row in evaluations]
    losses = [row["loss"] for row in evaluations]
    draw_markers(axes, evaluated, losses, ORANGE, "s", "held out")
    axes.set_ylabel("loss")
    axes.set_ylim(bottom=0, top=1.1 * max(axes.get_ylim()))
    label_steps(axes, [*steps, *evaluated])
    tidy(axes)
    figure.legend(loc="outside upper left", ncols=2, fontsize=11, frameon=False)
    return figure


def finite_rows(rows: list[Row]) -> list[Row]:
    """Returns the rows with a loss, which is null in those of steps that were not finite."""
    return [row for row in rows if row["loss"] is not None]


def draw_curve(
    axes: Axes,
    steps: Sequence[int],
    values: Sequence[float],
    color: str,
    label: str | None,
) -> None:
    """Draws the values of single batches, and over them their moving mean if they are many.

    Without values, for instance because no loss was finite, nothing is drawn.
    """
    if not values:
        return
    window = max(1, len(values) // 15)
    weights = np.ones(window)
    mean = np.convolve(values, weights, "same") / np.convolve(np.ones(len(values)), weights, "same")
    if window > 1:
        axes.plot(steps, values, color=color, alpha=0.3, linewidth=1)
    marker = "." if window == 1 else ""
    axes.plot(steps, mean, color=color, linewidth=2, marker=marker, label=label)


def draw_markers(
    axes: Axes,
    steps: Sequence[int],
    values: Sequence[float],
    color: str,
    marker: str,
    label: str,
) -> None:
    """Draws the values of evaluations as markers."""
    axes.plot(
        steps,
        values,
        color=color,
        marker=marker,
        markersize=8,
        markeredgecolor="black",
        linestyle="none",
        clip_on=False,
        zorder=3,
        label=label,
    )


def label_steps(axes: Axes, steps: Sequence[int]) -> None:
    """Labels an axis of steps, which begins at 0 and ends behind the last step."""
    axes.set_xlabel("step")
    axes.set_xlim(0, 1.02 * max(steps))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def count_clicks(clicks: str) -> str:
    """Returns "1 click" or, for example, "3 clicks"."""
    return "1 click" if clicks == "1" else f"{clicks} clicks"


def draw_clicks(evaluation: dict[str, Any]) -> Figure:
    """Draws the mean IoU by the number of clicks, and that of a box.

    Args:
      evaluation: The result of `evaluate_clicks`.

    Returns:
      The figure.
    """
    figure = new_figure(8, 5.5)
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    counts = list(evaluation["clicks"])
    positions = range(len(counts))
    box_position = len(counts) + 0.25
    for kind, color, marker, label in (
        ("oracle", ORANGE, "s", "oracle: the best of the outputs"),
        ("chosen", BLUE, "o", "chosen: the output with the highest predicted IoU"),
    ):
        values = [evaluation["clicks"][count][kind] for count in counts]
        axes.plot(
            positions, values, color=color, marker=marker, markersize=8, linewidth=2, label=label
        )
        box_iou = evaluation["box"][kind]
        axes.plot([box_position], [box_iou], color=color, marker=marker, markersize=8)
    scores = [*evaluation["clicks"].values(), evaluation["box"]]
    for position, iou in zip([*positions, box_position], scores, strict=True):
        annotate(axes, position, iou["chosen"], BLUE, is_above=False)
        if iou["oracle"] > iou["chosen"]:
            annotate(axes, position, iou["oracle"], DARK_ORANGE, is_above=True)
    ceiling = evaluation["ceiling"]
    label = f"upper bound for one click, not knowing which object is meant: {ceiling:.3f}"
    axes.axhline(ceiling, color=GRAY, linestyle="--", label=label)
    axes.set_xticks([*positions, box_position], [*counts, "box"])
    axes.set_xlim(-0.4, box_position + 0.4)
    axes.set_ylim(min(0, min(iou["chosen"] for iou in scores) - 0.1), 1.1)  # room for the numbers
    axes.set_xlabel("clicks, or one box")
    axes.set_ylabel(f"mean IoU of {evaluation['objects']} held-out objects")
    tidy(axes)
    figure.legend(loc="outside upper left", fontsize=11, frameon=False)
    return figure


def annotate(axes: Axes, x: float, y: float, color: str, *, is_above: bool) -> None:
    """Writes a value below its point, or above it."""
    axes.annotate(
        f"{y:.3f}",
        (x, y),
        (0, 9 if is_above else -9),
        textcoords="offset points",
        ha="center",
        va="bottom" if is_above else "top",
        color=color,
        fontsize=11,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )
