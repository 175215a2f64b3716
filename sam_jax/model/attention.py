"""Attention with decomposed relative positions, within windows or over the full grid.

Source: Li et al. 2022 (MViTv2), as used by ViTDet and Segment Anything
(segment-anything `modeling/image_encoder.py`).

Differences, all exact up to rounding: see `ops/relative_positions.py`, `ops/global_attention.py`,
`ops/window_attention.py` and `ops/windows.py`. In short: relative positions are folded into extra
channels, the logits of a full grid are never in memory, and except on TPUs the padding of windows
is projected once.
"""

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from sam_jax.model.layers import xavier_uniform
from sam_jax.model.ops import dispatch
from sam_jax.model.ops.relative_positions import relative_positions
from sam_jax.model.ops.windows import join_windows


class Attention(nn.Module):
    """Self-attention on a grid of tokens, within windows or over the full grid.

    Attributes:
      num_heads: Attention heads, a divisor of the channels.
      table_size: (height, width) that the tables of relative positions are stored for; None for
        attention without relative positions.
      window: Side of a window in tokens; 0 for the full grid.
      dtype: Compute type of the projections and products.
    """

    num_heads: int
    table_size: tuple[int, int] | None
    window: int = 0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "b gh gw c"]) -> Float[Array, "b gh gw c"]:
        """Attends among the tokens of each grid."""
        gh, gw, c = x.shape[-3:]
        qkv = nn.Dense(3 * c, dtype=self.dtype, kernel_init=xavier_uniform, name="qkv")
        out = nn.Dense(c, dtype=self.dtype, kernel_init=xavier_uniform, name="proj")
        if self.table_size is None:
            tokens = rearrange(qkv(x), "b h w c -> b (h w) c")
            attended = dispatch.attend_among_tokens(tokens, self.num_heads)
            return out(rearrange(attended, "b (h w) c -> b h w c", w=gw))

        table_h = self.position_table("rel_pos_h", self.table_size[0], c)
        table_w = self.position_table("rel_pos_w", self.table_size[1], c)
        if self.window:
            projected = dispatch.project_windows(x, qkv, self.window)
            attend = dispatch.attend_in_windows
        else:
            projected = qkv(x)
            attend = dispatch.attend_globally
        rel_h = relative_positions(table_h, projected.shape[1], self.dtype)
        rel_w = relative_positions(table_w, projected.shape[2], self.dtype)
        attended = attend(projected, rel_h, rel_w, self.num_heads)
        if self.window:
            attended = join_windows(attended, gh, gw)
        return out(attended)

    def position_table(self, name: str, size: int, channels: int) -> Float[Array, "r d"]:
        """Returns the parameter with the relative positions of an axis of `size` tokens."""
        shape = (2 * size - 1, channels // self.num_heads)
        return jnp.asarray(self.param(name, nn.initializers.zeros, shape))
