"""What kernels over an image's pixels share.

An image is a matrix 'c p' in them, channels in rows and pixels in lanes: a sum over channels is
then a sum of rows, products need no transposes, and logits leave as training keeps them, pixels of
a token apart (`train/objectives/interactive.py`, `by_token`).
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from sam_jax.model.ops.platform import platform

PIXELS = (1024, 512, 256, 128)  # that a step may take, the best first
BYTES = 4  # of a random word: a quarter of the pixels is dropped by each


def has_kernels(image):
    """Whether there are kernels for an image '... p c': on TPUs, in bfloat16, p in whole steps."""
    in_steps = pixels_at_once(image.shape[-2]) is not None
    return platform() == "tpu" and image.dtype == jnp.bfloat16 and in_steps


def over_objects(f, *args):
    """F of one object's arrays, applied to 'b n ...'; arrays with n = 1 are for all objects."""
    leaves, tree = jax.tree.flatten(args)
    n = max(x.shape[1] for x in leaves)
    axes = [0 if x.shape[1] == n else None for x in leaves]
    leaves = [x if axis == 0 else x[:, 0] for x, axis in zip(leaves, axes, strict=True)]
    one = lambda *leaves: f(*jax.tree.unflatten(tree, leaves))
    return jax.vmap(jax.vmap(one, axes))(*leaves)


def product(a, b, contract):
    """The product of matrices over an axis of each, summed in float32."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def add(x, y):
    """X + y in float32, rounded to x's type."""
    return (x.astype(jnp.float32) + y.astype(jnp.float32)).astype(x.dtype)


def normalize(x, epsilon):
    """Normalises 'c p' float32 over channels -> 'c p', and '1 p', 1 over the deviation."""
    centred = x - jnp.mean(x, axis=0, keepdims=True)
    inverse_deviation = jax.lax.rsqrt(jnp.mean(centred**2, axis=0, keepdims=True) + epsilon)
    return centred * inverse_deviation, inverse_deviation


def norm_gradient(d_normed, normed, inverse_deviation):
    """The gradient of what was normalised over channels 'c p', from that of the result."""
    mean = lambda x: jnp.mean(x, axis=0, keepdims=True)
    return inverse_deviation * (d_normed - mean(d_normed) - normed * mean(d_normed * normed))


def pixels_at_once(p):
    """How many of p pixels a step takes, of a quarter; None if that cannot be cut into steps."""
    return next((n for n in PIXELS if p % (BYTES * n) == 0), None)


def whole(x):
    """The block that is all of an array, in every step."""
    return pl.BlockSpec(x.shape, lambda i: (0,) * x.ndim)


def step_of(x):
    """The block of the pixels of a step, in an array '... p'."""
    shape = (*x.shape[:-1], pixels_at_once(x.shape[-1]))
    return pl.BlockSpec(shape, lambda i: (0,) * (x.ndim - 1) + (i,))


def like(x, dtype=None):
    """The shape and type of an array, or the shape alone with another type."""
    return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype)


def zero_at_first(*sums):
    """Clears what is summed over the steps, in the first."""

    @pl.when(pl.program_id(0) == 0)
    def _():
        for ref in sums:
            ref[:] = jnp.zeros_like(ref)
