"""A plain vision transformer that encodes an image once for all of its prompts.

Source: segment-anything `modeling/image_encoder.py` (Li et al. 2022, ViTDet).

Differences: any frame divisible by the patch (positions are interpolated); drop path and remat,
which the released code leaves out; attention as in `attention.py`.
"""

import flax.linen as nn
import jax

from sam_jax.model.attention import Attention
from sam_jax.model.layers import PatchConv, fan_in_uniform, gelu, layer_norm, xavier_uniform


class ImageEncoder(nn.Module):
    """Encodes normalised images 'b h w 3' as 'b gh gw out_dim'.

    Attributes:
      image_size: (height, width) in pixels that the position tables are stored for.
      patch_size: side of a patch in pixels.
      embed_dim: channels; mlp_ratio: the MLPs' hidden channels over these.
      depth: blocks; num_heads: attention heads of each.
      global_blocks: indices of the blocks that attend globally; the others attend in windows.
      window_size: side of a window in tokens.
      out_dim: channels of the embedding.
      drop_path: chance that the last block's branches are dropped; it grows linearly from 0.
      remat: recompute each block in the backward pass, to save memory.
      dtype: compute type; parameters are float32.
    """

    image_size: tuple[int, int]
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    global_blocks: tuple[int, ...]
    window_size: int
    mlp_ratio: int
    out_dim: int
    drop_path: float
    remat: bool
    dtype: str

    @nn.compact
    def __call__(self, image, train=False):
        c = self.embed_dim
        grid = (self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size)
        x = PatchConv(c, self.patch_size, self.dtype, xavier_uniform, name="patch_embed")(image)
        positions = self.param("pos_embed", nn.initializers.truncated_normal(0.02), (1, *grid, c))
        x = x + resize_positions(positions, x.shape[1:3]).astype(self.dtype)

        block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        for i in range(self.depth):
            window = 0 if i in self.global_blocks else self.window_size
            x = block(
                num_heads=self.num_heads,
                table_size=(window, window) if window else grid,
                window=window,
                mlp_dim=self.mlp_ratio * c,
                drop_path=self.drop_path * i / max(1, self.depth - 1),
                dtype=self.dtype,
                name=f"block_{i:02d}",
            )(x, train)
        return Neck(self.out_dim, self.dtype, name="neck")(x)


def resize_positions(table, grid):
    """Interpolates positions '1 th tw c' to a grid (gh, gw), bicubic as PyTorch has it."""
    if table.shape[1:3] == tuple(grid):
        return table
    shape = (1, *grid, table.shape[-1])
    return jax.image.resize(table, shape, jax.image.ResizeMethod.CUBIC_PYTORCH, antialias=False)


class Block(nn.Module):
    """Attention and MLP, each on the norm of its input and added to it."""

    num_heads: int
    table_size: tuple[int, int]
    window: int
    mlp_dim: int
    drop_path: float
    dtype: str

    @nn.compact
    def __call__(self, x, train):
        c = x.shape[-1]
        dense = lambda features, name: nn.Dense(
            features, dtype=self.dtype, kernel_init=xavier_uniform, name=name
        )
        drop = nn.Dropout(
            self.drop_path,
            broadcast_dims=(1, 2, 3),
            rng_collection="drop_path",
            deterministic=not train,
        )
        attend = Attention(
            self.num_heads, self.table_size, self.window, self.dtype, name="attention"
        )
        x = x + drop(attend(layer_norm(1e-6, self.dtype, "norm1")(x)))
        y = gelu(dense(self.mlp_dim, "lin1")(layer_norm(1e-6, self.dtype, "norm2")(x)))
        return x + drop(dense(c, "lin2")(y))


class Neck(nn.Module):
    """A 1x1 and a 3x3 convolution to `out_dim` channels, a norm after each."""

    out_dim: int
    dtype: str

    @nn.compact
    def __call__(self, x):
        norm = lambda name: layer_norm(1e-6, self.dtype, name)
        init = fan_in_uniform(x.shape[-1])
        x = PatchConv(self.out_dim, 1, self.dtype, init, bias_init=None, name="conv1")(x)
        x = norm("norm1")(x)
        init = fan_in_uniform(3 * 3 * self.out_dim)
        conv = nn.Conv(
            self.out_dim, (3, 3), use_bias=False, dtype=self.dtype, kernel_init=init, name="conv2"
        )
        return norm("norm2")(conv(x))
