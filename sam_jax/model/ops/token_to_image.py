"""A kernel for the attention of a few queries to all pixels of an image, the pixels taken in steps.

Forward it keeps, as flash attention does, the highest logit so far and sums relative to it;
backward it makes the weights anew from the logarithm of their total. The image goes through
unchanged: so the gradients of all that is done with it afterwards come by, and are added within.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sam_jax.model.ops.blocks import (
    add,
    like,
    pixels_at_once,
    product,
    step_of,
    whole,
    zero_at_first,
)


@jax.custom_vjp
def attend(queries, image, positions):
    """softmax(queries (image + positions)^T) image.

    Args:
      queries: 'q c'; image, positions: 'p c', p a multiple of 512.

    Returns:
      'q c', and the image, for those that come after; not where `vmap` has one for several queries,
      as the gradients of later ones would then count for each of these.
    """
    return attend_forward(queries, image, positions)[0]


def attend_forward(queries, image, positions):
    """`attend`, and what its gradients need."""
    given, image, positions = image, image.T, positions.T
    column = jax.ShapeDtypeStruct((len(queries), 1), jnp.float32)
    context, log_total = pl.pallas_call(
        forward_kernel,
        grid=(image.shape[1] // pixels_at_once(image.shape[1]),),
        in_specs=[whole(queries), step_of(image), step_of(positions)],
        out_specs=[whole(queries), whole(column)],
        out_shape=[like(queries), column],
        scratch_shapes=[pltpu.VMEM(x.shape, jnp.float32) for x in (column, column, queries)],
        name="token_to_image_forward",
    )(queries, image, positions)
    return (context, given), (queries, image, positions, context, log_total)


def attend_backward(saved, d_results):
    """Gradients of the three arguments, from those of the results."""
    d_context, d_later = d_results
    queries, image, positions, context, log_total = saved
    inner = jnp.sum(d_context.astype(jnp.float32) * context, axis=1, keepdims=True)
    operands = (queries, image, positions, log_total, d_context, inner, d_later.T)
    d_queries, d_image = pl.pallas_call(
        backward_kernel,
        grid=(image.shape[1] // pixels_at_once(image.shape[1]),),
        in_specs=[
            *(whole(queries), step_of(image), step_of(positions)),
            *(whole(x) for x in (log_total, d_context, inner)),
            step_of(image),
        ],
        out_specs=[whole(queries), step_of(image)],
        out_shape=[like(queries, jnp.float32), like(image)],
        name="token_to_image_backward",
    )(*operands)
    _, of_positions = jax.vjp(functools.partial(attend_plainly, queries, image.T), positions.T)
    return d_queries.astype(queries.dtype), d_image.T, *of_positions(d_context)


attend.defvjp(attend_forward, attend_backward)


def attend_plainly(queries, image, positions):
    """What `attend` stands for; the positions' gradient, seldom wanted, is taken of it."""
    weights = jax.nn.softmax((queries @ (image + positions).T).astype(jnp.float32), axis=-1)
    return weights.astype(image.dtype) @ image


def forward_kernel(queries, image, positions, context, log_total, highest, total, weighed):
    """Adds the pixels of a step to what is weighed; writes it after the last."""

    @pl.when(pl.program_id(0) == 0)
    def _():
        highest[:] = jnp.full_like(highest, -jnp.inf)

    zero_at_first(total, weighed)
    logits = product(queries[:], add(image[:], positions[:]), (1, 0))
    now = jnp.maximum(highest[:], jnp.max(logits, axis=1, keepdims=True))
    fades, weights = jnp.exp(highest[:] - now), jnp.exp(logits - now)
    highest[:] = now
    total[:] = total[:] * fades + jnp.sum(weights, axis=1, keepdims=True)
    weighed[:] = weighed[:] * fades + product(weights.astype(image.dtype), image[:], (1, 1))

    @pl.when(pl.program_id(0) == pl.num_programs(0) - 1)
    def _():
        context[:] = (weighed[:] / total[:]).astype(context.dtype)
        log_total[:] = highest[:] + jnp.log(total[:])


def backward_kernel(
    queries, image, positions, log_total, d_context, inner, d_later, d_queries, d_image
):
    """Writes the gradient of a step's pixels, and adds to that of the queries."""
    zero_at_first(d_queries)
    keys = add(image[:], positions[:])
    weights = jnp.exp(product(queries[:], keys, (1, 0)) - log_total[:])
    d_logits = weights * (product(d_context[:], image[:], (1, 0)) - inner[:])
    d_logits = d_logits.astype(image.dtype)
    d_queries[:] += product(d_logits, keys, (1, 1))
    of_keys = product(queries[:], d_logits, (0, 0))
    of_values = product(d_context[:], weights.astype(image.dtype), (0, 0))
    d_image[:] = (d_later[:].astype(jnp.float32) + of_keys + of_values).astype(d_image.dtype)
