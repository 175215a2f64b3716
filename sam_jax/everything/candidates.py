"""Scores the masks of a grid of points on the device and selects those to keep.

The points go through the decoder's transformer in chunks. Only prompts with a mask that is
predicted to be good are upscaled, and only such masks are measured at the size of their image, tile
by tile. A few numbers per mask leave the device.

Source: segment-anything `automatic_mask_generator.py` (_process_batch, _process_crop), whose order
and comparisons are kept.
"""

import functools
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from sam_jax.everything.tiled_resize import Matrices, make_matrices, measure_masks
from sam_jax.everything.tiling import Tiling
from sam_jax.everything.tuning import Tuning
from sam_jax.masks.boxes import non_maximum_suppression
from sam_jax.model.mask_decoder import DecoderState
from sam_jax.model.prompt_encoder import FOREGROUND, NOT_A_POINT, Prompts
from sam_jax.model.sam import Sam

NUM_MULTIMASK_OUTPUTS = 3  # masks of an ambiguous prompt
CROP_EDGE_TOLERANCE = 20  # pixels from a side of a crop within which a mask may be cut off


@flax.struct.dataclass
class Thresholds:
    """Thresholds for masks.

    Attributes:
      iou: Masks with a predicted IoU of at most this are dropped; -inf keeps all.
      stability: Masks with a lower stability score are dropped; -inf keeps all.
      offset: The distance from 0 of the two levels that the stability score compares.
      area: Masks of at least this number of pixels are dropped; inf keeps all.
      box_iou: A mask is dropped if the IoU of its box with that of a better mask exceeds this.
    """

    iou: Float32[Array, ""] | np.float32
    stability: Float32[Array, ""] | np.float32
    offset: Float32[Array, ""] | np.float32
    area: Float32[Array, ""] | np.float32
    box_iou: Float32[Array, ""] | np.float32


@flax.struct.dataclass
class Candidates:
    """The masks of p points in a crop: q = 3 p of them, point by point.

    Attributes:
      iou: The predicted IoU.
      stability: The stability score; arbitrary for masks that were not measured.
      box: (left, top, right, bottom), inclusive, in pixels of the crop.
      is_kept: True for masks to keep.
    """

    iou: Float32[Array | np.ndarray, " q"]
    stability: Float32[Array | np.ndarray, " q"]
    box: Int32[Array | np.ndarray, "q 4"]
    is_kept: Bool[Array | np.ndarray, " q"]


@functools.partial(jax.jit, static_argnames=("model", "points_per_batch", "tuning"))
def find_candidates(
    model: Sam,
    variables: dict[str, Any],
    embedding: Float[Array, "1 gh gw c"],
    points: Float32[Array, "p 2"],
    num_points: Int[Array, ""],
    tiling: Tiling,
    thresholds: Thresholds,
    crop_box: Int[Array, " 4"],
    image_size: Int[Array, " 2"],
    *,
    points_per_batch: int,
    tuning: Tuning,
) -> Candidates:
    """Scores the masks of a crop's points and drops duplicates.

    Args:
      model: The model.
      variables: Its variables.
      embedding: The crop's embedding.
      points: (x, y) in pixels of the canvas; p is a multiple of `points_per_batch`.
      num_points: The number of points to use, the first ones.
      tiling: The tiles of the crop.
      thresholds: The thresholds that a mask must pass.
      crop_box: (x0, y0, x1, y1) of the crop in the image, x1 and y1 exclusive.
      image_size: (height, width) of the image.
      points_per_batch: The number of points that are decoded at a time.
      tuning: Other batch sizes.
    """
    matrices = make_matrices(tiling)

    def score_next(i: Int[Array, ""], candidates: Candidates) -> Candidates:
        start = i * points_per_batch
        valid = start + jnp.arange(points_per_batch) < num_points
        chunk = jax.lax.dynamic_slice_in_dim(points, start, points_per_batch)
        scored = _score(
            model, variables, embedding, chunk, valid, tiling, matrices, thresholds, tuning
        )
        return jax.tree.map(
            lambda values, part: jax.lax.dynamic_update_slice_in_dim(
                values, part, start * NUM_MULTIMASK_OUTPUTS, axis=0
            ),
            candidates,
            scored,
        )

    q = len(points) * NUM_MULTIMASK_OUTPUTS
    candidates = Candidates(
        iou=jnp.zeros(q, jnp.float32),
        stability=jnp.zeros(q, jnp.float32),
        box=jnp.zeros((q, 4), jnp.int32),
        is_kept=jnp.zeros(q, bool),
    )
    num_batches = (num_points + points_per_batch - 1) // points_per_batch
    candidates = jax.lax.fori_loop(0, num_batches, score_next, candidates)
    is_kept = candidates.is_kept & ~_is_near_crop_edge(candidates.box, crop_box, image_size)
    is_kept = non_maximum_suppression(candidates.box, candidates.iou, is_kept, thresholds.box_iou)
    return candidates.replace(is_kept=is_kept)


def point_prompts(points: Float32[Array, "p 2"]) -> Prompts:
    """Returns the prompts of p objects, each a foreground point and the official padding point.

    Args:
      points: (x, y) in pixels of the canvas.
    """
    padding = jnp.zeros_like(points)
    labels = jnp.array([FOREGROUND, NOT_A_POINT])
    return Prompts(
        points=jnp.stack([points, padding], axis=1)[None],
        labels=jnp.broadcast_to(labels, (1, len(points), 2)),
    )


def _score(
    model: Sam,
    variables: dict[str, Any],
    embedding: Float[Array, "1 gh gw c"],
    points: Float32[Array, "p 2"],
    valid: Bool[Array, " p"],
    tiling: Tiling,
    matrices: Matrices,
    thresholds: Thresholds,
    tuning: Tuning,
) -> Candidates:
    """Scores the masks of a chunk of points. Those of points that are not valid are dropped."""
    decoder_state = cast(
        DecoderState,
        model.apply(variables, embedding, point_prompts(points), method="decode_tokens"),
    )
    iou = decoder_state.iou[0, :, -NUM_MULTIMASK_OUTPUTS:]
    is_good = valid[:, None] & (iou > thresholds.iou)
    logits = _upscale_masks(
        model,
        variables,
        embedding.shape[1],
        decoder_state,
        is_good.any(axis=1),
        batch_size=tuning.prompts_per_upscaling,
    )
    measures = measure_masks(
        logits,
        is_good.ravel(),
        tiling,
        matrices,
        thresholds.offset,
        batch_size=tuning.tiles_per_measurement,
    )
    stability = measures.above.astype(jnp.float32) / measures.below
    # Without a threshold even 0 / 0 is kept.
    is_stable = (thresholds.stability == -jnp.inf) | (stability >= thresholds.stability)
    is_kept = is_good.ravel() & is_stable & (measures.area < thresholds.area)
    return Candidates(iou=iou.ravel(), stability=stability, box=measures.box, is_kept=is_kept)


def _upscale_masks(
    model: Sam,
    variables: dict[str, Any],
    gh: int,
    decoder_state: DecoderState,
    valid: Bool[Array, " p"],
    *,
    batch_size: int,
) -> Float32[Array, "3*p lh lw"]:
    """Returns the logits of the valid prompts' masks, and zeros for the other prompts."""
    p = len(valid)
    batch_size = min(p, batch_size)
    order = jnp.argsort(~valid, stable=True)  # valid ones first
    order = jnp.concatenate([order, jnp.full(-p % batch_size, p)])  # p: out of bounds, not written

    def upscale(index: Int[Array, " r"]) -> Float32[Array, "r 3 lh lw"]:
        image, hypernetwork_out = (
            decoder_state.image[:, index],
            decoder_state.hypernetwork_out[:, index],
        )
        logits = cast(
            Array, model.apply(variables, image, hypernetwork_out, gh, method="upscale_masks")
        )
        return logits[0, :, -NUM_MULTIMASK_OUTPUTS:]

    def has_more(state: tuple[Array, Array]) -> Bool[Array, ""]:
        return state[0] * batch_size < jnp.sum(valid)

    def upscale_next(state: tuple[Array, Array]) -> tuple[Array, Array]:
        i, logits = state
        index = jax.lax.dynamic_slice_in_dim(order, i * batch_size, batch_size)
        return i + 1, logits.at[index].set(upscale(index))

    shape = jax.eval_shape(upscale, order[:batch_size]).shape[1:]
    start = jnp.int32(0), jnp.zeros((p, *shape), jnp.float32)
    _, logits = jax.lax.while_loop(has_more, upscale_next, start)
    return rearrange(logits, "p m lh lw -> (p m) lh lw")


def _is_near_crop_edge(
    box: Int32[Array, "q 4"], crop_box: Int[Array, " 4"], image_size: Int[Array, " 2"]
) -> Bool[Array, " q"]:
    """Returns True for boxes that reach a side of the crop that is not a side of the image."""
    x0, y0 = crop_box[:2]
    box = box + jnp.stack([x0, y0, x0, y0])
    image_box = jnp.stack([0, 0, image_size[1], image_size[0]])
    is_near_crop = jnp.abs(box - crop_box) <= CROP_EDGE_TOLERANCE
    is_near_image = jnp.abs(box - image_box) <= CROP_EDGE_TOLERANCE
    return jnp.any(is_near_crop & ~is_near_image, axis=1)
