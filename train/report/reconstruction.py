"""What a masked autoencoder makes of held-out images: its error, and pictures to be looked at."""

import functools
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from matplotlib.figure import Figure

from sam_jax.data.crop_batch import check_sides, crop, middle_box, resize
from sam_jax.data.example import BadSample, Source
from sam_jax.model.mae import MaskedAutoencoder, mean_and_deviation, patchify
from sam_jax.model.sam import PIXEL_MEAN, PIXEL_STD, normalize_colors
from sam_jax.visualize.dataset_plots import new_figure
from train.config import Reconstruction
from train.metrics import read_rows
from train.objectives.reconstruction import reconstruction_loss
from train.report.curves import draw_loss
from train.report.html import items, table, write_page

SEED = 0  # of what is hidden of held-out images, together with their places in the source
AT_ONCE = 16  # images
SHOWN = 8  # images
GREY = 128  # of what is hidden
PANEL, GAP, MARGIN, HEADER = 2.2, 0.1, 0.15, 0.5  # inches


def evaluate_reconstruction(
    model: MaskedAutoencoder,
    params: dict,
    config: Reconstruction,
    source: Source,
    indices: Iterable[int],
) -> dict:
    """The mean loss of images, each of which has the same patches hidden whenever it is asked for.

    Args:
      model, params: which paint.
      config: of the objective.
      source: of the images, whose middles are taken.
      indices: of those that count.
    Returns:
      {"images": how many, "loss": their mean, "bad_samples": how many could not be used}.
    """
    losses, bad = [], 0

    def good():
        nonlocal bad
        for index in indices:
            try:
                yield index, middle_of(source[index].image, model)
            except BadSample:
                bad += 1

    for rows in batched(good(), AT_ONCE):
        index, image = zip(*rows, strict=True)
        painted = paint(model, config, params, *full(index, image))
        losses += np.asarray(painted[0])[: len(rows)].tolist()
    if not losses:
        raise ValueError("no held-out image can be used")
    return {"images": len(losses), "loss": float(np.mean(losses)), "bad_samples": bad}


def middle_of(image: np.ndarray, model: MaskedAutoencoder) -> np.ndarray:
    """The largest part of an image in its middle that fills the frame, resized to it.

    Raises:
      BadSample: if the image is too small.
    """
    check_sides(image, model.patch_size)
    height, width = model.image_size
    return resize(crop(image, *middle_box(image.shape[:2], width / height)), model.image_size)


def batched(rows: Iterable, size: int) -> Iterator[list]:
    """Lists of so many, the last one shorter."""
    some = []
    for row in rows:
        some.append(row)
        if len(some) == size:
            yield some
            some = []
    if some:
        yield some


def full(index: tuple, image: tuple) -> tuple[np.ndarray, np.ndarray]:
    """Arrays of AT_ONCE rows, the last one repeated: one program, however many there are."""
    of = lambda x: np.stack([*x, *[x[-1]] * (AT_ONCE - len(x))])
    return of(np.array(index, np.int32)), of(image)


@functools.partial(jax.jit, static_argnums=(0, 1))
def paint(model, config, params, index, image):
    """Paints images 'b h w 3' uint8 -> their losses 'b', and what is hidden and painted of them.

    Returns:
      'b' float32; 'b h w' bool, the hidden pixels; 'b h w 3' float32 of 0 to 255, painted.
    """
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(SEED), i))(index)
    normalized = normalize_colors(image)
    painted = model.apply({"params": params}, normalized, keys)
    losses = reconstruction_loss(painted, normalized, model.patch_size, config.normalized)
    patches = painted.patches
    if config.normalized:
        patches = in_scale_of(patchify(normalized, model.patch_size), patches)
    gh, _ = model.grid
    p = model.patch_size
    pixels = rearrange(patches, "b (gh gw) (i j c) -> b (gh i) (gw j) c", gh=gh, i=p, j=p)
    hidden = jnp.repeat(jnp.repeat(painted.mask.reshape(-1, *model.grid), p, 1), p, 2)
    colors = jnp.clip(pixels * jnp.array(PIXEL_STD) + jnp.array(PIXEL_MEAN), 0, 255)
    return losses, hidden, colors


def in_scale_of(true, patches):
    """Patches '... d' of mean 0 and deviation 1 in the mean and the deviation of the true ones."""
    mean, deviation = mean_and_deviation(true)
    return mean + patches * deviation


def choose_images(source: Source, model: MaskedAutoencoder) -> list[tuple[int, str, np.ndarray]]:
    """(index, name, image in the frame) of up to SHOWN images that are spread over a source."""
    found = []
    for stretch in np.array_split(np.arange(len(source)), min(SHOWN, len(source))):
        for index in map(int, stretch):
            try:
                found.append((index, source.name(index), middle_of(source[index].image, model)))
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
    tall = PANEL * images.shape[1] / images.shape[2]
    group = 3 * (PANEL + GAP)
    width = 2 * MARGIN + columns * group - GAP + (columns - 1) * 2 * GAP
    height = HEADER + rows * (tall + GAP) + MARGIN
    figure = new_figure(width, height)
    panels = zip(
        images,
        np.where(hidden[..., None], GREY, images),
        np.where(hidden[..., None], painted, images),
        strict=True,
    )
    for number, pictures in enumerate(panels):
        row, column = divmod(number, columns)
        left = MARGIN + column * (group + 2 * GAP)
        bottom = height - HEADER - (row + 1) * (tall + GAP) + GAP
        for place, picture in enumerate(pictures):
            x = left + place * (PANEL + GAP)
            axes = figure.add_axes((x / width, bottom / height, PANEL / width, tall / height))
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
    chosen = choose_images(held_out, model)[:AT_ONCE]
    index, names, images = zip(*chosen, strict=True)
    _, hidden, painted = map(np.asarray, paint(model, config, params, *full(index, images)))
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
