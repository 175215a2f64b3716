"""The reconstruction loss of a masked autoencoder on images, and the reconstructed pixels.

Source: He et al. 2022, facebookresearch/mae `models_mae.py`.

Differences: The mask of an image depends on its index alone, so its loss is the same every time.
Images are cropped in the center.
"""

import argparse
import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Float32, Int, UInt8
from tqdm import tqdm

from sam_jax.data.crop_batch import check_sides, crop, middle_box, resize
from sam_jax.data.example import BadSample, Source
from sam_jax.data.open import open_source, select
from sam_jax.model.mae import (
    MaskedAutoencoder,
    ReconstructedPatches,
    mean_and_deviation,
    patchify,
    reconstruction_loss,
)
from sam_jax.model.sam import PIXEL_MEAN, PIXEL_STD, normalize_colors
from sam_jax.weights.formats import load_autoencoder

SEED = 0  # of the masks, together with the index of the image
BATCH_SIZE = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See `Evaluation`."""
    parser.description = (
        "Computes the mean squared error of a masked autoencoder on the masked patches of images. "
        "The masks are the same every time."
    )
    parser.epilog = (
        "example: sam-jax evaluate reconstruction --weights runs/mae_tiny/weights "
        "--source images:photos/"
    )
    parser.add_argument(
        "--weights",
        type=os.path.expanduser,
        required=True,
        help="a weights directory of an autoencoder",
    )
    parser.add_argument(
        "--raw-pixels",
        action="store_true",
        help="for an autoencoder that predicts the pixels of a patch without normalizing them by "
        "their mean and deviation",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """See `Evaluation`."""
    images = select(open_source(args.source, masks=False), args.index)
    model, variables = load_autoencoder(args.weights)
    indices = tqdm(images.indices.tolist(), unit=" images", disable=None)
    return evaluate_reconstruction(
        model, variables["params"], not args.raw_pixels, images.source, indices
    )


def format_table(scores: dict[str, Any]) -> str:
    """See `Evaluation`."""
    lines = [f"loss of {scores['images']} images: {scores['loss']:.4f}"]
    if scores["bad_samples"]:
        lines.append(f"{scores['bad_samples']} images could not be used and were left out")
    return "\n".join(lines)


def evaluate_reconstruction(
    model: MaskedAutoencoder,
    params: dict[str, Any],
    normalized: bool,
    source: Source,
    indices: Iterable[int],
) -> dict[str, Any]:
    """Computes the mean reconstruction loss of images.

    Args:
      model: The autoencoder.
      params: Its parameters.
      normalized: True if it predicts patches normalized by their mean and deviation.
      source: The images.
      indices: The images to evaluate on, for example a progress bar over them.

    Returns:
      {"images": count, "loss": their mean loss, "bad_samples": number of images that could not be
      used}.

    Raises:
      ValueError: If no image can be used.
    """
    num_bad = 0

    def read_crops() -> Iterator[tuple[int, np.ndarray]]:
        nonlocal num_bad
        for index in indices:
            try:
                yield index, center_crop(source[index].image, model)
            except BadSample:
                num_bad += 1

    losses: list[float] = []
    for batch in batched(read_crops(), BATCH_SIZE):
        batch_indices, images = zip(*batch, strict=True)
        padded = pad_batch(batch_indices, images)
        batch_losses, _, _ = reconstruct(model, normalized, params, *padded)
        losses += np.asarray(batch_losses)[: len(batch)].tolist()
    if not losses:
        raise ValueError("no held-out image can be used")
    return {"images": len(losses), "loss": float(np.mean(losses)), "bad_samples": num_bad}


def center_crop(
    image: UInt8[np.ndarray, "h w 3"], model: MaskedAutoencoder
) -> UInt8[np.ndarray, "mh mw 3"]:
    """Crops the center of an image to the model's aspect ratio and resizes it to its input size.

    Raises:
      BadSample: If the image is too small.
    """
    check_sides(image, model.patch_size)
    height, width = model.image_size
    return resize(crop(image, *middle_box(image.shape[:2], width / height)), model.image_size)


def batched(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yields lists of `size` rows; the last one may be shorter."""
    batch = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def pad_batch(
    indices: Sequence[int], images: Sequence[UInt8[np.ndarray, "h w 3"]]
) -> tuple[Int[np.ndarray, " b"], UInt8[np.ndarray, "b h w 3"]]:
    """Stacks a batch and repeats its last row up to BATCH_SIZE rows, so one program fits all."""
    num_missing = BATCH_SIZE - len(images)
    return (
        np.array([*indices, *[indices[-1]] * num_missing], np.int32),
        np.stack([*images, *[images[-1]] * num_missing]),
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def reconstruct(
    model: MaskedAutoencoder,
    normalized: bool,
    params: dict[str, Any],
    indices: Int[Array, " b"],
    images: UInt8[Array, "b h w 3"],
) -> tuple[Float32[Array, " b"], Bool[Array, "b h w"], Float32[Array, "b h w 3"]]:
    """Reconstructs the masked patches of images.

    Args:
      model: The autoencoder.
      normalized: See `evaluate_reconstruction`.
      params: Its parameters.
      indices: The indices of the images in their source, which choose the masks.
      images: The images in the model's input size.

    Returns:
      The loss of each image, its masked pixels, and its reconstructed pixels in 0 to 255.
    """
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(SEED), i))(indices)
    inputs = normalize_colors(images)
    output = cast(ReconstructedPatches, model.apply({"params": params}, inputs, keys))
    losses = reconstruction_loss(output, inputs, model.patch_size, normalized)
    patches = output.patches
    if normalized:
        patches = unnormalize_patches(patches, jnp.asarray(patchify(inputs, model.patch_size)))
    gh, _ = model.grid
    p = model.patch_size
    pixels = rearrange(patches, "b (gh gw) (i j c) -> b (gh i) (gw j) c", gh=gh, i=p, j=p)
    masked = jnp.repeat(jnp.repeat(output.mask.reshape(-1, *model.grid), p, 1), p, 2)
    colors = jnp.clip(pixels * jnp.array(PIXEL_STD) + jnp.array(PIXEL_MEAN), 0, 255)
    return losses, masked, colors


def unnormalize_patches(
    patches: Float[Array, "*batch d"], target: Float[Array, "*batch d"]
) -> Float[Array, "*batch d"]:
    """Scales normalized patches to the mean and the deviation of the true patches."""
    mean, deviation = mean_and_deviation(target)
    return mean + patches * deviation
