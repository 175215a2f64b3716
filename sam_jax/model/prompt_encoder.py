"""Encodes points and boxes as tokens, and masks as an image of features.

Source: segment-anything `modeling/prompt_encoder.py`, in the form of `utils/onnx.py`: one list of
points, in which a box is two points with labels 2 and 3.

Differences: every object has the same number of slots, and absent ones (label -2) are masked out;
the reference's padding point (label -1) is added by the code that builds the prompts, not here.
"""

from collections.abc import Iterator
from typing import Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from sam_jax.model.fields import Rule, check_rules, field_rules
from sam_jax.model.layers import PatchConv, Projection, fan_in_uniform, gelu, layer_norm

FOREGROUND, BACKGROUND, TOP_LEFT, BOTTOM_RIGHT = 1, 0, 2, 3  # labels of points
NOT_A_POINT = -1  # the reference's padding point: a token of its own, which is attended to
ABSENT = -2  # an empty slot, which is never attended to
UNLABELED = 4  # a position alone: what the reference makes of the labels 2 and 3 of points


@flax.struct.dataclass
class Prompts:
    """Prompts for n objects in each of b images.

    >>> click = Prompts(points=jnp.array([[[[32.0, 20.0]]]]), labels=jnp.array([[[1]]]))

    Attributes:
      points: (x, y) in pixels of the padded image. Integers are centers of pixels.
      labels: 1 foreground, 0 background, 2 and 3 the top-left and bottom-right corners of a box,
        4 a position without a label, -1 the reference's "not a point" token, -2 absent.
      mask: Logits of an earlier prediction, or None if no object has one.
      has_mask: The objects whose `mask` is used; None if `mask` is None.
    """

    points: Float[Array | np.ndarray, "b n k 2"]
    labels: Int[Array | np.ndarray, "b n k"]
    mask: Float[Array | np.ndarray, "b n lh lw"] | None = None
    has_mask: Bool[Array | np.ndarray, "b n"] | None = None


@flax.struct.dataclass
class PromptFeatures:
    """Encoded prompts, as the mask decoder reads them.

    Attributes:
      sparse: Tokens. Absent slots are zero and must be masked.
      token_mask: True for slots that are not absent.
      dense: Features to add to the image's tokens, p = gh gw. The axes n and p have size 1 where
        all objects or all tokens share the features.
    """

    sparse: Float[Array | np.ndarray, "b n k c"]
    token_mask: Bool[Array | np.ndarray, "b n k"]
    dense: Float[Array | np.ndarray, "b n_or_1 p_or_1 c"]


class PromptEncoder(nn.Module):
    """Encodes prompts, and positions in general.

    Attributes:
      dim: Channels of a token.
      mask_channels: Channels before the last convolution of a mask prompt.
      position_scale: Standard deviation of the random frequencies of positions, in cycles per half
        image. With few channels and a coarse grid, lower frequencies are learned from sooner.
      dtype: Compute type. Positions are always encoded in float32.
    """

    dim: int = 256
    mask_channels: int = 16
    position_scale: float = 1.0
    dtype: Literal["float32", "bfloat16"] = "float32"

    def rules(self) -> Iterator[Rule]:
        """Yields the rules that the fields must obey."""
        yield from field_rules(self)
        channels = self.mask_channels
        yield Rule("dim", self.dim, self.dim > 0 and self.dim % 2 == 0, "a positive multiple of 2")
        allowed = "a positive multiple of 4"
        yield Rule("mask_channels", channels, channels > 0 and channels % 4 == 0, allowed)

    def validate(self) -> None:
        """Raises ValueError, naming the field, if the fields do not fit together."""
        check_rules(self.rules())

    def setup(self) -> None:
        """Creates the parameters and submodules."""
        normal = nn.initializers.normal(self.position_scale)
        self.gaussian = self.variable(
            "constants", "gaussian", lambda: normal(self.make_rng("params"), (2, self.dim // 2))
        )
        self.label_embeddings = [  # in the order of the labels 0, 1, 2, 3, 4
            self._embedding("background"),
            self._embedding("foreground"),
            self._embedding("top_left"),
            self._embedding("bottom_right"),
            jnp.zeros(self.dim),
        ]
        self.not_a_point = self._embedding("not_a_point")
        self.no_mask = self._embedding("no_mask")
        self.mask_downscaling = MaskDownscaling(self.dim, self.mask_channels, self.dtype)

    def _embedding(self, name: str) -> Float[Array | np.ndarray, " c"]:
        return self.param(name, nn.initializers.normal(1.0), (self.dim,))

    def __call__(self, prompts: Prompts, padded_size: tuple[int, int]) -> PromptFeatures:
        """Encodes prompts.

        Args:
          prompts: The prompts.
          padded_size: (height, width) in pixels of the padded image that they belong to.

        Returns:
          The features in `dtype`.
        """
        height, width = padded_size
        labels = prompts.labels[..., None]
        positions = self.encode_positions((prompts.points + 0.5) / jnp.array([width, height]))
        sparse = positions + jnp.stack(self.label_embeddings)[jnp.clip(prompts.labels, 0)]
        sparse = jnp.where(labels == NOT_A_POINT, self.not_a_point, sparse)
        sparse = jnp.where(labels == ABSENT, 0.0, sparse)

        dense = self.no_mask[None, None, None]
        if prompts.mask is not None:
            assert prompts.has_mask is not None, "prompts.has_mask must be given with prompts.mask"
            # The bias and `no_mask` are the same for all pixels. They are selected before they are
            # broadcast, so that each of their gradients is a single sum.
            has_mask = prompts.has_mask[..., None, None]
            masks, bias = self.mask_downscaling(prompts.mask)
            dense = jnp.where(has_mask, masks, 0) + jnp.where(has_mask, bias, dense)
        return PromptFeatures(
            sparse=sparse.astype(self.dtype),
            token_mask=prompts.labels != ABSENT,
            dense=dense.astype(self.dtype),
        )

    def encode_grid(self, gh: int, gw: int) -> Float[Array, "p c"]:
        """Encodes the centers of the cells of a grid.

        The result is that of `encode_positions`, by the angle sum identities: sines are slow, and
        those of gh + gw angles give all gh gw of them. They are combined by a matrix product,
        because XLA would fuse an elementwise sum with the sines and recompute them in every cell.

        Args:
          gh: Rows of the grid.
          gw: Columns of the grid.

        Returns:
          Positions '(gh gw) c' in `dtype`.
        """
        x, y = (jnp.arange(gw) + 0.5) / gw, (jnp.arange(gh) + 0.5) / gh
        x = 2 * jnp.pi * (2 * x - 1)[:, None] * self.gaussian.value[0]
        y = 2 * jnp.pi * (2 * y - 1)[:, None] * self.gaussian.value[1]
        sin, cos = jnp.sin, jnp.cos
        by_x = jnp.array([[sin(x), cos(x)], [cos(x), -sin(x)]])  # 'sin|cos pair gw c/2'
        by_y = jnp.array([cos(y), sin(y)])  # 'pair gh c/2'
        positions = jnp.einsum("skxc,kyc->yxsc", by_x, by_y, precision=jax.lax.Precision.HIGHEST)
        return rearrange(positions, "gh gw s c -> (gh gw) (s c)").astype(self.dtype)

    def encode_positions(
        self, xy: Float[Array | np.ndarray, "*shape 2"]
    ) -> Float[Array, "*shape c"]:
        """Returns random Fourier features, in float32, of positions from 0 to 1."""
        phase = jnp.matmul(2 * xy - 1, self.gaussian.value, precision=jax.lax.Precision.HIGHEST)
        phase = 2 * jnp.pi * phase
        return jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)


class MaskDownscaling(nn.Module):
    """Downscales mask logits by four to the grid of the tokens.

    Attributes:
      dim: Channels of the result.
      channels: Channels before the last convolution.
      dtype: Compute type.
    """

    dim: int
    channels: int
    dtype: Literal["float32", "bfloat16"]

    @nn.compact
    def __call__(
        self, mask: Float[Array | np.ndarray, "b n lh lw"]
    ) -> tuple[Float[Array, "b n p c"], Float[Array | np.ndarray, " c"]]:
        """Returns the features of each token without the last bias, and this bias."""

        def conv(x: Array | np.ndarray, features: int, size: int, name: str) -> Array:
            init = fan_in_uniform(size * size * x.shape[-1])
            return PatchConv(features, size, self.dtype, init, init, name=name)(x)

        x = rearrange(mask, "b n h w -> b n h w 1")
        x = gelu(layer_norm(1e-6, self.dtype, "norm1")(conv(x, self.channels // 4, 2, "conv1")))
        x = gelu(layer_norm(1e-6, self.dtype, "norm2")(conv(x, self.channels, 2, "conv2")))
        kernel, bias = Projection(self.channels, self.dim, is_conv=True, name="conv3")()
        x = rearrange(x, "b n h w c -> b n (h w) c")
        return x @ kernel.astype(self.dtype), bias
