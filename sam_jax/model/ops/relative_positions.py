"""Decomposed relative positions: their tables, and attention with them in extra channels.

Source: Li et al. 2022 (MViTv2), and segment-anything `modeling/image_encoder.py`.

Differences, exact up to rounding:
- The positions are folded into extra channels of queries and keys, so that the matrix product of
  the logits adds them, and no bias is broadcast to 't t' (`attend_folded`).
- Tables are interpolated to any grid. The reference contains this too, but never uses it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sam_jax.model.ops.softmax import softmax_matmul

Attend = Callable[
    [Float[Array, "head t d"], Float[Array, "head t d"], Float[Array, "head t e"]],
    Float[Array, "head t e"],
]


def relative_positions(
    table: Float[Array, "r d"], n: int, dtype: DTypeLike
) -> Float[Array, "{n} {n} d"]:
    """Looks up the row of a table for every (query, key) pair of an axis of n tokens."""
    if table.shape[0] != 2 * n - 1:
        table = jax.image.resize(table, (2 * n - 1, table.shape[1]), "linear", antialias=False)
    offsets = jnp.arange(n)[:, None] - jnp.arange(n) + n - 1
    return jnp.asarray(table, dtype)[offsets]


def attend_plain(
    q: Float[Array, "head t d"], k: Float[Array, "head t d"], v: Float[Array, "head t e"]
) -> Float[Array, "head t e"]:
    """Computes softmax(q k^T) v."""
    return softmax_matmul(jnp.einsum("aqd,akd->aqk", q, k), v)


def attend_folded(
    qkv: Float[Array, "h w c3"],
    rel_h: Float[Array, "h h d"],
    rel_w: Float[Array, "w w d"],
    num_heads: int,
    attend: Attend = attend_plain,
) -> Float[Array, "h w c"]:
    """Attends with relative positions in extra channels.

    The logits are `[q, q_rel_h, q_rel_w] . [k, 1_u, 1_v]`, where `1_u` and `1_v` are one-hot
    vectors of the row and the column of the key.

    Args:
      qkv: Queries, keys and values, '(3 head d)' channels, of one grid of tokens.
      rel_h: Vertical position of key row u relative to query row h, as 'h u d'.
      rel_w: Horizontal position of key column v relative to query column w, as 'w v d'.
      num_heads: Attention heads.
      attend: Attention without scaling.

    Returns:
      '(head d)' channels for each token.
    """
    height, width = qkv.shape[:2]
    q, k, v, q_rel_h, q_rel_w = project_positions(qkv, rel_h, rel_w, num_heads)
    rows = repeat(jnp.eye(height, dtype=k.dtype), "h u -> head h w u", head=num_heads, w=width)
    columns = repeat(jnp.eye(width, dtype=k.dtype), "w v -> head h w v", head=num_heads, h=height)
    q = jnp.concatenate([q, q_rel_h, q_rel_w], axis=-1)
    k = jnp.concatenate([k, rows, columns], axis=-1)
    q, k, v = (rearrange(x, "head h w d -> head (h w) d") for x in (q, k, v))
    return rearrange(attend(q, k, v), "head (h w) d -> h w (head d)", w=width)


def project_positions(
    qkv: Float[Array, "h w c3"],
    rel_h: Float[Array, "h h d"],
    rel_w: Float[Array, "w w d"],
    num_heads: int,
) -> tuple[
    Float[Array, "head h w d"],
    Float[Array, "head h w d"],
    Float[Array, "head h w d"],
    Float[Array, "head h w h"],
    Float[Array, "head h w w"],
]:
    """Splits heads, scales the queries, and projects the unscaled queries on the positions.

    Args:
      qkv: Queries, keys and values, '(3 head d)' channels.
      rel_h: As in `attend_folded`.
      rel_w: As in `attend_folded`.
      num_heads: Attention heads.

    Returns:
      Scaled queries, keys, values, and the terms that each key row and key column adds to the
      logits.
    """
    q, k, v = rearrange(qkv, "h w (qkv head d) -> qkv head h w d", qkv=3, head=num_heads)
    q_rel_h = jnp.einsum("ahwd,hud->ahwu", q, rel_h)
    q_rel_w = jnp.einsum("ahwd,wvd->ahwv", q, rel_w)
    return q * q.shape[-1] ** -0.5, k, v, q_rel_h, q_rel_w
