"""Masked autoencoder: a vision transformer learns images by painting what is hidden of them.

Source: He et al. 2022 ("Masked Autoencoders Are Scalable Vision Learners"), whose encoder Segment
Anything's begins as. Its blocks are those of `ImageEncoder`, attending to all visible patches,
without relative positions.

Differences: masks are drawn from a key an image.
"""

from contextlib import AbstractContextManager
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from sam_jax.model.image_encoder import Block, rematted
from sam_jax.model.layers import PatchConv, xavier_uniform
from sam_jax.model.sam import Sam, sam_tiny, sam_vit_b, sam_vit_h, sam_vit_l

EPSILON = 1e-6  # of norms, and of a patch's variance


@flax.struct.dataclass
class ReconstructedPatches:
    """What a masked autoencoder makes of b images of l patches.

    Attributes:
      patches: 'b l (i j c)' float32, of all patches, each normalised by its own mean and deviation.
      is_hidden: 'b l' bool, those it had not seen.
    """

    patches: jax.Array
    mask: jax.Array


class MaskedAutoencoder(nn.Module):
    """The autoencoder. It is its own configuration: frozen, hashable, comparable.

    Attributes:
      image_size: (height, width) in pixels; patch_size: side of a patch, which divides them.
      embed_dim, depth, num_heads, mlp_ratio: of the encoder, as in `Sam`.
      decoder_dim, decoder_depth, decoder_heads: of the decoder.
      mask_ratio: of an image's patches that are hidden.
      remat: as in `Sam`.
      dtype: as in `Sam`; parameters and results are float32.
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
    remat: Literal["none", "products", "blocks"] = "none"
    dtype: Literal["float32", "bfloat16"] = "float32"

    def setup(self) -> None:
        normal = nn.initializers.normal(0.02)
        self.patch_embed = PatchConv(self.embed_dim, self.patch_size, self.dtype, xavier_uniform)
        self.class_token = self.param("class_token", normal, (self.embed_dim,))
        for i in range(self.depth):
            setattr(self, f"block_{i:02d}", self.block(self.num_heads, self.embed_dim))
        self.norm = self.layer_norm()
        self.decoder_embed = self.dense(self.decoder_dim)
        self.mask_token = self.param("mask_token", normal, (self.decoder_dim,))
        for i in range(self.decoder_depth):
            block = self.block(self.decoder_heads, self.decoder_dim)
            setattr(self, f"decoder_block_{i:02d}", block)
        self.decoder_norm = self.layer_norm()
        self.decoder_pred = self.dense(3 * self.patch_size**2)

    def block(self, num_heads: int, dim: int) -> nn.Module:
        """A block of the encoder, or the decoder."""
        return rematted(Block, self.remat)(
            num_heads=num_heads, table_size=None, mlp_dim=self.mlp_ratio * dim, dtype=self.dtype
        )

    def dense(self, features: int) -> nn.Module:
        return nn.Dense(features, dtype=self.dtype, kernel_init=xavier_uniform)

    def layer_norm(self) -> nn.Module:
        return nn.LayerNorm(epsilon=EPSILON, use_fast_variance=False, dtype=self.dtype)

    def __call__(self, image: jax.Array, keys: jax.Array) -> ReconstructedPatches:
        """Paints all patches of images from few.

        Args:
          image: 'b h w 3' float, normalised.
          keys: 'b', of which each image's own hidden patches are drawn.
        Raises:
          ValueError: if the images are of another size, or all patches are hidden, or none.
        """
        expected = (*self.image_size, 3)
        if image.shape[1:] != expected:
            raise ValueError(f"image must have shape {('b', *expected)}; got {image.shape}")
        if any(side % self.patch_size for side in self.image_size):
            raise ValueError(
                f"image_size must be divisible by the patch of {self.patch_size} pixels; got "
                f"{self.image_size}"
            )
        if not 0 < self.num_visible < self.grid[0] * self.grid[1]:
            raise ValueError(
                "mask_ratio must leave some patches visible and hide some; got "
                f"{self.mask_ratio} of {self.grid[0] * self.grid[1]} patches"
            )
        order = jax.vmap(self.draw_order)(keys)
        visible = order[:, : self.num_visible]
        with self.precision():
            painted = self.decode(self.encode(image, visible), order)
        rank = jnp.argsort(order, axis=1)
        return ReconstructedPatches(painted.astype(jnp.float32), rank >= self.num_visible)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def num_visible(self) -> int:
        """Patches of an image that the encoder sees."""
        return int(self.grid[0] * self.grid[1] * (1 - self.mask_ratio))

    def precision(self) -> AbstractContextManager[Any]:
        """As `Sam.precision`."""
        return jax.default_matmul_precision("highest" if self.dtype == "float32" else "default")

    def draw_order(self, key: jax.Array) -> jax.Array:
        """A random order of an image's patches, 'l': the first `num_visible` are visible."""
        return jnp.argsort(jax.random.uniform(key, (self.grid[0] * self.grid[1],)))

    def encode(self, image: jax.Array, visible: jax.Array) -> jax.Array:
        """Encodes the patches 'b v' of images 'b h w 3' -> 'b (1 v) c', the class token first."""
        x = rearrange(self.patch_embed(image), "b gh gw c -> b (gh gw) c")
        x = x + jnp.asarray(encode_positions(*self.grid, self.embed_dim), self.dtype)
        x = jnp.take_along_axis(x, visible[..., None], axis=1)
        blocks = [getattr(self, f"block_{i:02d}") for i in range(self.depth)]
        return self.norm(apply_to_rows(blocks, prepend(self.class_token, x)))

    def decode(self, x: jax.Array, order: jax.Array) -> jax.Array:
        """Paints all patches of images.

        Args:
          x: 'b (1 v) c' from `encode`; order: 'b l', of the patches, those v first.
        Returns:
          'b l (i j c)'.
        """
        x = self.decoder_embed(x)
        num_hidden = order.shape[1] - self.num_visible
        hidden = jnp.broadcast_to(self.mask_token, (len(x), num_hidden, x.shape[-1]))
        patches = jnp.concatenate([x[:, 1:], hidden.astype(x.dtype)], axis=1)
        patches = jnp.take_along_axis(patches, jnp.argsort(order, axis=1)[..., None], axis=1)
        positions = encode_positions(*self.grid, self.decoder_dim)
        patches = patches + jnp.asarray(positions, self.dtype)
        blocks = [getattr(self, f"decoder_block_{i:02d}") for i in range(self.decoder_depth)]
        x = apply_to_rows(blocks, jnp.concatenate([x[:, :1], patches], axis=1))
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]


def apply_to_rows(blocks: list, x: jax.Array) -> jax.Array:
    """Applies blocks to 'b t c', a grid of one row."""
    x = x[:, None]
    for block in blocks:
        x = block(x)
    return x[:, 0]


def prepend(token: jax.Array, x: jax.Array) -> jax.Array:
    """'c' before 'b t c' -> 'b (1 t) c'."""
    first = jnp.broadcast_to(token, (len(x), 1, x.shape[-1]))
    return jnp.concatenate([first.astype(x.dtype), x], axis=1)


def patches_of(image: jax.Array, size: int) -> jax.Array:
    """'b h w c' -> 'b l (i j c)', patches of i = j = size pixels, row by row."""
    return rearrange(image, "b (gh i) (gw j) c -> b (gh gw) (i j c)", i=size, j=size)


def encode_positions(gh: int, gw: int, c: int) -> np.ndarray:
    """Sines and cosines of the places of a grid, '(gh gw) c' float32: half the channels for x."""
    frequencies = 10000.0 ** (-np.arange(c // 4) / (c // 4))
    of = lambda x: np.concatenate([np.sin(x), np.cos(x)], axis=-1)
    x, y = (of(np.arange(n)[:, None] * frequencies) for n in (gw, gh))
    x, y = np.broadcast_to(x, (gh, gw, c // 2)), np.broadcast_to(y[:, None], (gh, gw, c // 2))
    return np.concatenate([x, y], axis=-1).reshape(gh * gw, c).astype(np.float32)


def normalize_patches(patches: jax.Array) -> jax.Array:
    """'... d' patches, less their mean, over their deviation."""
    mean, deviation = mean_and_deviation(patches)
    return (patches - mean) / deviation


def mean_and_deviation(patches: jax.Array) -> tuple[jax.Array, jax.Array]:
    """'... 1' each, of '... d' patches; the deviation of d - 1 degrees of freedom, and not 0."""
    mean = jnp.mean(patches, axis=-1, keepdims=True)
    variance = jnp.var(patches, axis=-1, ddof=1, keepdims=True)
    return mean, jnp.sqrt(variance + EPSILON)


def reconstruction_loss(
    output: ReconstructedPatches, image: jax.Array, patch_size: int, normalized: bool
) -> jax.Array:
    """Computes the mean squared error of the masked patches of each image.

    Source: `forward_loss` in facebookresearch/mae `models_mae.py`.

    Args:
      output: 'b l d' patches; the same number is masked in each image.
      image: 'b h w 3' float32, normalised.
      patch_size: side of a patch in pixels.
      normalized: True if patches are predicted normalised by their mean and deviation.

    Returns:
      'b' float32.
    """
    target = patches_of(image, patch_size)
    if normalized:
        target = normalize_patches(target)
    error = jnp.mean((output.patches - target) ** 2, axis=-1)
    return jnp.sum(error * output.mask, axis=1) / jnp.sum(output.mask, axis=1)


def mae_for(sam: Sam, **overrides: Any) -> MaskedAutoencoder:
    """An autoencoder whose encoder can become that of a SAM."""
    names = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
    return MaskedAutoencoder(**({name: getattr(sam, name) for name in names} | overrides))


def mae_vit_b(**overrides: Any) -> MaskedAutoencoder:
    """For ViT-B."""
    return mae_for(sam_vit_b(), **overrides)


def mae_vit_l(**overrides: Any) -> MaskedAutoencoder:
    """For ViT-L."""
    return mae_for(sam_vit_l(), **overrides)


def mae_vit_h(**overrides: Any) -> MaskedAutoencoder:
    """For ViT-H: patches of 16 pixels, where the published autoencoder has 14."""
    return mae_for(sam_vit_h(), **overrides)


def mae_tiny(**overrides: Any) -> MaskedAutoencoder:
    """For `sam_tiny`, with a decoder as small."""
    sizes = dict(image_size=(64, 64), decoder_dim=64, decoder_depth=1, decoder_heads=2)
    return mae_for(sam_tiny(), **(sizes | overrides))
