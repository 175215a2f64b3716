"""A TPU kernel for attention among the few tokens of an image, without positions: all at once.

Weights of all pairs of tokens, and what leads to them, never leave the chip's fast memory.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from sam_jax.model.ops.blocks import product
from sam_jax.model.ops.platform import platform
from sam_jax.model.ops.window_attention import heads_of, window_of

MOST_TOKENS = 512  # whose pairs' weights, of a head, are sure to fit


def has_kernel(qkv):
    """Whether there is a kernel for 'b t (3 head d)': on TPUs, in bfloat16, of few tokens."""
    is_small = qkv.shape[1] <= MOST_TOKENS
    return platform() == "tpu" and qkv.dtype == jnp.bfloat16 and is_small


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def attend(qkv, num_heads):
    """Attention of 'b t (3 head d)', queries, keys and values -> 'b t (head d)'."""
    b, t, c = qkv.shape
    return pl.pallas_call(
        functools.partial(forward_kernel, num_heads=num_heads),
        grid=(b,),
        in_specs=[window_of(t, c)],
        out_specs=window_of(t, c // 3),
        out_shape=jax.ShapeDtypeStruct((b, t, c // 3), qkv.dtype),
        name="token_attention_forward",
    )(qkv)


def attend_forward(qkv, num_heads):
    """`attend`, and what its gradient needs: its argument."""
    return attend(qkv, num_heads), qkv


def attend_backward(num_heads, qkv, d_out):
    """The gradient 'b t (3 head d)' from that of the result, 'b t (head d)'."""
    b, t, c = qkv.shape
    d_qkv = pl.pallas_call(
        functools.partial(backward_kernel, num_heads=num_heads),
        grid=(b,),
        in_specs=[window_of(t, c), window_of(t, c // 3)],
        out_specs=window_of(t, c),
        out_shape=jax.ShapeDtypeStruct(qkv.shape, qkv.dtype),
        name="token_attention_backward",
    )(qkv, d_out)
    return (d_qkv,)


attend.defvjp(attend_forward, attend_backward)


def weights_of(q, k):
    """The weights 't t' float32 of a head, keys in rows, with 'q' and 'k' 't d'."""
    logits = product(k, q, (1, 1)) * q.shape[-1] ** -0.5
    weights = jnp.exp(logits - jnp.max(logits, axis=0, keepdims=True))
    return weights / jnp.sum(weights, axis=0, keepdims=True)


def forward_kernel(qkv, out, *, num_heads):
    """Writes the 't (head d)' of an image."""
    results = []
    for q, k, v in heads_of(qkv, 3, num_heads):
        weights = weights_of(q, k)
        results.append(product(weights.astype(v.dtype), v, (0, 0)).astype(out.dtype))
    out[:] = jnp.concatenate(results, axis=-1)


def backward_kernel(qkv, d_out, d_qkv, *, num_heads):
    """Writes an image's gradients 't (3 head d)'."""
    heads = []
    for (q, k, v), (d_o,) in zip(
        heads_of(qkv, 3, num_heads), heads_of(d_out, 1, num_heads), strict=True
    ):
        weights = weights_of(q, k)
        d_v = product(weights.astype(d_o.dtype), d_o, (1, 0))
        d_weights = product(v, d_o, (1, 1))
        inner = jnp.sum(d_weights * weights, axis=0, keepdims=True)
        d_logits = (weights * (d_weights - inner) * q.shape[-1] ** -0.5).astype(q.dtype)
        heads.append((product(d_logits, k, (0, 0)), product(d_logits, q, (1, 0)), d_v))
    d_qkv[:] = jnp.concatenate(
        [x for part in zip(*heads, strict=True) for x in part], axis=-1
    ).astype(d_qkv.dtype)
