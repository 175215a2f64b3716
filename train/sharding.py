"""Shards the training step over devices; the only file that names the axes of the mesh.

Each device processes its shard of the batch independently, and gradients are all-reduced at the
end, so that no activation crosses from one device to another. Large arrays of the state are
sharded over the `fsdp` axis: parameters are all-gathered before they are used, and their gradients
are reduce-scattered. Small arrays are replicated.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from train.config import ConfigError
from train.objectives.sums import Sums

Objective = Callable[..., Sums]  # a function of (params, constants, batch, key)
CompiledStep = jax.stages.Wrapped  # a function of (state, batch), which can also be lowered

DATA, FSDP = "data", "fsdp"
BATCH_SPEC = PartitionSpec((DATA, FSDP))  # the images of a batch are split over all devices
REPLICATED = PartitionSpec()
# Elements of the smallest array that is sharded. Below some 4 MB, the latency of a collective costs
# more than the memory that sharding would save.
MIN_SHARD_SIZE = 2**20
ROW_MULTIPLE = 8  # a shard has a multiple of this many rows, which TPUs tile memory by
# XLA options that overlap all-gathers with computation, which some TPUs do not do by default.
ASYNC_ALL_GATHER_OPTIONS = {
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
}


def make_mesh(batch_size: int, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a mesh of devices with the axes (data, fsdp).

    A single process uses as many of its devices as divide the batch. Several processes use all of
    their devices.

    Args:
      batch_size: Images of all devices together.
      fsdp: The number of devices over which large arrays of the state are sharded.
      devices: The devices; by default all that there are.

    Returns:
      The mesh.

    Raises:
      ConfigError: If fsdp does not divide the number of devices, or that the batch size.
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
    # The last axis of a mesh is laid out over neighboring devices. Most data is sent along `fsdp`.
    arranged = mesh_utils.create_device_mesh(
        (count // fsdp, fsdp), devices[:count], allow_split_physical_axes=True
    )
    return Mesh(arranged, (DATA, FSDP), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def infer_sharding(mesh: Mesh, state: Any) -> Any:
    """Infers the sharding of each array of a state from its shape.

    Large arrays are split along the first axis, other than the last, that leaves each device a
    multiple of ROW_MULTIPLE rows. Other arrays are replicated.

    Args:
      mesh: The devices.
      state: A tree of arrays or of their shapes.

    Returns:
      A tree of `NamedSharding`.
    """

    def infer(x: Any) -> NamedSharding:
        fsdp = mesh.shape[FSDP]
        axes = [i for i, n in enumerate(x.shape[:-1]) if n % (ROW_MULTIPLE * fsdp) == 0]
        if fsdp == 1 or x.size < MIN_SHARD_SIZE or not axes:
            return NamedSharding(mesh, REPLICATED)
        return NamedSharding(mesh, PartitionSpec(*[None] * axes[0], FSDP))

    return jax.tree.map(infer, state)


def init_sharded(mesh: Mesh, init_fn: Callable[..., Any], *args: Any) -> Any:
    """Runs `init_fn` under jit with `out_shardings`, so that arrays are created on their devices.

    Args:
      mesh: The devices.
      init_fn: A function of `args` that returns a tree of arrays.
      *args: Trees of arrays in the host's memory.

    Returns:
      The result of `init_fn`, sharded as `infer_sharding` says.
    """
    args = jax.tree.map(np.asarray, args)
    sharding = infer_sharding(mesh, jax.eval_shape(init_fn, *args))
    return jax.jit(init_fn, out_shardings=sharding)(*args)


def shard_batch(mesh: Mesh, batch: Any) -> Any:
    """Moves this host's rows 'b ...' of a batch to its devices, as part of the global batch."""
    sharding = NamedSharding(mesh, BATCH_SPEC)
    # For JAX this transfer is explicit on one host, but not on several.
    with jax.transfer_guard("allow"):
        return jax.make_array_from_process_local_data(sharding, batch)


def process_allgather(mesh: Mesh, tree: Any) -> Any:
    """Copies all shards of a tree's arrays to the memory of every host, as numpy arrays."""
    replicated = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, REPLICATED))(tree)
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), replicated)


def broadcast_from_lead_host(value: int) -> int:
    """Waits until every host has called this function, and returns the value of the lead host."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def max_over_hosts(value: int) -> int:
    """Returns the largest of the values with which all hosts call this function together."""
    if jax.process_count() == 1:
        return value
    return int(np.max(multihost_utils.process_allgather(np.int32(value))))


def compile_step(mesh: Mesh, step: Callable[..., Any], state: Any) -> CompiledStep:
    """Compiles a step f(state, batch) -> (state, values); the state is donated.

    Args:
      mesh: The devices.
      step: The function.
      state: The state, or its shapes. It keeps its sharding.

    Returns:
      The compiled function.
    """
    state_sharding = infer_sharding(mesh, state)
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    return jax.jit(
        step,
        in_shardings=(state_sharding, NamedSharding(mesh, BATCH_SPEC)),
        out_shardings=(state_sharding, NamedSharding(mesh, REPLICATED)),
        donate_argnums=0,
        compiler_options=ASYNC_ALL_GATHER_OPTIONS if on_tpu else None,
    )


def make_sharded_grad_fn(
    mesh: Mesh, objective: Objective, params: Any, dtype: DTypeLike = jnp.float32
) -> Callable[..., tuple[tuple[jax.Array, dict[str, Any]], Any]]:
    """Builds the gradient of an objective for a batch that is sharded over the devices.

    The objective runs under `shard_map`, so that XLA cannot choose to communicate activations. It
    returns sums; the loss is their total over all devices, divided by the total count.

    Args:
      mesh: The devices.
      objective: The objective.
      params: The parameters, or their shapes.
      dtype: The dtype of all-gathered parameters and reduce-scattered gradients (FSDP only).

    Returns:
      A function of (params, constants, batch, key) that returns ((loss, values), gradients) of the
      global batch. The gradients are sharded like the parameters.
    """
    specs = jax.tree.map(lambda x: x.spec, infer_sharding(mesh, params))

    def all_gather(spec: PartitionSpec, x: jax.Array) -> jax.Array:
        if FSDP not in spec:
            return x
        # Its transpose, in the backward pass, reduce-scatters the gradient.
        return jax.lax.all_gather(x.astype(dtype), FSDP, axis=spec.index(FSDP), tiled=True)

    def all_reduce(spec: PartitionSpec, x: jax.Array) -> jax.Array:
        return jax.lax.psum(x, DATA if FSDP in spec else (DATA, FSDP))

    def shard_grad(params: Any, constants: Any, batch: Any, key: jax.Array) -> Any:
        def loss_share(params: Any) -> tuple[jax.Array, Any]:
            with jax.named_scope("gather"):
                params = jax.tree.map(all_gather, specs, params, is_leaf=is_spec)
            sums = objective(params, constants, batch, key)
            count = jnp.maximum(1, jax.lax.psum(sums.count, (DATA, FSDP)))
            share = sums.loss / count
            return share, (share, jax.tree.map(lambda x: x / count, sums.values))

        gradients, shares = jax.grad(loss_share, has_aux=True)(params)
        means = jax.tree.map(lambda x: jax.lax.psum(x, (DATA, FSDP)), shares)
        with jax.named_scope("add_gradients"):
            return means, jax.tree.map(all_reduce, specs, gradients, is_leaf=is_spec)

    return jax.shard_map(
        shard_grad,
        mesh=mesh,
        in_specs=(specs, REPLICATED, BATCH_SPEC, REPLICATED),
        out_specs=(REPLICATED, specs),
        check_vma=False,
    )


def is_spec(x: Any) -> bool:
    """Returns True for a `PartitionSpec`, which `jax.tree` may treat as a tuple."""
    return isinstance(x, PartitionSpec)
