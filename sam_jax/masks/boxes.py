"""Boxes around masks, and their non-maximum suppression.

Source: `utils/amg.py` in facebookresearch/segment-anything dca509f (batched_mask_to_box and
box_xyxy_to_xywh). Corners are pixel indices and inclusive. The XYWH width is right - left, which is
one less than the number of columns; COCO's own code adds the one.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int64, Num, Real


def box_of_mask(mask: np.ndarray) -> Int64[np.ndarray, "*batch 4"]:
    """Finds the smallest box around each mask.

    Args:
      mask: '... h w' bool.

    Returns:
      (left, top, right, bottom) in pixel indices, both corners inside the box. An empty mask gives
      zeros, and so does a mask of the pixel (0, 0) alone.

    Raises:
      ValueError: If the mask has fewer than two axes or another dtype.
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


def box_of_runs(runs: Int64[np.ndarray, "r 2"], height: int) -> tuple[int, int, int, int]:
    """Returns the bounding box of a mask.

    Args:
      runs: The bounds of the mask's runs, at least one, see `rle.bounds`.
      height: The height of the mask.

    Returns:
      (left, top, right, bottom), both corners inside the mask's box.
    """
    column, row = np.divmod(runs - [0, 1], height)  # of each run's first and last pixel
    wraps = (column[:, 1] > column[:, 0]).any()  # a run continues in the next column
    top, bottom = (0, height - 1) if wraps else (row.min(), row.max())
    return int(column[0, 0]), int(top), int(column[-1, 1]), int(bottom)


def xyxy_to_xywh(box: Num[np.ndarray, "*batch 4"]) -> Num[np.ndarray, "*batch 4"]:
    """Replaces the second corner of boxes by their size.

    Args:
      box: (left, top, right, bottom).

    Returns:
      (left, top, right - left, bottom - top) in the same dtype.
    """
    box = np.asarray(box)
    return np.concatenate([box[..., :2], box[..., 2:] - box[..., :2]], axis=-1)


@jax.jit
def non_maximum_suppression(
    boxes: Real[Array | np.ndarray, "n 4"],
    scores: Float[Array | np.ndarray, " n"],
    valid: Bool[Array | np.ndarray, " n"],
    threshold: np.float32 | Float[Array, ""],
) -> Bool[Array, " n"]:
    """Keeps the best boxes and drops those that overlap with a better box that is kept.

    As torchvision's `nms`, which the reference uses, except that ties go to the lower index. The
    loop is over the kept boxes, of which there are few.

    Args:
      boxes: (left, top, right, bottom). Areas do not include the pixel that COCO would add.
      scores: Higher is better.
      valid: False for boxes to ignore.
      threshold: Boxes are dropped if their IoU is greater, in float32. Two boxes without area are
        kept.

    Returns:
      True for the boxes that are kept.
    """
    valid = jnp.asarray(valid)
    order = jnp.argsort(jnp.where(valid, scores, -jnp.inf), descending=True, stable=True)
    low, high = jnp.split(jnp.asarray(boxes, jnp.float32)[order], 2, axis=1)
    area = jnp.prod(high - low, axis=1)

    def keep_best(
        state: tuple[Bool[Array, " n"], Bool[Array, " n"]],
    ) -> tuple[Bool[Array, " n"], Bool[Array, " n"]]:
        remaining, kept = state
        best = jnp.argmax(remaining)
        sides = jnp.minimum(high, high[best]) - jnp.maximum(low, low[best])
        intersection = jnp.prod(jnp.maximum(sides, 0), axis=1)
        iou = intersection / (area + area[best] - intersection)
        remaining &= ~(iou > threshold)  # the IoU of two boxes without area is NaN
        return remaining.at[best].set(False), kept.at[order[best]].set(True)

    state = valid[order], jnp.zeros(len(boxes), bool)
    return jax.lax.while_loop(lambda state: jnp.any(state[0]), keep_best, state)[1]


def _first_and_last(
    line: Bool[np.ndarray, "*batch s"],
) -> tuple[np.int64 | Int64[np.ndarray, "*batch"], Int64[np.ndarray, "*batch"]]:
    """Returns the first and the last true index, or 0 and 0 if there is none."""
    first = line.argmax(axis=-1)
    last = line.shape[-1] - 1 - line[..., ::-1].argmax(axis=-1)
    return first, np.where(line.any(axis=-1), last, 0)
