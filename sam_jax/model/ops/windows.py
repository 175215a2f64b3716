"""Windows of a grid of tokens: cut before or after a projection, and joined again.

Source: segment-anything `modeling/image_encoder.py`, `window_partition` and `window_unpartition`.

Differences: where the projection comes first, the padding is filled with the projection of a zero
token, which is what the reference computes for each padding token.
"""

from collections.abc import Callable

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

Projection = Callable[[Float[Array, "*batch c"]], Float[Array, "*batch d"]]


def project_xla(
    x: Float[Array, "b gh gw c"], project: Projection, window: int
) -> Float[Array, "n {window} {window} d"]:
    """Projects the tokens, then cuts windows; see `dispatch.project_windows`."""
    projected = project(x)
    return split_windows(projected, window, fill=project(jnp.zeros(x.shape[-1], x.dtype)))


def project_after_split(
    x: Float[Array, "b gh gw c"], project: Projection, window: int
) -> Float[Array, "n {window} {window} d"]:
    """Cuts windows, then projects their tokens.

    It computes more, but moves the narrow tokens instead of their wide projections, which on TPUs
    takes less time.
    """
    windows = rearrange(split_windows(x, window), "n h w c -> n (h w) c")
    return rearrange(project(windows), "n (h w) c -> n h w c", w=window)


def split_windows(
    x: Float[Array, "b gh gw c"], window: int, fill: Float[Array, " c"] | None = None
) -> Float[Array, "n {window} {window} c"]:
    """Cuts a grid into windows, row by row.

    Args:
      x: Grids of tokens.
      window: Side of a window.
      fill: The token that pads the bottom and the right; None for zeros.

    Returns:
      The windows of all images, '(b nh nw) h w c'.
    """
    gh, gw = x.shape[1:3]
    pad_h, pad_w = -gh % window, -gw % window
    if pad_h or pad_w:
        inside = (jnp.arange(gh + pad_h) < gh)[:, None] & (jnp.arange(gw + pad_w) < gw)
        x = jnp.pad(x, ((0, 0), (0, pad_h), (0, pad_w), (0, 0)))
        if fill is not None:
            x = jnp.where(inside[..., None], x, fill)
    return rearrange(x, "b (nh h) (nw w) c -> (b nh nw) h w c", h=window, w=window)


def join_windows(
    x: Float[Array, "n window window c"], gh: int, gw: int
) -> Float[Array, "b {gh} {gw} c"]:
    """Undoes `split_windows`, and drops the padding."""
    nh, nw = -(-gh // x.shape[1]), -(-gw // x.shape[2])
    x = rearrange(x, "(b nh nw) h w c -> b (nh h) (nw w) c", nh=nh, nw=nw)
    return x[:, :gh, :gw]
