"""Checksums of arrays, which do not depend on how the arrays are sharded.

Each element is hashed together with its position in the array, and the hashes are added. The sum of
integers does not depend on the order of its terms, so it is the same on any number of devices. For
a given position, the hash is a one-to-one function of the element's bits. A change of a single
element therefore always changes the sum. Other changes escape notice with a probability of 2^-64.

Source: the finalizer of MurmurHash3 (fmix32).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Shaped, UInt32

from train.sharding import MIN_SHARD_SIZE, REPLICATED

ROW = 1024  # elements


def checksums(mesh: Mesh, tree: Any) -> list[str]:
    """Computes the checksum of each array of a tree.

    Args:
      mesh: The devices of the arrays.
      tree: The arrays, which may hold booleans, numbers or random keys.

    Returns:
      16 hexadecimal digits for each array, in the order of the leaves.
    """
    leaves = jax.tree.leaves(tree)
    of_small, of_large = _compile(mesh)
    # A program with a kernel for each array of a model would take minutes to compile. Small arrays,
    # which are never sharded, have one kernel, and large arrays have one for each shape.
    small = [i for i, x in enumerate(leaves) if x.size < MIN_SHARD_SIZE]
    sums: dict[int, Any] = {i: of_large(x) for i, x in enumerate(leaves) if i not in small}
    if small:
        sums |= zip(small, jax.device_get(of_small([leaves[i] for i in small])), strict=True)
    return [f"{a:08x}{b:08x}" for a, b in (jax.device_get(sums[i]) for i in range(len(leaves)))]


@functools.cache
def _compile(mesh: Mesh) -> tuple[Callable[..., Any], Callable[..., Any]]:
    replicated = NamedSharding(mesh, REPLICATED)
    return (
        jax.jit(_checksums_of_small, out_shardings=replicated),
        jax.jit(_checksum_of_large, out_shardings=replicated),
    )


def _checksum_of_large(x: Shaped[Array, "..."]) -> UInt32[Array, "2"]:
    """Returns the sums of an array, which keeps its shape and so its sharding."""
    bits = _bits(x)
    positions = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):  # row-major order, modulo 2^32
        stride = math.prod(bits.shape[axis + 1 :]) % 2**32
        index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        positions += index * jnp.uint32(stride)
    return jnp.stack([jnp.sum(h, dtype=jnp.uint32) for h in _hashes(bits, positions)])


def _checksums_of_small(arrays: list[Shaped[Array, "..."]]) -> UInt32[Array, "arrays 2"]:
    """Returns the same sums of many arrays, whose elements are put into rows of one array."""
    bits = [_bits(x).reshape(-1) for x in arrays]
    counts = np.array([-(-x.size // ROW) for x in bits])  # rows
    array = np.repeat(np.arange(len(arrays)), counts)
    first = ROW * (np.arange(len(array)) - np.repeat(np.cumsum(counts) - counts, counts))
    size = np.array([x.size for x in bits])[array]
    rows = jnp.concatenate([jnp.pad(x, (0, -x.size % ROW)) for x in bits]).reshape(-1, ROW)
    positions = first[:, None].astype(np.uint32) + jnp.arange(ROW, dtype=jnp.uint32)
    is_element = positions < size[:, None].astype(np.uint32)
    sums = [
        jnp.sum(jnp.where(is_element, h, 0), axis=1, dtype=jnp.uint32)
        for h in _hashes(rows, positions)
    ]
    return jax.ops.segment_sum(jnp.stack(sums, axis=1), array, len(arrays))


def _hashes(
    bits: UInt32[Array, "*shape"], positions: UInt32[Array, "*shape"]
) -> tuple[UInt32[Array, "*shape"], UInt32[Array, "*shape"]]:
    """Returns two hashes of each element, to make it less likely that changes compensate."""
    hashes = _mix(bits ^ _mix(positions))
    return hashes, _mix(hashes + jnp.uint32(0x9E3779B9))


def _bits(x: Shaped[Array, "..."]) -> UInt32[Array, "..."]:
    """Returns the bits of each element. Those of 8 bytes become two, along a new last axis."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _mix(x: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Returns a hash of each element, which is a one-to-one function of the element."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
