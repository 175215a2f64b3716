"""Draws held-out objects with the model's masks after one click and after more clicks."""

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from sam_jax.data.example import BadSample, Example, Source
from sam_jax.evaluate.clicks import decode_masks, predict_clicks
from sam_jax.masks import rle
from sam_jax.masks.clicks import center_click, center_click_on_error
from sam_jax.masks.overlap import mask_iou
from sam_jax.predict.predictor import SamPredictor
from sam_jax.visualize.style import BLUE, GREEN, RED, PanelGrid
from train.report.curves import count_clicks
from train.report.panels import (
    MASK_KEY,
    OUTLINE_KEY,
    Click,
    Crop,
    area_title,
    crop_if_small,
    draw_panel,
)

NUM_OBJECTS = 8
CLICK_COUNTS = (1, 3, 9)  # numbers of clicks after which the masks are shown
MIN_AREA_FRACTION = 0.01  # of the image; smaller objects are shown only if there are no others

# Lengths on the page, in inches.
PANEL, GAP, MARGIN, TITLE, HEADER = 2.3, 0.12, 0.15, 0.34, 0.8
MIN_ASPECT, MAX_ASPECT = 0.2, 1.6  # height of a row of panels divided by the panels' width


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The model's masks after some clicks.

    Attributes:
      clicks: The clicks.
      masks: The predicted masks.
      predicted: The predicted IoU of each mask.
      iou: The IoU of each mask with the true mask.
    """

    clicks: list[Click]
    masks: Bool[np.ndarray, "m h w"]
    predicted: Float[np.ndarray, " m"]
    iou: Float[np.ndarray, " m"]

    @property
    def best(self) -> int:
        """The index of the mask with the highest predicted IoU."""
        return int(self.predicted.argmax())


@dataclasses.dataclass(frozen=True)
class ShownObject:
    """An object with the predictions after each of CLICK_COUNTS clicks.

    Attributes:
      name: The name of the image and the index of the mask.
      image: The image.
      mask: The true mask.
      crop: The part of the image to draw.
      predictions: The predictions.
    """

    name: str
    image: UInt8[np.ndarray, "h w 3"]
    mask: Bool[np.ndarray, "h w"]
    crop: Crop
    predictions: list[Prediction]


def choose_objects(
    source: Source,
) -> Iterator[tuple[str, UInt8[np.ndarray, "h w 3"], Bool[np.ndarray, "h w"]]]:
    """Chooses one object from each of up to NUM_OBJECTS images, spread over a source.

    Args:
      source: The source.

    Yields:
      The name of the image with the index of the mask, the image, and the mask.
    """
    ranges = np.array_split(np.arange(len(source)), min(NUM_OBJECTS, len(source)))
    for number, indices in enumerate(ranges):
        # Multiples of the golden ratio spread the ranks evenly, in no obvious order.
        rank = (0.5 + number * 0.618) % 1
        for index in map(int, indices):
            try:
                example = source[index]
                mask_index = choose_mask(example, rank)
                (mask,) = decode_masks([example.masks[mask_index]])
            except (BadSample, rle.RLEError):
                continue  # with the next image of the range
            yield f"{source.name(index)}, mask {mask_index}", example.image, mask
            break


def choose_mask(example: Example, rank: float) -> int:
    """Chooses a mask by its relative rank by area.

    Args:
      example: The image and its masks.
      rank: From 0 for the smallest mask to 1 for the largest (exclusive). Masks smaller than
        MIN_AREA_FRACTION are ranked only if there are no others.

    Returns:
      The index of the mask.
    """
    areas = np.array([rle.area(mask) for mask in example.masks])
    order = np.argsort(areas, kind="stable")
    height, width = example.image.shape[:2]
    large = order[areas[order] >= MIN_AREA_FRACTION * height * width]
    order = large if len(large) else order
    return int(order[int(rank * len(order))])


def click_on_object(
    predictor: SamPredictor,
    name: str,
    image: UInt8[np.ndarray, "h w 3"],
    mask: Bool[np.ndarray, "h w"],
    tiles: int | str | None = None,
) -> ShownObject:
    """Clicks on an object as `evaluate_clicks` does.

    Args:
      predictor: The predictor. Its image is replaced.
      name: The name to show.
      image: The image.
      mask: The true mask.
      tiles: See `SamPredictor.set_image`.

    Returns:
      The object with the predictions.
    """
    predictor.set_image(image, tiles=tiles)
    x, y, _ = center_click(mask)
    clicks: list[Click] = [(x, y, 1)]
    predictions = []
    rounds = predict_clicks(predictor, mask[None])
    for number, ((masks,), (predicted,)) in enumerate(rounds, start=1):
        prediction = Prediction(list(clicks), masks, predicted, mask_iou(masks, mask))
        if number in CLICK_COUNTS:
            predictions.append(prediction)
        if click := center_click_on_error(masks[prediction.best], mask):
            clicks.append(click)
    return ShownObject(name, image, mask, crop_if_small(mask), predictions)


def draw_objects(objects: list[ShownObject]) -> Figure:
    """Draws a row per object: the first click, the three masks after it, and later masks."""
    columns = 1 + 3 + len(CLICK_COUNTS) - 1
    shapes = [shown.mask[shown.crop].shape for shown in objects]
    aspects = [height / width for height, width in shapes]
    heights = [PANEL * min(max(aspect, MIN_ASPECT), MAX_ASPECT) for aspect in aspects]
    grid = PanelGrid(
        columns=columns,
        row_heights=heights,
        panel_width=PANEL,
        column_gap=GAP,
        row_gap=TITLE,
        margin=MARGIN,
        header=HEADER,
    )
    figure = grid.new_figure()
    headings = {
        0: (1, "image, first click"),
        1: (3, "three masks after the first click, with predicted and true IoU"),
    } | {4 + i: (1, f"after {number} clicks") for i, number in enumerate(CLICK_COUNTS[1:])}
    for column, (span, text) in headings.items():
        middle = (grid.left(column) + grid.left(column + span - 1) + PANEL) / 2 / grid.width
        y = 1 - (HEADER - 0.15) / grid.height
        figure.text(middle, y, text, ha="center", va="bottom", fontsize=12, weight="bold")
    draw_legend(figure)
    for i, shown in enumerate(objects):
        row = [grid.add_panel(figure, i, column) for column in range(columns)]
        draw_row(row, i + 1, shown)
    return figure


def draw_legend(figure: Figure) -> None:
    """Draws the legend of lines, colors and markers at the top."""

    def marker(shape: str, color: str, label: str) -> Line2D:
        return Line2D(
            [],
            [],
            linestyle="none",
            markeredgecolor="white",
            markersize=9,
            marker=shape,
            color=color,
            label=label,
        )

    figure.legend(
        handles=[
            OUTLINE_KEY,
            MASK_KEY,
            Patch(facecolor="none", edgecolor=BLUE, linewidth=3, label="chosen by predicted IoU"),
            marker("o", GREEN, "click on the object"),
            marker("X", RED, "click off the object"),
        ],
        loc="upper center",
        ncols=5,
        fontsize=12,
        frameon=False,
    )


def draw_row(row: list[Axes], number: int, shown: ShownObject) -> None:
    """Draws the panels of an object; `number` is its number in the list on the page."""
    first, *later = shown.predictions
    draw = functools.partial(draw_panel, image=shown.image, true_mask=shown.mask, crop=shown.crop)
    draw(row[0], clicks=first.clicks)
    row[0].set_title(area_title(number, shown.mask), fontsize=11)
    for i, axes in enumerate(row[1:4]):
        draw(axes, mask=first.masks[i])
        text = f"predicted {first.predicted[i]:.2f}, true {first.iou[i]:.2f}"
        is_best = i == first.best
        axes.set_title(text, fontsize=11, weight="bold" if is_best else "normal")
        if is_best:
            axes.spines[:].set(visible=True, color=BLUE, linewidth=4)
    for axes, count, prediction in zip(row[4:], CLICK_COUNTS[1:], later, strict=True):
        draw(axes, mask=prediction.masks[prediction.best], clicks=prediction.clicks)
        title = f"IoU {prediction.iou[prediction.best]:.2f}"
        if len(prediction.clicks) < count:  # the mask was perfect after fewer clicks
            title += f", {count_clicks(str(len(prediction.clicks)))} sufficed"
        axes.set_title(title, fontsize=11)
