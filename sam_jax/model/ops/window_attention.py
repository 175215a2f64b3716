"""A TPU kernel for attention within windows, with relative positions: one window at a time.

What the compiler makes of the same arithmetic spends most of its time on moving heads and positions
about in memory. Here a window's queries, keys and values are read once, as the projection left
them, and everything else happens in registers and VMEM.

The relative position of a key, `q . rel_h[row of q, row of k] + q . rel_w[column of q, column of
k]`, is made of matrix products alone: q with all of `rel`, of which a mask keeps those of q's own
row and column, which are gathered into one channel a row and column of keys. These are then more
channels of queries, which meet keys that are 1 in the channels of their own row and column.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.experimental import pallas as pl

from sam_jax.model.ops.blocks import product, whole


def attend_in_windows(qkv, rel_h, rel_w, num_heads):
    """Attention within each window.

    Args:
      qkv: 'n side side (3 head d)', queries, keys and values.
      rel_h: 'side side d', the vertical position of a key's row relative to a query's; rel_w.
      num_heads: heads.

    Returns:
      'n side side (head d)'.
    """
    side = qkv.shape[1]
    rel = jnp.concatenate([rel_h, rel_w]).reshape(2 * side * side, -1).T
    tokens = rearrange(qkv, "n h w c -> n (h w) c")
    out = attend(tokens, rel, num_heads)
    return rearrange(out, "n (h w) c -> n h w c", h=side)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def attend(qkv, rel, num_heads):
    """The same of 'n t (3 head d)' and 'd (2 t)' -> 'n t (head d)'."""
    n, t, c = qkv.shape
    return pl.pallas_call(
        functools.partial(forward_kernel, num_heads=num_heads),
        grid=(n,),
        in_specs=[window_of(t, c), *(whole(x) for x in (rel, *constants(t, qkv.dtype)))],
        out_specs=window_of(t, c // 3),
        out_shape=jax.ShapeDtypeStruct((n, t, c // 3), qkv.dtype),
        name="window_attention_forward",
    )(qkv, rel, *constants(t, qkv.dtype))


def attend_forward(qkv, rel, num_heads):
    """`attend`, and what its gradients need: its arguments."""
    return attend(qkv, rel, num_heads), (qkv, rel)


def attend_backward(num_heads, saved, d_out):
    """Gradients 'n t (3 head d)' and 'd (2 t)' from those of the result, 'n t (head d)'."""
    qkv, rel = saved
    n, t, c = qkv.shape
    d_qkv, d_rel = pl.pallas_call(
        functools.partial(backward_kernel, num_heads=num_heads),
        grid=(n,),
        in_specs=[
            window_of(t, c),
            window_of(t, c // 3),
            *(whole(x) for x in (rel, *constants(t, qkv.dtype))),
        ],
        out_specs=[window_of(t, c), whole(rel)],
        out_shape=[
            jax.ShapeDtypeStruct(qkv.shape, qkv.dtype),
            jax.ShapeDtypeStruct(rel.shape, jnp.float32),
        ],
        name="window_attention_backward",
    )(qkv, d_out, rel, *constants(t, qkv.dtype))
    return d_qkv, d_rel.astype(rel.dtype)


attend.defvjp(attend_forward, attend_backward)


def window_of(t, c):
    """The block of a grid's window in an array 'n t c'."""
    return pl.BlockSpec((None, t, c), lambda i: (i, 0, 0))


def constants(t, dtype):
    """Which relative positions are whose, of a window of t tokens.

    Returns:
      own: 't (2 t)', 1 at the relative positions of a query's own row, and column.
      gathers: '(2 t) (2 side)', to the channel of the key's row, or column.
      places: '(2 side) t', 1 at the channels of a key's own row and column.
    """
    side = round(t**0.5)
    row, column = np.divmod(np.arange(t), side)
    first, second = np.divmod(np.arange(t), side)  # of a relative position: the query's, the key's
    own = np.concatenate([row[:, None] == first, column[:, None] == first], axis=1)
    gathers = np.kron(np.eye(2), second[:, None] == np.arange(side))
    places = np.concatenate([np.arange(side)[:, None] == row, np.arange(side)[:, None] == column])
    return tuple(jnp.asarray(x, dtype) for x in (own, gathers, places))


def scores_of(q, k, rel, own, gathers, places):
    """The weights 't t' float32 of a head, with 'q' and 'k' 't d'."""
    relative = (product(q, rel, (1, 0)) * own).astype(q.dtype)
    relative = product(relative, gathers, (1, 0)).astype(q.dtype)
    logits = product(q, k, (1, 1)) * q.shape[-1] ** -0.5 + product(relative, places, (1, 0))
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    return weights / jnp.sum(weights, axis=-1, keepdims=True)


def heads_of(ref, parts, num_heads):
    """The matrices 't d' of a reference 't (part head d)', by head: a tuple of all parts."""
    d = ref.shape[-1] // parts // num_heads
    for head in range(num_heads):
        yield tuple(
            ref[:, (part * num_heads + head) * d : (part * num_heads + head + 1) * d]
            for part in range(parts)
        )


def forward_kernel(qkv, rel, own, gathers, places, out, *, num_heads):
    """Writes the 't (head d)' of a window."""
    fixed = rel[:], own[:], gathers[:], places[:]
    results = []
    for q, k, v in heads_of(qkv, 3, num_heads):
        weights = scores_of(q, k, *fixed)
        results.append(product(weights.astype(v.dtype), v, (1, 0)).astype(out.dtype))
    out[:] = jnp.concatenate(results, axis=-1)


def backward_kernel(qkv, d_out, rel, own, gathers, places, d_qkv, d_rel, *, num_heads):
    """Writes a window's gradients 't (3 head d)', and adds to those of `rel`."""

    @pl.when(pl.program_id(0) == 0)
    def _():
        d_rel[:] = jnp.zeros_like(d_rel)

    fixed = rel[:], own[:], gathers[:], places[:]
    heads, of_rel = [], 0.0
    for (q, k, v), (d_o,) in zip(
        heads_of(qkv, 3, num_heads), heads_of(d_out, 1, num_heads), strict=True
    ):
        weights = scores_of(q, k, *fixed)
        d_v = product(weights.astype(d_o.dtype), d_o, (0, 0))
        d_weights = product(d_o, v, (1, 1))
        inner = jnp.sum(d_weights * weights, axis=-1, keepdims=True)
        d_logits = (weights * (d_weights - inner)).astype(q.dtype)
        scale = q.shape[-1] ** -0.5
        d_relative = product(d_logits, places[:], (1, 1)).astype(q.dtype)
        d_relative = (product(d_relative, gathers[:], (1, 1)) * own[:]).astype(q.dtype)
        d_q = scale * product(d_logits, k, (1, 0)) + product(d_relative, rel[:], (1, 1))
        d_k = scale * product(d_logits, q, (0, 0))
        of_rel = of_rel + product(q, d_relative, (0, 0))
        heads.append((d_q, d_k, d_v))
    d_rel[:] += of_rel
    d_qkv[:] = jnp.concatenate(
        [x for part in zip(*heads, strict=True) for x in part], axis=-1
    ).astype(d_qkv.dtype)
