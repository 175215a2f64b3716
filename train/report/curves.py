"""Plots of a run: its curves, and what it reached by the number of clicks."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sam_jax.visualize.style import BLUE, GREY, ORANGE, new_figure, tidy


def draw_curves(rows: list[dict], evaluations: list[dict]) -> Figure:
    """Loss and mean IoU against steps.

    Args:
      rows: of metrics.jsonl; evaluations: of evaluations.jsonl, with the last one.
    """
    figure = new_figure(8, 7)
    figure.set_layout_engine("constrained")
    loss, iou = figure.subplots(2, 1, sharex=True)
    steps = [row["step"] for row in rows]
    draw_curve(loss, steps, [row["loss"] for row in rows], "black", None)
    for r, color, label in ((0, BLUE, "first round"), (-1, ORANGE, "last round")):
        values = [row["miou_of_rounds"][r] for row in rows]
        draw_curve(iou, steps, values, color, f"training, {label}")
    evaluated = [row["step"] for row in evaluations]
    few, *_, many = evaluations[-1]["clicks"]
    for clicks, color, marker in ((few, BLUE, "o"), (many, ORANGE, "s")):
        iou.plot(
            evaluated,
            [row["clicks"][clicks]["chosen"] for row in evaluations],
            color=color,
            marker=marker,
            markersize=8,
            markeredgecolor="black",
            linestyle="none",
            clip_on=False,
            zorder=3,
            label=f"held out, {count_of(clicks)}",
        )
    loss.set_ylabel("loss")
    loss.set_ylim(bottom=0)
    iou.set_ylabel("mean IoU")
    iou.set_ylim(0, 1)
    iou.set_xlabel("step")
    iou.set_xlim(0, 1.02 * max([*steps, *evaluated]))
    iou.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    for axes in (loss, iou):
        tidy(axes)
    figure.legend(loc="outside upper left", ncols=2, fontsize=11, frameon=False)
    return figure


def draw_loss(rows: list[dict], evaluations: list[dict]) -> Figure:
    """The loss against steps; rows, evaluations: {"step", "loss"} each."""
    figure = new_figure(8, 4)
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    steps = [row["step"] for row in rows]
    draw_curve(axes, steps, [row["loss"] for row in rows], BLUE, "training")
    axes.plot(
        [row["step"] for row in evaluations],
        [row["loss"] for row in evaluations],
        color=ORANGE,
        marker="s",
        markersize=8,
        markeredgecolor="black",
        linestyle="none",
        clip_on=False,
        zorder=3,
        label="held out",
    )
    axes.set_ylabel("loss")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_xlim(0, 1.02 * max([*steps, *(row["step"] for row in evaluations)]))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    tidy(axes)
    figure.legend(loc="outside upper left", ncols=2, fontsize=11, frameon=False)
    return figure


def draw_curve(axes: Axes, steps: list, values: list, color: str, label: str | None) -> None:
    """A curve of single batches, and over it their moving mean where they are many."""
    window = max(1, len(values) // 15)
    weights = np.ones(window)
    mean = np.convolve(values, weights, "same") / np.convolve(np.ones(len(values)), weights, "same")
    if window > 1:
        axes.plot(steps, values, color=color, alpha=0.3, linewidth=1)
    axes.plot(steps, mean, color=color, linewidth=2, marker="." if window == 1 else "", label=label)


def count_of(clicks: str) -> str:
    """A number of clicks in words."""
    return "1 click" if clicks == "1" else f"{clicks} clicks"


def draw_clicks(evaluation: dict) -> Figure:
    """Mean IoU by the number of clicks, and of a box; see `evaluate_clicks`."""
    figure = new_figure(8, 5.5)
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    numbers = list(evaluation["clicks"])
    places = range(len(numbers))
    box = len(numbers) + 0.25
    for kind, color, marker, label in (
        ("oracle", ORANGE, "s", "oracle: the best of the outputs"),
        ("chosen", BLUE, "o", "chosen: the output with the highest predicted IoU"),
    ):
        values = [evaluation["clicks"][number][kind] for number in numbers]
        style = {"color": color, "marker": marker, "markersize": 8}
        axes.plot(places, values, **style, linewidth=2, label=label)
        axes.plot([box], [evaluation["box"][kind]], **style)
    for place, iou in [*zip(places, evaluation["clicks"].values(), strict=True),
                       (box, evaluation["box"])]:  # fmt: skip
        annotate(axes, place, iou["chosen"], BLUE, -1)
        if iou["oracle"] > iou["chosen"]:
            annotate(axes, place, iou["oracle"], "#8A5F00", 1)  # orange, dark enough to be read
    ceiling = evaluation["ceiling"]
    label = f"ceiling of one click, not knowing which object is meant: {ceiling:.3f}"
    axes.axhline(ceiling, color=GREY, linestyle="--", label=label)
    axes.set_xticks([*places, box], [*numbers, "box"])
    axes.set_xlim(-0.4, box + 0.4)
    lowest = min(iou["chosen"] for iou in (*evaluation["clicks"].values(), evaluation["box"]))
    axes.set_ylim(min(0, lowest - 0.1), 1.1)  # with room for the values
    axes.set_xlabel("clicks, or one box")
    axes.set_ylabel(f"mean IoU of {evaluation['objects']} held-out objects")
    tidy(axes)
    figure.legend(loc="outside upper left", fontsize=11, frameon=False)
    return figure


def annotate(axes: Axes, x: float, y: float, color: str, side: int) -> None:
    """Writes a value under its point, or over it where `side` is 1."""
    axes.annotate(
        f"{y:.3f}",
        (x, y),
        (0, 9 * side),
        textcoords="offset points",
        ha="center",
        va="bottom" if side > 0 else "top",
        color=color,
        fontsize=11,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )
