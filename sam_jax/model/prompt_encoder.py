"""Points, boxes and masks as tokens and as an image of features.

Source: segment-anything `modeling/prompt_encoder.py`, in the form of `utils/onnx.py`: one list of
points in which a box is two points with labels 2 and 3.

Differences: every object has the same number of slots, and absent ones (label -2) are masked out;
the padding point of the reference (label -1) is added by whoever builds the prompts, not here.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from sam_jax.model.layers import PatchConv, Projection, fan_in_uniform, gelu, layer_norm

FOREGROUND, BACKGROUND, TOP_LEFT, BOTTOM_RIGHT = 1, 0, 2, 3
NOT_A_POINT = -1  # the reference's padding point: a token of its own, which is attended to
ABSENT = -2  # an empty slot: never attended to


@flax.struct.dataclass
class Prompts:
    """What is known of n objects in each of b images.

    Attributes:
      points: 'b n k 2' float32, (x, y) in pixels of the padded frame; pixel centres lie at +0.5.
      labels: 'b n k' int32: 1 foreground, 0 background, 2 and 3 the top-left and bottom-right
        corners of a box, -1 the reference's "not a point" token, -2 absent.
      mask: 'b n lh lw' float32 logits of an earlier prediction, or None if no object has one.
      has_mask: 'b n' bool, the objects whose `mask` counts; None if `mask` is.
    """

    points: jax.Array | np.ndarray
    labels: jax.Array | np.ndarray
    mask: jax.Array | np.ndarray | None = None
    has_mask: jax.Array | np.ndarray | None = None


@flax.struct.dataclass
class PromptFeatures:
    """Prompts as the mask decoder reads them.

    Attributes:
      sparse: 'b n k c' tokens; absent slots are zero and must be masked.
      present: 'b n k' bool, the slots that are not absent.
      dense: 'b n (gh gw) c' to be added to the image; n and (gh gw) are 1 where all are alike.
    """

    sparse: jax.Array
    present: jax.Array
    dense: jax.Array


class PromptEncoder(nn.Module):
    """Encodes prompts, and positions in general.

    Attributes:
      dim: channels of a token.
      mask_channels: channels before the last convolution of a mask prompt.
      position_scale: standard deviation of the frequencies of positions, in cycles per half frame.
      dtype: compute type; positions are always encoded in float32.
    """

    dim: int
    mask_channels: int
    position_scale: float
    dtype: str

    def setup(self):
        normal = nn.initializers.normal(self.position_scale)
        gaussian = lambda: normal(self.make_rng("params"), (2, self.dim // 2))
        self.gaussian = self.variable("constants", "gaussian", gaussian)
        embedding = lambda name: self.param(name, nn.initializers.normal(1.0), (self.dim,))
        self.by_label = [  # in the order of the labels 0, 1, 2, 3
            embedding("background"),
            embedding("foreground"),
            embedding("top_left"),
            embedding("bottom_right"),
        ]
        self.not_a_point = embedding("not_a_point")
        self.no_mask = embedding("no_mask")
        self.mask_downscaling = MaskDownscaling(self.dim, self.mask_channels, self.dtype)

    def __call__(self, prompts, frame):
        """Encodes `Prompts` on a padded frame of (height, width) pixels as `PromptFeatures`."""
        height, width = frame
        labels = prompts.labels[..., None]
        positions = self.encode_positions((prompts.points + 0.5) / jnp.array([width, height]))
        sparse = positions + jnp.stack(self.by_label)[jnp.clip(prompts.labels, 0)]
        sparse = jnp.where(labels == NOT_A_POINT, self.not_a_point, sparse)
        sparse = jnp.where(labels == ABSENT, 0.0, sparse)

        dense = self.no_mask[None, None, None]
        if prompts.mask is not None:
            # What is alike for all pixels is chosen before it is added: its gradient is one sum.
            has_mask = prompts.has_mask[..., None, None]
            masks, bias = self.mask_downscaling(prompts.mask)
            dense = jnp.where(has_mask, masks, 0) + jnp.where(has_mask, bias, dense)
        return PromptFeatures(
            sparse=sparse.astype(self.dtype),
            present=prompts.labels != ABSENT,
            dense=dense.astype(self.dtype),
        )

    def encode_grid(self, gh, gw):
        """Encodes the centres of a grid's cells -> '(gh gw) c' in `dtype`.

        As `encode_positions` would, but by the angle sum identities: sines are slow, and those of
        'gh + gw' angles make all 'gh gw'. A product cannot be fused with the sines, which would
        compute them anew in every cell.
        """
        x, y = (jnp.arange(gw) + 0.5) / gw, (jnp.arange(gh) + 0.5) / gh
        x = 2 * jnp.pi * (2 * x - 1)[:, None] * self.gaussian.value[0]
        y = 2 * jnp.pi * (2 * y - 1)[:, None] * self.gaussian.value[1]
        sin, cos = jnp.sin, jnp.cos
        by_x = jnp.array([[sin(x), cos(x)], [cos(x), -sin(x)]])  # 'sin|cos pair gw c/2'
        by_y = jnp.array([cos(y), sin(y)])  # 'pair gh c/2'
        positions = jnp.einsum("skxc,kyc->yxsc", by_x, by_y, precision=jax.lax.Precision.HIGHEST)
        return rearrange(positions, "gh gw s c -> (gh gw) (s c)").astype(self.dtype)

    def encode_positions(self, xy):
        """Random Fourier features of '... 2' positions in [0, 1] -> '... c' float32."""
        phase = jnp.matmul(2 * xy - 1, self.gaussian.value, precision=jax.lax.Precision.HIGHEST)
        phase = 2 * jnp.pi * phase
        return jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)


class MaskDownscaling(nn.Module):
    """'b n lh lw' mask logits -> 'b n (lh/4 lw/4) dim' features, less their bias 'dim'."""

    dim: int
    channels: int
    dtype: str

    @nn.compact
    def __call__(self, mask):
        def conv(x, features, size, name):
            init = fan_in_uniform(size * size * x.shape[-1])
            return PatchConv(features, size, self.dtype, init, init, name=name)(x)

        x = rearrange(mask, "b n h w -> b n h w 1")
        x = gelu(layer_norm(1e-6, self.dtype, "norm1")(conv(x, self.channels // 4, 2, "conv1")))
        x = gelu(layer_norm(1e-6, self.dtype, "norm2")(conv(x, self.channels, 2, "conv2")))
        kernel, bias = Projection(self.channels, self.dim, is_conv=True, name="conv3")()
        x = rearrange(x, "b n h w c -> b n (h w) c")
        return x @ kernel.astype(self.dtype), bias
