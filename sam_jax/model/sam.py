"""Segment Anything: one encoding of an image, any number of prompted masks from it.

Source: Kirillov et al. 2023, and segment-anything `modeling/sam.py`, `build_sam.py`.

Differences: images and prompted objects are both batched, in one program; float32 means float32
products on every device. Prediction resizes on the host, see `sam_jax.images.resize`; `preprocess`
and `postprocess_masks` are for code that was written for the reference.
"""

import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped, UInt8

from sam_jax.model.fields import Rule, check_rules
from sam_jax.model.image_encoder import Dtype, ImageEncoder, check_normalized
from sam_jax.model.layers import matmul_precision
from sam_jax.model.mask_decoder import DecoderState, MaskDecoder, Masks
from sam_jax.model.prompt_encoder import PromptEncoder, PromptFeatures, Prompts

PIXEL_MEAN = (123.675, 116.28, 103.53)  # of RGB values from 0 to 255
PIXEL_STD = (58.395, 57.12, 57.375)
UPSCALING = 4  # pixels of a mask along each side of a token


class Sam(nn.Module):
    """The promptable model, composed of its three parts.

    A Flax module is its own configuration: frozen, hashable and comparable. `build_sam` sets the
    fields that several parts share, such as `dtype`, all at once.

    >>> model = sam_jax.sam_vit_b(dtype="bfloat16")
    >>> model.image_encoder.embed_dim
    768

    Attributes:
      image_encoder: Encodes images.
      prompt_encoder: Encodes points, boxes and masks.
      mask_decoder: Predicts masks from both.
      mask_threshold: Pixels with a logit above this belong to the mask.
      image_format: The order of an image's channels.
      object_share: The smallest and the largest share of the input's side that the longer side of
        an object took in training on windows around objects; None for training on entire images.
        Nothing that the model computes depends on it: prediction is in tiles by default if it is
        set, see `sam_jax.predict.tiles_option.resolve_tiles`.
    """

    image_encoder: ImageEncoder = ImageEncoder()
    prompt_encoder: PromptEncoder = PromptEncoder()
    mask_decoder: MaskDecoder = MaskDecoder()
    object_share: tuple[float, float] | None = None
    mask_threshold: ClassVar[float] = 0.0
    image_format: ClassVar[str] = "RGB"

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the padded images that positions are stored for."""
        return self.image_encoder.image_size

    @property
    def patch_size(self) -> int:
        """Side of a token in pixels."""
        return self.image_encoder.patch_size

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the embedding of an image of `image_size`."""
        return self.image_encoder.grid

    @property
    def low_res(self) -> tuple[int, int]:
        """(height, width) of the mask logits that `decode` returns for images of `image_size`."""
        return UPSCALING * self.grid[0], UPSCALING * self.grid[1]

    @property
    def embedding_dim(self) -> int:
        """Channels of an embedding."""
        return self.image_encoder.out_dim

    @property
    def dtype(self) -> Dtype:
        """Compute type of all parts."""
        return self.image_encoder.dtype

    def validate(self) -> None:
        """Raises ValueError, naming the field, if the fields do not fit together."""
        encoder, prompts, decoder = self.image_encoder, self.prompt_encoder, self.mask_decoder
        check_rules(encoder.rules(), "image_encoder.")
        check_rules(prompts.rules(), "prompt_encoder.")
        check_rules(decoder.rules(), "mask_decoder.")
        dims, dtypes = (prompts.dim, decoder.dim), (prompts.dtype, decoder.dtype)
        share = self.object_share
        check_rules((
            Rule(
                "prompt_encoder.dim and mask_decoder.dim",
                dims,
                dims == (encoder.out_dim, encoder.out_dim),
                f"equal to image_encoder.out_dim = {encoder.out_dim}",
            ),
            Rule(
                "prompt_encoder.dtype and mask_decoder.dtype",
                dtypes,
                dtypes == (encoder.dtype, encoder.dtype),
                f"equal to image_encoder.dtype = {encoder.dtype!r}",
            ),
            Rule(
                "object_share",
                share,
                share is None or (len(share) == 2 and 0 < share[0] <= share[1] < math.inf),
                "None, or a smallest and a largest share above 0",
            ),
        ))  # fmt: skip

    def __call__(
        self, image: Float[Array | np.ndarray, "b h w 3"], prompts: Prompts, train: bool = False
    ) -> Masks:
        """Encodes images and decodes prompts; see `encode` and `decode`."""
        return self.decode(self.encode(image, train), prompts, train)

    def encode(
        self, image: Shaped[Array | np.ndarray, "..."], train: bool = False
    ) -> Float[Array, "b gh gw c"]:
        """Encodes images.

        Args:
          image: 'b h w 3' float, normalized (see `normalize`) and then padded with zeros. The
            patch size must divide its sides.
          train: Whether to drop paths; needs the rng "drop_path".

        Returns:
          Embeddings in `dtype`.

        Raises:
          ValueError: If the image has another rank, sides that the patch does not divide, or
            pixels that are not normalized; or if a field of the image encoder has a value that is
            not allowed.
        """
        self._check_image(image)
        with matmul_precision(self.dtype):
            return self.image_encoder(image.astype(self.dtype), train)

    def encode_trunk(
        self, image: Shaped[Array | np.ndarray, "..."], train: bool = False
    ) -> Float[Array, "b gh gw e"]:
        """Runs `encode` up to the neck of the image encoder; `apply_neck` does the rest.

        Args:
          image: As for `encode`.
          train: As for `encode`.

        Returns:
          Tokens of `image_encoder.embed_dim` channels in `dtype`.

        Raises:
          ValueError: As for `encode`.
        """
        self._check_image(image)
        with matmul_precision(self.dtype):
            return self.image_encoder(image.astype(self.dtype), train, part="trunk")

    def apply_neck(self, tokens: Shaped[Array | np.ndarray, "..."]) -> Float[Array, "b gh gw c"]:
        """Applies the neck of the image encoder.

        Args:
          tokens: 'b gh gw e' from `encode_trunk`.

        Returns:
          Embeddings in `dtype`, those that `encode` returns.

        Raises:
          ValueError: If the tokens have another rank or number of channels.
        """
        e = self.image_encoder.embed_dim
        if tokens.ndim != 4 or tokens.shape[-1] != e:
            raise ValueError(f"tokens must have shape (b, gh, gw, {e}); got {tokens.shape}")
        with matmul_precision(self.dtype):
            return self.image_encoder(tokens.astype(self.dtype), part="neck")

    def decode(
        self, embedding: Shaped[Array | np.ndarray, "..."], prompts: Prompts, train: bool = False
    ) -> Masks:
        """Decodes four masks for every prompted object; `choose_masks` keeps three or one.

        Args:
          embedding: 'b gh gw c' from `encode`.
          prompts: Prompts for b images and n objects in each of them.
          train: Whether to apply dropout; needs the rng "dropout".

        Returns:
          Masks with logits 'b n m (4 gh) (4 gw)': four pixels along each side of a token.

        Raises:
          ValueError: If the shapes disagree.
        """
        with matmul_precision(self.dtype):
            features, grid_pe = self._encode_prompts(embedding, prompts)
            return self.mask_decoder(embedding, features, grid_pe, train)

    def decode_tokens(
        self, embedding: Shaped[Array | np.ndarray, "..."], prompts: Prompts
    ) -> DecoderState:
        """Runs `decode` up to the masks themselves, for callers who want only a few of them.

        Args:
          embedding: As for `decode`.
          prompts: As for `decode`.

        Returns:
          The state from which `upscale_masks` makes the masks of any of the objects.

        Raises:
          ValueError: If the shapes disagree.
        """
        with matmul_precision(self.dtype):
            features, grid_pe = self._encode_prompts(embedding, prompts)
            return self.mask_decoder.decode_tokens(embedding, features, grid_pe)

    def upscale_masks(
        self,
        image: Float[Array | np.ndarray, "b n p c"],
        hypernetwork_out: Float[Array | np.ndarray, "b n m k"],
        gh: int,
    ) -> Float[Array, "b n m lh lw"]:
        """Makes the masks of some objects of a `DecoderState`.

        Args:
          image: The objects' part of `DecoderState.image`.
          hypernetwork_out: The objects' part of `DecoderState.hypernetwork_out`, for any number
            m of the masks.
          gh: Rows of the embedding.

        Returns:
          The logits that `decode` returns for these objects and masks.
        """
        with matmul_precision(self.dtype):
            return self.mask_decoder.upscale_masks(image, hypernetwork_out, gh)

    def preprocess(self, image: Shaped[Array | np.ndarray, "..."]) -> Float[Array, "*b 3 h w"]:
        """Normalizes and pads images in the reference's order of axes.

        Args:
          image: '*b 3 ih iw', RGB values from 0 to 255, not larger than the model's input.

        Returns:
          Images of `image_size`, for `encode` after a transposition to '*b h w 3'.

        Raises:
          ValueError: If the images have another shape or are larger.
        """
        *_, channels, height, width = image.shape
        if channels != 3 or height > self.image_size[0] or width > self.image_size[1]:
            raise ValueError(
                "image must have shape (..., 3, height, width), with sides of at most "
                f"{self.image_size}; got {image.shape}"
            )
        image = jnp.moveaxis(normalize_colors(jnp.moveaxis(jnp.asarray(image), -3, -1)), -1, -3)
        missing = [(0, self.image_size[0] - height), (0, self.image_size[1] - width)]
        return jnp.pad(image, [(0, 0)] * (image.ndim - 2) + missing)

    def postprocess_masks(
        self,
        masks: Float[Array | np.ndarray, "*b lh lw"],
        input_size: tuple[int, int],
        original_size: tuple[int, int],
    ) -> Float[Array, "*b h w"]:
        """Resizes low-resolution logits to the canvas, removes the padding, and resizes again.

        Args:
          masks: The logits.
          input_size: (height, width) of the resized image on the canvas.
          original_size: (height, width) of the image.

        Returns:
          Logits at the size of the image.

        Raises:
          ValueError: If `input_size` is larger than the canvas.
        """
        height, width = input_size
        if height > self.image_size[0] or width > self.image_size[1]:
            raise ValueError(
                f"input_size must be at most the model's input, {self.image_size}; got {input_size}"
            )

        def resize(x: Array | np.ndarray, size: tuple[int, int]) -> Array:
            return jax.image.resize(x, (*x.shape[:-2], *size), "linear", antialias=False)

        return resize(resize(masks, self.image_size)[..., :height, :width], original_size)

    def _encode_prompts(
        self, embedding: Array | np.ndarray, prompts: Prompts
    ) -> tuple[PromptFeatures, Float[Array, "p c"]]:
        """Encodes prompts for embeddings, and the positions of the embeddings' grid."""
        _check_prompts(embedding, prompts, self.embedding_dim)
        gh, gw = embedding.shape[1:3]
        padded_size = (gh * self.patch_size, gw * self.patch_size)
        return self.prompt_encoder(prompts, padded_size), self.prompt_encoder.encode_grid(gh, gw)

    def _check_image(self, image: Array | np.ndarray) -> None:
        """Raises ValueError if the model or the images are not as `encode` describes them."""
        check_rules(self.image_encoder.rules(), "image_encoder.")
        p = self.patch_size
        sides = image.shape[1:3]
        if image.ndim != 4 or image.shape[-1] != 3 or any(s % p or not s for s in sides):
            raise ValueError(
                f"image must have shape (b, h, w, 3) with h and w divisible by the patch of {p} "
                f"pixels, e.g. {(1, *self.image_size, 3)}; got {image.shape}"
            )
        check_normalized(image)


def _check_prompts(embedding: Array | np.ndarray, prompts: Prompts, embedding_dim: int) -> None:
    """Raises ValueError if embeddings and prompts do not fit together."""
    if embedding.ndim != 4 or embedding.shape[-1] != embedding_dim:
        raise ValueError(
            f"embedding must have shape (b, gh, gw, {embedding_dim}); got {embedding.shape}"
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
    expected = (b, points[1], UPSCALING * gh, UPSCALING * gw)
    if prompts.mask is not None and prompts.mask.shape != expected:
        raise ValueError(f"prompts.mask must have shape {expected}; got {prompts.mask.shape}")


def normalize(
    image: UInt8[Array | np.ndarray, "b h w 3"], size: Int[Array | np.ndarray, "b 2"]
) -> Float[Array, "b h w 3"]:
    """Normalizes colors, then sets the padding to zero.

    Args:
      image: RGB images, padded at the bottom and on the right.
      size: (height, width) of each image without its padding.

    Returns:
      Normalized images in float32.
    """
    inside_h = jnp.arange(image.shape[1]) < size[:, :1]
    inside_w = jnp.arange(image.shape[2]) < size[:, 1:]
    inside = (inside_h[:, :, None] & inside_w[:, None, :])[..., None]
    return jnp.where(inside, normalize_colors(image), 0.0)


def normalize_colors(image: Shaped[Array | np.ndarray, "*shape 3"]) -> Float[Array, "*shape 3"]:
    """Normalizes RGB values from 0 to 255 by ImageNet's mean and deviation, in float32."""
    image = jnp.asarray(image, jnp.float32)
    return (image - jnp.array(PIXEL_MEAN)) / jnp.array(PIXEL_STD)


# Where each flat field of `build_sam` is in a Sam's parts. A field that parts share is set in all.
FLAT_FIELDS = {
    "image_size": ("image_encoder.image_size",),
    "patch_size": ("image_encoder.patch_size",),
    "embed_dim": ("image_encoder.embed_dim",),
    "depth": ("image_encoder.depth",),
    "num_heads": ("image_encoder.num_heads",),
    "global_blocks": ("image_encoder.global_blocks",),
    "window_size": ("image_encoder.window_size",),
    "mlp_ratio": ("image_encoder.mlp_ratio",),
    "prompt_dim": ("image_encoder.out_dim", "prompt_encoder.dim", "mask_decoder.dim"),
    "mask_channels": ("prompt_encoder.mask_channels",),
    "position_scale": ("prompt_encoder.position_scale",),
    "decoder_depth": ("mask_decoder.depth",),
    "decoder_heads": ("mask_decoder.num_heads",),
    "decoder_mlp_dim": ("mask_decoder.mlp_dim",),
    "iou_hidden_dim": ("mask_decoder.iou_hidden_dim",),
    "drop_path": ("image_encoder.drop_path",),
    "dropout": ("mask_decoder.dropout",),
    "remat": ("image_encoder.remat",),
    "scan_blocks": ("image_encoder.scan_blocks",),
    "dtype": ("image_encoder.dtype", "prompt_encoder.dtype", "mask_decoder.dtype"),
}
TOP_LEVEL_FIELDS = ("object_share",)  # of a Sam, and of none of its parts


def replace_fields(model: Sam, **fields: Any) -> Sam:
    """Replaces fields of a model and of its parts by their flat names.

    Args:
      model: The model.
      **fields: New values by flat name, see `FLAT_FIELDS`; and `object_share`.

    Returns:
      A model with the new values.

    Raises:
      TypeError: If there is no such field.
    """
    known = (*FLAT_FIELDS, *TOP_LEVEL_FIELDS)
    if unknown := sorted(fields.keys() - set(known)):
        raise TypeError(f"Sam has no field {unknown[0]!r}; its fields are {', '.join(known)}")
    own = {name: fields[name] for name in TOP_LEVEL_FIELDS if name in fields}
    changes: dict[str, dict[str, Any]] = {}
    for name, value in fields.items():
        for path in FLAT_FIELDS.get(name, ()):
            part, field = path.split(".")
            changes.setdefault(part, {})[field] = value
    parts = {part: getattr(model, part).clone(**values) for part, values in changes.items()}
    return model.clone(**parts, **own)


def build_sam(**fields: Any) -> Sam:
    """Builds a model from flat fields.

    >>> model = build_sam(depth=2, global_blocks=(1,), dtype="bfloat16")

    Args:
      **fields: Values by flat name, see `replace_fields`; the default values are those of ViT-B.

    Returns:
      The model.

    Raises:
      TypeError: If there is no such field.
    """
    return replace_fields(Sam(), **fields)


def sam_vit_b(**overrides: Any) -> Sam:
    """Builds the smallest official size: 93.7 M parameters; overrides as for `build_sam`."""
    return build_sam(**overrides)


def sam_vit_l(**overrides: Any) -> Sam:
    """Builds the middle official size: 312 M parameters; overrides as for `build_sam`."""
    fields = dict(embed_dim=1024, depth=24, num_heads=16, global_blocks=(5, 11, 17, 23))
    return build_sam(**(fields | overrides))


def sam_vit_h(**overrides: Any) -> Sam:
    """Builds the largest official size: 641 M parameters; overrides as for `build_sam`."""
    fields = dict(embed_dim=1280, depth=32, num_heads=16, global_blocks=(7, 15, 23, 31))
    return build_sam(**(fields | overrides))


def sam_tiny(**overrides: Any) -> Sam:
    """Builds a size that trains on two CPU cores: 0.36 M parameters, images of 64 pixels."""
    fields = dict(
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
    return build_sam(**(fields | overrides))
