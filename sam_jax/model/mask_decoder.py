"""Masks of the prompted objects, from the image's embedding and the prompts' features.

Source: segment-anything `modeling/mask_decoder.py`.

Differences: all four masks are always returned (`choose_masks` chooses); the transposed
convolutions, whose 2x2 patches do not overlap, are dense layers whose pixels stay grouped by token
until the masks are made, as norm, GELU and the last product act on each pixel alone.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from einops import rearrange

from sam_jax.model.layers import Mlp, NormWeights, fan_in_uniform
from sam_jax.model.ops import dispatch
from sam_jax.model.ops.upscaling import UpscalingWeights
from sam_jax.model.two_way_transformer import TwoWayTransformer

NUM_MASKS = 4  # 0 is the single-mask output; 1 to 3 are those of an ambiguous prompt


@flax.struct.dataclass
class Masks:
    """Predicted masks of n objects in each of b images.

    Attributes:
      logits: 'b n m lh lw' float32, positive inside; a token is 4x4 of these pixels.
      iou: 'b n m' float32, predicted IoU of each mask with the truth; not confined to [0, 1].
    """

    logits: jax.Array
    iou: jax.Array


@flax.struct.dataclass
class Attended:
    """Prompted objects of which all is known but the masks.

    Attributes:
      image: 'b n (gh gw) c', what each object made of the image.
      hyper: 'b n m c/8', the weights of a pixel's channels in each mask.
      iou: 'b n m' float32, as in `Masks`.
    """

    image: jax.Array
    hyper: jax.Array
    iou: jax.Array


def choose_masks(masks, multimask_output):
    """Keeps masks 1 to 3 of the four for an ambiguous prompt, else mask 0 alone."""
    kept = slice(1, None) if multimask_output else slice(0, 1)
    return jax.tree.map(lambda x: x[:, :, kept], masks)


class MaskDecoder(nn.Module):
    """Decodes four masks and their predicted IoUs for every object.

    Attributes:
      dim: channels of a token.
      depth: two-way blocks; num_heads: attention heads, mlp_dim: hidden channels of their MLPs.
      iou_hidden_dim: hidden channels of the IoU head.
      dropout: rate after each attention and MLP of the transformer.
      dtype: compute type; logits and IoUs are float32.
    """

    dim: int
    depth: int
    num_heads: int
    mlp_dim: int
    iou_hidden_dim: int
    dropout: float
    dtype: str

    def setup(self):
        c = self.dim
        normal = nn.initializers.normal(1.0)
        self.iou_token = self.param("iou_token", normal, (1, c))
        self.mask_tokens = self.param("mask_tokens", normal, (NUM_MASKS, c))
        self.transformer = TwoWayTransformer(
            self.depth, self.num_heads, self.mlp_dim, self.dropout, self.dtype
        )
        self.hypernetwork = [Mlp((c, c, c // 8), nn.relu, self.dtype) for _ in range(NUM_MASKS)]
        self.upscaling = Upscaling(self.dtype)
        hidden = self.iou_hidden_dim
        self.iou_head = Mlp((hidden, hidden, NUM_MASKS), nn.relu, self.dtype)

    def __call__(self, embedding, features, image_pe, train=False):
        """Decodes `PromptFeatures` on embeddings 'b gh gw c' with positions '(gh gw) c'."""
        attended = self.attend(embedding, features, image_pe, train)
        logits = self.upscale(attended.image, attended.hyper, embedding.shape[1])
        return Masks(logits=logits, iou=attended.iou)

    def attend(self, embedding, features, image_pe, train=False):
        """All but the masks themselves -> `Attended`; arguments as above."""
        b, n = features.sparse.shape[:2]
        outputs = jnp.concatenate([self.iou_token, self.mask_tokens]).astype(self.dtype)
        num_outputs = len(outputs)
        outputs = jnp.broadcast_to(outputs, (b, n, *outputs.shape))
        tokens = jnp.concatenate([outputs, features.sparse], axis=2)
        present = jnp.concatenate([jnp.ones((b, n, num_outputs), bool), features.present], axis=2)
        image = rearrange(embedding, "b gh gw c -> b 1 (gh gw) c").astype(self.dtype)
        tokens, image = self.transformer(
            tokens, present, image + features.dense, image_pe, num_outputs=num_outputs, train=train
        )
        hyper = [mlp(tokens[:, :, 1 + m]) for m, mlp in enumerate(self.hypernetwork)]
        iou = self.iou_head(tokens[:, :, 0]).astype(jnp.float32)
        return Attended(image=image, hyper=jnp.stack(hyper, axis=2), iou=iou)

    def upscale(self, image, hyper, gh):
        """The masks of an `Attended`, of gh rows of tokens -> logits 'b n m (4 gh) (4 gw)'."""
        return dispatch.arrange_pixels(self.upscaling(image, hyper), gh, image.dtype)


class Upscaling(nn.Module):
    """Tokens as 4 x 4 pixels each, and masks of them."""

    dtype: str

    @nn.compact
    def __call__(self, image, hyper):
        """Of tokens 'b n p c', masks that weigh pixels' channels by 'b n m c/8'.

        Returns:
          'b n m s p' float32, the (4 4) pixels s of each token.
        """
        c = image.shape[-1]
        kernel1, bias1 = Deconvolution(c, c // 4, name="conv1")()
        kernel2, bias2 = Deconvolution(c // 4, c // 8, name="conv2")()
        weights = UpscalingWeights(
            kernel1, bias1, *NormWeights(c // 4, name="norm")(), kernel2, bias2
        )
        return dispatch.upscale_masks(image, weights, hyper)


class Deconvolution(nn.Module):
    """The weights of a transposed convolution of size and stride 2: 'c 2 2 o' and 'o'."""

    in_features: int
    features: int

    @nn.compact
    def __call__(self):
        init = fan_in_uniform(4 * self.features)
        kernel = self.param("kernel", init, (self.in_features, 2, 2, self.features))
        return kernel, self.param("bias", init, (self.features,))
