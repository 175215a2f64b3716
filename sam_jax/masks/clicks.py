"""Clicks on a mask, or on the errors of a prediction."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32, Key

from sam_jax.masks.boxes import box_of_mask


def uniform_click(
    key: Key[Array, ""], region: Bool[Array | np.ndarray, "h w"]
) -> Int32[Array, " 2"]:
    """Samples a pixel of a region uniformly.

    Args:
      key: A random key.
      region: The pixels to sample from.

    Returns:
      (x, y), or (0, 0) if the region is empty.
    """
    per_row = jnp.sum(region, axis=1, dtype=jnp.int32)
    rank = jax.random.randint(key, (), 0, jnp.maximum(per_row.sum(), 1))  # of the pixel, from 0
    rows_end = jnp.cumsum(per_row)
    y = jnp.argmax(rows_end > rank)
    rank_in_row = rank - (rows_end[y] - per_row[y])
    x = jnp.argmax(jnp.cumsum(region[y], dtype=jnp.int32) > rank_in_row)
    return jnp.stack([x, y]).astype(jnp.int32)


def center_click(region: Bool[np.ndarray, "h w"]) -> tuple[int, int, float]:
    """Finds the pixel of a region that is farthest from its border.

    Args:
      region: The pixels to choose from. Pixels outside of the image are outside of the region.

    Returns:
      x, y and the distance in pixels, which is 0 if the region is empty. Of several such pixels,
      the first one in row-major order.
    """
    from scipy import ndimage

    if not region.any():
        return 0, 0, 0.0
    left, top, right, bottom = box_of_mask(region)
    padded = np.pad(region[top : bottom + 1, left : right + 1], 1)
    distance = ndimage.distance_transform_edt(padded)[1:-1, 1:-1]
    y, x = np.unravel_index(np.argmax(distance), distance.shape)
    return int(left + x), int(top + y), float(distance[y, x])


def center_click_on_error(
    predicted: Bool[np.ndarray, "h w"], target: Bool[np.ndarray, "h w"]
) -> tuple[int, int, int] | None:
    """Clicks on the center of the largest error of a prediction.

    The errors are the missed pixels (false negatives) and the added pixels (false positives). The
    click is on the pixel that is farthest from the border of its region. Added pixels win ties.

    Source: Sofiiuk et al. 2021 (RITM); Kirillov et al. 2023, appendix D.1.

    Args:
      predicted: The predicted mask.
      target: The true mask.

    Returns:
      x, y and the label, 1 for a missed and 0 for an added pixel. None if there is no error.
    """
    missed_x, missed_y, missed = center_click(target & ~predicted)
    added_x, added_y, added = center_click(predicted & ~target)
    if not missed and not added:
        return None
    return (missed_x, missed_y, 1) if missed > added else (added_x, added_y, 0)
