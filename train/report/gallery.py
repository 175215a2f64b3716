"""Draws objects at percentiles of the box's IoU: neither the best ones nor chosen by hand."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from sam_jax.data.example import Source
from sam_jax.evaluate.clicks import box_prompts, decode_masks, predict_boxes
from sam_jax.masks.overlap import mask_iou
from sam_jax.predict.predictor import SamPredictor
from sam_jax.visualize.style import GREEN, PanelGrid
from train.report.panels import MASK_KEY, OUTLINE_KEY, area_title, crop_around, draw_panel

PERCENTILES = (10, 50, 90)
PER_PERCENTILE = 3  # objects

# Lengths on the page, in inches.
PANEL, GAP, MARGIN, TITLE, HEADER = 2.1, 0.1, 0.15, 0.75, 0.35
HEADING = 0.38  # of the heading of a row above its panels


@dataclasses.dataclass(frozen=True)
class BoxedObject:
    """An object with the mask that is predicted from its box.

    Attributes:
      name: The name of the image and the index of the mask.
      image: The image.
      mask: The true mask.
      chosen: The output with the highest predicted IoU.
      predicted: Its predicted IoU.
    """

    name: str
    image: UInt8[np.ndarray, "h w 3"]
    mask: Bool[np.ndarray, "h w"]
    chosen: Bool[np.ndarray, "h w"]
    predicted: float


def choose_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Chooses the objects next to each of PERCENTILES of the box's IoU.

    Args:
      rows: The rows of objects.jsonl. The IoU is the one with tiles, if there is one.

    Returns:
      PER_PERCENTILE rows for each percentile, or all of them if they are fewer. Of few objects,
      some are chosen for several percentiles.
    """
    ordered = sorted(rows, key=lambda row: row.get("tiles", row)["box"]["chosen"])
    count = min(PER_PERCENTILE, len(ordered))
    chosen = []
    for percentile in PERCENTILES:
        middle = round(percentile / 100 * (len(ordered) - 1))
        start = min(max(0, middle - count // 2), len(ordered) - count)
        chosen += ordered[start : start + count]
    return chosen


def predict_rows(
    predictor: SamPredictor,
    source: Source,
    rows: list[dict[str, Any]],
    tiles: int | str | None,
) -> Iterator[BoxedObject]:
    """Prompts the model with the boxes of objects.

    Args:
      predictor: The predictor. Its image is replaced.
      source: The images.
      rows: Rows of objects.jsonl.
      tiles: See `SamPredictor.set_image`.

    Yields:
      The objects.
    """
    index_of = {source.name(index): index for index in range(len(source))}
    for row in rows:
        example = source[index_of[row["image"]]]
        masks = decode_masks([example.masks[row["mask"]]])
        predictor.set_image(example.image, tiles=tiles)
        (outputs,), (scores,) = predict_boxes(predictor, masks)
        best = int(scores.argmax())
        name = f"{row['image']}, mask {row['mask']}"
        yield BoxedObject(name, example.image, masks[0], outputs[best], float(scores[best]))


def draw_gallery(objects: list[BoxedObject]) -> Figure:
    """Draws a row per percentile: each object with its box, and with its predicted mask.

    Args:
      objects: The same number of objects for each of PERCENTILES, in their order.

    Returns:
      The figure.
    """
    count = len(objects) // len(PERCENTILES)
    grid = PanelGrid(
        columns=2 * PER_PERCENTILE,
        row_heights=[PANEL] * len(PERCENTILES),
        panel_width=PANEL,
        column_gap=GAP,
        row_gap=TITLE,
        margin=MARGIN,
        header=HEADER,
        group=2,
    )
    figure = grid.new_figure()
    box_key = Line2D([], [], color=GREEN, linewidth=2, linestyle="--", label="box prompt")
    figure.legend(
        handles=[OUTLINE_KEY, box_key, MASK_KEY],
        loc="upper center",
        ncols=3,
        fontsize=12,
        frameon=False,
    )
    for row, percentile in enumerate(PERCENTILES):
        y = 1 - (grid.bottom(row) - PANEL - HEADING) / grid.height
        heading = f"{percentile}th percentile of the IoU from boxes"
        figure.text(grid.left(0) / grid.width, y, heading, fontsize=12, weight="bold")
        for i, shown in enumerate(objects[row * count : (row + 1) * count]):
            crop = crop_around(shown.mask)
            axes = grid.add_panel(figure, row, 2 * i)
            draw_panel(axes, shown.image, shown.mask, crop)
            left, top, right, bottom = box_prompts(shown.mask)
            axes.add_patch(
                Rectangle(
                    (left, top),
                    right - left,
                    bottom - top,
                    fill=False,
                    edgecolor=GREEN,
                    linewidth=2,
                    linestyle="--",
                )
            )
            axes.set_title(area_title(row * count + i + 1, shown.mask), fontsize=10)
            axes = grid.add_panel(figure, row, 2 * i + 1)
            draw_panel(axes, shown.image, shown.mask, crop, shown.chosen)
            iou = float(mask_iou(shown.chosen, shown.mask))
            axes.set_title(f"IoU {iou:.2f}, predicted {shown.predicted:.2f}", fontsize=10)
    return figure
