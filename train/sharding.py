"""How a step is spread over devices: each takes its share of the images, all hold all parameters.

The only file that names an axis of the mesh.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

DATA = "data"


def make_mesh(batch_size: int) -> Mesh:
    """As many of the devices as the batch can be divided among, in a row."""
    devices = jax.devices()
    count = max(n for n in range(1, len(devices) + 1) if batch_size % n == 0)
    types = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((count,), (DATA,), axis_types=types, devices=devices[:count])


def replicate(mesh: Mesh, tree):
    """Puts arrays on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def split_batch(mesh: Mesh, batch):
    """Puts arrays 'b ...' on the devices, each with its share of the images."""
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec(DATA)))


def gradients_over(mesh: Mesh, objective):
    """Builds the gradients of an objective of a batch that is split over the devices.

    Every device goes through its own images alone, and the gradients are added once, at the end.

    Args:
      mesh: `make_mesh`'s.
      objective: f(params, constants, batch, key) -> (loss, values), means over the valid masks of
        the batch.
    Returns:
      f of the same arguments -> ((loss, values), gradients), of the whole batch and on all devices.
    """

    def of_share(params, constants, batch, key):
        means = jax.value_and_grad(objective, has_aux=True)(params, constants, batch, key)
        masks = jnp.sum(batch.valid)
        share = masks / jnp.maximum(1, jax.lax.psum(masks, DATA))
        return jax.lax.psum(jax.tree.map(lambda x: x * share, means), DATA)

    same, shared = PartitionSpec(), PartitionSpec(DATA)
    return jax.shard_map(
        of_share, mesh=mesh, in_specs=(same, same, shared, same), out_specs=same, check_vma=False
    )
