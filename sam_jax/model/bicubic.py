"""Bicubic interpolation as PyTorch and OpenCV compute it.

Source: Keys 1981, "Cubic convolution interpolation for digital image processing", with a = -0.75.

Differences: `jax.image.resize` has a = -0.5 in versions of JAX before `ResizeMethod.CUBIC_PYTORCH`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

SHARPNESS = -0.75  # Keys' a


def resize_bicubic(
    x: Float[Array | np.ndarray, "..."], axes: Sequence[int], size: Sequence[int]
) -> Float[Array, "..."]:
    """Resizes axes of an array, without a filter against aliases.

    Args:
      x: The array.
      axes: The axes to resize.
      size: The new size of each of these axes.

    Returns:
      The resized array.
    """
    for axis, new_size in zip(axes, size, strict=True):
        matrix = interpolation_matrix(x.shape[axis], new_size)
        product = jnp.tensordot(matrix, x, (1, axis), precision=jax.lax.Precision.HIGHEST)
        x = jnp.moveaxis(product, 0, axis)
    return jnp.asarray(x)


def interpolation_matrix(size: int, new_size: int) -> Float32[np.ndarray, "m n"]:
    """Returns the weight of each of n = `size` samples in each of m = `new_size` new ones.

    Samples beyond the ends are equal to the first or the last one.
    """
    centers = (np.arange(new_size) + 0.5) * size / new_size - 0.5
    taps = np.floor(centers)[:, None] + np.arange(-1, 3)
    distance = np.abs(centers[:, None] - taps)
    near = ((SHARPNESS + 2) * distance - (SHARPNESS + 3)) * distance**2 + 1
    far = SHARPNESS * (((distance - 5) * distance + 8) * distance - 4)
    matrix = np.zeros((new_size, size))
    rows, columns = np.arange(new_size)[:, None], np.clip(taps, 0, size - 1).astype(int)
    np.add.at(matrix, (rows, columns), np.where(distance <= 1, near, far))
    return matrix.astype(np.float32)
