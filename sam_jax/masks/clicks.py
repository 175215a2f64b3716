"""Where to click on a mask, or on what a prediction got wrong."""

import jax
import jax.numpy as jnp
import numpy as np

from sam_jax.masks.boxes import box_of_mask


def uniform_click(key: jax.Array, region: jax.Array) -> jax.Array:
    """Draws a pixel, all of a region's being equally likely.

    Args:
      key: of the draw.
      region: 'h w' bool.
    Returns:
      '2' int32 (x, y); (0, 0) if the region is empty.
    """
    per_row = jnp.sum(region, axis=1, dtype=jnp.int32)
    rank = jax.random.randint(key, (), 0, jnp.maximum(per_row.sum(), 1))  # of the pixel, from 0
    rows_end = jnp.cumsum(per_row)
    y = jnp.argmax(rows_end > rank)
    rank_in_row = rank - (rows_end[y] - per_row[y])
    x = jnp.argmax(jnp.cumsum(region[y], dtype=jnp.int32) > rank_in_row)
    return jnp.stack([x, y]).astype(jnp.int32)


def farthest_click(region: np.ndarray) -> tuple[int, int, float]:
    """Finds the pixel of a region that is farthest from the region's border.

    Args:
      region: 'h w' bool; what lies outside the image counts as outside the region.
    Returns:
      x, y and the distance in pixels, 0 if the region is empty; of several pixels the first in
      row-major order.
    """
    from scipy import ndimage

    if not region.any():
        return 0, 0, 0.0
    left, top, right, bottom = box_of_mask(region)
    padded = np.pad(region[top : bottom + 1, left : right + 1], 1)
    distance = ndimage.distance_transform_edt(padded)[1:-1, 1:-1]
    y, x = np.unravel_index(np.argmax(distance), distance.shape)
    return int(left + x), int(top + y), float(distance[y, x])


def click_on_error(predicted: np.ndarray, target: np.ndarray) -> tuple[int, int, int] | None:
    """Clicks where a prediction is most wrong: farthest from the border of what it missed, or of
    what it added, whichever is strictly deeper inside; added pixels win a tie.

    Source: Sofiiuk et al. 2021 (RITM); Kirillov et al. 2023, appendix D.1.

    Args:
      predicted, target: 'h w' bool.
    Returns:
      x, y and the label, 1 on the target and 0 off it; None if nothing is wrong.
    """
    missed_x, missed_y, missed = farthest_click(target & ~predicted)
    added_x, added_y, added = farthest_click(predicted & ~target)
    if not missed and not added:
        return None
    return (missed_x, missed_y, 1) if missed > added else (added_x, added_y, 0)
