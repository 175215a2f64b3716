"""A masked autoencoder: a vision transformer that learns to reconstruct removed patches of images.

Source: He et al. 2022 ("Masked Autoencoders Are Scalable Vision Learners"), facebookresearch/mae
`models_mae.py`. Segment Anything's image encoder is initialized from its encoder. The blocks are
those of `ImageEncoder`, without relative positions, and attend to all visible patches.

Differences: the patches to remove are sampled from one key per image.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Float32, Int, Key, Shaped

from sam_jax.model.fields import Rule, check_rules, field_rules, multiple_of
from sam_jax.model.image_encoder import (
    Block,
    Dtype,
    Remat,
    check_normalized,
    patch_rules,
    rematted,
)
from sam_jax.model.layers import PatchConv, matmul_precision, xavier_uniform
from sam_jax.model.sam import Sam, sam_tiny, sam_vit_b, sam_vit_h, sam_vit_l

EPSILON = 1e-6  # of norms, and added to a patch's variance


@flax.struct.dataclass
class ReconstructedPatches:
    """The reconstruction of b images of l patches.

    Attributes:
      patches: Reconstructed patches, including those that were visible. Each is normalized by its
        own mean and deviation.
      mask: True for patches that were removed from the encoder's input.
    """

    patches: Float32[Array, "b l d"]
    mask: Bool[Array, "b l"]


class MaskedAutoencoder(nn.Module):
    """The autoencoder; the default fields are those of ViT-B.

    Attributes:
      image_size: (height, width) in pixels.
      patch_size: Side of a patch in pixels, which divides the image's sides.
      embed_dim: Channels of the encoder.
      depth: Blocks of the encoder.
      num_heads: Attention heads of the encoder.
      mlp_ratio: Hidden channels of each MLP, as a multiple of its input channels.
      decoder_dim: Channels of the decoder.
      decoder_depth: Blocks of the decoder.
      decoder_heads: Attention heads of the decoder.
      mask_ratio: Fraction of an image's patches that are removed.
      remat: As in `ImageEncoder`.
      dtype: Compute type. Parameters and results are float32.
    """

    image_size: tuple[int, int] = (224, 224)
    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: int = 4
    decoder_dim: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    mask_ratio: float = 0.75
    remat: Remat = "none"
    dtype: Dtype = "float32"

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of an image's patches."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def num_visible(self) -> int:
        """Patches of an image that the encoder sees."""
        return int(self.num_patches * (1 - self.mask_ratio))

    def rules(self) -> Iterator[Rule]:
        """Yields the rules that the fields must obey."""
        yield from field_rules(self)
        yield from patch_rules(self.image_size, self.patch_size)
        yield from multiple_of("embed_dim", self.embed_dim, self.num_heads, "num_heads")
        yield from multiple_of("decoder_dim", self.decoder_dim, self.decoder_heads, "decoder_heads")
        for name in ("embed_dim", "decoder_dim"):  # sines and cosines of two coordinates
            yield Rule(name, getattr(self, name), getattr(self, name) % 4 == 0, "a multiple of 4")
        removes_some = 0 < self.num_visible < self.num_patches
        allowed = f"such that some of the {self.num_patches} patches are removed and some are not"
        yield Rule("mask_ratio", self.mask_ratio, removes_some, allowed)

    def validate(self) -> None:
        """Raises ValueError, naming the field, if the fields do not fit together."""
        check_rules(self.rules())

    def setup(self) -> None:
        """Creates the parameters and submodules."""
        normal = nn.initializers.normal(0.02)
        self.patch_embed = PatchConv(self.embed_dim, self.patch_size, self.dtype, xavier_uniform)
        self.class_token = self.param("class_token", normal, (self.embed_dim,))
        for i in range(self.depth):
            setattr(self, f"block_{i:02d}", self._block(self.num_heads, self.embed_dim))
        self.norm = self._layer_norm()
        self.decoder_embed = self._dense(self.decoder_dim)
        self.mask_token = self.param("mask_token", normal, (self.decoder_dim,))
        for i in range(self.decoder_depth):
            block = self._block(self.decoder_heads, self.decoder_dim)
            setattr(self, f"decoder_block_{i:02d}", block)
        self.decoder_norm = self._layer_norm()
        self.decoder_pred = self._dense(3 * self.patch_size**2)

    def _block(self, num_heads: int, dim: int) -> nn.Module:
        return rematted(Block, self.remat)(
            num_heads=num_heads, table_size=None, mlp_dim=self.mlp_ratio * dim, dtype=self.dtype
        )

    def _dense(self, features: int) -> nn.Module:
        return nn.Dense(features, dtype=self.dtype, kernel_init=xavier_uniform)

    def _layer_norm(self) -> nn.Module:
        return nn.LayerNorm(epsilon=EPSILON, use_fast_variance=False, dtype=self.dtype)

    def __call__(
        self, image: Shaped[Array | np.ndarray, "..."], keys: Key[Array, " b"]
    ) -> ReconstructedPatches:
        """Reconstructs all patches of images from the visible ones.

        Args:
          image: 'b h w 3' float, normalized, of `image_size`.
          keys: One key per image, from which its removed patches are sampled.

        Returns:
          The reconstructed patches, and which of them were removed.

        Raises:
          ValueError: If the images have another size or are not normalized, or if `mask_ratio`
            removes all patches or none.
        """
        expected = (*self.image_size, 3)
        if image.shape[1:] != expected:
            raise ValueError(f"image must have shape {('b', *expected)}; got {image.shape}")
        check_normalized(image)
        self.validate()
        order = jax.vmap(self.sample_order)(keys)
        visible = order[:, : self.num_visible]
        with matmul_precision(self.dtype):
            patches = self.decode(self.encode(image, visible), order)
        rank = jnp.argsort(order, axis=1)
        return ReconstructedPatches(patches.astype(jnp.float32), rank >= self.num_visible)

    def sample_order(self, key: Key[Array, ""]) -> Int[Array, " l"]:
        """Samples an order of an image's patches, of which the first `num_visible` are visible."""
        return jnp.argsort(jax.random.uniform(key, (self.num_patches,)))

    def encode(
        self, image: Float[Array | np.ndarray, "b h w 3"], visible: Int[Array | np.ndarray, "b v"]
    ) -> Float[Array, "b 1+v c"]:
        """Encodes the visible patches of images.

        Args:
          image: Normalized images.
          visible: Indices of the visible patches.

        Returns:
          The class token, then the visible patches.
        """
        x = rearrange(self.patch_embed(image), "b gh gw c -> b (gh gw) c")
        x = x + jnp.asarray(encode_positions(*self.grid, self.embed_dim), self.dtype)
        x = jnp.take_along_axis(x, visible[..., None], axis=1)
        blocks = [getattr(self, f"block_{i:02d}") for i in range(self.depth)]
        return self.norm(apply_to_rows(blocks, prepend(self.class_token, x)))

    def decode(
        self, x: Float[Array, "b one_plus_v c"], order: Int[Array | np.ndarray, "b l"]
    ) -> Float[Array, "b l d"]:
        """Reconstructs all patches of images.

        Args:
          x: Encoded class token and visible patches, from `encode`.
          order: The patches, the visible ones first.

        Returns:
          Patches of d = i j 3 values: i rows of j pixels.
        """
        x = self.decoder_embed(x)
        num_removed = order.shape[1] - self.num_visible
        removed = jnp.broadcast_to(self.mask_token, (len(x), num_removed, x.shape[-1]))
        patches = jnp.concatenate([x[:, 1:], removed.astype(x.dtype)], axis=1)
        patches = jnp.take_along_axis(patches, jnp.argsort(order, axis=1)[..., None], axis=1)
        positions = encode_positions(*self.grid, self.decoder_dim)
        patches = patches + jnp.asarray(positions, self.dtype)
        blocks = [getattr(self, f"decoder_block_{i:02d}") for i in range(self.decoder_depth)]
        x = apply_to_rows(blocks, jnp.concatenate([x[:, :1], patches], axis=1))
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]


def apply_to_rows(
    blocks: Sequence[Callable[..., Any]], x: Float[Array, "b t c"]
) -> Float[Array, "b t c"]:
    """Applies blocks, which expect a grid, to a row of tokens."""
    x = x[:, None]
    for block in blocks:
        x = block(x)
    return x[:, 0]


def prepend(
    token: Float[Array | np.ndarray, " c"], x: Float[Array, "b t c"]
) -> Float[Array, "b 1+t c"]:
    """Puts a token before those of each image."""
    first = jnp.broadcast_to(token, (len(x), 1, x.shape[-1]))
    return jnp.concatenate([first.astype(x.dtype), x], axis=1)


def patchify(
    image: Shaped[Array | np.ndarray, "b h w c"], size: int
) -> Shaped[Array | np.ndarray, "b l d"]:
    """Cuts images into patches 'b (gh gw) (i j c)' of i = j = `size` pixels, row by row."""
    return rearrange(image, "b (gh i) (gw j) c -> b (gh gw) (i j c)", i=size, j=size)


def encode_positions(gh: int, gw: int, c: int) -> Float32[np.ndarray, "l c"]:
    """Returns sines and cosines of the positions in a grid; half of the channels are for x."""
    frequencies = 10000.0 ** (-np.arange(c // 4) / (c // 4))

    def encode(length: int) -> Float[np.ndarray, "length half_c"]:
        phase = np.arange(length)[:, None] * frequencies
        return np.concatenate([np.sin(phase), np.cos(phase)], axis=-1)

    x = np.broadcast_to(encode(gw), (gh, gw, c // 2))
    y = np.broadcast_to(encode(gh)[:, None], (gh, gw, c // 2))
    return np.concatenate([x, y], axis=-1).reshape(gh * gw, c).astype(np.float32)


def normalize_patches(patches: Float[Array | np.ndarray, "*shape d"]) -> Float[Array, "*shape d"]:
    """Normalizes each patch by its own mean and deviation."""
    mean, deviation = mean_and_deviation(patches)
    return (jnp.asarray(patches) - mean) / deviation


def mean_and_deviation(
    patches: Float[Array | np.ndarray, "*shape d"],
) -> tuple[Float[Array, "*shape 1"], Float[Array, "*shape 1"]]:
    """Returns the mean of each patch, and its deviation with d - 1 degrees of freedom."""
    mean = jnp.mean(patches, axis=-1, keepdims=True)
    variance = jnp.var(patches, axis=-1, ddof=1, keepdims=True)
    return mean, jnp.sqrt(variance + EPSILON)


def reconstruction_loss(
    output: ReconstructedPatches,
    image: Float[Array | np.ndarray, "b h w 3"],
    patch_size: int,
    normalized: bool,
) -> Float[Array, " b"]:
    """Computes the mean squared error of the masked patches of each image.

    Source: `forward_loss` in facebookresearch/mae `models_mae.py`.

    Args:
      output: Reconstructed patches. The same number is removed from each image.
      image: Normalized images.
      patch_size: Side of a patch in pixels.
      normalized: True if patches are predicted normalized by their mean and deviation.

    Returns:
      The mean over an image's removed patches.
    """
    target = patchify(image, patch_size)
    if normalized:
        target = normalize_patches(target)
    error = jnp.mean((output.patches - target) ** 2, axis=-1)
    return jnp.sum(error * output.mask, axis=1) / jnp.sum(output.mask, axis=1)


def mae_for(sam: Sam, **overrides: Any) -> MaskedAutoencoder:
    """Builds an autoencoder whose encoder can become a SAM's image encoder."""
    names = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
    fields = {name: getattr(sam.image_encoder, name) for name in names}
    return MaskedAutoencoder(**(fields | overrides))


def mae_vit_b(**overrides: Any) -> MaskedAutoencoder:
    """Builds the autoencoder for ViT-B."""
    return mae_for(sam_vit_b(), **overrides)


def mae_vit_l(**overrides: Any) -> MaskedAutoencoder:
    """Builds the autoencoder for ViT-L."""
    return mae_for(sam_vit_l(), **overrides)


def mae_vit_h(**overrides: Any) -> MaskedAutoencoder:
    """Builds the autoencoder for ViT-H: patches of 16 pixels, where the published one has 14."""
    return mae_for(sam_vit_h(), **overrides)


def mae_tiny(**overrides: Any) -> MaskedAutoencoder:
    """Builds the autoencoder for `sam_tiny`, with an equally small decoder."""
    fields: dict[str, Any] = dict(
        image_size=(64, 64), decoder_dim=64, decoder_depth=1, decoder_heads=2
    )
    return mae_for(sam_tiny(), **(fields | overrides))
