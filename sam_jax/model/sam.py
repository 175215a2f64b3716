"""Segment Anything: one encoding of an image, any number of prompted masks from it.

Source: Kirillov et al. 2023, and segment-anything `modeling/sam.py`, `build_sam.py`.

Differences: images and prompted objects are both batched, in one program; float32 means float32
products on every device; preprocessing and postprocessing live in `sam_jax.predict`.
"""

from contextlib import AbstractContextManager
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam_jax.model.image_encoder import ImageEncoder
from sam_jax.model.mask_decoder import Attended, MaskDecoder, Masks
from sam_jax.model.prompt_encoder import PromptEncoder, PromptFeatures, Prompts

PIXEL_MEAN = (123.675, 116.28, 103.53)  # of RGB values in 0..255
PIXEL_STD = (58.395, 57.12, 57.375)


class Sam(nn.Module):
    """The promptable model. It is its own configuration: frozen, hashable, comparable.

    Attributes:
      image_size: (height, width) in pixels of the frame that positions are stored for. Images of
        any size that the patch divides are accepted; positions are interpolated for them.
      patch_size, embed_dim, depth, num_heads, global_blocks, window_size, mlp_ratio: of the image
        encoder, see `ImageEncoder`.
      prompt_dim: channels of embeddings and tokens.
      mask_channels: channels before the last convolution of a mask prompt.
      position_scale: standard deviation of the positions' random frequencies when they are drawn;
        with few channels and a coarse grid, lower ones are learnt from sooner.
      decoder_depth, decoder_heads, decoder_mlp_dim: two-way blocks, their attention heads, the
        hidden channels of their MLPs.
      iou_hidden_dim: hidden channels of the IoU head.
      drop_path: of the image encoder's last block; dropout: of the mask decoder. In training only.
      remat: what the backward pass recomputes of the image encoder, to save memory: "none"; all but
        the results of matrix "products"; or whole "blocks".
      scan_blocks: loop over the image encoder's super-blocks (windowed blocks and a global one), of
        which only one is compiled: training on accelerators starts sooner.
      dtype: "float32" or "bfloat16", the compute type. Parameters, norms, softmax, positions and
        outputs of the mask decoder are float32 in either case.
    """

    image_size: tuple[int, int] = (1024, 1024)
    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    global_blocks: tuple[int, ...] = (2, 5, 8, 11)
    window_size: int = 14
    mlp_ratio: int = 4
    prompt_dim: int = 256
    mask_channels: int = 16
    position_scale: float = 1.0
    decoder_depth: int = 2
    decoder_heads: int = 8
    decoder_mlp_dim: int = 2048
    iou_hidden_dim: int = 256
    drop_path: float = 0.0
    dropout: float = 0.0
    remat: Literal["none", "products", "blocks"] = "none"
    scan_blocks: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"

    def setup(self) -> None:
        self.image_encoder = ImageEncoder(
            image_size=self.image_size,
            patch_size=self.patch_size,
            embed_dim=self.embed_dim,
            depth=self.depth,
            num_heads=self.num_heads,
            global_blocks=self.global_blocks,
            window_size=self.window_size,
            mlp_ratio=self.mlp_ratio,
            out_dim=self.prompt_dim,
            drop_path=self.drop_path,
            remat=self.remat,
            scan_blocks=self.scan_blocks,
            dtype=self.dtype,
        )
        self.prompt_encoder = PromptEncoder(
            self.prompt_dim, self.mask_channels, self.position_scale, self.dtype
        )
        self.mask_decoder = MaskDecoder(
            dim=self.prompt_dim,
            depth=self.decoder_depth,
            num_heads=self.decoder_heads,
            mlp_dim=self.decoder_mlp_dim,
            iou_hidden_dim=self.iou_hidden_dim,
            dropout=self.dropout,
            dtype=self.dtype,
        )

    def __call__(self, image: jax.Array, prompts: Prompts, train: bool = False) -> Masks:
        """Encodes images and decodes prompts: see `encode` and `decode`."""
        return self.decode(self.encode(image, train), prompts, train)

    def encode(self, image: jax.Array, train: bool = False) -> jax.Array:
        """Encodes images.

        Args:
          image: 'b h w 3' float, normalised (`normalize`) and then padded with zeros.
          train: whether to drop paths; needs the rng "drop_path".
        Returns:
          'b gh gw c' in `dtype`.
        Raises:
          ValueError: if the image has another rank, or sides that the patch does not divide.
        """
        p = self.patch_size
        sides = image.shape[1:3]
        if image.ndim != 4 or image.shape[-1] != 3 or any(s % p or not s for s in sides):
            raise ValueError(
                f"image must have shape (b, h, w, 3) with h and w divisible by the patch of {p} "
                f"pixels, e.g. {(1, *self.image_size, 3)}; got {image.shape}"
            )
        with self.precision():
            return self.image_encoder(image.astype(self.dtype), train)

    def decode(self, embedding: jax.Array, prompts: Prompts, train: bool = False) -> Masks:
        """Decodes four masks for every prompted object; `choose_masks` keeps three or one.

        Args:
          embedding: 'b gh gw c' from `encode`.
          prompts: `Prompts` for b images and n objects each.
          train: whether to drop out; needs the rng "dropout".
        Returns:
          `Masks`, with logits at a quarter of a token: 'b n m (4 gh) (4 gw)'.
        Raises:
          ValueError: if shapes disagree.
        """
        with self.precision():
            return self.mask_decoder(embedding, *self.encode_prompts(embedding, prompts), train)

    def attend(self, embedding: jax.Array, prompts: Prompts) -> Attended:
        """Does all of `decode` but the masks themselves, for those who want few of them."""
        with self.precision():
            return self.mask_decoder.attend(embedding, *self.encode_prompts(embedding, prompts))

    def upscale(self, image: jax.Array, hyper: jax.Array, gh: int) -> jax.Array:
        """Makes the masks of some objects of `attend`.

        Args:
          image, hyper: of the objects, see `Attended`; gh: rows of the embedding.
        Returns:
          The logits that `decode` gives.
        """
        with self.precision():
            return self.mask_decoder.upscale(image, hyper, gh)

    def encode_prompts(
        self, embedding: jax.Array, prompts: Prompts
    ) -> tuple[PromptFeatures, jax.Array]:
        """Encodes prompts for the embeddings that they are meant for, and the grid's positions."""
        self.check_prompts(embedding, prompts)
        gh, gw = embedding.shape[1:3]
        frame = (gh * self.patch_size, gw * self.patch_size)
        return self.prompt_encoder(prompts, frame), self.prompt_encoder.encode_grid(gh, gw)

    def precision(self) -> AbstractContextManager[Any]:
        """By default TPUs multiply float32 in bfloat16 and GPUs in TF32; float32 means float32."""
        return jax.default_matmul_precision("highest" if self.dtype == "float32" else "default")

    def check_prompts(self, embedding: jax.Array, prompts: Prompts) -> None:
        if embedding.ndim != 4 or embedding.shape[-1] != self.prompt_dim:
            raise ValueError(
                f"embedding must have shape (b, gh, gw, {self.prompt_dim}); got {embedding.shape}"
            )
        b, gh, gw, _ = embedding.shape
        points, labels = prompts.points.shape, prompts.labels.shape
        if len(points) != 4 or points[0] != b or points[-1] != 2 or labels != points[:-1]:
            raise ValueError(
                f"prompts.points must have shape ({b}, n, k, 2) and prompts.labels ({b}, n, k) for "
                f"{b} embeddings; got {points} and {labels}"
            )
        if (prompts.mask is None) != (prompts.has_mask is None):
            raise ValueError("prompts.mask and prompts.has_mask must both be given, or neither")
        if prompts.has_mask is not None and prompts.has_mask.shape != points[:2]:
            raise ValueError(
                f"prompts.has_mask must have shape {points[:2]}; got {prompts.has_mask.shape}"
            )
        expected = (b, points[1], 4 * gh, 4 * gw)
        if prompts.mask is not None and prompts.mask.shape != expected:
            raise ValueError(f"prompts.mask must have shape {expected}; got {prompts.mask.shape}")


def normalize(image: jax.Array, size: jax.Array) -> jax.Array:
    """Normalises colours, then sets what lies outside the image to zero.

    Args:
      image: 'b h w 3' uint8 RGB, padded bottom and right.
      size: 'b 2' int32, (height, width) of each image without its padding.
    Returns:
      'b h w 3' float32.
    """
    inside_h = jnp.arange(image.shape[1]) < size[:, :1]
    inside_w = jnp.arange(image.shape[2]) < size[:, 1:]
    inside = (inside_h[:, :, None] & inside_w[:, None, :])[..., None]
    return jnp.where(inside, normalize_colors(image), 0.0)


def normalize_colors(image: jax.Array) -> jax.Array:
    """Normalises colours '... 3' of 0 to 255 by those of ImageNet -> float32."""
    return (image.astype(jnp.float32) - jnp.array(PIXEL_MEAN)) / jnp.array(PIXEL_STD)


def sam_vit_b(**overrides: Any) -> Sam:
    """The smallest official size: 93.7 M parameters."""
    return Sam(**overrides)


def sam_vit_l(**overrides: Any) -> Sam:
    """The middle official size: 312 M parameters."""
    sizes: dict[str, Any] = dict(
        embed_dim=1024, depth=24, num_heads=16, global_blocks=(5, 11, 17, 23)
    )
    return Sam(**(sizes | overrides))


def sam_vit_h(**overrides: Any) -> Sam:
    """The largest official size, the default of the released code: 641 M parameters."""
    sizes: dict[str, Any] = dict(
        embed_dim=1280, depth=32, num_heads=16, global_blocks=(7, 15, 23, 31)
    )
    return Sam(**(sizes | overrides))


def sam_tiny(**overrides: Any) -> Sam:
    """A size that trains on two CPU cores: 0.36 M parameters on frames of 64 pixels."""
    sizes: dict[str, Any] = dict(
        image_size=(64, 64),
        patch_size=8,
        embed_dim=64,
        depth=2,
        num_heads=2,
        global_blocks=(0, 1),
        prompt_dim=64,
        position_scale=0.35,
        decoder_heads=2,
        decoder_mlp_dim=256,
        iou_hidden_dim=64,
    )
    return Sam(**(sizes | overrides))
