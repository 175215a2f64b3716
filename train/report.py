"""What a run led to, to be looked at: three pictures and one page with the numbers.

Colours are Okabe and Ito's (2008), which colour-blind people can tell apart; what matters differs
in shape or in words too. Pictures are drawn without pyplot, whose state is the process's.
"""

import dataclasses
import html
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from sam_jax.data.example import BadSample, Example, Source
from sam_jax.evaluate.clicks import mask_iou, paint_masks, rounds_of
from sam_jax.masks import rle
from sam_jax.masks.clicks import click_on_error, farthest_click
from sam_jax.predict.predictor import SamPredictor
from train.metrics import read_rows

BLUE, GREEN, ORANGE, RED, GREY = "#0072B2", "#009E73", "#E69F00", "#D55E00", "#666666"
DPI = 120

EXAMPLES = 8
SHOWN = (1, 3, 9)  # clicks after which an example is shown
MIN_AREA = 0.01  # of the image; smaller objects are not shown, unless there are no others
MAX_SIDE = 600  # pixels of an example's image that are drawn

# Lengths of the page of examples, in inches.
PANEL, GAP, MARGIN, TITLE, HEADER = 2.3, 0.12, 0.15, 0.34, 0.8
SLIMMEST, TALLEST = 0.2, 1.6  # height of a row of panels over their width

MAIN = (
    *("model.image_size", "model.patch_size", "model.embed_dim", "model.depth", "model.dtype"),
    *("data.source", "data.held_out", "objective.points", "objective.extra_rounds"),
    *("objective.masks_per_image", "optimizer.peak_lr", "optimizer.warmup_steps"),
    *("optimizer.drop_at", "optimizer.weight_decay", "optimizer.layer_decay"),
    *("batch_size", "num_steps", "init_from", "train_only", "seed"),
)  # fields of the config on the page


def write_report(
    workdir: Path, predictor: SamPredictor, held_out: Source, evaluation: dict
) -> Path:
    """Writes curves.png, clicks.png, examples.png and then index.html into workdir/report/.

    Args:
      workdir: of the run, with its config.json and metrics.jsonl.
      predictor: of the trained model; its image is replaced.
      held_out: the examples that were evaluated on.
      evaluation: what evaluation.json holds.
    Returns:
      The path of index.html.
    """
    folder = workdir / "report"
    folder.mkdir(exist_ok=True)
    config = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    rows = read_rows(workdir / "metrics.jsonl")
    evaluations = read_rows(workdir / "evaluations.jsonl")
    evaluations.append({"step": config["num_steps"]} | evaluation)
    objects = [play(predictor, *chosen) for chosen in choose_objects(held_out)]
    figures = {
        "curves.png": draw_curves(rows, evaluations),
        "clicks.png": draw_clicks(evaluation),
        "examples.png": draw_examples(objects),
    }
    for name, figure in figures.items():
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=DPI)
        write_whole(folder / name, png.getvalue())
    page = folder / "index.html"
    names = [shown.name for shown in objects]
    write_whole(page, make_page(config, evaluation, names).encode("utf-8"))
    return page


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file that is whole or not there."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def new_figure(width: float, height: float) -> Figure:
    """An empty picture of a size in inches."""
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


# Curves.


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


def draw_curve(axes: Axes, steps: list, values: list, color: str, label: str | None) -> None:
    """A curve of single batches, and over it their moving mean where they are many."""
    window = max(1, len(values) // 15)
    weights = np.ones(window)
    mean = np.convolve(values, weights, "same") / np.convolve(np.ones(len(values)), weights, "same")
    if window > 1:
        axes.plot(steps, values, color=color, alpha=0.3, linewidth=1)
    axes.plot(steps, mean, color=color, linewidth=2, marker="." if window == 1 else "", label=label)


def tidy(axes: Axes) -> None:
    """Light grid, no frame, text of a readable size."""
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=11)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_size(12)


def count_of(clicks: str) -> str:
    return "1 click" if clicks == "1" else f"{clicks} clicks"


# Clicks.


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


# Examples.


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
                (mask,) = paint_masks(Example(example.image, [example.masks[which]]))
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
    clicks = [(*farthest_click(mask)[:2], 1)]
    answers = []
    for number, ((masks,), (predicted,)) in enumerate(rounds_of(predictor, mask[None]), start=1):
        answer = Answer(list(clicks), masks, predicted, mask_iou(masks, mask))
        if number in SHOWN:
            answers.append(answer)
        if click := click_on_error(masks[answer.best], mask):
            clicks.append(click)
    return Shown(name, image, mask, answers)


def draw_examples(objects: list[Shown]) -> Figure:
    """A row an object: the first click, its three answers, and the mask after more clicks."""
    columns = 1 + 3 + len(SHOWN) - 1
    aspects = [shown.image.shape[0] / shown.image.shape[1] for shown in objects]
    heights = [PANEL * min(max(aspect, SLIMMEST), TALLEST) for aspect in aspects]
    width = 2 * MARGIN + columns * (PANEL + GAP) - GAP
    height = HEADER + sum(heights) + len(heights) * TITLE + MARGIN
    figure = new_figure(width, height)
    left = [MARGIN + column * (PANEL + GAP) for column in range(columns)]
    headings = {
        0: (1, "image, first click"),
        1: (3, "three answers to the first click, their IoU as predicted and true"),
    } | {4 + i: (1, f"after {number} clicks") for i, number in enumerate(SHOWN[1:])}
    for column, (span, text) in headings.items():
        middle = left[column] + (span * (PANEL + GAP) - GAP) / 2
        y = 1 - (HEADER - 0.15) / height
        figure.text(middle / width, y, text, ha="center", va="bottom", fontsize=12, weight="bold")
    draw_key(figure)

    top = height - HEADER
    for number, (shown, tall) in enumerate(zip(objects, heights, strict=True), start=1):
        bottom = top - TITLE - tall
        row = [
            figure.add_axes((x / width, bottom / height, PANEL / width, tall / height))
            for x in left
        ]
        draw_row(row, number, shown)
        top = bottom
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


# The page.


def make_page(config: dict, evaluation: dict, names: list[str]) -> str:
    """The page's HTML: no script, nothing from elsewhere, and all text escaped."""
    by_prompt = {count_of(clicks): iou for clicks, iou in evaluation["clicks"].items()}
    by_prompt["box"] = evaluation["box"]
    scores = [(name, f"{iou['chosen']:.3f}", f"{iou['oracle']:.3f}")
              for name, iou in by_prompt.items()]  # fmt: skip
    others = [(k.replace("_", " "), v) for k, v in evaluation.items() if not isinstance(v, dict)]
    fields = flatten_dict(config, sep=".")
    few, *_, many = evaluation["clicks"]
    source = config["data"]["source"]
    return PAGE.format(
        title=html.escape(f"SAM trained on {source}"),
        summary=html.escape(
            f"Mean IoU of {evaluation['objects']} held-out objects: "
            f"{evaluation['clicks'][few]['chosen']:.3f} after {count_of(few)}, "
            f"{evaluation['clicks'][many]['chosen']:.3f} after {count_of(many)}, "
            f"{evaluation['box']['chosen']:.3f} from a box."
        ),
        scores=table(scores),
        others=table(others),
        names="\n".join(f"<li>{html.escape(name)}</li>" for name in names),
        config=table([(name, fields[name]) for name in MAIN if name in fields]),
    )


def table(rows: list[tuple]) -> str:
    """Rows of a table, the first cell of each being its heading."""
    cells = lambda row: "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row)
    return "\n".join(
        f'<tr><th scope="row">{html.escape(str(first))}</th>{cells(rest)}</tr>'
        for first, *rest in rows
    )


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ max-width: 76rem; margin: 2rem auto; padding: 0 1rem; background: #fff; color: #222;
  font: 1rem/1.5 system-ui, sans-serif; }}
h1, h2 {{ line-height: 1.2; overflow-wrap: anywhere; }}
h2 {{ margin-top: 2.5rem; }}
img {{ max-width: 100%; height: auto; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: 0.2rem 1.5rem 0.2rem 0; border-bottom: 1px solid #ddd; text-align: left;
  vertical-align: top; overflow-wrap: anywhere; }}
th[scope=row] {{ font-weight: normal; }}
.side {{ display: flex; flex-wrap: wrap; gap: 1rem 3rem; align-items: flex-start; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{summary}</p>
<h2>Evaluation</h2>
<div class="side">
<table>
<tr><th>prompt</th><th>chosen</th><th>oracle</th></tr>
{scores}
</table>
<table>
{others}
</table>
</div>
<p>Mean IoU. Of several outputs, chosen is the one with the highest predicted IoU, the oracle's
the best one. The ceiling is that of one click, for who knows all objects but not which one is
meant.</p>
<img src="clicks.png" alt="Mean IoU by the number of clicks">
<h2>Training</h2>
<img src="curves.png" alt="Loss and mean IoU against steps">
<h2>Held-out examples</h2>
<a href="examples.png"><img src="examples.png" alt="Clicks and masks of the objects below"></a>
<ol>
{names}
</ol>
<h2>Configuration</h2>
<table>
{config}
</table>
<p>All fields: <a href="../config.json">config.json</a></p>
</body>
</html>
"""
