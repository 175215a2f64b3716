"""Building blocks of the kernels, most of them for kernels that process the pixels of an image.

In these kernels an image is a matrix 'c p', with channels in rows and pixels in lanes. A sum over
channels is then a sum of rows, products need no transposition, and logits leave the kernel in the
layout in which training keeps them, with the pixels of a token apart (see
`train/objectives/interactive.py`).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from sam_jax.model.ops.kernel_cost import Cost, CostFunction, Shapes

Ref = Any  # a Pallas reference to a block in fast memory

PIXELS_PER_STEP = (1024, 512, 256, 128)  # allowed numbers of pixels of a step, the best first
# A random word of 32 bits decides on dropout for four pixels: one byte for each quarter of the
# image. The pixels of a step must therefore lie in one quarter.
PIXELS_PER_WORD = 4
COST_PIXELS = 1024  # pixels that the measured cycles of a kernel are for


def pixels_per_step(p: int) -> int | None:
    """Returns the number of pixels of a step; None if a quarter of p has no equal steps."""
    return next((n for n in PIXELS_PER_STEP if p % (PIXELS_PER_WORD * n) == 0), None)


def has_whole_steps(shape: tuple[int, ...]) -> bool:
    """Returns True if the pixels of an image '... p c' can be processed in equal steps."""
    return pixels_per_step(shape[-2]) is not None


def num_steps(p: int) -> int:
    """Returns the number of steps for p pixels."""
    step = pixels_per_step(p)
    if step is None:
        raise ValueError(
            f"the number of pixels must be a multiple of {PIXELS_PER_WORD * PIXELS_PER_STEP[-1]}; "
            f"got {p}"
        )
    return p // step


def vmap_objects(f: Callable[..., Any], *args: Any) -> Any:
    """Applies the function of one object to arrays 'b n ...'.

    Args:
      f: A function of arrays without the axes 'b n'.
      *args: Pytrees of arrays 'b n ...', where n may be 1 for an array that all objects share.

    Returns:
      The results of f with the leading axes 'b n'.
    """
    leaves, tree = jax.tree.flatten(args)
    n = max(x.shape[1] for x in leaves)
    axes = [0 if x.shape[1] == n else None for x in leaves]
    leaves = [x if axis == 0 else x[:, 0] for x, axis in zip(leaves, axes, strict=True)]

    def apply(*leaves: Any) -> Any:
        return f(*jax.tree.unflatten(tree, leaves))

    return jax.vmap(jax.vmap(apply, axes))(*leaves)


def dot(
    a: Float[Array, "_ _"], b: Float[Array, "_ _"], contract: tuple[int, int]
) -> Float32[Array, "_ _"]:
    """Multiplies two matrices, contracting one axis of each, and accumulates in float32."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def add_in_float32(x: Float[Array, "c p"], y: Float[Array, "c p"]) -> Float[Array, "c p"]:
    """Adds in float32 and rounds to the dtype of x."""
    return (x.astype(jnp.float32) + y.astype(jnp.float32)).astype(x.dtype)


def normalize(
    x: Float32[Array, "c p"], epsilon: float
) -> tuple[Float32[Array, "c p"], Float32[Array, "1 p"]]:
    """Normalizes every pixel over its channels.

    Args:
      x: Pixels.
      epsilon: Added to the variance.

    Returns:
      The normalized pixels, and the inverse of their standard deviations.
    """
    centered = x - jnp.mean(x, axis=0, keepdims=True)
    inverse_deviation = jax.lax.rsqrt(jnp.mean(centered**2, axis=0, keepdims=True) + epsilon)
    return centered * inverse_deviation, inverse_deviation


def normalize_grad(
    d_normed: Float32[Array, "c p"],
    normed: Float32[Array, "c p"],
    inverse_deviation: Float32[Array, "1 p"],
) -> Float32[Array, "c p"]:
    """Returns the gradient of the input of `normalize`, given that of its first result."""
    mean_grad = jnp.mean(d_normed, axis=0, keepdims=True)
    mean_product = jnp.mean(d_normed * normed, axis=0, keepdims=True)
    return inverse_deviation * (d_normed - mean_grad - normed * mean_product)


def full_block(x: Any) -> pl.BlockSpec:
    """Returns the block that contains the full array in every step."""
    return pl.BlockSpec(x.shape, lambda i: (0,) * x.ndim)


def pixel_block(x: Any) -> pl.BlockSpec:
    """Returns the block with the pixels of a step of an array '... p'."""
    shape = (*x.shape[:-1], pixels_per_step(x.shape[-1]))
    return pl.BlockSpec(shape, lambda i: (0,) * (x.ndim - 1) + (i,))


def struct_like(x: Any, dtype: DTypeLike | None = None) -> jax.ShapeDtypeStruct:
    """Returns the shape of an array, with its dtype or another one."""
    return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype)


def zero_on_first_step(*refs: Ref) -> None:
    """Clears the blocks that are summed over the steps."""

    @pl.when(pl.program_id(0) == 0)
    def _() -> None:
        for ref in refs:
            ref[:] = jnp.zeros_like(ref)


def pixel_kernel_cost(cycles: int) -> CostFunction:
    """Returns the cost of a kernel that processes the pixels of several objects.

    Args:
      cycles: Measured for `COST_PIXELS` pixels of 256 channels, with 15 tokens and 8 heads.

    Returns:
      The cost function. Positions, which all objects share, are read again for every object.
    """

    def cost(operands: Shapes, num_bytes: int) -> Cost:
        *objects, c, pixels = max(operands, key=lambda shape: shape[-1])  # the image
        count = math.prod(objects)
        if [c, pixels] in [list(shape) for shape in operands]:  # the positions
            num_bytes += (count - 1) * 2 * c * pixels  # in bfloat16
        return Cost(cycles=cycles * count * pixels / COST_PIXELS, bytes=num_bytes)

    return cost
