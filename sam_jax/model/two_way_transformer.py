"""A transformer in which a few tokens and the image attend to each other.

Source: segment-anything `modeling/transformer.py`.

Differences, all exact up to rounding:
- Folded projections: between tokens and image, where tokens are few and channels many, the
  projections of the image are folded into the tokens. `q (x W_k + b_k)^T` is `(q W_k^T) x^T` plus a
  constant per row, which softmax drops, and `P (x W_v + b_v)` is `(P x) W_v + b_v`, since the rows
  of P sum to one. The image is never projected. If every object has an image of its own, this takes
  fewer FLOPs for up to 16 tokens of 256 channels.
- All objects may share one image (n = 1) until the first block updates it.
- Only the tokens that are read afterwards query the image in the last attention.
- Absent tokens are masked out as keys.
"""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, UInt32

from sam_jax.model.layers import Mlp, NormWeights, Projection, layer_norm, linear
from sam_jax.model.ops import dispatch, image_to_token
from sam_jax.model.ops.image_to_token import MASKED_LOGIT, FoldedTokens
from sam_jax.model.ops.softmax import masked_softmax, unnormalized_softmax

CROSS_DOWNSAMPLE = 2  # ratio of the channels to the inner channels of the cross-attention
NORM_EPSILON = image_to_token.NORM_EPSILON


class TwoWayTransformer(nn.Module):
    """Two-way attention blocks and a last attention of the tokens to the image.

    Attributes:
      depth: Number of blocks.
      num_heads: Attention heads.
      mlp_dim: Hidden channels of the MLPs.
      dropout: Rate after each attention and MLP.
      dtype: Compute type.
    """

    depth: int
    num_heads: int
    mlp_dim: int
    dropout: float
    dtype: str

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "b n t c"],
        token_mask: Bool[Array, "b n t"],
        image: Float[Array, " b #n p c"],
        image_pe: Float[Array, "p c"],
        *,
        num_outputs: int,
        train: bool,
    ) -> tuple[Float[Array, "b n {num_outputs} c"], Float[Array, " b #n p c"]]:
        """Lets tokens and image attend to each other.

        Args:
          tokens: Tokens of each object, which are also their positional encoding.
          token_mask: True for tokens that are present; the others are never attended to.
          image: Pixels, one image for all objects if its n is 1.
          image_pe: Positional encoding of the pixels.
          num_outputs: Number of leading tokens to return.
          train: Apply dropout; needs the rng "dropout".

        Returns:
          The first tokens and the image, both updated.
        """
        token_pe = tokens
        for i in range(self.depth):
            block = TwoWayBlock(
                i == 0, self.num_heads, self.mlp_dim, self.dropout, self.dtype, name=f"layer_{i}"
            )
            tokens, image = block(tokens, token_pe, token_mask, image, image_pe, train)
        tokens, token_pe = tokens[:, :, :num_outputs], token_pe[:, :, :num_outputs]
        attended, image = TokenToImage(self.num_heads, self.dtype, name="final_attention")(
            tokens + token_pe, image, image_pe
        )
        attended = nn.Dropout(self.dropout, deterministic=not train)(attended)
        return layer_norm(NORM_EPSILON, self.dtype, "final_norm")(tokens + attended), image


class TwoWayBlock(nn.Module):
    """Self-attention, attention to the image, MLP, and attention of the image, each with a norm.

    Attributes:
      is_first: True for the first block, whose self-attention replaces the tokens and adds no
        positions.
      num_heads: Attention heads.
      mlp_dim: Hidden channels of the MLP.
      dropout: Rate after each attention and MLP; for the image it is rounded, see
        `ops/image_to_token.py`.
      dtype: Compute type.
    """

    is_first: bool
    num_heads: int
    mlp_dim: int
    dropout: float
    dtype: str

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "b n t c"],
        token_pe: Float[Array, "b n t c"],
        token_mask: Bool[Array, "b n t"],
        image: Float[Array, " b #n p c"],
        image_pe: Float[Array, "p c"],
        train: bool,
    ) -> tuple[Float[Array, "b n t c"], Float[Array, "b n p c"]]:
        """Updates the tokens, then the image; arguments as in `TwoWayTransformer`."""
        drop = nn.Dropout(self.dropout, deterministic=not train)

        attend = SelfAttention(self.num_heads, self.dtype, name="self_attention")
        if self.is_first:
            tokens = drop(attend(tokens, tokens, token_mask))
        else:
            tokens = tokens + drop(attend(tokens + token_pe, tokens, token_mask))
        tokens = layer_norm(NORM_EPSILON, self.dtype, "norm1")(tokens)

        attended, image = TokenToImage(self.num_heads, self.dtype, name="token_to_image")(
            tokens + token_pe, image, image_pe
        )
        tokens = layer_norm(NORM_EPSILON, self.dtype, "norm2")(tokens + drop(attended))

        mlp = Mlp((self.mlp_dim, tokens.shape[-1]), nn.relu, self.dtype, name="mlp")
        tokens = layer_norm(NORM_EPSILON, self.dtype, "norm3")(tokens + drop(mlp(tokens)))

        words = self.sample_dropout_words(tokens, image) if train and self.dropout else None
        image = self.update_image(image, image_pe, tokens + token_pe, tokens, token_mask, words)
        return tokens, image

    def sample_dropout_words(
        self, tokens: Float[Array, "b n t c"], image: Float[Array, " b #n p c"]
    ) -> UInt32[Array, "b n words c"]:
        """Samples random bits for the dropout of the image."""
        b, n, _, c = tokens.shape
        return image_to_token.random_words(self.make_rng("dropout"), (b, n), image.shape[2], c)

    def update_image(
        self,
        image: Float[Array, " b #n p c"],
        image_pe: Float[Array, "p c"],
        keys: Float[Array, "b n t c"],
        values: Float[Array, "b n t c"],
        token_mask: Bool[Array, "b n t"],
        words: UInt32[Array, "b n words c"] | None,
    ) -> Float[Array, "b n p c"]:
        """Attends from the image to the tokens, with dropout, residual and norm.

        Args:
          image: Pixels, one image for all objects if its n is 1.
          image_pe: Positional encoding of the pixels.
          keys: Tokens with their positional encoding.
          values: Tokens.
          token_mask: True for tokens that are present.
          words: From `sample_dropout_words`; None for no dropout.

        Returns:
          The updated pixels of every object.
        """
        c = image.shape[-1]
        attend = ImageToToken(c, self.num_heads, self.dtype, name="image_to_token")
        norm_weights = NormWeights(c, name="norm4")()
        if should_fold_projections(keys.shape[2], c, self.num_heads):
            folded = FoldedTokens(*attend.fold(keys, values, token_mask), *norm_weights)
            return dispatch.update_image(
                image, image_pe, folded, words, self.num_heads, self.dropout
            )
        attended = attend(image + image_pe, keys, values, token_mask)
        return image_to_token.drop_add_norm(image, attended, words, self.dropout, *norm_weights)


class SelfAttention(nn.Module):
    """Attention of tokens to the tokens that are present.

    Attributes:
      num_heads: Attention heads.
      dtype: Compute type.
    """

    num_heads: int
    dtype: str

    @nn.compact
    def __call__(
        self,
        queries: Float[Array, "b n t c"],
        values: Float[Array, "b n t c"],
        token_mask: Bool[Array, "b n t"],
    ) -> Float[Array, "b n t c"]:
        """Attends from queries, which are also the keys, to values."""
        q, k = self.project(queries, "q"), self.project(queries, "k")
        v = self.project(values, "v")
        logits = jnp.einsum("...qd,...kd->...qk", q, k) * q.shape[-1] ** -0.5
        weights = masked_softmax(logits, token_mask[..., None, None, :], axis=-1)
        out = rearrange(weights @ v, "... head t d -> ... t (head d)")
        return linear(out.shape[-1], out.shape[-1], self.dtype, "out")(out)

    def project(self, x: Float[Array, "b n t c"], name: str) -> Float[Array, "b n head t d"]:
        """Projects tokens with the dense layer of that name, and splits heads."""
        x = linear(x.shape[-1], x.shape[-1], self.dtype, name)(x)
        return rearrange(x, "... t (head d) -> ... head t d", head=self.num_heads)


class TokenToImage(nn.Module):
    """Attention of tokens to the image.

    Attributes:
      num_heads: Attention heads.
      dtype: Compute type.
    """

    num_heads: int
    dtype: str

    @nn.compact
    def __call__(
        self,
        queries: Float[Array, "b n t c"],
        image: Float[Array, " b #n p c"],
        image_pe: Float[Array, "p c"],
    ) -> tuple[Float[Array, "b n t c"], Float[Array, " b #n p c"]]:
        """Attends from queries to the image.

        Args:
          queries: Tokens with their positional encoding.
          image: Pixels, one image for all objects if its n is 1.
          image_pe: Positional encoding of the pixels.

        Returns:
          The attended values, and `image`, which later operations must use instead of the argument:
          kernels accumulate its cotangents.
        """
        t, c = queries.shape[-2:]
        q = split_heads(linear(c, c // CROSS_DOWNSAMPLE, self.dtype, "q")(queries), self.num_heads)
        q = q * q.shape[-1] ** -0.5
        k_kernel, _ = head_weights(c, "k", self.num_heads, self.dtype)
        v_kernel, v_bias = head_weights(c, "v", self.num_heads, self.dtype)
        if should_fold_projections(t, c, self.num_heads):
            q = rearrange(jnp.einsum("bnthd,chd->bnhtc", q, k_kernel), "b n h t c -> b n (h t) c")
            context, image = dispatch.attend_to_image(q, image, image_pe)
            context = rearrange(context, "b n (h t) c -> b n h t c", h=self.num_heads)
            out = jnp.einsum("bnhtc,chd->bnthd", context, v_kernel)
        else:
            k = jnp.einsum("bnpc,chd->bnphd", image + image_pe, k_kernel)
            v = jnp.einsum("bnpc,chd->bnphd", image, v_kernel)
            weights, total = unnormalized_softmax(jnp.einsum("bnthd,bnphd->bnhtp", q, k))
            out = jnp.einsum("bnhtp,bnphd->bnhtd", weights.astype(self.dtype), v) / total
            out = rearrange(out.astype(self.dtype), "b n h t d -> b n t h d")
        out = merge_heads(out + v_bias)
        return linear(c // CROSS_DOWNSAMPLE, c, self.dtype, "out")(out), image


class ProjectedTokens(NamedTuple):
    """Keys and values of tokens by head, and the projections of the image that meet them.

    Attributes:
      keys: 'b n t h d', scaled.
      values: 'b n t h d'.
      q_kernel: 'c h d', projects pixels to queries.
      q_bias: 'h d'.
      out_kernel: 'h d c', projects attended values to the channels of the image.
    """

    keys: Array
    values: Array
    q_kernel: Array
    q_bias: Array
    out_kernel: Array


class ImageToToken(nn.Module):
    """Attention of the image to the tokens that are present.

    Attributes:
      channels: Channels of image and tokens.
      num_heads: Attention heads.
      dtype: Compute type.
    """

    channels: int
    num_heads: int
    dtype: str

    def setup(self) -> None:
        """Creates the projections."""
        c, inner = self.channels, self.channels // CROSS_DOWNSAMPLE
        self.q, self.out = Projection(c, inner), Projection(inner, c)
        self.k, self.v = linear(c, inner, self.dtype), linear(c, inner, self.dtype)

    def __call__(
        self,
        queries: Float[Array, " b #n p c"],
        keys: Float[Array, "b n t c"],
        values: Float[Array, "b n t c"],
        token_mask: Bool[Array, "b n t"],
    ) -> Float[Array, "b n p c"]:
        """Attends from projected pixels to tokens, without folding the projections.

        Args:
          queries: Pixels with their positional encoding.
          keys: Tokens with their positional encoding.
          values: Tokens.
          token_mask: True for tokens that are present.

        Returns:
          The attended values in the channels of the image.
        """
        k, v, q_kernel, q_bias, out_kernel = self.project(keys, values)
        q = jnp.einsum("bnpc,chd->bnhdp", queries, q_kernel) + q_bias[..., None]
        logits = jnp.einsum("bnthd,bnhdp->bnhtp", k, q)
        mask = token_mask[:, :, None, :, None]
        weights, total = unnormalized_softmax(logits, mask, axis=-2)
        out = jnp.einsum("bnhtp,bnthd->bnhdp", weights.astype(self.dtype), v) / total
        return jnp.einsum("bnhdp,hdc->bnpc", out.astype(self.dtype), out_kernel) + self.out_bias

    def fold(
        self,
        keys: Float[Array, "b n t c"],
        values: Float[Array, "b n t c"],
        token_mask: Bool[Array, "b n t"],
    ) -> tuple[
        Float[Array, "b n k c"], Float[Array, "b n k"], Float[Array, "b n k c"], Float[Array, " c"]
    ]:
        """Folds the projections of the image into the tokens.

        Args:
          keys: Tokens with their positional encoding.
          values: Tokens.
          token_mask: True for tokens that are present.

        Returns:
          The keys, offsets, values and bias of `FoldedTokens`, with k = heads x tokens.
        """
        k, v, q_kernel, q_bias, out_kernel = self.project(keys, values)
        offsets = jnp.einsum("bnthd,hd->bnht", k, q_bias).astype(jnp.float32)
        offsets = jnp.where(token_mask[:, :, None], offsets, MASKED_LOGIT)
        k = rearrange(jnp.einsum("bnthd,chd->bnhtc", k, q_kernel), "b n h t c -> b n (h t) c")
        v = rearrange(jnp.einsum("bnthd,hdc->bnhtc", v, out_kernel), "b n h t c -> b n (h t) c")
        return k, rearrange(offsets, "b n h t -> b n (h t)"), v, self.out_bias

    @property
    def out_bias(self) -> Float[Array, " c"]:
        """The bias of the output projection."""
        return self.out()[1].astype(self.dtype)

    def project(
        self, keys: Float[Array, "b n t c"], values: Float[Array, "b n t c"]
    ) -> ProjectedTokens:
        """Projects the tokens, and splits the heads of all projections."""
        k, v = (split_heads(x, self.num_heads) for x in (self.k(keys), self.v(values)))
        q_kernel, q_bias = (split_heads(x.astype(self.dtype), self.num_heads) for x in self.q())
        out_kernel = self.out()[0].astype(self.dtype)
        out_kernel = rearrange(out_kernel, "(h d) c -> h d c", h=self.num_heads)
        return ProjectedTokens(k * k.shape[-1] ** -0.5, v, q_kernel, q_bias, out_kernel)


def should_fold_projections(t: int, c: int, num_heads: int) -> bool:
    """Returns True if folding the projections takes fewer FLOPs than projecting every pixel.

    This holds if every object has an image of its own. The rule is the same for objects that share
    one, so that results do not depend on their number.
    """
    return num_heads * t <= c // CROSS_DOWNSAMPLE


def head_weights(
    c: int, name: str, num_heads: int, dtype: DTypeLike
) -> tuple[Float[Array, "c h d"], Float[Array, "h d"]]:
    """Returns the kernel and bias of a projection to the inner channels, by head."""
    kernel, bias = Projection(c, c // CROSS_DOWNSAMPLE, name=name)()
    return split_heads(kernel.astype(dtype), num_heads), split_heads(bias.astype(dtype), num_heads)


def split_heads(x: Float[Array, "*batch _"], num_heads: int) -> Float[Array, "*batch h d"]:
    """Splits channels '(h d)' into heads."""
    return rearrange(x, "... (h d) -> ... h d", h=num_heads)


def merge_heads(x: Float[Array, "*batch h d"]) -> Float[Array, "*batch _"]:
    """Merges heads into channels '(h d)'."""
    return rearrange(x, "... h d -> ... (h d)")
