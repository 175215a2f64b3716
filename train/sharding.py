"""How a step is spread over devices: the only file that names an axis of the mesh.

Every device takes its share of the images and goes through it alone, from the gradients of which
are added at the end: no activation ever crosses from one device to another. Large arrays of the
state lie in pieces over a row of `fsdp` devices, which gather the parameters to use them and add
their gradients piece by piece; small ones lie whole on every device.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train.config import ConfigError

DATA, FSDP = "data", "fsdp"
BATCH_SPEC = PartitionSpec((DATA, FSDP))  # the images of a batch are split over all devices
REPLICATED = PartitionSpec()
MIN_SHARD_SIZE = 2**20  # elements of the smallest array that is split
SHARE = 8  # a piece's rows are a multiple of this, as tiles of memory have them
ASYNC_ALL_GATHER_OPTIONS = {  # other work: not all generations of TPUs do so unasked
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
}


def make_mesh(batch_size: int, fsdp: int = 1, devices=None) -> Mesh:
    """A mesh of all devices, 'data fsdp'.

    One process takes as many of its devices as the batch can be divided among; several take all.

    Args:
      batch_size: images of all devices together.
      fsdp: devices over which large arrays of the state are split.
      devices: instead of those that there are.
    Raises:
      ConfigError: if the devices cannot be arranged so, or the batch not be divided among them.
    """
    devices = list(jax.devices() if devices is None else devices)
    count = len(devices)
    if len({d.process_index for d in devices}) == 1:
        counts = range(fsdp, len(devices) + 1, fsdp)
        count = max((n for n in counts if batch_size % n == 0), default=0)
    if not count or count % fsdp or batch_size % count:
        raise ConfigError(
            f"batch_size must be divisible by the number of devices and that by fsdp; got "
            f"{batch_size} images, {len(devices)} devices and fsdp={fsdp}"
        )
    shape = (count // fsdp, fsdp)
    types = (jax.sharding.AxisType.Auto,) * 2
    placed = mesh_utils.create_device_mesh(
        shape, devices[:count], allow_split_physical_axes=True
    )  # the last axis, along which most is sent, over neighbours
    return Mesh(placed, (DATA, FSDP), axis_types=types)


def infer_sharding(mesh: Mesh, state: Any) -> Any:
    """Where each array of a state lies, by its shape alone.

    Large ones are split along the first axis that leaves every device whole tiles.
    """

    def place(x):
        fsdp = mesh.shape[FSDP]
        axes = [i for i, n in enumerate(x.shape[:-1]) if n % (SHARE * fsdp) == 0]
        if fsdp == 1 or x.size < MIN_SHARD_SIZE or not axes:
            return NamedSharding(mesh, REPLICATED)
        return NamedSharding(mesh, PartitionSpec(*[None] * axes[0], FSDP))

    return jax.tree.map(place, state)


def init_sharded(mesh: Mesh, make: Callable, *args: Any) -> Any:
    """What `make` returns for arrays in the host's memory, each result made where it is to lie."""
    args = jax.tree.map(np.asarray, args)
    layout = infer_sharding(mesh, jax.eval_shape(make, *args))
    return jax.jit(make, out_shardings=layout)(*args)


def shard_batch(mesh: Mesh, batch: Any) -> Any:
    """Makes this host's rows 'b ...' of a batch part of all hosts' rows, each on its device."""
    sharding = NamedSharding(mesh, BATCH_SPEC)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def process_allgather(mesh: Mesh, tree: Any) -> Any:
    """All of a tree's arrays, whole, in the memory of every host."""
    whole = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, REPLICATED))(tree)
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), whole)


def sync_hosts(what: str) -> None:
    """Waits until every host has come to this place."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def compile_step(mesh: Mesh, step: Callable, state: Any) -> Callable:
    """Compiles f(state, batch) -> (state, values); the state stays where it lies, and is donated.

    Args:
      state: arrays, or their shapes.
    """
    layout = infer_sharding(mesh, state)
    whole, images = NamedSharding(mesh, REPLICATED), NamedSharding(mesh, BATCH_SPEC)
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    return jax.jit(
        step,
        in_shardings=(layout, images),
        out_shardings=(layout, whole),
        donate_argnums=0,
        compiler_options=ASYNC_ALL_GATHER_OPTIONS if on_tpu else None,
    )


def make_sharded_grad_fn(mesh: Mesh, objective: Callable, params: Any, dtype: Any = jnp.float32):
    """Builds the gradients of an objective of a batch that is split over the devices.

    Args:
      mesh: `make_mesh`'s.
      objective: f(params, constants, batch, key) -> (loss, values), means over the valid masks of
        the batch.
      params: arrays, or their shapes.
      dtype: in which the pieces of parameters and gradients travel.
    Returns:
      f of the same arguments -> ((loss, values), gradients), of the whole batch; the gradients lie
      as the parameters do.
    """
    specs = jax.tree.map(lambda x: x.spec, infer_sharding(mesh, params))

    def gather_piece(spec, x):
        if FSDP not in spec:
            return x
        return jax.lax.all_gather(x.astype(dtype), FSDP, axis=spec.index(FSDP), tiled=True)

    def add(spec, x):
        return jax.lax.psum(x, DATA if FSDP in spec else (DATA, FSDP))

    def of_share(params, constants, batch, key):
        masks = jnp.sum(batch.valid)
        share = masks / jnp.maximum(1, jax.lax.psum(masks, (DATA, FSDP)))

        def weighted(params):
            with jax.named_scope("gather"):
                params = jax.tree.map(gather_piece, specs, params, is_leaf=is_spec)
            loss, values = objective(params, constants, batch, key)
            return loss * share, (loss, values)

        gradients, means = jax.grad(weighted, has_aux=True)(params)
        means = jax.tree.map(lambda x: jax.lax.psum(x * share, (DATA, FSDP)), means)
        with jax.named_scope("add_gradients"):
            return means, jax.tree.map(add, specs, gradients, is_leaf=is_spec)

    return jax.shard_map(
        of_share,
        mesh=mesh,
        in_specs=(specs, REPLICATED, BATCH_SPEC, REPLICATED),
        out_specs=(REPLICATED, specs),
        check_vma=False,
    )


def is_spec(x: Any) -> bool:
    """Whether it is a leaf of a tree of specs, which JAX might take for a tuple."""
    return isinstance(x, PartitionSpec)
