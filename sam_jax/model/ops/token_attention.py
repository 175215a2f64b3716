"""Attention among the few tokens of an image, without positions.

Source: timm's `Attention` in the masked autoencoder (`models_mae.py`).

Differences: the TPU kernel processes an image at once. The weights of all pairs of tokens, and
everything that they are computed from, never leave the fast memory of the chip.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Float32

from sam_jax.model.ops.blocks import Ref, dot, struct_like
from sam_jax.model.ops.kernel_cost import Cost, CostFunction, Shapes
from sam_jax.model.ops.softmax import softmax_matmul
from sam_jax.model.ops.window_attention import join_head_parts, split_head_parts, window_block

MAX_TOKENS = 512  # the weights of all their pairs, for one head, fit into VMEM


def attend_xla(qkv: Float[Array, "b t c3"], num_heads: int) -> Float[Array, "b t c"]:
    """Attends in plain JAX; see `dispatch.attend_among_tokens`."""
    q, k, v = rearrange(qkv, "b t (qkv head d) -> qkv b head t d", qkv=3, head=num_heads)
    logits = jnp.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5
    return rearrange(softmax_matmul(logits, v), "b head t d -> b t (head d)")


def pallas_supports(shape: tuple[int, ...]) -> bool:
    """Returns True if the tokens of 'b t (3 head d)' are few enough for the kernel."""
    return shape[1] <= MAX_TOKENS


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def attend_pallas(qkv: Float[Array, "b t c3"], num_heads: int) -> Float[Array, "b t c"]:
    """Attends with the TPU kernel; see `dispatch.attend_among_tokens`."""
    b, t, c = qkv.shape
    return pl.pallas_call(
        functools.partial(forward_kernel, num_heads=num_heads),
        grid=(b,),
        in_specs=[window_block(t, c)],
        out_specs=window_block(t, c // 3),
        out_shape=jax.ShapeDtypeStruct((b, t, c // 3), qkv.dtype),
        name="token_attention_forward",
    )(qkv)


def attend_forward(
    qkv: Float[Array, "b t c3"], num_heads: int
) -> tuple[Float[Array, "b t c"], Float[Array, "b t c3"]]:
    """Returns the result of `attend_pallas`, and its argument for the backward pass."""
    return attend_pallas(qkv, num_heads), qkv


def attend_backward(
    num_heads: int, qkv: Float[Array, "b t c3"], d_out: Float[Array, "b t c"]
) -> tuple[Float[Array, "b t c3"]]:
    """Returns the gradient of the argument of `attend_pallas`."""
    b, t, c = qkv.shape
    d_qkv = pl.pallas_call(
        functools.partial(backward_kernel, num_heads=num_heads),
        grid=(b,),
        in_specs=[window_block(t, c), window_block(t, c // 3)],
        out_specs=window_block(t, c),
        out_shape=struct_like(qkv),
        name="token_attention_backward",
    )(qkv, d_out)
    return (d_qkv,)


attend_pallas.defvjp(attend_forward, attend_backward)


def transposed_weights(q: Float[Array, "t d"], k: Float[Array, "t d"]) -> Float32[Array, "t t"]:
    """Computes the attention weights of a head, with keys in rows."""
    logits = dot(k, q, (1, 1)) * q.shape[-1] ** -0.5
    weights = jnp.exp(logits - jnp.max(logits, axis=0, keepdims=True))
    return weights / jnp.sum(weights, axis=0, keepdims=True)


def forward_kernel(qkv: Ref, out: Ref, *, num_heads: int) -> None:
    """Writes the attended values 't (head d)' of an image."""
    results = []
    for q, k, v in split_head_parts(qkv, 3, num_heads):
        weights = transposed_weights(q, k)
        results.append(dot(weights.astype(v.dtype), v, (0, 0)).astype(out.dtype))
    out[:] = jnp.concatenate(results, axis=-1)


def backward_kernel(qkv: Ref, d_out: Ref, d_qkv: Ref, *, num_heads: int) -> None:
    """Writes the gradient 't (3 head d)' of an image."""
    head_grads = []
    for (q, k, v), (d_o,) in zip(
        split_head_parts(qkv, 3, num_heads), split_head_parts(d_out, 1, num_heads), strict=True
    ):
        weights = transposed_weights(q, k)
        d_v = dot(weights.astype(d_o.dtype), d_o, (1, 0))
        d_weights = dot(v, d_o, (1, 1))
        inner = jnp.sum(d_weights * weights, axis=0, keepdims=True)
        d_logits = (weights * (d_weights - inner) * q.shape[-1] ** -0.5).astype(q.dtype)
        head_grads.append((dot(d_logits, k, (0, 0)), dot(d_logits, q, (1, 0)), d_v))
    d_qkv[:] = join_head_parts(head_grads).astype(d_qkv.dtype)


def _cost(cycles: Mapping[tuple[int, int], int]) -> CostFunction:
    """Returns the cost of the kernel from its cycles for an image, by (tokens, channels)."""

    def cost(operands: Shapes, num_bytes: int) -> Cost | None:
        images, tokens, channels = operands[0]
        if (tokens, channels // 3) not in cycles:
            return None
        image_cycles = cycles[tokens, channels // 3]
        return Cost(cycles=image_cycles * (images + 2), bytes=num_bytes)  # two to fill and drain

    return cost


COSTS: Mapping[str, CostFunction] = {
    "token_attention_forward": _cost(
        {(50, 768): 1210, (50, 1024): 1338, (50, 1280): 1785, (197, 512): 5080}
    ),
    "token_attention_backward": _cost(
        {(50, 768): 2475, (50, 1024): 3365, (50, 1280): 3857, (197, 512): 12792}
    ),
}
