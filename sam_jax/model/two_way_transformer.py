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
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from sam_jax.model.layers import Mlp, Projection, layer_norm, linear

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
        attended = TokenToImage(self.num_heads, self.dtype, name="final_attention")(
            tokens + token_pe, image, image_pe
        )
        attended = nn.Dropout(self.dropout, deterministic=not train)(attended)
        return layer_norm(1e-5, self.dtype, "final_norm")(tokens + attended), image


class TwoWayBlock(nn.Module):
    """Self-attention of tokens, tokens to image, MLP of tokens, image to tokens; norms after each.

    The first block's self-attention replaces the tokens and adds no positions.
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

        attended = TokenToImage(self.num_heads, self.dtype, name="token_to_image")(
            tokens + token_pe, image, image_pe
        )
        tokens = norm("norm2")(tokens + drop(attended))

        tokens = tokens + drop(Mlp((self.mlp_dim, c), nn.relu, self.dtype, name="mlp")(tokens))
        tokens = norm("norm3")(tokens)

        attended = ImageToToken(self.num_heads, self.dtype, name="image_to_token")(
            image + image_pe, tokens + token_pe, tokens, present
        )
        return tokens, norm("norm4")(image + drop(attended))


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
        """Attends queries 'b n t c' to image 'b n p c' with positions 'p c' -> 'b n t c'."""
        t, c = queries.shape[-2:]
        q = split_heads(linear(c, c // CROSS_DOWNSAMPLE, self.dtype, "q")(queries), self.num_heads)
        q = q * q.shape[-1] ** -0.5
        k_kernel, _ = head_weights(c, "k", self.num_heads, self.dtype)
        v_kernel, v_bias = head_weights(c, "v", self.num_heads, self.dtype)
        if absorbs(t, c, self.num_heads):
            q = rearrange(jnp.einsum("bnthd,chd->bnhtc", q, k_kernel), "b n h t c -> b n (h t) c")
            weights, total = exponentials(jnp.einsum("bnqc,bnpc->bnqp", q, image + image_pe))
            context = ((weights.astype(self.dtype) @ image) / total).astype(self.dtype)
            context = rearrange(context, "b n (h t) c -> b n h t c", h=self.num_heads)
            out = jnp.einsum("bnhtc,chd->bnthd", context, v_kernel)
        else:
            k = jnp.einsum("bnpc,chd->bnphd", image + image_pe, k_kernel)
            v = jnp.einsum("bnpc,chd->bnphd", image, v_kernel)
            weights, total = exponentials(jnp.einsum("bnthd,bnphd->bnhtp", q, k))
            out = jnp.einsum("bnhtp,bnphd->bnhtd", weights.astype(self.dtype), v) / total
            out = rearrange(out.astype(self.dtype), "b n h t d -> b n t h d")
        return linear(c // CROSS_DOWNSAMPLE, c, self.dtype, "out")(merge_heads(out + v_bias))


class ImageToToken(nn.Module):
    """Attention of the image to the tokens that are present."""

    num_heads: int
    dtype: str

    @nn.compact
    def __call__(self, queries, keys, values, present):
        """Attends image queries 'b n p c' to keys and values 'b n t c' -> 'b n p c'."""
        t, c = keys.shape[-2:]
        inner = c // CROSS_DOWNSAMPLE
        k = split_heads(linear(c, inner, self.dtype, "k")(keys), self.num_heads)
        k = k * k.shape[-1] ** -0.5
        v = split_heads(linear(c, inner, self.dtype, "v")(values), self.num_heads)
        q_kernel, q_bias = head_weights(c, "q", self.num_heads, self.dtype)
        out_kernel, out_bias = Projection(inner, c, name="out")()
        out_kernel = rearrange(out_kernel.astype(self.dtype), "(h d) c -> h d c", h=self.num_heads)
        present = present[:, :, None, :, None]
        if absorbs(t, c, self.num_heads):
            offset = rearrange(jnp.einsum("bnthd,hd->bnht", k, q_bias), "b n h t -> b n (h t) 1")
            k = rearrange(jnp.einsum("bnthd,chd->bnhtc", k, q_kernel), "b n h t c -> b n (h t) c")
            logits = jnp.einsum("bnkc,bnpc->bnkp", k, queries) + offset
            logits = rearrange(logits, "b n (h t) p -> b n h t p", h=self.num_heads)
            weights = masked_softmax(logits, present, axis=-2)
            weights = rearrange(weights, "b n h t p -> b n (h t) p")
            v = rearrange(jnp.einsum("bnthd,hdc->bnhtc", v, out_kernel), "b n h t c -> b n (h t) c")
            out = jnp.swapaxes(weights, -1, -2) @ v
        else:
            q = jnp.einsum("bnpc,chd->bnhdp", queries, q_kernel) + q_bias[..., None]
            logits = jnp.einsum("bnthd,bnhdp->bnhtp", k, q)
            weights, total = exponentials(logits, present, axis=-2)
            out = jnp.einsum("bnhtp,bnthd->bnhdp", weights.astype(self.dtype), v) / total
            out = jnp.einsum("bnhdp,hdc->bnpc", out.astype(self.dtype), out_kernel)
        return out + out_bias.astype(self.dtype)


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
