"""Attention of a few tokens to all pixels of an image, with folded projections.

Source: segment-anything `modeling/transformer.py`, `cross_attn_token_to_image`.

Differences, exact up to rounding: the projections of keys and values are folded into the queries
and the output (`two_way_transformer.py`), so that the image itself is both keys and values.

The TPU kernel processes the pixels in steps. As in flash attention, the forward pass keeps the
highest logit so far and sums relative to it, and the backward pass computes the weights again from
the logarithm of their total. The kernel returns `image` unchanged, so that its downstream
cotangents flow back through the kernel and are accumulated in VMEM.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from sam_jax.model.ops.blocks import (
    Ref,
    add_in_float32,
    dot,
    full_block,
    num_steps,
    pixel_block,
    pixel_kernel_cost,
    struct_like,
    vmap_objects,
    zero_on_first_step,
)
from sam_jax.model.ops.kernel_cost import CostFunction
from sam_jax.model.ops.softmax import unnormalized_softmax

COSTS: Mapping[str, CostFunction] = {
    "token_to_image_forward": pixel_kernel_cost(1875),
    "token_to_image_backward": pixel_kernel_cost(3123),
}


def attend_xla(
    queries: Float[Array, "b n q c"],
    image: Float[Array, " b #n p c"],
    positions: Float[Array, "p c"],
) -> tuple[Float[Array, "b n q c"], Float[Array, " b #n p c"]]:
    """Attends in plain JAX; see `dispatch.attend_to_image`."""
    logits = jnp.einsum("bnqc,bnpc->bnqp", queries, image + positions)
    weights, total = unnormalized_softmax(logits)
    return ((weights.astype(image.dtype) @ image) / total).astype(image.dtype), image


def attend_pallas(
    queries: Float[Array, "b n q c"],
    image: Float[Array, " b #n p c"],
    positions: Float[Array, "p c"],
) -> tuple[Float[Array, "b n q c"], Float[Array, " b #n p c"]]:
    """Attends with the TPU kernel; see `dispatch.attend_to_image`."""

    def attend_object(
        queries: Float[Array, "q c"], image: Float[Array, "p c"]
    ) -> tuple[Float[Array, "q c"], Float[Array, "p c"]]:
        return attend(queries, image, positions)

    attended, images = vmap_objects(attend_object, queries, image)
    # A shared image would be returned once for every object. Its later cotangents would then count
    # for each of them.
    return attended, images if images.shape == image.shape else image


@jax.custom_vjp
def attend(
    queries: Float[Array, "q c"], image: Float[Array, "p c"], positions: Float[Array, "p c"]
) -> tuple[Float[Array, "q c"], Float[Array, "p c"]]:
    """Computes softmax(queries (image + positions)^T) image, for one object.

    Args:
      queries: Scaled queries.
      image: Pixels, a number that `blocks.pixels_per_step` can cut into steps.
      positions: Positional encoding of the pixels.

    Returns:
      The attended pixels, and `image` for the operations that follow.
    """
    return attend_forward(queries, image, positions)[0]


def attend_forward(
    queries: Float[Array, "q c"], image: Float[Array, "p c"], positions: Float[Array, "p c"]
) -> tuple[tuple[Float[Array, "q c"], Float[Array, "p c"]], tuple[Array, ...]]:
    """Returns the results of `attend`, and what its backward pass needs."""
    columns, positions = image.T, positions.T
    per_query = jax.ShapeDtypeStruct((len(queries), 1), jnp.float32)
    context, log_total = pl.pallas_call(
        forward_kernel,
        grid=(num_steps(columns.shape[1]),),
        in_specs=[full_block(queries), pixel_block(columns), pixel_block(positions)],
        out_specs=[full_block(queries), full_block(per_query)],
        out_shape=[struct_like(queries), per_query],
        scratch_shapes=[pltpu.VMEM(x.shape, jnp.float32) for x in (per_query, per_query, queries)],
        name="token_to_image_forward",
    )(queries, columns, positions)
    return (context, image), (queries, columns, positions, context, log_total)


def attend_backward(
    saved: tuple[Array, ...], d_results: tuple[Float[Array, "q c"], Float[Array, "p c"]]
) -> tuple[Float[Array, "q c"], Float[Array, "p c"], Float[Array, "p c"]]:
    """Returns the gradients of the arguments of `attend`."""
    d_context, d_image_later = d_results
    queries, columns, positions, context, log_total = saved
    inner = jnp.sum(d_context.astype(jnp.float32) * context, axis=1, keepdims=True)
    operands = (queries, columns, positions, log_total, d_context, inner, d_image_later.T)
    d_queries, d_columns = pl.pallas_call(
        backward_kernel,
        grid=(num_steps(columns.shape[1]),),
        in_specs=[
            *(full_block(queries), pixel_block(columns), pixel_block(positions)),
            *(full_block(x) for x in (log_total, d_context, inner)),
            pixel_block(columns),
        ],
        out_specs=[full_block(queries), pixel_block(columns)],
        out_shape=[struct_like(queries, jnp.float32), struct_like(columns)],
        name="token_to_image_backward",
    )(*operands)

    def attend_positions(positions: Float[Array, "p c"]) -> Float[Array, "q c"]:
        return attend_plain(queries, columns.T, positions)

    # Few callers want the gradient of the positions. XLA drops it where it is not used.
    (d_positions,) = jax.vjp(attend_positions, positions.T)[1](d_context)
    return d_queries.astype(queries.dtype), d_columns.T, d_positions


attend.defvjp(attend_forward, attend_backward)


def attend_plain(
    queries: Float[Array, "q c"], image: Float[Array, "p c"], positions: Float[Array, "p c"]
) -> Float[Array, "q c"]:
    """Computes the first result of `attend` in plain JAX."""
    weights = jax.nn.softmax((queries @ (image + positions).T).astype(jnp.float32), axis=-1)
    return weights.astype(image.dtype) @ image


def forward_kernel(
    queries: Ref,
    image: Ref,
    positions: Ref,
    context: Ref,
    log_total: Ref,
    highest: Ref,
    total: Ref,
    weighted: Ref,
) -> None:
    """Adds the pixels of a step to the weighted sum, and writes the result after the last step."""

    @pl.when(pl.program_id(0) == 0)
    def _() -> None:
        highest[:] = jnp.full_like(highest, -jnp.inf)

    zero_on_first_step(total, weighted)
    logits = dot(queries[:], add_in_float32(image[:], positions[:]), (1, 0))
    new_highest = jnp.maximum(highest[:], jnp.max(logits, axis=1, keepdims=True))
    rescale, weights = jnp.exp(highest[:] - new_highest), jnp.exp(logits - new_highest)
    highest[:] = new_highest
    total[:] = total[:] * rescale + jnp.sum(weights, axis=1, keepdims=True)
    weighted[:] = weighted[:] * rescale + dot(weights.astype(image.dtype), image[:], (1, 1))

    @pl.when(pl.program_id(0) == pl.num_programs(0) - 1)
    def _() -> None:
        context[:] = (weighted[:] / total[:]).astype(context.dtype)
        log_total[:] = highest[:] + jnp.log(total[:])


def backward_kernel(
    queries: Ref,
    image: Ref,
    positions: Ref,
    log_total: Ref,
    d_context: Ref,
    inner: Ref,
    d_image_later: Ref,
    d_queries: Ref,
    d_image: Ref,
) -> None:
    """Writes the gradient of the pixels of a step, and adds to the gradient of the queries."""
    zero_on_first_step(d_queries)
    keys = add_in_float32(image[:], positions[:])
    weights = jnp.exp(dot(queries[:], keys, (1, 0)) - log_total[:])
    d_logits = weights * (dot(d_context[:], image[:], (1, 0)) - inner[:])
    d_logits = d_logits.astype(image.dtype)
    d_queries[:] += dot(d_logits, keys, (1, 1))
    d_keys = dot(queries[:], d_logits, (0, 0))
    d_values = dot(d_context[:], weights.astype(image.dtype), (0, 0))
    d_image[:] = (d_image_later[:].astype(jnp.float32) + d_keys + d_values).astype(d_image.dtype)
