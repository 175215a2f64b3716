"""The report of a masked autoencoder: its loss on held-out images, and pictures of them."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8
from matplotlib.figure import Figure

from sam_jax.data.example import BadSample, Source
from sam_jax.evaluate.reconstruction import BATCH_SIZE, center_crop, pad_batch, reconstruct
from sam_jax.model.mae import MaskedAutoencoder
from sam_jax.visualize.style import PanelGrid
from train.config import Reconstruction
from train.report.curves import draw_loss
from train.report.page import list_names, table_rows, write_page
from train.rows import read_rows
from train.summary import read_summary

NUM_IMAGES = 8
REMOVED_GRAY = 128  # value of removed pixels
PANEL, GAP, MARGIN, HEADER = 2.2, 0.1, 0.15, 0.4  # inches


def choose_images(
    source: Source, model: MaskedAutoencoder
) -> list[tuple[int, str, UInt8[np.ndarray, "h w 3"]]]:
    """Chooses up to NUM_IMAGES images that are spread over a source.

    Args:
      source: The source.
      model: The model that the images are cropped for.

    Returns:
      The index, the name and the center crop of each image.
    """
    chosen = []
    for indices in np.array_split(np.arange(len(source)), min(NUM_IMAGES, len(source))):
        for index in map(int, indices):
            try:
                image = center_crop(source[index].image, model)
            except BadSample:
                continue  # with the next image of the range
            chosen.append((index, source.name(index), image))
            break
    return chosen


def draw_reconstructions(
    images: UInt8[np.ndarray, "n h w 3"],
    is_removed: Bool[np.ndarray, "n h w"],
    reconstructed: Float[np.ndarray, "n h w 3"],
) -> Figure:
    """Draws two images per row: the image, its visible patches, and its reconstruction.

    Args:
      images: The images.
      is_removed: True for pixels of removed patches.
      reconstructed: The reconstructed pixels, from 0 to 255.

    Returns:
      The figure.
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
        np.where(is_removed[..., None], REMOVED_GRAY, images),
        np.where(is_removed[..., None], reconstructed, images),
        strict=True,
    )
    for number, pictures in enumerate(panels):
        row, column = divmod(number, columns)
        for i, picture in enumerate(pictures):
            axes = grid.add_panel(figure, row, 3 * column + i)
            axes.imshow(picture.astype(np.uint8), interpolation="nearest")
            axes.set_axis_off()
            if row == 0:
                title = ("image", "visible patches", "reconstruction")[i]
                axes.set_title(title, fontsize=11)
    return figure


def write_reconstruction_report(
    workdir: Path,
    model: MaskedAutoencoder,
    params: dict[str, Any],
    config: Reconstruction,
    eval_split: Source,
    evaluation: dict[str, Any],
) -> Path:
    """Writes curves.png, reconstructions.png and then index.html into workdir/report/.

    Args:
      workdir: The folder of the run, with its config.json, summary.json and metrics.jsonl.
      model: The model.
      params: Its parameters.
      config: The objective's configuration.
      eval_split: The images of the evaluation.
      evaluation: The content of evaluation.json.

    Returns:
      The path of index.html.
    """
    chosen = choose_images(eval_split, model)[:BATCH_SIZE]
    index, names, images = zip(*chosen, strict=True)
    batch = pad_batch(index, images)
    outputs = reconstruct(model, config.normalized, params, *batch)
    _, is_removed, reconstructed = map(np.asarray, outputs)
    count = len(chosen)
    rows = read_rows(workdir / "metrics.jsonl")
    evaluations = read_rows(workdir / "evaluations.jsonl")
    last = {"step": rows[-1]["step"] if rows else 0, "loss": evaluation["loss"]}
    figures = {
        "curves.png": draw_loss(rows, [*evaluations, last]),
        "reconstructions.png": draw_reconstructions(
            np.stack(images), is_removed[:count], reconstructed[:count]
        ),
    }
    scale = (
        "each patch normalized by its own mean and deviation, so that a uniform patch of the right "
        "color has a loss of 1"
        if config.normalized
        else "in normalized colors"
    )
    summary = (
        f"Mean squared error of the removed patches of {evaluation['images']} held-out images: "
        f"{evaluation['loss']:.3f}, {scale}."
    )
    note = NORMALIZED if config.normalized else ""
    others = [
        (name.replace("_", " "), f"{value:.4f}" if isinstance(value, float) else value)
        for name, value in evaluation.items()
    ]
    body = BODY.format(others=table_rows(others), note=note, names=list_names(names))
    source = evaluation.get("source", "images")
    weights = f"{read_summary(workdir)['workdir']}/weights"
    commands = [
        ["sam-jax", "evaluate", "reconstruction", "--weights", weights, "--source", source],
        ["sam-jax", "convert", weights, "mae.pth"],
    ]
    title = f"Masked autoencoder of {source}"
    return write_page(workdir, title, summary, body, figures, commands)


NORMALIZED = """<p>The autoencoder does not predict the mean and the deviation of a removed patch:
the pictures use the true ones.</p>"""

BODY = """<h2>Held-out images</h2>
<a href="reconstructions.png"><img src="reconstructions.png" alt="Images, their visible patches, and
their reconstructions"></a>
{note}
{names}
<h2>Evaluation</h2>
<table>
{others}
</table>
<h2>Training</h2>
<img src="curves.png" alt="Loss by step">"""
