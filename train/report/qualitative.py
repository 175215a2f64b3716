"""A picture of held-out objects: what the model answers to one click on each, and to more."""

import dataclasses
from collections.abc import Iterator

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from sam_jax.data.example import BadSample, Example, Source
from sam_jax.evaluate.clicks import decode_masks, mask_iou, predict_clicks
from sam_jax.masks import rle
from sam_jax.masks.clicks import center_click, center_click_on_error
from sam_jax.predict.predictor import SamPredictor
from sam_jax.visualize.style import BLUE, GREEN, ORANGE, RED, PanelGrid
from train.report.curves import count_of

EXAMPLES = 8
SHOWN = (1, 3, 9)  # clicks after which an example is shown
MIN_AREA = 0.01  # of the image; smaller objects are not shown, unless there are no others
MAX_SIDE = 600  # pixels of an example's image that are drawn

# Lengths of the page of examples, in inches.
PANEL, GAP, MARGIN, TITLE, HEADER = 2.3, 0.12, 0.15, 0.34, 0.8
SLIMMEST, TALLEST = 0.2, 1.6  # height of a row of panels over their width


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model answers to some clicks.

    Attributes:
      clicks: (x, y, label) each, 1 on the object and 0 off it.
      masks: 'm h w' bool; predicted, iou: 'm', the IoU it expects of each, and the true one.
    """

    clicks: list[tuple[int, int, int]]
    masks: np.ndarray
    predicted: np.ndarray
    iou: np.ndarray

    @property
    def best(self) -> int:
        """The mask that the model would choose."""
        return int(self.predicted.argmax())


@dataclasses.dataclass(frozen=True)
class Shown:
    """An object, 'h w 3' uint8 image and 'h w' bool mask, and the answers after SHOWN clicks."""

    name: str
    image: np.ndarray
    mask: np.ndarray
    answers: list[Answer]


def choose_objects(source: Source) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Chooses an object of each of up to EXAMPLES images spread over a source: small and large.

    Yields:
      What a person would look for, the image 'h w 3', and the object's mask 'h w'.
    """
    stretches = np.array_split(np.arange(len(source)), min(EXAMPLES, len(source)))
    for number, stretch in enumerate(stretches):
        rank = (0.5 + number * 0.618) % 1  # of its area in the image: spread evenly, in no order
        for index in map(int, stretch):
            try:
                example = source[index]
                which = choose_mask(example, rank)
                (mask,) = decode_masks(Example(example.image, [example.masks[which]]))
            except (BadSample, rle.RLEError):
                continue  # the next one of the stretch
            yield f"{source.name(index)}, mask {which}", example.image, mask
            break


def choose_mask(example: Example, rank: float) -> int:
    """The index of the mask at a rank, 0 to 1, by area among those that are not tiny."""
    areas = np.array([rle.area(mask) for mask in example.masks])
    order = np.argsort(areas, kind="stable")
    height, width = example.image.shape[:2]
    large = order[areas[order] >= MIN_AREA * height * width]
    order = large if len(large) else order
    return int(order[int(rank * len(order))])


def play(predictor: SamPredictor, name: str, image: np.ndarray, mask: np.ndarray) -> Shown:
    """Clicks on an object as `evaluate_clicks` does."""
    predictor.set_image(image)
    clicks = [(*center_click(mask)[:2], 1)]
    answers = []
    rounds = predict_clicks(predictor, mask[None])
    for number, ((masks,), (predicted,)) in enumerate(rounds, start=1):
        answer = Answer(list(clicks), masks, predicted, mask_iou(masks, mask))
        if number in SHOWN:
            answers.append(answer)
        if click := center_click_on_error(masks[answer.best], mask):
            clicks.append(click)
    return Shown(name, image, mask, answers)


def draw_examples(objects: list[Shown]) -> Figure:
    """A row an object: the first click, its three answers, and the mask after more clicks."""
    columns = 1 + 3 + len(SHOWN) - 1
    aspects = [shown.image.shape[0] / shown.image.shape[1] for shown in objects]
    heights = [PANEL * min(max(aspect, SLIMMEST), TALLEST) for aspect in aspects]
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
        1: (3, "three answers to the first click, their IoU as predicted and true"),
    } | {4 + i: (1, f"after {number} clicks") for i, number in enumerate(SHOWN[1:])}
    for column, (span, text) in headings.items():
        middle = (grid.left(column) + grid.left(column + span - 1) + PANEL) / 2 / grid.width
        y = 1 - (HEADER - 0.15) / grid.height
        figure.text(middle, y, text, ha="center", va="bottom", fontsize=12, weight="bold")
    draw_key(figure)
    for i, shown in enumerate(objects):
        row = [grid.add_panel(figure, i, column) for column in range(columns)]
        draw_row(row, i + 1, shown)
    return figure


def draw_key(figure: Figure) -> None:
    """What lines, colours and marks mean, at the top."""
    dot = {"linestyle": "none", "markeredgecolor": "white", "markersize": 9}
    figure.legend(
        handles=[
            Line2D([], [], color=ORANGE, linewidth=2.5, label="outline of the true mask"),
            Patch(facecolor=BLUE, alpha=0.6, label="predicted mask"),
            Patch(facecolor="none", edgecolor=BLUE, linewidth=3, label="chosen by predicted IoU"),
            Line2D([], [], **dot, marker="o", color=GREEN, label="click on the object"),
            Line2D([], [], **dot, marker="X", color=RED, label="click off the object"),
        ],
        loc="upper center",
        ncols=5,
        fontsize=12,
        frameon=False,
    )


def draw_row(row: list[Axes], number: int, shown: Shown) -> None:
    """Fills the panels of an object, of the number by which the page lists it."""
    first, *later = shown.answers
    draw_panel(row[0], shown, None, first.clicks)
    row[0].set_title(f"{number}: {shown.mask.mean():.1%} of the image", fontsize=11)
    for i, axes in enumerate(row[1:4]):
        draw_panel(axes, shown, first.masks[i])
        text = f"predicted {first.predicted[i]:.2f}, true {first.iou[i]:.2f}"
        is_best = i == first.best
        axes.set_title(text, fontsize=11, weight="bold" if is_best else "normal")
        if is_best:
            axes.spines[:].set(visible=True, color=BLUE, linewidth=4)
    for axes, asked, answer in zip(row[4:], SHOWN[1:], later, strict=True):
        draw_panel(axes, shown, answer.masks[answer.best], answer.clicks)
        enough = len(answer.clicks) < asked  # as nothing was wrong any more
        text = f", {count_of(str(len(answer.clicks)))} enough" if enough else ""
        axes.set_title(f"IoU {answer.iou[answer.best]:.2f}{text}", fontsize=11)


def draw_panel(axes: Axes, shown: Shown, mask: np.ndarray | None, clicks=()) -> None:
    """Draws the image with the true outline; grey under a predicted mask, if there is one."""
    height, width = shown.mask.shape
    step = -(-max(height, width) // MAX_SIDE)
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    image = shown.image[::step, ::step]
    if mask is not None:
        image = 0.5 * image.mean(axis=-1, keepdims=True).repeat(3, axis=-1) + 127
        tint = [int(BLUE[i : i + 2], 16) for i in (1, 3, 5)]
        image = np.where(mask[::step, ::step, None], 0.4 * image + 0.6 * np.array(tint), image)
    axes.imshow(image.astype(np.uint8), extent=extent)
    draw_outline(axes, shown.mask[::step, ::step], extent)
    for wanted, color, marker in ((1, GREEN, "o"), (0, RED, "X")):
        points = [(x, y) for x, y, label in clicks if label == wanted]
        if points:
            axes.scatter(
                *np.transpose(points), s=50, c=color, marker=marker, edgecolors="white", zorder=3
            )
    axes.set_xlim(extent[:2])
    axes.set_ylim(extent[2:])
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def draw_outline(axes: Axes, mask: np.ndarray, extent: tuple) -> None:
    """Draws the border of a mask 'h w' that fills the extent (left, right, bottom, top)."""
    if not mask.any():
        return  # thinner than what is drawn of the image
    left, right, bottom, top = extent
    height, width = mask.shape
    x = left + (np.arange(-1, width + 1) + 0.5) * (right - left) / width
    y = top + (np.arange(-1, height + 1) + 0.5) * (bottom - top) / height
    border = axes.contour(x, y, np.pad(mask, 1).astype(float), [0.5], colors=ORANGE, linewidths=1.5)
    border.set_path_effects([withStroke(linewidth=2.7, foreground="black")])
