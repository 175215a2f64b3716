"""Checksums of arrays: the same on every mesh, and changed by every change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train.checksum import checksums

RNG = np.random.default_rng(0)
TREE = {
    "float32": RNG.standard_normal((16, 24), np.float32),
    "bfloat16": jnp.asarray(RNG.standard_normal((8, 3, 5)), jnp.bfloat16),
    "int32": np.int32(7),
    "uint8": RNG.integers(0, 256, 2000, np.uint8),
    "bool": RNG.random(9) < 0.5,
    "empty": np.zeros((0, 4), np.float32),
    "large": RNG.standard_normal((1024, 1032), np.float32),
}
MESHES = ((8, 1), (4, 2), (2, 2), (1, 1))


def mesh_of(shape):
    devices = np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape)
    return Mesh(devices, ("data", "fsdp"))


def on(shape, tree):
    """Places arrays on a mesh, sharded where an axis is divisible."""
    mesh = mesh_of(shape)

    def place(x):
        x = jnp.asarray(x)
        spec = ["fsdp" if n % 2 == 0 and n else None for n in x.shape[:1]]
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    return mesh, jax.tree.map(place, tree) | {"key": jax.random.key(3)}


@pytest.fixture(scope="module")
def expected():
    return checksums(*on((1, 1), TREE))


def test_the_checksums_are_the_same_on_every_mesh(expected):
    assert len(set(expected)) == len(TREE) + 1
    for shape in MESHES[:-1]:
        assert checksums(*on(shape, TREE)) == expected


def test_an_independent_formula(expected):
    """In Python's integers, for the array of the first small and the one large type."""

    def mix(x):
        x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
        x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
        return x ^ (x >> 16)

    paths = sorted([*TREE, "key"])
    for name, dtype in (("float32", np.uint32), ("uint8", np.uint8), ("bfloat16", np.uint16)):
        bits = np.asarray(TREE[name]).view(dtype).ravel().tolist()
        hashes = [mix(x ^ mix(i)) for i, x in enumerate(bits)]
        sums = [sum(hashes), sum(mix((h + 0x9E3779B9) % 2**32) for h in hashes)]
        assert expected[paths.index(name)] == "".join(f"{s % 2**32:08x}" for s in sums)


def test_every_changed_bit_changes_the_checksum(expected):
    """Also two changes of the highest bit, which cancel in weighted sums of the elements."""
    mesh = mesh_of((1, 1))
    for name in ("float32", "bfloat16", "large", "uint8"):
        original = np.asarray(TREE[name])
        before = checksums(mesh, [jnp.asarray(original)])
        for bits in [(bit,) for bit in RNG.integers(0, original.nbytes * 8, 12)] + [(31, 127)]:
            changed = np.frombuffer(original.tobytes(), np.uint8).copy()
            for bit in bits:
                changed[bit // 8] ^= 1 << bit % 8
            changed = changed.view(original.dtype).reshape(original.shape)
            assert checksums(mesh, [jnp.asarray(changed)]) != before


def test_the_order_of_elements_matters():
    mesh = mesh_of((1, 1))
    assert checksums(mesh, [jnp.arange(4.0)]) != checksums(mesh, [jnp.arange(4.0)[::-1]])
