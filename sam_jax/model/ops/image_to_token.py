"""Update of an image by attention to a few tokens, with dropout, residual and norm.

Source: segment-anything `modeling/transformer.py`, `cross_attn_image_to_token` and `norm4`.

Differences, exact up to rounding: the projections of the image are folded into the tokens
(`two_way_transformer.py`). The rate of the dropout is rounded to a multiple of 1/256, since one
random byte decides on each entry.

Each pixel is updated independently of the others, so that the TPU kernel reads and writes the image
once.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Float32, Integer, UInt32

from sam_jax.model.layers import apply_layer_norm
from sam_jax.model.ops.blocks import (
    PIXELS_PER_WORD,
    Ref,
    add_in_float32,
    dot,
    full_block,
    normalize,
    normalize_grad,
    num_steps,
    pixel_block,
    pixel_kernel_cost,
    pixels_per_step,
    struct_like,
    vmap_objects,
    zero_on_first_step,
)
from sam_jax.model.ops.kernel_cost import CostFunction

NORM_EPSILON = 1e-5
DROPOUT_LEVELS = 256  # a random byte decides, so that rates are multiples of 1/256
SUBLANES = 8  # rows of a TPU register; tokens are padded to a multiple of it
MASKED_LOGIT = -1e30  # the offset of a token that must not be attended to

COSTS: Mapping[str, CostFunction] = {
    "image_to_token_forward": pixel_kernel_cost(2768),
    "image_to_token_backward": pixel_kernel_cost(6665),
}


class FoldedTokens(NamedTuple):
    """Projected token keys and values plus the output bias and norm weights; k = heads x tokens.

    Attributes:
      keys: '... k c', scaled keys, projected to the channels of the image.
      offsets: '... k' float32, added to the logits; `MASKED_LOGIT` for absent tokens.
      values: '... k c', projected to the channels of the image.
      bias: 'c', added to the attended values.
      norm_scale: 'c' float32.
      norm_bias: 'c' float32.
    """

    keys: Array
    offsets: Array
    values: Array
    bias: Array
    norm_scale: Array
    norm_bias: Array


def random_words(
    key: Array, objects: tuple[int, int], p: int, c: int
) -> UInt32[Array, "b n words c"]:
    """Samples the random words that decide on the dropout of images 'b n p c'."""
    return jax.random.bits(key, (*objects, -(-p // PIXELS_PER_WORD), c))


def keep_mask(words: Integer[Array, "*batch words c"], rate: float) -> Bool[Array, "*batch p c"]:
    """Returns True for the entries that dropout keeps, one for each byte of the words."""
    drawn = [(words >> (8 * n)) & 0xFF for n in range(PIXELS_PER_WORD)]
    return jnp.concatenate(drawn, axis=-2) >= round(DROPOUT_LEVELS * rate)


def inverse_keep_prob(rate: float) -> float:
    """Returns the scale applied to kept activations, 1 / (1 - rate), with the rate rounded."""
    return DROPOUT_LEVELS / (DROPOUT_LEVELS - round(DROPOUT_LEVELS * rate))


def update_xla(
    image: Float[Array, " b #n p c"],
    positions: Float[Array, "p c"],
    tokens: FoldedTokens,
    words: UInt32[Array, "b n words c"] | None,
    num_heads: int,
    rate: float,
) -> Float[Array, "b n p c"]:
    """Updates images in plain JAX; see `dispatch.update_image`."""
    attended = attend_xla(image + positions, tokens, num_heads)
    return drop_add_norm(image, attended, words, rate, tokens.norm_scale, tokens.norm_bias)


def attend_xla(
    queries: Float[Array, " b #n p c"], tokens: FoldedTokens, num_heads: int
) -> Float[Array, "b n p c"]:
    """Attends pixels to folded tokens, without dropout, residual and norm."""
    logits = jnp.einsum("bnkc,bnpc->bnkp", tokens.keys, queries) + tokens.offsets[..., None]
    logits = rearrange(logits, "b n (h t) p -> b n h t p", h=num_heads)
    weights = jax.nn.softmax(logits, axis=-2).astype(tokens.values.dtype)
    weights = rearrange(weights, "b n h t p -> b n (h t) p")
    return jnp.swapaxes(weights, -1, -2) @ tokens.values + tokens.bias


def drop_add_norm(
    image: Float[Array, " b #n p c"],
    attended: Float[Array, "b n p c"],
    words: UInt32[Array, "b n words c"] | None,
    rate: float,
    norm_scale: Float32[Array, " c"],
    norm_bias: Float32[Array, " c"],
) -> Float[Array, "b n p c"]:
    """Computes norm(image + dropout(attended)) in plain JAX.

    Args:
      image: Pixels before the update.
      attended: The update of the pixels.
      words: From `random_words`; None for no dropout.
      rate: Dropout rate.
      norm_scale: Scale of the LayerNorm.
      norm_bias: Bias of the LayerNorm.

    Returns:
      The updated pixels in the dtype of the image.
    """
    if words is not None:
        keep = keep_mask(words, rate)[:, :, : image.shape[2]]
        attended = jnp.where(keep, attended * inverse_keep_prob(rate), 0)
    return apply_layer_norm(image + attended, norm_scale, norm_bias, NORM_EPSILON, image.dtype)


def update_pallas(
    image: Float[Array, " b #n p c"],
    positions: Float[Array, "p c"],
    tokens: FoldedTokens,
    words: UInt32[Array, "b n words c"] | None,
    num_heads: int,
    rate: float,
) -> Float[Array, "b n p c"]:
    """Updates images with the TPU kernel; see `dispatch.update_image`."""

    def update_object(
        image: Float[Array, "p c"],
        words: UInt32[Array, "words c"] | None,
        keys: Float[Array, "k c"],
        offsets: Float32[Array, " k"],
        values: Float[Array, "k c"],
    ) -> Float[Array, "p c"]:
        folded = tokens._replace(keys=keys, offsets=offsets, values=values)
        return update(image, positions, folded, words, num_heads, rate)

    return vmap_objects(update_object, image, words, tokens.keys, tokens.offsets, tokens.values)


def update(
    image: Float[Array, "p c"],
    positions: Float[Array, "p c"],
    tokens: FoldedTokens,
    words: UInt32[Array, "words c"] | None,
    num_heads: int,
    rate: float,
) -> Float[Array, "p c"]:
    """Computes norm(image + dropout(attention of image + positions to the tokens)).

    Args:
      image: Pixels, a number that `blocks.pixels_per_step` can cut into steps.
      positions: Positional encoding of the pixels.
      tokens: Folded tokens of one object.
      words: Random words, as in `keep_mask`; None for no dropout.
      num_heads: Attention heads.
      rate: Dropout rate.

    Returns:
      The updated pixels.
    """
    tokens = FoldedTokens(
        keys=_pad_tokens(tokens.keys, num_heads),
        offsets=_column(_pad_tokens(tokens.offsets, num_heads, MASKED_LOGIT)),
        values=_pad_tokens(tokens.values, num_heads),
        bias=_column(tokens.bias),
        norm_scale=_column(tokens.norm_scale),
        norm_bias=_column(tokens.norm_bias),
    )
    if words is not None:
        # Kernels on TPUs do not support unsigned integers.
        words = jax.lax.bitcast_convert_type(words.T, jnp.int32)
    return update_columns(image.T, positions.T, tokens, words, num_heads, rate).T


def _pad_tokens(x: Float[Array, " k *c"], num_heads: int, value: float = 0.0) -> Array:
    """Pads the tokens of every head with `value` until they fill entire registers."""
    by_head = x.reshape(num_heads, -1, *x.shape[1:])
    padding = ((0, 0), (0, -by_head.shape[1] % SUBLANES), *[(0, 0)] * (x.ndim - 1))
    return jnp.pad(by_head, padding, constant_values=value).reshape(-1, *x.shape[1:])


def _column(x: Float[Array, " c"]) -> Float32[Array, "c 1"]:
    return x.astype(jnp.float32)[:, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def update_columns(
    image: Float[Array, "c p"],
    positions: Float[Array, "c p"],
    tokens: FoldedTokens,
    words: Integer[Array, "c words"] | None,
    num_heads: int,
    rate: float,
) -> Float[Array, "c p"]:
    """Runs the kernel, with vectors as columns and the tokens of a head in entire registers."""
    operands = (image, positions, tokens, words)
    return pl.pallas_call(
        functools.partial(forward_kernel, num_heads=num_heads, rate=rate),
        grid=(num_steps(image.shape[1]),),
        in_specs=_operand_blocks(*operands),
        out_specs=pixel_block(image),
        out_shape=struct_like(image),
        name="image_to_token_forward",
    )(*operands)


def _operand_blocks(
    image: Array, positions: Array, tokens: FoldedTokens, words: Array | None
) -> list[Any]:
    """Returns the blocks of the operands of both kernels."""
    pixels = pixels_per_step(image.shape[1])
    steps_of_quarter = num_steps(image.shape[1]) // PIXELS_PER_WORD
    words_block = pl.BlockSpec(
        (len(image), pixels), lambda i: (0, jax.lax.rem(i, steps_of_quarter))
    )
    return [
        *(pixel_block(image), pixel_block(positions), jax.tree.map(full_block, tokens)),
        None if words is None else words_block,
    ]


def update_forward(
    image: Array,
    positions: Array,
    tokens: FoldedTokens,
    words: Array | None,
    num_heads: int,
    rate: float,
) -> tuple[Array, tuple[Any, ...]]:
    """Returns the result of `update_columns`, and its arguments for the backward pass."""
    saved = (image, positions, tokens, words)
    return update_columns(*saved, num_heads, rate), saved


def update_backward(
    num_heads: int, rate: float, saved: tuple[Any, ...], d_out: Float[Array, "c p"]
) -> tuple[Array, Array, FoldedTokens, None]:
    """Returns the gradients of image, positions and tokens."""
    image, positions, tokens, words = saved
    d_image, d_tokens = pl.pallas_call(
        functools.partial(backward_kernel, num_heads=num_heads, rate=rate),
        grid=(num_steps(image.shape[1]),),
        in_specs=[*_operand_blocks(*saved), pixel_block(d_out)],
        out_specs=[pixel_block(image), jax.tree.map(full_block, tokens)],
        out_shape=[
            struct_like(image),
            jax.tree.map(lambda x: struct_like(x, jnp.float32), tokens),
        ],
        name="image_to_token_backward",
    )(*saved, d_out)
    factor = 1.0 if words is None else keep_mask(words.T, rate).T * inverse_keep_prob(rate)

    def update_positions(positions: Float[Array, "c p"]) -> Float32[Array, "c p"]:
        return scale_and_shift(compute(image, positions, tokens, factor, num_heads), tokens)

    # Few callers want the gradient of the positions. XLA drops it where it is not used.
    (d_positions,) = jax.vjp(update_positions, positions)[1](d_out.astype(jnp.float32))
    d_tokens = jax.tree.map(lambda d, x: d.astype(x.dtype), d_tokens, tokens)
    return d_image, d_positions, d_tokens, None


update_columns.defvjp(update_forward, update_backward)


def dropout_factor(words: Ref | None, rate: float) -> Float32[Array, "c p"] | float:
    """Returns the factor of every entry of a step: 0 if dropped; 1 everywhere without words."""
    if words is None:
        return 1.0
    byte = jax.lax.div(pl.program_id(0) * PIXELS_PER_WORD, pl.num_programs(0))
    drawn = (words[:] >> (8 * byte)) & 0xFF
    return jnp.where(drawn >= round(DROPOUT_LEVELS * rate), inverse_keep_prob(rate), 0.0)


class Activations(NamedTuple):
    """The intermediate results of an update, which both passes need.

    Attributes:
      queries: 'c p', pixels plus positions.
      weights: 'k p' float32, attention weights.
      normed: 'c p' float32, before scale and bias.
      inverse_deviation: '1 p' float32, of every pixel before it is normalized.
    """

    queries: Array
    weights: Array
    normed: Array
    inverse_deviation: Array


def compute(
    image: Float[Array, "c p"],
    positions: Float[Array, "c p"],
    tokens: FoldedTokens,
    factor: Float[Array, "c p"] | float,
    num_heads: int,
) -> Activations:
    """Attends, multiplies by the dropout factor, adds the residual and normalizes."""
    queries = add_in_float32(image, positions)
    logits = dot(tokens.keys, queries, (1, 0)) + tokens.offsets
    logits = logits.reshape(num_heads, -1, logits.shape[-1])
    weights = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
    weights = weights * (1 / jnp.sum(weights, axis=1, keepdims=True))
    weights = weights.reshape(-1, weights.shape[-1])
    attended = dot(tokens.values, weights.astype(image.dtype), (0, 0)) + tokens.bias
    updated = image.astype(jnp.float32) + attended * factor
    return Activations(queries, weights, *normalize(updated, NORM_EPSILON))


def scale_and_shift(activations: Activations, tokens: FoldedTokens) -> Float32[Array, "c p"]:
    """Applies the scale and bias of the norm."""
    return activations.normed * tokens.norm_scale + tokens.norm_bias


def forward_kernel(
    image: Ref,
    positions: Ref,
    tokens: FoldedTokens,
    words: Ref | None,
    out: Ref,
    *,
    num_heads: int,
    rate: float,
) -> None:
    """Writes the pixels of a step."""
    tokens = FoldedTokens(*(x[:] for x in tokens))
    activations = compute(image[:], positions[:], tokens, dropout_factor(words, rate), num_heads)
    out[:] = scale_and_shift(activations, tokens).astype(out.dtype)


def backward_kernel(
    image: Ref,
    positions: Ref,
    tokens: FoldedTokens,
    words: Ref | None,
    d_out: Ref,
    d_image: Ref,
    d_tokens: FoldedTokens,
    *,
    num_heads: int,
    rate: float,
) -> None:
    """Writes the gradient of the pixels of a step, and adds to the gradients of the tokens."""
    zero_on_first_step(*d_tokens)
    dtype = image.dtype
    tokens, factor = FoldedTokens(*(x[:] for x in tokens)), dropout_factor(words, rate)
    queries, weights, normed, inverse_deviation = compute(
        image[:], positions[:], tokens, factor, num_heads
    )
    d_updated = _norm_backward(d_out[:], normed, inverse_deviation, tokens, d_tokens)
    d_attended = d_updated * factor
    d_tokens.bias[:] += jnp.sum(d_attended, axis=1, keepdims=True)
    d_attended = d_attended.astype(dtype)
    d_tokens.values[:] += dot(weights.astype(dtype), d_attended, (1, 1))

    d_weights = _by_head(dot(tokens.values, d_attended, (1, 0)), num_heads)
    weights = _by_head(weights, num_heads)
    d_logits = weights * (d_weights - jnp.sum(d_weights * weights, axis=1, keepdims=True))
    d_logits = d_logits.reshape(len(tokens.keys), -1)
    d_tokens.offsets[:] += jnp.sum(d_logits, axis=1, keepdims=True)
    d_logits = d_logits.astype(dtype)
    d_tokens.keys[:] += dot(d_logits, queries, (1, 1))
    d_queries = dot(tokens.keys, d_logits, (0, 0))
    d_image[:] = (d_updated + d_queries).astype(d_image.dtype)


def _norm_backward(
    d_out: Float[Array, "c p"],
    normed: Float32[Array, "c p"],
    inverse_deviation: Float32[Array, "1 p"],
    tokens: FoldedTokens,
    d_tokens: FoldedTokens,
) -> Float32[Array, "c p"]:
    """Returns the gradient of the input of the norm, and adds to those of its weights."""
    d_out = d_out.astype(jnp.float32)
    d_tokens.norm_scale[:] += jnp.sum(d_out * normed, axis=1, keepdims=True)
    d_tokens.norm_bias[:] += jnp.sum(d_out, axis=1, keepdims=True)
    return normalize_grad(d_out * tokens.norm_scale, normed, inverse_deviation)


def _by_head(x: Float32[Array, "k p"], num_heads: int) -> Float32[Array, "{num_heads} t p"]:
    return x.reshape(num_heads, -1, x.shape[-1])
