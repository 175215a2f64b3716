"""Attention with decomposed relative positions, over windows or over the whole grid.

Source: Li et al. 2022 (MViTv2), as used by ViTDet and Segment Anything
(segment-anything `modeling/image_encoder.py`).

Differences, all exact up to rounding:
- In windows the relative positions are folded into extra query and key channels, so that plain
  matrix products add them (`fold_positions`), and no bias is ever broadcast to 't t'.
- Over the whole grid the queries are taken a few rows at a time: the logits of one step stay in the
  cache, where the reference holds 'heads t t' in memory.
- Queries, keys and values of a window's padding are not computed: they are those of a zero token.
- Tables are interpolated to any grid (the reference does so too, but never uses it).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jax import lax

from sam_jax.model.layers import ENCODER_INIT

QUERIES_PER_STEP = 256  # of one head; a step's logits over 4096 keys take 4 MiB


class Attention(nn.Module):
    """Self-attention on a grid of tokens, in windows of `window` x `window` or global (`window=0`).

    Attributes:
      num_heads: heads; they divide the channels.
      table_size: (height, width) that the relative-position tables are stored for.
      window: side of a window in tokens, or 0.
      dtype: compute type of the projections and products.
    """

    num_heads: int
    table_size: tuple[int, int]
    window: int = 0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x):
        """Attends 'b gh gw c' -> 'b gh gw c'."""
        gh, gw, c = x.shape[-3:]
        project = nn.Dense(3 * c, dtype=self.dtype, kernel_init=ENCODER_INIT, name="qkv")
        table_h = self.param(
            "rel_pos_h", nn.initializers.zeros, (2 * self.table_size[0] - 1, c // self.num_heads)
        )
        table_w = self.param(
            "rel_pos_w", nn.initializers.zeros, (2 * self.table_size[1] - 1, c // self.num_heads)
        )

        qkv = project(x)
        if self.window:
            qkv = split_windows(qkv, self.window, fill=project(jnp.zeros(c, x.dtype)))
        *_, height, width, _ = qkv.shape
        q, k, v = rearrange(
            qkv, "... h w (qkv head d) -> qkv (...) head h w d", qkv=3, head=self.num_heads
        )
        rel_h = jnp.einsum("nahwd,hud->nahwu", q, relative_positions(table_h, height, self.dtype))
        rel_w = jnp.einsum("nahwd,wud->nahwu", q, relative_positions(table_w, width, self.dtype))
        q = q * (c // self.num_heads) ** -0.5

        out = (attend_folded if self.window else attend_by_rows)(q, k, v, rel_h, rel_w)
        out = rearrange(out, "n head h w d -> n h w (head d)")
        if self.window:
            out = join_windows(out, gh, gw)
        return nn.Dense(c, dtype=self.dtype, kernel_init=ENCODER_INIT, name="proj")(out)


def relative_positions(table, n, dtype):
    """Looks up 'r d' rows for every (query, key) pair of an axis of n tokens -> 'n n d'."""
    if table.shape[0] != 2 * n - 1:
        table = jax.image.resize(table, (2 * n - 1, table.shape[1]), "linear", antialias=False)
    offsets = jnp.arange(n)[:, None] - jnp.arange(n) + n - 1
    return table.astype(dtype)[offsets]


def split_windows(x, window, fill):
    """Cuts 'b gh gw c' into '(b nh nw) window window c', padded bottom and right with `fill` 'c'."""
    gh, gw = x.shape[1:3]
    pad_h, pad_w = -gh % window, -gw % window
    if pad_h or pad_w:
        inside = (jnp.arange(gh + pad_h) < gh)[:, None] & (jnp.arange(gw + pad_w) < gw)
        x = jnp.pad(x, ((0, 0), (0, pad_h), (0, pad_w), (0, 0)))
        x = jnp.where(inside[..., None], x, fill)
    return rearrange(x, "b (nh h) (nw w) c -> (b nh nw) h w c", h=window, w=window)


def join_windows(x, gh, gw):
    """Undoes `split_windows`: '(b nh nw) window window c' -> 'b gh gw c', padding dropped."""
    nh, nw = -(-gh // x.shape[1]), -(-gw // x.shape[2])
    x = rearrange(x, "(b nh nw) h w c -> b (nh h) (nw w) c", nh=nh, nw=nw)
    return x[:, :gh, :gw]


def attend_folded(q, k, v, rel_h, rel_w):
    """Attention whose relative positions ride in extra channels: `[q, rel_h, rel_w] . [k, 1_u, 1_v]`.

    Args:
      q, k, v: 'n head h w d', q already scaled.
      rel_h: 'n head h w h', the vertical term for each key row; rel_w: 'n head h w w', likewise.
    Returns:
      'n head h w d'.
    """
    n, heads, height, width, _ = q.shape
    rows = repeat(jnp.eye(height, dtype=k.dtype), "h u -> n a h w u", n=n, a=heads, w=width)
    columns = repeat(jnp.eye(width, dtype=k.dtype), "w u -> n a h w u", n=n, a=heads, h=height)
    q, k, v = (
        rearrange(x, "n a h w d -> (n a) (h w) d")
        for x in (
            jnp.concatenate([q, rel_h, rel_w], -1),
            jnp.concatenate([k, rows, columns], -1),
            v,
        )
    )
    out = attend(jnp.einsum("nqd,nkd->nqk", q, k), v)
    return rearrange(out, "(n a) (h w) d -> n a h w d", a=heads, h=height)


def attend_by_rows(q, k, v, rel_h, rel_w):
    """The same attention over a large grid, a few rows of queries of one head at a time.

    The relative terms are added to the logits here: the extra channels would cost more than they
    save where the logits stay in the cache. Arguments and result as in `attend_folded`.
    """
    n, heads, height, width, _ = q.shape
    rows = next(r for r in range(max(1, QUERIES_PER_STEP // width), 0, -1) if height % r == 0)

    def one_head(inputs):
        q, k, v, rel_h, rel_w = inputs
        k, v = (rearrange(x, "h w d -> (h w) d") for x in (k, v))

        @jax.checkpoint
        def some_rows(inputs):
            q, rel_h, rel_w = inputs
            logits = rearrange(q, "r w d -> (r w) d") @ k.T
            logits = rearrange(logits, "(r w) (u v) -> r w u v", w=width, v=width)
            logits = logits + rel_h[..., :, None] + rel_w[..., None, :]
            return attend(rearrange(logits, "r w u v -> (r w) (u v)"), v)

        steps = [rearrange(x, "(s r) w d -> s r w d", r=rows) for x in (q, rel_h, rel_w)]
        return rearrange(lax.map(some_rows, steps), "s (r w) d -> (s r) w d", w=width)

    inputs = [rearrange(x, "n a h w d -> (n a) h w d") for x in (q, k, v, rel_h, rel_w)]
    return rearrange(lax.map(one_head, inputs), "(n a) h w d -> n a h w d", n=n)


def attend(logits, v):
    """Softmax in float32 of '... q k', applied to values '... k d' -> '... q d'.

    Dividing the result instead of the weights passes over 'q d' instead of 'q k'.
    """
    logits = logits.astype(jnp.float32)
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return ((weights.astype(v.dtype) @ v) / total).astype(v.dtype)
