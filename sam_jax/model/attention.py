"""Attention with decomposed relative positions, over windows or over the whole grid.

Source: Li et al. 2022 (MViTv2), as used by ViTDet and Segment Anything
(segment-anything `modeling/image_encoder.py`).

Differences, all exact up to rounding:
- The relative positions are folded into extra query and key channels, so that plain matrix products
  add them (`attend_folded`), and no bias is ever broadcast to 't t'.
- Over the whole grid the logits, 'heads t t' in the reference, are never in memory: accelerators
  have kernels for that (`flash_attention.py`); elsewhere the queries are taken a few rows at a
  time, so that the logits of one step stay in the cache.
- Queries, keys and values of a window's padding, those of a zero token, are computed once, except
  on TPUs.
- Tables are interpolated to any grid (the reference does so too, but never uses it).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jax import lax

from sam_jax.model.layers import xavier_uniform
from sam_jax.model.ops import flash_attention, token_attention, window_attention
from sam_jax.model.ops.platform import platform

QUERIES_PER_STEP = 256  # of one head; a step's logits over 4096 keys take 4 MiB


class Attention(nn.Module):
    """Self-attention on a grid of tokens, in windows of `window` x `window` or global (`window=0`).

    Attributes:
      num_heads: heads; they divide the channels.
      table_size: (height, width) that the relative-position tables are stored for; None for no
        relative positions.
      window: side of a window in tokens, or 0.
      dtype: compute type of the projections and products.
    """

    num_heads: int
    table_size: tuple[int, int] | None
    window: int = 0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x):
        """Attends 'b gh gw c' -> 'b gh gw c'."""
        gh, gw, c = x.shape[-3:]
        project = nn.Dense(3 * c, dtype=self.dtype, kernel_init=xavier_uniform, name="qkv")
        out = nn.Dense(c, dtype=self.dtype, kernel_init=xavier_uniform, name="proj")
        if self.table_size is None:
            return out(attend_without_positions(project(x), self.num_heads))
        table_h = self.param(
            "rel_pos_h", nn.initializers.zeros, (2 * self.table_size[0] - 1, c // self.num_heads)
        )
        table_w = self.param(
            "rel_pos_w", nn.initializers.zeros, (2 * self.table_size[1] - 1, c // self.num_heads)
        )

        if self.window and platform() == "tpu":  # where it takes longer to move than to compute
            windows = rearrange(split_windows(x, self.window), "n h w c -> n (h w) c")
            qkv = rearrange(project(windows), "n (h w) c -> n h w c", w=self.window)
        elif self.window:
            qkv = split_windows(project(x), self.window, fill=project(jnp.zeros(c, x.dtype)))
        else:
            qkv = project(x)
        rel_h = relative_positions(table_h, qkv.shape[1], self.dtype)
        rel_w = relative_positions(table_w, qkv.shape[2], self.dtype)
        attend = attend_in_windows if self.window else attend_globally
        attended = attend(qkv, rel_h, rel_w, self.num_heads)
        if self.window:
            attended = join_windows(attended, gh, gw)
        return out(attended)


def attend_without_positions(qkv, num_heads):
    """Attention within grids of few tokens: 'b h w (3 head d)' -> 'b h w (head d)'."""
    width = qkv.shape[2]
    tokens = rearrange(qkv, "b h w c -> b (h w) c")
    if token_attention.has_kernel(tokens):
        return rearrange(token_attention.attend(tokens, num_heads), "b (h w) c -> b h w c", w=width)
    q, k, v = rearrange(qkv, "b h w (qkv head d) -> qkv b head (h w) d", qkv=3, head=num_heads)
    logits = jnp.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5
    return rearrange(weigh(logits, v), "b head (h w) d -> b h w (head d)", w=width)


def attend_in_windows(qkv, rel_h, rel_w, num_heads):
    """Attention within each of many small grids: one by one on CPUs, whose caches hold one.

    Args:
      qkv: 'b h w (3 head d)', queries, keys and values.
      rel_h: 'h u d', the vertical position of key row u relative to query row h; rel_w: 'w v d'.
      num_heads: heads.

    Returns:
      'b h w (head d)'.
    """
    if platform() == "tpu" and qkv.dtype == jnp.bfloat16:
        return window_attention.attend_in_windows(qkv, rel_h, rel_w, num_heads)
    one = lambda x: attend_folded(x, rel_h, rel_w, num_heads)
    return lax.map(one, qkv) if platform() == "cpu" else jax.vmap(one)(qkv)


def attend_globally(qkv, rel_h, rel_w, num_heads):
    """The same within large grids, of which not all logits are ever in memory."""
    attend = flash_attention.choose(qkv.shape[1] * qkv.shape[2], qkv.dtype)
    if attend is None:
        return lax.map(lambda x: attend_by_rows(x, rel_h, rel_w, num_heads), qkv)
    return jax.vmap(lambda x: attend_folded(x, rel_h, rel_w, num_heads, attend))(qkv)


def relative_positions(table, n, dtype):
    """Looks up 'r d' rows for every (query, key) pair of an axis of n tokens -> 'n n d'."""
    if table.shape[0] != 2 * n - 1:
        table = jax.image.resize(table, (2 * n - 1, table.shape[1]), "linear", antialias=False)
    offsets = jnp.arange(n)[:, None] - jnp.arange(n) + n - 1
    return jnp.asarray(table, dtype)[offsets]


def split_windows(x, window, fill=None):
    """Cuts 'b gh gw c' into '(b nh nw) window window c', padded with `fill` 'c' or zeros."""
    gh, gw = x.shape[1:3]
    pad_h, pad_w = -gh % window, -gw % window
    if pad_h or pad_w:
        inside = (jnp.arange(gh + pad_h) < gh)[:, None] & (jnp.arange(gw + pad_w) < gw)
        x = jnp.pad(x, ((0, 0), (0, pad_h), (0, pad_w), (0, 0)))
        if fill is not None:
            x = jnp.where(inside[..., None], x, fill)
    return rearrange(x, "b (nh h) (nw w) c -> (b nh nw) h w c", h=window, w=window)


def join_windows(x, gh, gw):
    """Undoes `split_windows`: '(b nh nw) window window c' -> 'b gh gw c', padding dropped."""
    nh, nw = -(-gh // x.shape[1]), -(-gw // x.shape[2])
    x = rearrange(x, "(b nh nw) h w c -> b (nh h) (nw w) c", nh=nh, nw=nw)
    return x[:, :gh, :gw]


def attend_plainly(q, k, v):
    """softmax(q k^T) v of 'head t d', 'head t d' and 'head t e' -> 'head t e'."""
    return weigh(jnp.einsum("aqd,akd->aqk", q, k), v)


def attend_folded(qkv, rel_h, rel_w, num_heads, attend=attend_plainly):
    """Attention with relative positions in extra channels: `[q, q_rel_h, q_rel_w] . [k, 1_u, 1_v]`.

    Args:
      qkv: 'h w (3 head d)', the queries, keys and values of one grid of tokens.
      rel_h, rel_w, num_heads: as in `attend_in_windows`.
      attend: f('head t d', 'head t d', 'head t e') -> 'head t e', attention without scaling.

    Returns:
      'h w (head d)'.
    """
    height, width = qkv.shape[:2]
    q, k, v, q_rel_h, q_rel_w = project_positions(qkv, rel_h, rel_w, num_heads)
    rows = repeat(jnp.eye(height, dtype=k.dtype), "h u -> head h w u", head=num_heads, w=width)
    columns = repeat(jnp.eye(width, dtype=k.dtype), "w v -> head h w v", head=num_heads, h=height)
    q = jnp.concatenate([q, q_rel_h, q_rel_w], axis=-1)
    k = jnp.concatenate([k, rows, columns], axis=-1)
    q, k, v = (rearrange(x, "head h w d -> head (h w) d") for x in (q, k, v))
    return rearrange(attend(q, k, v), "head (h w) d -> h w (head d)", w=width)


def attend_by_rows(qkv, rel_h, rel_w, num_heads):
    """The same as `attend_folded` for a large grid, a few rows of queries of one head at a time.

    The relative terms are added to the logits here: extra channels would cost more than they save
    where the logits stay in the cache.
    """
    height, width = qkv.shape[:2]
    rows = next(r for r in range(max(1, QUERIES_PER_STEP // width), 0, -1) if height % r == 0)

    def one_head(inputs):
        q, k, v, q_rel_h, q_rel_w = inputs
        k, v = (rearrange(x, "h w d -> (h w) d") for x in (k, v))

        @jax.checkpoint
        def some_rows(inputs):
            q, q_rel_h, q_rel_w = inputs
            logits = rearrange(q, "r w d -> (r w) d") @ k.T
            logits = rearrange(logits, "(r w) (u v) -> r w u v", w=width, v=width)
            logits = logits + q_rel_h[..., :, None] + q_rel_w[..., None, :]
            return weigh(rearrange(logits, "r w u v -> (r w) (u v)"), v)

        steps = [rearrange(x, "(s r) w d -> s r w d", r=rows) for x in (q, q_rel_h, q_rel_w)]
        return lax.map(some_rows, steps)

    out = lax.map(one_head, project_positions(qkv, rel_h, rel_w, num_heads))
    return rearrange(out, "head s (r w) d -> (s r) w (head d)", w=width)


def project_positions(qkv, rel_h, rel_w, num_heads):
    """Splits heads, scales queries, and multiplies unscaled queries with relative positions.

    Returns:
      q, k, v: 'head h w d', and what is to be added to the logits: 'head h w u', 'head h w v'.
    """
    q, k, v = rearrange(qkv, "h w (qkv head d) -> qkv head h w d", qkv=3, head=num_heads)
    q_rel_h = jnp.einsum("ahwd,hud->ahwu", q, rel_h)
    q_rel_w = jnp.einsum("ahwd,wvd->ahwv", q, rel_w)
    return q * q.shape[-1] ** -0.5, k, v, q_rel_h, q_rel_w


def weigh(logits, v):
    """Softmax in float32 of '... q k', applied to values '... k d' -> '... q d'.

    Dividing the result instead of the weights passes over 'q d' instead of 'q k'.
    """
    logits = logits.astype(jnp.float32)
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return ((weights.astype(v.dtype) @ v) / total).astype(v.dtype)
