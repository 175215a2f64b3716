"""Predicts masks of the prompted objects from an image's embedding and the prompts' features.

Source: segment-anything `modeling/mask_decoder.py`.

Differences: all four masks are always returned, and `choose_masks` selects among them; the
transposed convolutions, whose 2x2 patches do not overlap, are dense layers whose pixels stay
grouped by token until the masks are made, since norm, GELU and the last product act on each pixel
separately.
"""

import math
from collections.abc import Iterator
from typing import Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Float32

from sam_jax.model.fields import Rule, check_rules, field_rules
from sam_jax.model.layers import Mlp, NormWeights, fan_in_uniform
from sam_jax.model.ops import dispatch
from sam_jax.model.ops.upscaling import UpscalingWeights
from sam_jax.model.prompt_encoder import PromptFeatures
from sam_jax.model.two_way_transformer import CROSS_DOWNSAMPLE, TwoWayTransformer

NUM_MASK_TOKENS = 4  # token 0 is the single-mask output; 1 to 3 are those of an ambiguous prompt
NUM_OUTPUT_TOKENS = 1 + NUM_MASK_TOKENS  # one for the IoUs and one per mask


@flax.struct.dataclass
class Masks:
    """Predicted masks of n objects in each of b images.

    Attributes:
      logits: Positive inside the mask; a token is 4x4 of these pixels.
      iou: Predicted IoU of each mask with the true mask; not confined to [0, 1].
    """

    logits: Float32[Array, "b n m lh lw"]
    iou: Float32[Array, "b n m"]


@flax.struct.dataclass
class DecoderState:
    """The decoder's state before the masks are made.

    Attributes:
      image: The image's tokens, p = gh gw, after the objects' tokens have updated them.
      hypernetwork_out: Weights of a pixel's channels in each mask, k = c / 8.
      iou: As in `Masks`.
    """

    image: Float[Array | np.ndarray, "b n p c"]
    hypernetwork_out: Float[Array | np.ndarray, "b n m k"]
    iou: Float32[Array, "b n m"]


def choose_masks(masks: Masks, multimask_output: bool) -> Masks:
    """Keeps masks 1 to 3 of the four for an ambiguous prompt, and mask 0 alone otherwise."""
    kept = slice(1, None) if multimask_output else slice(0, 1)
    return jax.tree.map(lambda x: x[:, :, kept], masks)


class MaskDecoder(nn.Module):
    """Decodes four masks and their predicted IoUs for every object.

    Attributes:
      dim: Channels of a token.
      depth: Number of two-way blocks.
      num_heads: Attention heads of the two-way blocks.
      mlp_dim: Hidden channels of the two-way blocks' MLPs.
      iou_hidden_dim: Hidden channels of the IoU head.
      dropout: Dropout rate after each attention and MLP of the transformer, in training.
      dtype: Compute type. Logits and IoUs are float32.
    """

    dim: int = 256
    depth: int = 2
    num_heads: int = 8
    mlp_dim: int = 2048
    iou_hidden_dim: int = 256
    dropout: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"

    def rules(self) -> Iterator[Rule]:
        """Yields the rules that the fields must obey."""
        yield from field_rules(self)
        yield Rule("num_heads", self.num_heads, self.num_heads >= 1, "at least 1")
        divisor = math.lcm(8, CROSS_DOWNSAMPLE * self.num_heads)
        allowed = f"a positive multiple of {divisor}, that is, of 8 and of "
        allowed += f"{CROSS_DOWNSAMPLE} x num_heads"
        yield Rule("dim", self.dim, self.dim > 0 and self.dim % divisor == 0, allowed)
        # The image's dropout compares bytes, so that its rate is a multiple of 1/256.
        has_valid_rate = self.dropout == 0 or 1 / 256 <= self.dropout <= 255 / 256
        yield Rule("dropout", self.dropout, has_valid_rate, "0, or 1/256 to 255/256")

    def validate(self) -> None:
        """Raises ValueError, naming the field, if the fields do not fit together."""
        check_rules(self.rules())

    def setup(self) -> None:
        """Creates the parameters and submodules."""
        c = self.dim
        normal = nn.initializers.normal(1.0)
        self.iou_token = self.param("iou_token", normal, (1, c))
        self.mask_tokens = self.param("mask_tokens", normal, (NUM_MASK_TOKENS, c))
        self.transformer = TwoWayTransformer(
            self.depth, self.num_heads, self.mlp_dim, self.dropout, self.dtype
        )
        self.hypernetwork = [
            Mlp((c, c, c // 8), nn.relu, self.dtype) for _ in range(NUM_MASK_TOKENS)
        ]
        self.upscaling = Upscaling(self.dtype)
        hidden = self.iou_hidden_dim
        self.iou_head = Mlp((hidden, hidden, NUM_MASK_TOKENS), nn.relu, self.dtype)

    def __call__(
        self,
        embedding: Float[Array | np.ndarray, "b gh gw c"],
        features: PromptFeatures,
        image_pe: Float[Array | np.ndarray, "p c"],
        train: bool = False,
    ) -> Masks:
        """Decodes masks.

        Args:
          embedding: Embeddings of the images.
          features: Encoded prompts.
          image_pe: Positions of the embeddings' tokens, p = gh gw.
          train: Whether to apply dropout; needs the rng "dropout".

        Returns:
          The four masks of every object.
        """
        state = self.decode_tokens(embedding, features, image_pe, train)
        gh = embedding.shape[1]
        logits = self.upscale_masks(state.image, state.hypernetwork_out, gh, train)
        return Masks(logits=logits, iou=state.iou)

    def decode_tokens(
        self,
        embedding: Float[Array | np.ndarray, "b gh gw c"],
        features: PromptFeatures,
        image_pe: Float[Array | np.ndarray, "p c"],
        train: bool = False,
    ) -> DecoderState:
        """Runs the decoder up to the masks themselves; arguments as for `__call__`."""
        b, n = features.sparse.shape[:2]
        outputs = jnp.concatenate([self.iou_token, self.mask_tokens]).astype(self.dtype)
        num_outputs = len(outputs)
        outputs = jnp.broadcast_to(outputs, (b, n, *outputs.shape))
        tokens = jnp.concatenate([outputs, features.sparse], axis=2)
        is_output = jnp.ones((b, n, num_outputs), bool)
        token_mask = jnp.concatenate([is_output, features.token_mask], axis=2)
        image = rearrange(embedding, "b gh gw c -> b 1 (gh gw) c").astype(self.dtype)
        tokens, image = self.transformer(
            tokens,
            token_mask,
            jnp.asarray(image + features.dense),
            jnp.asarray(image_pe),
            num_outputs=num_outputs,
            train=train,
        )
        mask_weights = [mlp(tokens[:, :, 1 + m]) for m, mlp in enumerate(self.hypernetwork)]
        iou = self.iou_head(tokens[:, :, 0]).astype(jnp.float32)
        return DecoderState(image=image, hypernetwork_out=jnp.stack(mask_weights, axis=2), iou=iou)

    def upscale_masks(
        self,
        image: Float[Array | np.ndarray, "b n p c"],
        hypernetwork_out: Float[Array | np.ndarray, "b n m k"],
        gh: int,
        train: bool = False,
    ) -> Float32[Array, "b n m lh lw"]:
        """Makes masks; other arguments as for `Sam.upscale_masks`.

        If `train`, pixels are placed by a transposition on all platforms. The objective arranges
        them by token again, and XLA then drops both transpositions.
        """
        logits = self.upscaling(image, hypernetwork_out)
        implementation = "xla" if train else None
        return dispatch.arrange_pixels(logits, gh, image.dtype, implementation=implementation)


class Upscaling(nn.Module):
    """Upscales each token to 4x4 pixels, and multiplies them with the weights of the masks."""

    dtype: Literal["float32", "bfloat16"]

    @nn.compact
    def __call__(
        self,
        image: Float[Array | np.ndarray, "b n p c"],
        hypernetwork_out: Float[Array | np.ndarray, "b n m k"],
    ) -> Float32[Array, "b n m 16 p"]:
        """Returns the masks' logits at the (4 4) pixels of each token."""
        c = image.shape[-1]
        kernel1, bias1 = Deconvolution(c, c // 4, name="conv1")()
        kernel2, bias2 = Deconvolution(c // 4, c // 8, name="conv2")()
        weights = UpscalingWeights(
            kernel1, bias1, *NormWeights(c // 4, name="norm")(), kernel2, bias2
        )
        return dispatch.upscale_masks(jnp.asarray(image), weights, jnp.asarray(hypernetwork_out))


class Deconvolution(nn.Module):
    """The parameters of a transposed convolution of size and stride 2."""

    in_features: int
    features: int

    @nn.compact
    def __call__(
        self,
    ) -> tuple[Float[Array, "c 2 2 o"], Float[Array, " o"]]:
        """Returns the kernel and the bias."""
        init = fan_in_uniform(4 * self.features)
        kernel = self.param("kernel", init, (self.in_features, 2, 2, self.features))
        bias = self.param("bias", init, (self.features,))
        return jnp.asarray(kernel), jnp.asarray(bias)
