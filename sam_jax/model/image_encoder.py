"""A plain vision transformer that encodes an image once for all of its prompts.

Source: segment-anything `modeling/image_encoder.py` (Li et al. 2022, ViTDet).

Differences: any frame divisible by the patch (positions are interpolated); drop path and remat,
which the released code leaves out; attention as in `attention.py`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

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
      remat: what the backward pass keeps of a block: "none" recomputed, all but "products", or all
        of the "blocks" but their inputs.
      scan_blocks: loop over super-blocks, of which one is compiled; for training on accelerators.
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
    remat: str
    scan_blocks: bool
    dtype: str

    @nn.compact
    def __call__(self, image, train=False):
        c = self.embed_dim
        grid = (self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size)
        x = PatchConv(c, self.patch_size, self.dtype, xavier_uniform, name="patch_embed")(image)
        positions = self.param("pos_embed", nn.initializers.truncated_normal(0.02), (1, *grid, c))
        x = x + resize_positions(positions, x.shape[1:3]).astype(self.dtype)

        keep = self.draw_kept(len(x)) if train and self.drop_path else None
        blocks = [self.block(i) for i in range(self.depth)]
        if self.scan_blocks and not self.is_initializing():
            x = scan_super_blocks(blocks, self.variables["params"], x, keep)
        else:
            for i, block in enumerate(blocks):
                x = block(x, None if keep is None else keep[i])
        return Neck(self.out_dim, self.dtype, name="neck")(x)

    def block(self, i):
        """Block i, with its parameters."""
        window = 0 if i in self.global_blocks else self.window_size
        grid = (self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size)
        return rematted(Block, self.remat)(
            num_heads=self.num_heads,
            table_size=(window, window) if window else grid,
            window=window,
            mlp_dim=self.mlp_ratio * self.embed_dim,
            dtype=self.dtype,
            name=f"block_{i:02d}",
        )

    def draw_kept(self, b):
        """Factors 'depth 2 b' of the blocks' branches: 0 for a dropped one, and the mean is 1."""
        rate = self.drop_path * jnp.arange(self.depth) / max(1, self.depth - 1)
        kept = 1 - rate[:, None, None]
        draws = jax.random.bernoulli(self.make_rng("drop_path"), kept, (self.depth, 2, b))
        return jnp.where(draws, 1 / kept, 0.0)


def scan_super_blocks(blocks, params, x, keep):
    """Applies blocks in loops, so that only one of each kind is compiled.

    Args:
      blocks: a whole number of super-blocks: some windowed blocks, then a global one.
      params: the encoder's.
      x: 'b gh gw c'; keep: 'depth 2 b', or None.
    """
    ends = [i for i, block in enumerate(blocks) if not block.window]
    period = len(blocks) // max(1, len(ends))
    if ends != list(range(period - 1, len(blocks), period)):
        raise ValueError(
            "scan_blocks needs global_blocks at equal distances, the last block among them; got "
            f"{ends} of {len(blocks)} blocks"
        )
    count = len(blocks) // period
    each = [params[block.name] for block in blocks]
    stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    windowed = [stack(each[s * period : (s + 1) * period - 1]) for s in range(count) if period > 1]
    xs = {"global": stack(each[period - 1 :: period])}
    if windowed:
        xs["windowed"] = stack(windowed)
    if keep is not None:
        xs["keep"] = rearrange(keep, "(s i) branch b -> s i branch b", i=period)

    def apply(block, x, params, keep):
        return block.clone(parent=None, name=None).apply({"params": params}, x, keep)

    def super_block(x, xs):
        keep = xs.get("keep")
        if windowed:
            within = xs["windowed"], None if keep is None else keep[:-1]
            x, _ = jax.lax.scan(lambda x, one: (apply(blocks[0], x, *one), None), x, within)
        return apply(blocks[-1], x, xs["global"], None if keep is None else keep[-1]), None

    return jax.lax.scan(super_block, x, xs)[0]


def rematted(block, what):
    """The class of a block whose backward pass recomputes what `ImageEncoder.remat` says."""
    if what == "none":
        return block
    keep_products = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return nn.remat(block, policy={"products": keep_products, "blocks": None}[what])


def resize_positions(table, grid):
    """Interpolates positions '1 th tw c' to a grid (gh, gw), bicubic as PyTorch has it."""
    if table.shape[1:3] == tuple(grid):
        return table
    shape = (1, *grid, table.shape[-1])
    return jax.image.resize(table, shape, jax.image.ResizeMethod.CUBIC_PYTORCH, antialias=False)


class Block(nn.Module):
    """Attention and MLP, each on the norm of its input and added to it; fields as `Attention`'s."""

    num_heads: int
    table_size: tuple[int, int] | None
    mlp_dim: int
    window: int = 0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, keep=None):
        """Maps 'b gh gw c' to the same; keep: factors '2 b' of the two branches, or None."""
        c = x.shape[-1]
        dense = lambda features, name: nn.Dense(
            features, dtype=self.dtype, kernel_init=xavier_uniform, name=name
        )
        factor = lambda y, i: (
            y if keep is None else y * keep[i, :, None, None, None].astype(y.dtype)
        )
        attend = Attention(
            self.num_heads, self.table_size, self.window, self.dtype, name="attention"
        )
        x = x + factor(attend(layer_norm(1e-6, self.dtype, "norm1")(x)), 0)
        y = gelu(dense(self.mlp_dim, "lin1")(layer_norm(1e-6, self.dtype, "norm2")(x)))
        return x + factor(dense(c, "lin2")(y), 1)


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
