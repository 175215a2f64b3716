"""A kernel for the attention of all pixels to a few tokens, with dropout, residual and norm.

No pixel needs another, so that an image is read and written once.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from sam_jax.model.ops.blocks import (
    BYTES,
    add,
    like,
    norm_gradient,
    normalize,
    pixels_at_once,
    product,
    step_of,
    whole,
    zero_at_first,
)

EPSILON = 1e-5  # of the norm
LEVELS = 256  # of rates of dropout, for which a byte is drawn an entry
TILE = 8  # rows that a sum over tokens takes at once
NEVER = -1e30  # the offset of a token that is not attended to


class Tokens(NamedTuple):
    """What pixels are attended by and updated with: k = (h t), a head and token each.

    Attributes:
      keys: 'k c', values: 'k c', projected to the channels of the image; offsets: 'k' float32, to
        be added to the logits.
      bias: 'c' float32, of what is attended.
      norm_scale, norm_bias: 'c' float32.
    """

    keys: jax.Array
    offsets: jax.Array
    values: jax.Array
    bias: jax.Array
    norm_scale: jax.Array
    norm_bias: jax.Array


def kept_by(words, rate):
    """What of 'p c' entries dropout keeps, by a byte each of random words '(p/4) c'."""
    drawn = [(words >> (8 * n)) & 0xFF for n in range(BYTES)]
    return jnp.concatenate(drawn, axis=-2) >= round(LEVELS * rate)


def growth(rate):
    """By what dropout multiplies what it keeps."""
    return LEVELS / (LEVELS - round(LEVELS * rate))


def update(image, positions, tokens, words, num_heads, rate):
    """norm(image + dropout(attention of image + positions to the tokens)).

    Args:
      image, positions: 'p c', p a multiple of 512; tokens: `Tokens`.
      words: '(p/4) c' uint32, as in `kept_by`; None for no dropout.
      num_heads: heads; rate: of the dropout.

    Returns:
      'p c'.
    """
    by_head = lambda x: x.reshape(num_heads, -1, *x.shape[1:])
    fill = lambda x, value=0.0: jnp.pad(
        by_head(x),
        ((0, 0), (0, -(len(x) // num_heads) % TILE), *[(0, 0)] * (x.ndim - 1)),
        constant_values=value,
    ).reshape(-1, *x.shape[1:])
    column = lambda x: x.astype(jnp.float32)[:, None]
    tokens = Tokens(
        keys=fill(tokens.keys),
        offsets=column(fill(tokens.offsets, NEVER)),
        values=fill(tokens.values),
        bias=column(tokens.bias),
        norm_scale=column(tokens.norm_scale),
        norm_bias=column(tokens.norm_bias),
    )
    if words is not None:
        words = jax.lax.bitcast_convert_type(words.T, jnp.int32)  # as kernels have no unsigned ones
    return update_columns(image.T, positions.T, tokens, words, num_heads, rate).T


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def update_columns(image, positions, tokens, words, num_heads, rate):
    """The same of matrices 'c p', with vectors as columns and tokens filled up to whole tiles."""
    operands = (image, positions, tokens, words)
    return pl.pallas_call(
        functools.partial(forward_kernel, num_heads=num_heads, rate=rate),
        grid=(image.shape[1] // pixels_at_once(image.shape[1]),),
        in_specs=specs_of(*operands),
        out_specs=step_of(image),
        out_shape=like(image),
        name="image_to_token_forward",
    )(*operands)


def specs_of(image, positions, tokens, words):
    """The blocks of the operands."""
    pixels = pixels_at_once(image.shape[1])
    quarter = image.shape[1] // BYTES // pixels
    of_words = pl.BlockSpec((len(image), pixels), lambda i: (0, jax.lax.rem(i, quarter)))
    return [
        *(step_of(image), step_of(positions), jax.tree.map(whole, tokens)),
        None if words is None else of_words,
    ]


def update_forward(image, positions, tokens, words, num_heads, rate):
    """`update_columns`, and what its gradients need: its arguments."""
    saved = (image, positions, tokens, words)
    return update_columns(*saved, num_heads, rate), saved


def update_backward(num_heads, rate, saved, d_out):
    """Gradients of image, positions and tokens, from that of the result 'c p'."""
    image, positions, tokens, words = saved
    d_image, d_tokens = pl.pallas_call(
        functools.partial(backward_kernel, num_heads=num_heads, rate=rate),
        grid=(image.shape[1] // pixels_at_once(image.shape[1]),),
        in_specs=[*specs_of(*saved), step_of(d_out)],
        out_specs=[step_of(image), jax.tree.map(whole, tokens)],
        out_shape=[like(image), jax.tree.map(lambda x: like(x, jnp.float32), tokens)],
        name="image_to_token_backward",
    )(*saved, d_out)
    factor = 1.0 if words is None else kept_by(words.T, rate).T * growth(rate)
    plainly = lambda positions: finish(compute(image, positions, tokens, factor, num_heads), tokens)
    _, of_positions = jax.vjp(plainly, positions)
    d_tokens = jax.tree.map(lambda d, x: d.astype(x.dtype), d_tokens, tokens)
    return d_image, *of_positions(d_out.astype(jnp.float32)), d_tokens, None


update_columns.defvjp(update_forward, update_backward)


def factor_of(words, rate):
    """What dropout multiplies a step's 'c p' entries by, and 1 without words."""
    if words is None:
        return 1.0
    byte = jax.lax.div(pl.program_id(0) * BYTES, pl.num_programs(0))
    drawn = (words[:] >> (8 * byte)) & 0xFF
    return jnp.where(drawn >= round(LEVELS * rate), growth(rate), 0.0)


class Updated(NamedTuple):
    """The steps of an update, of 'c p' pixels, as both directions need them."""

    queries: jax.Array
    weights: jax.Array
    normed: jax.Array
    inverse_deviation: jax.Array


def compute(image, positions, tokens, factor, num_heads):
    """Attends, multiplies by a factor, adds and normalises -> `Updated`."""
    queries = add(image, positions)
    logits = product(tokens.keys, queries, (1, 0)) + tokens.offsets
    logits = logits.reshape(num_heads, -1, logits.shape[-1])
    weights = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
    weights = weights * (1 / jnp.sum(weights, axis=1, keepdims=True))
    weights = weights.reshape(-1, weights.shape[-1])
    attended = product(tokens.values, weights.astype(image.dtype), (0, 0)) + tokens.bias
    updated = image.astype(jnp.float32) + attended * factor
    return Updated(queries, weights, *normalize(updated, EPSILON))


def finish(updated, tokens):
    """The norm's scale and bias."""
    return updated.normed * tokens.norm_scale + tokens.norm_bias


def forward_kernel(image, positions, tokens, words, out, *, num_heads, rate):
    """Writes the pixels of a step."""
    tokens = Tokens(*(x[:] for x in tokens))
    updated = compute(image[:], positions[:], tokens, factor_of(words, rate), num_heads)
    out[:] = finish(updated, tokens).astype(out.dtype)


def backward_kernel(image, positions, tokens, words, d_out, d_image, d_tokens, *, num_heads, rate):
    """Writes the gradient of a step's pixels, and adds to those of the tokens."""
    zero_at_first(*d_tokens)
    dtype, tokens, factor = image.dtype, Tokens(*(x[:] for x in tokens)), factor_of(words, rate)
    queries, weights, normed, inverse_deviation = compute(
        image[:], positions[:], tokens, factor, num_heads
    )
    d_out = d_out[:].astype(jnp.float32)
    d_tokens.norm_scale[:] += jnp.sum(d_out * normed, axis=1, keepdims=True)
    d_tokens.norm_bias[:] += jnp.sum(d_out, axis=1, keepdims=True)
    d_updated = norm_gradient(d_out * tokens.norm_scale, normed, inverse_deviation)
    d_attended = d_updated * factor
    d_tokens.bias[:] += jnp.sum(d_attended, axis=1, keepdims=True)
    d_attended = d_attended.astype(dtype)
    d_tokens.values[:] += product(weights.astype(dtype), d_attended, (1, 1))

    by_head = lambda x: x.reshape(num_heads, -1, x.shape[-1])
    d_weights, weights = by_head(product(tokens.values, d_attended, (1, 0))), by_head(weights)
    d_logits = weights * (d_weights - jnp.sum(d_weights * weights, axis=1, keepdims=True))
    d_logits = d_logits.reshape(len(tokens.keys), -1)
    d_tokens.offsets[:] += jnp.sum(d_logits, axis=1, keepdims=True)
    d_logits = d_logits.astype(dtype)
    d_tokens.keys[:] += product(d_logits, queries, (1, 1))
    of_queries = product(tokens.keys, d_logits, (0, 0))
    d_image[:] = (d_updated + of_queries).astype(d_image.dtype)
