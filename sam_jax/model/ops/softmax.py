"""Softmax in float32, with masks, and with the division left to the caller."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32


def softmax_matmul(
    logits: Float[Array, "*batch q k"], v: Float[Array, "*batch k d"]
) -> Float[Array, "*batch q d"]:
    """Multiplies the softmax of logits by values, in the dtype of the values.

    The product is divided instead of the weights: it has 'q d' entries instead of 'q k'.
    """
    logits = logits.astype(jnp.float32)
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return ((weights.astype(v.dtype) @ v) / total).astype(v.dtype)


def unnormalized_softmax(
    logits: Float[Array, "*shape"], mask: Bool[Array, "*#shape"] | None = None, axis: int = -1
) -> tuple[Float32[Array, "*shape"], Float32[Array, "..."]]:
    """Computes the numerators and the denominators of a softmax.

    Callers divide the weighted result, which is smaller than the weights.

    Args:
      logits: Logits in any float dtype.
      mask: True for the entries that count; None if all of them do.
      axis: The axis to sum over.

    Returns:
      The numerators, and their sum with `axis` kept as an axis of size one.
    """
    logits = jnp.where(
        True if mask is None else mask, logits.astype(jnp.float32), jnp.finfo(jnp.float32).min
    )
    highest = jax.lax.stop_gradient(jnp.max(logits, axis=axis, keepdims=True))
    weights = jnp.exp(logits - highest)
    return weights, jnp.sum(weights, axis=axis, keepdims=True)


def masked_softmax(
    logits: Float[Array, "*shape"], mask: Bool[Array, "*#shape"], axis: int
) -> Float[Array, "*shape"]:
    """Computes a softmax over the entries where `mask` is True, in the dtype of the logits."""
    masked = jnp.where(mask, logits.astype(jnp.float32), jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(masked, axis=axis).astype(logits.dtype)
