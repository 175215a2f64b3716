"""A plain vision transformer that encodes an image once for all of its prompts.

Source: segment-anything `modeling/image_encoder.py` (Li et al. 2022, ViTDet).

Differences: images of any size that the patch divides are accepted, because stored positions are
interpolated; drop path and rematerialization, which the released code leaves out, are options;
attention is computed as described in `attention.py`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Shaped

from sam_jax.model.attention import Attention
from sam_jax.model.bicubic import resize_bicubic
from sam_jax.model.fields import MAX_SIZE, Rule, check_rules, field_rules, multiple_of
from sam_jax.model.layers import PatchConv, fan_in_uniform, gelu, layer_norm, xavier_uniform

MAX_NORMALIZED = 50.0  # largest value of a pixel that can be taken for a normalized one

Remat = Literal["none", "products", "blocks"]
Dtype = Literal["float32", "bfloat16"]
Part = Literal["all", "trunk", "neck"]


class ImageEncoder(nn.Module):
    """The image encoder; the default fields are those of ViT-B.

    Attributes:
      image_size: (height, width) in pixels for which position tables are stored. Positions are
        interpolated for images of other sizes.
      patch_size: Side of a patch in pixels.
      embed_dim: Channels of a token inside the encoder.
      depth: Number of blocks.
      num_heads: Attention heads of each block.
      global_blocks: Indices of the blocks that attend globally. The others attend in windows.
      window_size: Side of a window in tokens.
      mlp_ratio: Hidden channels of each MLP, as a multiple of `embed_dim`.
      out_dim: Channels of the embedding that the encoder returns.
      drop_path: Probability that the last block's residual branches are dropped in training. It
        grows linearly with the block's index, from 0 for the first block.
      remat: What the backward pass recomputes to save memory: "none"; everything except the
        results of matrix "products"; or entire "blocks", of which only the inputs are kept.
      scan_blocks: Whether to loop over super-blocks (windowed blocks followed by a global one), so
        that only one of them is compiled. Training on accelerators then starts sooner.
      dtype: Compute type. Parameters, norms and softmax are float32.
    """

    image_size: tuple[int, int] = (1024, 1024)
    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    global_blocks: tuple[int, ...] = (2, 5, 8, 11)
    window_size: int = 14
    mlp_ratio: int = 4
    out_dim: int = 256
    drop_path: float = 0.0
    remat: Remat = "none"
    scan_blocks: bool = False
    dtype: Dtype = "float32"

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the tokens of an image of `image_size`."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    def rules(self) -> Iterator[Rule]:
        """Yields the rules that the fields must obey."""
        yield from field_rules(self)
        yield from patch_rules(self.image_size, self.patch_size)
        yield from multiple_of("embed_dim", self.embed_dim, self.num_heads, "num_heads")
        blocks = self.global_blocks
        are_indices = len(blocks) <= self.depth and set(blocks) <= set(range(self.depth))
        allowed = f"indices of blocks, below depth = {self.depth}"
        yield Rule("global_blocks", blocks, are_indices, allowed)
        yield Rule("drop_path", self.drop_path, 0 <= self.drop_path < 1, "at least 0 and below 1")

    def validate(self) -> None:
        """Raises ValueError, naming the field, if the fields do not fit together."""
        check_rules(self.rules())

    @nn.compact
    def __call__(
        self, image: Float[Array | np.ndarray, "b h w i"], train: bool = False, part: Part = "all"
    ) -> Float[Array, "b gh gw o"]:
        """Encodes images, or runs one part of the encoder.

        Args:
          image: Normalized images 'b h w 3', whose sides are multiples of `patch_size`. For the
            neck, the tokens that the trunk returns.
          train: Whether to drop paths; needs the rng "drop_path".
          part: "all", "trunk" for everything before the neck, or "neck".

        Returns:
          Embeddings of `out_dim` channels; from the trunk, tokens of `embed_dim` channels.
        """
        x = jnp.asarray(image) if part == "neck" else self._trunk(image, train)
        return x if part == "trunk" else Neck(self.out_dim, self.dtype, name="neck")(x)

    def _trunk(
        self, image: Float[Array | np.ndarray, "b h w 3"], train: bool
    ) -> Float[Array, "b gh gw c"]:
        """Embeds patches and applies the blocks."""
        c = self.embed_dim
        x = PatchConv(c, self.patch_size, self.dtype, xavier_uniform, name="patch_embed")(image)
        init = nn.initializers.truncated_normal(0.02)
        positions = self.param("pos_embed", init, (1, *self.grid, c))
        x = x + resize_positions(positions, x.shape[1:3]).astype(self.dtype)

        keep = self.sample_drop_path(len(x)) if train and self.drop_path else None
        blocks = [self._block(i) for i in range(self.depth)]
        # Initialization visits each block by itself, since it creates the parameters to stack.
        if self.scan_blocks and not self.is_initializing():
            return scan_super_blocks(blocks, self.variables["params"], x, keep)
        for i, block in enumerate(blocks):
            x = block(x, None if keep is None else keep[i])
        return x

    def _block(self, index: int) -> nn.Module:
        window = 0 if index in self.global_blocks else self.window_size
        return rematted(Block, self.remat)(
            num_heads=self.num_heads,
            table_size=(window, window) if window else self.grid,
            window=window,
            mlp_dim=self.mlp_ratio * self.embed_dim,
            dtype=self.dtype,
            name=f"block_{index:02d}",
        )

    def sample_drop_path(self, b: int) -> Float[Array, "depth 2 b"]:
        """Samples the factor of each residual branch: 0 if it is dropped, with a mean of 1."""
        rate = self.drop_path * jnp.arange(self.depth) / max(1, self.depth - 1)
        keep_prob = 1 - rate[:, None, None]
        is_kept = jax.random.bernoulli(self.make_rng("drop_path"), keep_prob, (self.depth, 2, b))
        return jnp.where(is_kept, 1 / keep_prob, 0.0)


def patch_rules(image_size: tuple[int, ...], patch_size: int) -> Iterator[Rule]:
    """Yields the rules of an image size and the side of a patch."""
    yield Rule("patch_size", patch_size, patch_size >= 1, "at least 1")
    fits = len(image_size) == 2 and all(side > 0 and side % patch_size == 0 for side in image_size)
    yield Rule("image_size", image_size, fits, f"two multiples of patch_size = {patch_size}")
    yield Rule("image_size", image_size, max(image_size) <= MAX_SIZE, f"at most {MAX_SIZE}")


def scan_super_blocks(
    blocks: Sequence[Any],
    params: Mapping[str, Any],
    x: Float[Array, "b gh gw c"],
    keep: Float[Array, "depth 2 b"] | None,
) -> Float[Array, "b gh gw c"]:
    """Applies blocks in loops, so that only one block of each kind is compiled.

    Args:
      blocks: The encoder's blocks: a number of equal super-blocks, each of which is some windowed
        blocks followed by a global one.
      params: The encoder's parameters.
      x: Tokens.
      keep: Factors of the residual branches, or None.

    Returns:
      The tokens after the last block.

    Raises:
      ValueError: If the blocks do not form equal super-blocks.
    """
    ends = [i for i, block in enumerate(blocks) if not block.window]
    period = len(blocks) // max(1, len(ends))
    if ends != list(range(period - 1, len(blocks), period)):
        raise ValueError(
            "scan_blocks needs global_blocks at equal distances, the last block among them; got "
            f"{ends} of {len(blocks)} blocks"
        )
    count = len(blocks) // period
    block_params = [params[block.name] for block in blocks]

    def stack(trees: list[Any]) -> Any:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    xs = {"global": stack(block_params[period - 1 :: period])}
    if period > 1:
        starts = range(0, count * period, period)
        xs["windowed"] = stack([stack(block_params[s : s + period - 1]) for s in starts])
    if keep is not None:
        xs["keep"] = rearrange(keep, "(s i) branch b -> s i branch b", i=period)

    def apply(block: Any, x: Array, params: Any, keep: Array | None) -> Array:
        return block.clone(parent=None, name=None).apply({"params": params}, x, keep)

    def windowed_block(x: Array, block_xs: Any) -> tuple[Array, None]:
        return apply(blocks[0], x, *block_xs), None

    def super_block(x: Array, xs: dict[str, Any]) -> tuple[Array, None]:
        keep = xs.get("keep")
        if "windowed" in xs:
            windowed_xs = xs["windowed"], None if keep is None else keep[:-1]
            x, _ = jax.lax.scan(windowed_block, x, windowed_xs)
        return apply(blocks[-1], x, xs["global"], None if keep is None else keep[-1]), None

    return jax.lax.scan(super_block, x, xs)[0]


def rematted(block: type[nn.Module], remat: Remat) -> Any:
    """Returns a block's class, modified to recompute in the backward pass what `remat` says."""
    if remat == "none":
        return block
    keep_products = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return nn.remat(block, policy={"products": keep_products, "blocks": None}[remat])


def check_normalized(image: Shaped[Array | np.ndarray, "..."]) -> None:
    """Raises ValueError for pixels that are not normalized floats, as far as can be seen.

    In functions that are traced, the values are not known; then only their type is checked.
    """
    how = "image must be normalized floats, as sam_jax.normalize returns them"
    if not jnp.issubdtype(image.dtype, jnp.floating):
        raise ValueError(f"{how}; got {image.dtype}")
    if isinstance(image, jax.core.Tracer) or not image.size:
        return
    # Not with jax.numpy, which would trace the comparison inside of a function that is traced.
    if (largest := float(np.abs(np.asarray(image)).max())) > MAX_NORMALIZED:
        raise ValueError(f"{how}, which are at most about 3; got values up to {largest:g}")


def resize_positions(
    table: Float[Array | np.ndarray, "1 th tw c"], grid: Sequence[int]
) -> Float[Array | np.ndarray, "1 gh gw c"]:
    """Interpolates a table of positions to a grid (gh, gw), bicubically as PyTorch does."""
    if table.shape[1:3] == tuple(grid):
        return table
    return resize_bicubic(table, (1, 2), grid)


class Block(nn.Module):
    """A transformer block: attention and an MLP, each with a norm before it and a residual.

    Attributes:
      num_heads: Attention heads.
      table_size: As in `Attention`.
      mlp_dim: Hidden channels of the MLP.
      window: As in `Attention`.
      dtype: Compute type.
    """

    num_heads: int
    table_size: tuple[int, int] | None
    mlp_dim: int
    window: int = 0
    dtype: Dtype = "float32"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b gh gw c"], keep: Float[Array, "2 b"] | None = None
    ) -> Float[Array, "b gh gw c"]:
        """Applies the block; `keep` are factors of the two residual branches."""

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype, kernel_init=xavier_uniform, name=name)

        def scale(branch: Array, index: int) -> Array:
            if keep is None:
                return branch
            return branch * keep[index, :, None, None, None].astype(branch.dtype)

        attention = Attention(
            self.num_heads, self.table_size, self.window, self.dtype, name="attention"
        )
        x = x + scale(attention(layer_norm(1e-6, self.dtype, "norm1")(x)), 0)
        y = gelu(dense(self.mlp_dim, "lin1")(layer_norm(1e-6, self.dtype, "norm2")(x)))
        return x + scale(dense(x.shape[-1], "lin2")(y), 1)


class Neck(nn.Module):
    """A 1x1 and a 3x3 convolution to `out_dim` channels, each followed by a norm."""

    out_dim: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b gh gw c"]) -> Float[Array, "b gh gw o"]:
        """Applies the two convolutions."""
        init = fan_in_uniform(x.shape[-1])
        x = PatchConv(self.out_dim, 1, self.dtype, init, bias_init=None, name="conv1")(x)
        x = layer_norm(1e-6, self.dtype, "norm1")(x)
        init = fan_in_uniform(3 * 3 * self.out_dim)
        conv = nn.Conv(
            self.out_dim, (3, 3), use_bias=False, dtype=self.dtype, kernel_init=init, name="conv2"
        )
        return layer_norm(1e-6, self.dtype, "norm2")(conv(x))
