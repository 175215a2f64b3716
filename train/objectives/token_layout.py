"""Two layouts of mask pixels, and masks at the resolution of the loss.

In the image layout a mask is 'h w' pixels. In the token layout it is 's p': the s pixels of each
of p tokens. The mask decoder computes logits in the token layout, and the mask prompt reads them
in it. Losses do not depend on the order of pixels, so training keeps masks in the token layout:
on TPUs, moving pixels would cost more than the losses.
"""

import math

import jax
from einops import rearrange
from jaxtyping import Array, Float, Shaped

Grid = tuple[int, int]  # (rows, columns) of the tokens of an image


def to_token_layout(mask: Shaped[Array, "*batch h w"], grid: Grid) -> Shaped[Array, "*batch s p"]:
    """Converts masks from the image layout to the token layout."""
    gh, gw = grid
    return rearrange(mask, "... (gh i) (gw j) -> ... (i j) (gh gw)", gh=gh, gw=gw)


def to_image_layout(mask: Shaped[Array, "*batch s p"], grid: Grid) -> Shaped[Array, "*batch h w"]:
    """Converts masks from the token layout to the image layout."""
    side = math.isqrt(mask.shape[-2])
    return rearrange(mask, "... (i j) (gh gw) -> ... (gh i) (gw j)", i=side, gh=grid[0])


def upsample(logits: Float[Array, "*batch lh lw"], scale: int) -> Float[Array, "*batch h w"]:
    """Resizes logits to `scale` times their resolution, bilinearly."""
    if scale == 1:
        return logits
    shape = (*logits.shape[:-2], logits.shape[-2] * scale, logits.shape[-1] * scale)
    return jax.image.resize(logits, shape, "linear", antialias=False)


def upsample_tokens(
    logits: Float[Array, "*batch s p"], grid: Grid, scale: int
) -> Float[Array, "*batch s_scaled p"]:
    """Does the same as `upsample` for logits in the token layout."""
    if scale == 1:
        return logits
    return to_token_layout(upsample(to_image_layout(logits, grid), scale), grid)
