"""What a masked autoencoder makes of held-out images: its error, and pictures to be looked at."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from sam_jax.data.example import BadSample, Source
from sam_jax.evaluate.reconstruction import BATCH_SIZE, center_crop, pad_batch, reconstruct
from sam_jax.model.mae import MaskedAutoencoder
from sam_jax.visualize.style import PanelGrid
from train.config import Reconstruction
from train.metrics import read_rows
from train.report.curves import draw_loss
from train.report.html import items, table, write_page

SHOWN = 8  # images
GREY = 128  # of what is hidden
PANEL, GAP, MARGIN, HEADER = 2.2, 0.1, 0.15, 0.4  # inches


def choose_images(source: Source, model: MaskedAutoencoder) -> list[tuple[int, str, np.ndarray]]:
    """(index, name, image in the frame) of up to SHOWN images that are spread over a source."""
    found = []
    for stretch in np.array_split(np.arange(len(source)), min(SHOWN, len(source))):
        for index in map(int, stretch):
            try:
                found.append((index, source.name(index), center_crop(source[index].image, model)))
            except BadSample:
                continue  # the next one of the stretch
            break
    return found


def draw_paintings(images: np.ndarray, hidden: np.ndarray, painted: np.ndarray) -> Figure:
    """Two images a row: whole, what the autoencoder saw, and what it painted between.

    Args:
      images: 'n h w 3' uint8; hidden: 'n h w' bool; painted: 'n h w 3' float of 0 to 255.
    """
    columns, rows = 2 if len(images) > 1 else 1, -(-len(images) // 2)
    grid = PanelGrid(
        columns=3 * columns,
        row_heights=[PANEL * images.shape[1] / images.shape[2]] * rows,
        panel_width=PANEL,
        column_gap=GAP,
        row_gap=GAP,
        margin=MARGIN,
        header=HEADER,
        group=3,
    )
    figure = grid.new_figure()
    panels = zip(
        images,
        np.where(hidden[..., None], GREY, images),
        np.where(hidden[..., None], painted, images),
        strict=True,
    )
    for number, pictures in enumerate(panels):
        row, column = divmod(number, columns)
        for place, picture in enumerate(pictures):
            axes = grid.add_panel(figure, row, 3 * column + place)
            axes.imshow(picture.astype(np.uint8), interpolation="nearest")
            axes.set_axis_off()
            if row == 0:
                text = ("image", "visible", "hidden patches painted")[place]
                axes.set_title(text, fontsize=11)
    return figure


def write_reconstruction_report(
    workdir: Path,
    model: MaskedAutoencoder,
    params: dict,
    config: Reconstruction,
    held_out: Source,
    evaluation: dict,
) -> Path:
    """Writes curves.png, paintings.png and then index.html into workdir/report/.

    Args:
      workdir: of the run, with its config.json and metrics.jsonl.
      model, params, config: as for `evaluate_reconstruction`.
      held_out: the images that were evaluated on; evaluation: what evaluation.json holds.

    Returns:
      The path of index.html.
    """
    chosen = choose_images(held_out, model)[:BATCH_SIZE]
    index, names, images = zip(*chosen, strict=True)
    batch = pad_batch(index, images)
    _, hidden, painted = map(np.asarray, reconstruct(model, config.normalized, params, *batch))
    count = len(chosen)
    rows = read_rows(workdir / "metrics.jsonl")
    evaluations = read_rows(workdir / "evaluations.jsonl")
    last = {"step": rows[-1]["step"] if rows else 0, "loss": evaluation["loss"]}
    figures = {
        "curves.png": draw_loss(rows, [*evaluations, last]),
        "paintings.png": draw_paintings(np.stack(images), hidden[:count], painted[:count]),
    }
    scale = (
        "each patch by its own mean and deviation, so that 1 is what a plain patch of the right "
        "colour gets"
        if config.normalized
        else "in normalised colours"
    )
    summary = (
        f"Mean squared error of the hidden patches of {evaluation['images']} held-out images: "
        f"{evaluation['loss']:.3f}, {scale}."
    )
    note = NORMALIZED if config.normalized else ""
    shown = lambda v: f"{v:.4f}" if isinstance(v, float) else v
    others = [(k.replace("_", " "), shown(v)) for k, v in evaluation.items()]
    body = BODY.format(others=table(others), note=note, names=items(list(names)))
    source = evaluation.get("source", "images")
    return write_page(workdir, f"Masked autoencoder of {source}", summary, body, figures)


NORMALIZED = """<p>The autoencoder does not learn a hidden patch's mean and deviation: in the
pictures they are the true ones.</p>"""

BODY = """<h2>Evaluation</h2>
<table>
{others}
</table>
<h2>Training</h2>
<img src="curves.png" alt="Loss against steps">
<h2>Held-out images</h2>
<a href="paintings.png"><img src="paintings.png" alt="Images, their visible patches, and the hidden
ones painted"></a>
{note}
<ol>
{names}
</ol>"""
