"""Attention within windows, with relative positions.

Source: segment-anything `modeling/image_encoder.py`, blocks with windows.

Differences, exact up to rounding: relative positions are folded into channels
(`relative_positions.py`), or added by the TPU kernel.

XLA spends most of the time of this arithmetic on transposing heads and positions. The kernel reads
the queries, keys and values of one window once, as the projection left them, and keeps everything
else in registers and VMEM.

The relative position of a key is `q . rel_h[row of q, row of k] + q . rel_w[column of q, column of
k]`. The kernel computes it by matrix products alone: it multiplies q by all of `rel`, keeps the
entries of the query's row and column with a mask, and gathers them into one channel for each row
and column of keys. The keys are one-hot in these channels.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from sam_jax.model.ops.blocks import Ref, dot, full_block, struct_like, zero_on_first_step
from sam_jax.model.ops.kernel_cost import Cost, CostFunction, Shapes
from sam_jax.model.ops.relative_positions import attend_folded


def attend_xla(
    qkv: Float[Array, "n h w c3"],
    rel_h: Float[Array, "h h d"],
    rel_w: Float[Array, "w w d"],
    num_heads: int,
) -> Float[Array, "n h w c"]:
    """Attends in all windows at once; see `dispatch.attend_in_windows`."""
    return jax.vmap(lambda x: attend_folded(x, rel_h, rel_w, num_heads))(qkv)


def attend_sequentially(
    qkv: Float[Array, "n h w c3"],
    rel_h: Float[Array, "h h d"],
    rel_w: Float[Array, "w w d"],
    num_heads: int,
) -> Float[Array, "n h w c"]:
    """Attends in one window after the other, so that the logits stay in the cache of a CPU."""
    return lax.map(lambda x: attend_folded(x, rel_h, rel_w, num_heads), qkv)


def attend_pallas(
    qkv: Float[Array, "n side side c3"],
    rel_h: Float[Array, "side side d"],
    rel_w: Float[Array, "side side d"],
    num_heads: int,
) -> Float[Array, "n side side c"]:
    """Attends with the TPU kernel; see `dispatch.attend_in_windows`."""
    side = qkv.shape[1]
    rel = jnp.concatenate([rel_h, rel_w]).reshape(2 * side * side, -1).T
    tokens = rearrange(qkv, "n h w c -> n (h w) c")
    out = attend(tokens, rel, num_heads)
    return rearrange(out, "n (h w) c -> n h w c", h=side)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def attend(
    qkv: Float[Array, "n t c3"], rel: Float[Array, "d 2*t"], num_heads: int
) -> Float[Array, "n t c"]:
    """Runs the kernel on '(3 head d)' channels, and returns '(head d)' channels."""
    n, t, c = qkv.shape
    constants = position_constants(t, qkv.dtype)
    return pl.pallas_call(
        functools.partial(forward_kernel, num_heads=num_heads),
        grid=(n,),
        in_specs=[window_block(t, c), *(full_block(x) for x in (rel, *constants))],
        out_specs=window_block(t, c // 3),
        out_shape=jax.ShapeDtypeStruct((n, t, c // 3), qkv.dtype),
        name="window_attention_forward",
    )(qkv, rel, *constants)


def attend_forward(
    qkv: Float[Array, "n t c3"], rel: Float[Array, "d 2*t"], num_heads: int
) -> tuple[Float[Array, "n t c"], tuple[Array, Array]]:
    """Returns the result of `attend`, and its arguments for the backward pass."""
    return attend(qkv, rel, num_heads), (qkv, rel)


def attend_backward(
    num_heads: int, saved: tuple[Array, Array], d_out: Float[Array, "n t c"]
) -> tuple[Float[Array, "n t c3"], Float[Array, "d 2*t"]]:
    """Returns the gradients of the arguments of `attend`."""
    qkv, rel = saved
    n, t, c = qkv.shape
    constants = position_constants(t, qkv.dtype)
    d_qkv, d_rel = pl.pallas_call(
        functools.partial(backward_kernel, num_heads=num_heads),
        grid=(n,),
        in_specs=[
            window_block(t, c),
            window_block(t, c // 3),
            *(full_block(x) for x in (rel, *constants)),
        ],
        out_specs=[window_block(t, c), full_block(rel)],
        out_shape=[struct_like(qkv), struct_like(rel, jnp.float32)],
        name="window_attention_backward",
    )(qkv, d_out, rel, *constants)
    return d_qkv, d_rel.astype(rel.dtype)


attend.defvjp(attend_forward, attend_backward)


def window_block(t: int, c: int) -> pl.BlockSpec:
    """Returns the block of one window of an array 'n t c'."""
    return pl.BlockSpec((None, t, c), lambda i: (i, 0, 0))


def position_constants(
    t: int, dtype: DTypeLike
) -> tuple[Float[Array, "{t} 2*{t}"], Float[Array, "2*{t} sides"], Float[Array, "sides {t}"]]:
    """Returns matrices of zeros and ones that assign relative positions in a window of t tokens.

    Args:
      t: Tokens of the square window.
      dtype: Dtype of the matrices.

    Returns:
      query_mask: 't (2 t)', 1 at the relative positions of the row and column of a query.
      to_channel: '(2 t) (2 side)', maps relative positions to the channel of the row or column of
        the key.
      key_one_hot: '(2 side) t', 1 in the channels of the row and column of a key.
    """
    side = round(t**0.5)
    row, column = np.divmod(np.arange(t), side)
    query_index, key_index = np.divmod(np.arange(t), side)  # of a relative position
    query_mask = np.concatenate(
        [row[:, None] == query_index, column[:, None] == query_index], axis=1
    )
    to_channel = np.kron(np.eye(2), key_index[:, None] == np.arange(side))
    key_one_hot = np.concatenate(
        [np.arange(side)[:, None] == row, np.arange(side)[:, None] == column]
    )
    return (
        jnp.asarray(query_mask, dtype),
        jnp.asarray(to_channel, dtype),
        jnp.asarray(key_one_hot, dtype),
    )


def attention_weights(
    q: Float[Array, "t d"],
    k: Float[Array, "t d"],
    rel: Float[Array, "d 2*t"],
    query_mask: Float[Array, "t 2*t"],
    to_channel: Float[Array, "2*t sides"],
    key_one_hot: Float[Array, "sides t"],
) -> Float32[Array, "t t"]:
    """Computes the attention weights of a head."""
    relative = (dot(q, rel, (1, 0)) * query_mask).astype(q.dtype)
    relative = dot(relative, to_channel, (1, 0)).astype(q.dtype)
    logits = dot(q, k, (1, 1)) * q.shape[-1] ** -0.5 + dot(relative, key_one_hot, (1, 0))
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    return weights / jnp.sum(weights, axis=-1, keepdims=True)


def split_head_parts(
    ref: Ref, num_parts: int, num_heads: int
) -> Iterator[tuple[Float[Array, "t d"], ...]]:
    """Yields the matrices 't d' of all parts, head by head, of a reference 't (part head d)'."""
    d = ref.shape[-1] // num_parts // num_heads
    for head in range(num_heads):
        yield tuple(
            ref[:, (part * num_heads + head) * d : (part * num_heads + head + 1) * d]
            for part in range(num_parts)
        )


def forward_kernel(
    qkv: Ref,
    rel: Ref,
    query_mask: Ref,
    to_channel: Ref,
    key_one_hot: Ref,
    out: Ref,
    *,
    num_heads: int,
) -> None:
    """Writes the attended values 't (head d)' of a window."""
    constants = rel[:], query_mask[:], to_channel[:], key_one_hot[:]
    results = []
    for q, k, v in split_head_parts(qkv, 3, num_heads):
        weights = attention_weights(q, k, *constants)
        results.append(dot(weights.astype(v.dtype), v, (1, 0)).astype(out.dtype))
    out[:] = jnp.concatenate(results, axis=-1)


def backward_kernel(
    qkv: Ref,
    d_out: Ref,
    rel: Ref,
    query_mask: Ref,
    to_channel: Ref,
    key_one_hot: Ref,
    d_qkv: Ref,
    d_rel: Ref,
    *,
    num_heads: int,
) -> None:
    """Writes the gradient 't (3 head d)' of a window, and adds to the gradient of `rel`."""
    zero_on_first_step(d_rel)
    constants = rel[:], query_mask[:], to_channel[:], key_one_hot[:]
    head_grads = []
    window_d_rel: Array | float = 0.0
    for (q, k, v), (d_o,) in zip(
        split_head_parts(qkv, 3, num_heads), split_head_parts(d_out, 1, num_heads), strict=True
    ):
        weights = attention_weights(q, k, *constants)
        d_v = dot(weights.astype(d_o.dtype), d_o, (0, 0))
        d_weights = dot(d_o, v, (1, 1))
        inner = jnp.sum(d_weights * weights, axis=-1, keepdims=True)
        d_logits = (weights * (d_weights - inner)).astype(q.dtype)
        scale = q.shape[-1] ** -0.5
        d_relative = dot(d_logits, key_one_hot[:], (1, 1)).astype(q.dtype)
        d_relative = (dot(d_relative, to_channel[:], (1, 1)) * query_mask[:]).astype(q.dtype)
        d_q = scale * dot(d_logits, k, (1, 0)) + dot(d_relative, rel[:], (1, 1))
        d_k = scale * dot(d_logits, q, (0, 0))
        window_d_rel = window_d_rel + dot(q, d_relative, (0, 0))
        head_grads.append((d_q, d_k, d_v))
    d_rel[:] += window_d_rel
    d_qkv[:] = join_head_parts(head_grads).astype(d_qkv.dtype)


def join_head_parts(heads: Sequence[tuple[Array, ...]]) -> Float32[Array, "t _"]:
    """Concatenates the matrices 't d' of heads and parts as 't (part head d)'."""
    return jnp.concatenate([x for part in zip(*heads, strict=True) for x in part], axis=-1)


def _cost(cycles: int) -> CostFunction:
    """Returns the cost of the kernel from its cycles for one head of a 14 x 14 window.

    The cycles are those of the wider heads: 792 forward and 1871 backward with 64 channels, 853
    and 1969 with 80.
    """

    def cost(operands: Shapes, num_bytes: int) -> Cost:
        windows, _, channels = operands[0]
        head_width = next(shape for shape in operands if len(shape) == 2)[0]  # of `rel`
        heads = channels // 3 // head_width
        return Cost(cycles=cycles * heads * (windows + 2))  # two windows to fill and drain

    return cost


COSTS: Mapping[str, CostFunction] = {
    "window_attention_forward": _cost(853),
    "window_attention_backward": _cost(1969),
}
