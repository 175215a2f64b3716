"""Boxes around masks, and which of them to keep.

Source: `utils/amg.py` in facebookresearch/segment-anything dca509f (batched_mask_to_box and
box_xyxy_to_xywh). Corners are pixel indices and inclusive, so the XYWH width is right - left: one
less than the number of columns, while COCO's own code adds the one.
"""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray


def box_of_mask(mask: np.ndarray) -> np.ndarray:
    """Finds the smallest box around each mask.

    Args:
      mask: '... h w' bool.
    Returns:
      '... 4' int64, (left, top, right, bottom) in pixel indices, both corners inside the box. An
      empty mask gives zeros, and so does a mask of the pixel (0, 0) alone.
    Raises:
      ValueError: if the mask has fewer than two axes or another dtype.
    """
    mask = np.asarray(mask)
    if mask.ndim < 2 or mask.dtype != np.bool_:
        raise ValueError(
            f"mask must be '... h w' bool, got {mask.dtype} of shape {mask.shape}; "
            "for example box_of_mask(logits > 0)"
        )
    if mask.size == 0:
        return np.zeros((*mask.shape[:-2], 4), np.int64)
    left, right = _first_and_last(np.logical_or.reduce(mask, axis=-2))
    top, bottom = _first_and_last(np.logical_or.reduce(mask, axis=-1))
    return np.stack([left, top, right, bottom], axis=-1)


def xyxy_to_xywh(box: np.ndarray) -> np.ndarray:
    """Replaces the second corner by a size.

    Args:
      box: '... 4', (left, top, right, bottom).
    Returns:
      '... 4' of the same dtype, (left, top, right - left, bottom - top).
    """
    box = np.asarray(box)
    return np.concatenate([box[..., :2], box[..., 2:] - box[..., :2]], axis=-1)


@jax.jit
def non_maximum_suppression(
    boxes: Array, scores: Array, valid: Array, threshold: np.float32 | Array
) -> jax.Array:
    """Keeps the best boxes, dropping those that overlap a better one that is kept.

    As torchvision's `nms`, which the reference uses, but a tie goes to the lower index. What is
    looped over is the boxes that are kept, of which there are few.

    Args:
      boxes: 'n 4' (left, top, right, bottom), of areas without the pixel that COCO would add.
      scores: 'n', higher ones are better; valid: 'n' bool, others are as if they were not there.
      threshold: a box is dropped where the IoU is above it, in float32. Two boxes without area
        are kept.
    Returns:
      'n' bool.
    """
    valid = jnp.asarray(valid)
    order = jnp.argsort(jnp.where(valid, scores, -jnp.inf), descending=True, stable=True)
    low, high = jnp.split(jnp.asarray(boxes, jnp.float32)[order], 2, axis=1)
    area = jnp.prod(high - low, axis=1)

    def keep_best(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        left, kept = state
        best = jnp.argmax(left)
        sides = jnp.minimum(high, high[best]) - jnp.maximum(low, low[best])
        overlap = jnp.prod(jnp.maximum(sides, 0), axis=1)
        left &= ~(overlap / (area + area[best] - overlap) > threshold)
        return left.at[best].set(False), kept.at[order[best]].set(True)

    state = valid[order], jnp.zeros(len(boxes), bool)
    return jax.lax.while_loop(lambda state: jnp.any(state[0]), keep_best, state)[1]


def _first_and_last(line: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """'... s' bool -> first and last true index '...', or 0 and 0 where there is none."""
    first = line.argmax(axis=-1)
    last = line.shape[-1] - 1 - line[..., ::-1].argmax(axis=-1)
    return first, np.where(line.any(axis=-1), last, 0)
