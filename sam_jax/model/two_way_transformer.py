"""A transformer in which a few tokens and the image attend to each other.

Source: segment-anything `modeling/transformer.py`.

Differences, all exact up to rounding:
- Between tokens and image, where tokens are few and channels many, the image's projections are
  absorbed into the tokens' side: `q (x W_k + b_k)^T` is `(q W_k^T) x^T` plus a constant per row,
  which softmax drops, and `P (x W_v + b_v)` is `(P x) W_v + b_v`, as the rows of P sum to one. No
  projected image is ever made. With 256 channels, up to 16 tokens are few.
- The image may be one for all objects (n = 1) until the objects change it, so that the first
  layer's products over it are shared.
- Only the tokens that are read afterwards query the image in the last attention.
- Absent tokens are masked out as keys.

On TPUs kernels do what is done to every pixel (`kernels/`), with the same absorbed projections.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from sam_jax.model.layers import Mlp, NormWeights, Projection, layer_norm, linear
from sam_jax.model.ops import token_to_image
from sam_jax.model.ops.blocks import BYTES, has_kernels, over_objects
from sam_jax.model.ops.image_to_token import NEVER, Tokens, growth, kept_by, update

CROSS_DOWNSAMPLE = 2  # channels over the inner channels of the attention between tokens and image


class TwoWayTransformer(nn.Module):
    """Two-way attention blocks and a last attention of the tokens to the image."""

    depth: int
    num_heads: int
    mlp_dim: int
    dropout: float
    dtype: str

    @nn.compact
    def __call__(self, tokens, present, image, image_pe, *, num_outputs, train):
        """Lets tokens and image attend to each other.

        Args:
          tokens: 'b n t c'; also their own positional encoding.
          present: 'b n t' bool; others are never attended to.
          image: 'b n (gh gw) c', n may be 1 for all objects alike.
          image_pe: '(gh gw) c'.
          num_outputs: how many of the first tokens are wanted.
          train: whether to drop out.

        Returns:
          'b n num_outputs c' and 'b n (gh gw) c'.
        """
        token_pe = tokens
        for i in range(self.depth):
            block = TwoWayBlock(
                i == 0, self.num_heads, self.mlp_dim, self.dropout, self.dtype, name=f"layer_{i}"
            )
            tokens, image = block(tokens, token_pe, present, image, image_pe, train)
        tokens, token_pe = tokens[:, :, :num_outputs], token_pe[:, :, :num_outputs]
        attended, image = TokenToImage(self.num_heads, self.dtype, name="final_attention")(
            tokens + token_pe, image, image_pe
        )
        attended = nn.Dropout(self.dropout, deterministic=not train)(attended)
        return layer_norm(1e-5, self.dtype, "final_norm")(tokens + attended), image


class TwoWayBlock(nn.Module):
    """Self-attention of tokens, tokens to image, MLP of tokens, image to tokens; norms after each.

    The first block's self-attention replaces the tokens and adds no positions. What is dropped of
    the image is drawn by the byte: its rates are multiples of 1/256.
    """

    is_first: bool
    num_heads: int
    mlp_dim: int
    dropout: float
    dtype: str

    @nn.compact
    def __call__(self, tokens, token_pe, present, image, image_pe, train):
        c = tokens.shape[-1]
        norm = lambda name: layer_norm(1e-5, self.dtype, name)
        drop = nn.Dropout(self.dropout, deterministic=not train)

        attend = SelfAttention(self.num_heads, self.dtype, name="self_attention")
        if self.is_first:
            tokens = drop(attend(tokens, tokens, present))
        else:
            tokens = tokens + drop(attend(tokens + token_pe, tokens, present))
        tokens = norm("norm1")(tokens)

        attended, image = TokenToImage(self.num_heads, self.dtype, name="token_to_image")(
            tokens + token_pe, image, image_pe
        )
        tokens = norm("norm2")(tokens + drop(attended))

        tokens = tokens + drop(Mlp((self.mlp_dim, c), nn.relu, self.dtype, name="mlp")(tokens))
        tokens = norm("norm3")(tokens)

        answer = ImageToToken(c, self.num_heads, self.dtype, name="image_to_token")
        words = None
        if train and self.dropout:
            quarter = -(-image.shape[2] // BYTES)
            words = jax.random.bits(self.make_rng("dropout"), (*tokens.shape[:2], quarter, c))
        if has_kernels(image) and absorbs(tokens.shape[2], c, self.num_heads):
            scale, shift = NormWeights(c, name="norm4")()

            def update_one(image, words, keys, offsets, values):
                absorbed = Tokens(keys, offsets, values, answer.bias, scale, shift)
                return update(image, image_pe, absorbed, words, self.num_heads, self.dropout)

            absorbed = answer.absorb(tokens + token_pe, tokens, present)
            return tokens, over_objects(update_one, image, words, *absorbed)
        attended = answer(image + image_pe, tokens + token_pe, tokens, present)
        if words is not None:
            kept = kept_by(words, self.dropout)[:, :, : image.shape[2]]
            attended = jnp.where(kept, attended * growth(self.dropout), 0)
        return tokens, norm("norm4")(image + attended)


class SelfAttention(nn.Module):
    """Attention of tokens to the tokens that are present."""

    num_heads: int
    dtype: str

    @nn.compact
    def __call__(self, queries, values, present):
        """Attends queries, which are the keys too, to values: 'b n t c' each -> 'b n t c'."""
        c = queries.shape[-1]
        project = lambda x, name: rearrange(
            linear(c, c, self.dtype, name)(x), "... t (head d) -> ... head t d", head=self.num_heads
        )
        q, k, v = project(queries, "q"), project(queries, "k"), project(values, "v")
        logits = jnp.einsum("...qd,...kd->...qk", q, k) * q.shape[-1] ** -0.5
        weights = masked_softmax(logits, present[..., None, None, :], axis=-1)
        out = rearrange(weights @ v, "... head t d -> ... t (head d)")
        return linear(c, c, self.dtype, "out")(out)


class TokenToImage(nn.Module):
    """Attention of tokens to the image."""

    num_heads: int
    dtype: str

    @nn.compact
    def __call__(self, queries, image, image_pe):
        """Attends queries 'b n t c' to image 'b n p c' with positions 'p c'.

        Returns:
          'b n t c', and the image: what is done with it later should be done with this one, whose
          gradients kernels add to their own.
        """
        t, c = queries.shape[-2:]
        q = split_heads(linear(c, c // CROSS_DOWNSAMPLE, self.dtype, "q")(queries), self.num_heads)
        q = q * q.shape[-1] ** -0.5
        k_kernel, _ = head_weights(c, "k", self.num_heads, self.dtype)
        v_kernel, v_bias = head_weights(c, "v", self.num_heads, self.dtype)
        if absorbs(t, c, self.num_heads):
            q = rearrange(jnp.einsum("bnthd,chd->bnhtc", q, k_kernel), "b n h t c -> b n (h t) c")
            context, image = attend_to_image(q, image, image_pe)
            context = rearrange(context, "b n (h t) c -> b n h t c", h=self.num_heads)
            out = jnp.einsum("bnhtc,chd->bnthd", context, v_kernel)
        else:
            k = jnp.einsum("bnpc,chd->bnphd", image + image_pe, k_kernel)
            v = jnp.einsum("bnpc,chd->bnphd", image, v_kernel)
            weights, total = exponentials(jnp.einsum("bnthd,bnphd->bnhtp", q, k))
            out = jnp.einsum("bnhtp,bnphd->bnhtd", weights.astype(self.dtype), v) / total
            out = rearrange(out.astype(self.dtype), "b n h t d -> b n t h d")
        out = merge_heads(out + v_bias)
        return linear(c // CROSS_DOWNSAMPLE, c, self.dtype, "out")(out), image


def attend_to_image(queries, image, image_pe):
    """softmax(queries (image + image_pe)^T) image, of 'b n q c', 'b n p c' and 'p c'; and image."""
    if has_kernels(image):
        attend = lambda queries, image: token_to_image.attend(queries, image, image_pe)
        attended, images = over_objects(attend, queries, image)
        return attended, images if images.shape == image.shape else image
    logits = jnp.einsum("bnqc,bnpc->bnqp", queries, image + image_pe)
    weights, total = exponentials(logits)
    return ((weights.astype(image.dtype) @ image) / total).astype(image.dtype), image


class ImageToToken(nn.Module):
    """Attention of the image to the tokens that are present."""

    channels: int
    num_heads: int
    dtype: str

    def setup(self):
        c, inner = self.channels, self.channels // CROSS_DOWNSAMPLE
        self.q, self.out = Projection(c, inner), Projection(inner, c)
        self.k, self.v = linear(c, inner, self.dtype), linear(c, inner, self.dtype)

    @property
    def bias(self):
        """'c', of what is attended."""
        return self.out()[1].astype(self.dtype)

    def project(self, keys, values):
        """Keys and values 'b n t c' by head, 'b n t h d', the keys scaled; and their kernels.

        Returns:
          keys, values; 'c h d' and 'h d', the weights of queries; 'h d c' those of the output.
        """
        k, v = (split_heads(x, self.num_heads) for x in (self.k(keys), self.v(values)))
        of_queries = (split_heads(x.astype(self.dtype), self.num_heads) for x in self.q())
        out_kernel = self.out()[0].astype(self.dtype)
        out_kernel = rearrange(out_kernel, "(h d) c -> h d c", h=self.num_heads)
        return k * k.shape[-1] ** -0.5, v, *of_queries, out_kernel

    def absorb(self, keys, values, present):
        """Keys and values 'b n t c' with the image's projections, k = (h t).

        Returns:
          'b n k c' keys, 'b n k' float32 to be added to their logits, 'b n k c' values.
        """
        k, v, q_kernel, q_bias, out_kernel = self.project(keys, values)
        offsets = jnp.einsum("bnthd,hd->bnht", k, q_bias).astype(jnp.float32)
        offsets = jnp.where(present[:, :, None], offsets, NEVER)
        k = rearrange(jnp.einsum("bnthd,chd->bnhtc", k, q_kernel), "b n h t c -> b n (h t) c")
        v = rearrange(jnp.einsum("bnthd,hdc->bnhtc", v, out_kernel), "b n h t c -> b n (h t) c")
        return k, rearrange(offsets, "b n h t -> b n (h t)"), v

    def __call__(self, queries, keys, values, present):
        """Attends image queries 'b n p c' to keys and values 'b n t c' -> 'b n p c'."""
        if absorbs(keys.shape[2], self.channels, self.num_heads):
            k, offsets, v = self.absorb(keys, values, present)
            logits = jnp.einsum("bnkc,bnpc->bnkp", k, queries) + offsets[..., None]
            logits = rearrange(logits, "b n (h t) p -> b n h t p", h=self.num_heads)
            weights = jax.nn.softmax(logits, axis=-2).astype(self.dtype)
            weights = rearrange(weights, "b n h t p -> b n (h t) p")
            out = jnp.swapaxes(weights, -1, -2) @ v
        else:
            k, v, q_kernel, q_bias, out_kernel = self.project(keys, values)
            q = jnp.einsum("bnpc,chd->bnhdp", queries, q_kernel) + q_bias[..., None]
            logits = jnp.einsum("bnthd,bnhdp->bnhtp", k, q)
            weights, total = exponentials(logits, present[:, :, None, :, None], axis=-2)
            out = jnp.einsum("bnhtp,bnthd->bnhdp", weights.astype(self.dtype), v) / total
            out = jnp.einsum("bnhdp,hdc->bnpc", out.astype(self.dtype), out_kernel)
        return out + self.bias


def absorbs(t, c, num_heads):
    """Whether absorbed projections are less arithmetic: few (head, token) pairs, many channels."""
    return num_heads * t <= c // CROSS_DOWNSAMPLE


def exponentials(logits, present=True, axis=-1):
    """Softmax in float32 over the entries that are present, before its division.

    Returns:
      The numerators, and the denominators, their axis kept: to divide what they weigh is less.
    """
    logits = jnp.where(present, logits.astype(jnp.float32), jnp.finfo(jnp.float32).min)
    highest = jax.lax.stop_gradient(jnp.max(logits, axis=axis, keepdims=True))
    weights = jnp.exp(logits - highest)
    return weights, jnp.sum(weights, axis=axis, keepdims=True)


def masked_softmax(logits, present, axis):
    """Softmax in float32 over the entries that are present, in the logits' dtype."""
    masked = jnp.where(present, logits.astype(jnp.float32), jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(masked, axis=axis).astype(logits.dtype)


def head_weights(c, name, num_heads, dtype):
    """The kernel 'c h d' and bias 'h d' of a projection to the inner channels, by head."""
    kernel, bias = Projection(c, c // CROSS_DOWNSAMPLE, name=name)()
    return tuple(split_heads(x.astype(dtype), num_heads) for x in (kernel, bias))


def split_heads(x, num_heads):
    """'... (h d)' -> '... h d'."""
    return rearrange(x, "... (h d) -> ... h d", h=num_heads)


def merge_heads(x):
    """'... h d' -> '... (h d)'."""
    return rearrange(x, "... h d -> ... (h d)")
