"""Where to click on a mask, or on what a prediction got wrong."""

import jax
import jax.numpy as jnp


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
