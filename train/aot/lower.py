"""Programs lowered and compiled for absent TPUs, and reports of their cost."""

import functools
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.stages import Lowered

from sam_jax.io.extras import install_hint
from sam_jax.model.image_encoder import Block
from sam_jax.model.init import init_variables
from sam_jax.model.ops.platform import traced_for
from sam_jax.model.prompt_encoder import Prompts
from sam_jax.model.sam import Sam
from train.aot.chips import CHIPS, GIB, Chip
from train.aot.hlo_cost import estimate_cost
from train.config import ConfigError, Interactive, TrainConfig
from train.flops import block_flops, decoder_flops, encoder_flops
from train.optimizer import make_optimizer
from train.sharding import make_mesh
from train.state import init_state
from train.step import make_step
from train.tasks.base import make_task

# Phases of a program, and patterns of the scopes that belong to them.
PHASES = {
    "gather": r"\bgather\b",
    "encoder": r"\bencoder\b|\bBlock\b|\bMaskedAutoencoder\.encode\b",
    "decoder": r"\bMaskedAutoencoder\.decode\b",
    "rounds": r"\brounds\b",
    "add_gradients": r"\badd_gradients\b",
    "optimizer": r"\boptimizer\b",
}
PROMPT_TOKENS = 7  # of a decoded prompt: two of the first prompt and five clicks


def devices_of(topology: str) -> tuple[list[jax.Device], Chip]:
    """Returns the devices of a named topology, and the facts about one of its chips.

    Args:
      topology: A chip and the shape of the pod, e.g. "v5e:16x16".

    Returns:
      The devices and the chip.

    Raises:
      ConfigError: If the compiler is missing or does not know the name.
    """
    kind = topology.split(":")[0]
    if kind not in CHIPS or ":" not in topology:
        raise ConfigError(
            f"--topology must be CHIP:SHAPE, e.g. v5e:16x16, of {', '.join(CHIPS)}; got {topology}"
        )
    megacore = {"chip_config_name": "megacore"} if kind == "v4" else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **megacore)
    except Exception as error:  # the type depends on what is missing
        raise ConfigError(
            f"no TPU compiler for --topology {topology}: {str(error).splitlines()[0]}; "
            f"{install_hint('tpu,train')}"
        ) from error
    return list(found.devices), CHIPS[kind]


def lower_step(config: TrainConfig, devices: list[jax.Device]) -> tuple[Lowered, float]:
    """Lowers the training step.

    Args:
      config: The config of the run.
      devices: Devices of the mesh.

    Returns:
      The program, and the ideal FLOPs of one device.
    """
    mesh = make_mesh(config.batch_size, config.fsdp, devices)
    task = make_task(config)
    optimizer = make_optimizer(config.optimizer, task.encoder_depth, config.trainable)
    state = jax.eval_shape(lambda: init_state(task.init_fn(), optimizer))
    step = make_step(
        task.objective,
        optimizer,
        config.seed,
        mesh,
        state,
        config.model.dtype,
        config.trainable,
    )
    images = config.batch_size / mesh.devices.size
    return step.lower(state, task.batch_spec()), images * (task.flops or 0)


def lower_encode(config: TrainConfig, devices: list[jax.Device]) -> tuple[Lowered, float]:
    """Lowers the encoding of one device's share of a batch; returns as `lower_step`."""
    model, _ = sam_of(config, "encode")
    images = max(1, config.batch_size // len(devices))
    variables = jax.eval_shape(functools.partial(init_variables, model, 0))
    image = jax.ShapeDtypeStruct((images, *model.image_size, 3), jnp.float32)
    encode = functools.partial(model.apply, method="encode")
    return lower_on_first(devices, encode, variables, image), images * encoder_flops(model)


def lower_decode(config: TrainConfig, devices: list[jax.Device]) -> tuple[Lowered, float]:
    """Lowers the decoding of clicks and mask prompts on one image; returns as `lower_step`."""
    model, objective = sam_of(config, "decode")
    n = objective.masks_per_image
    prompts = jax.eval_shape(
        lambda: Prompts(
            points=jnp.zeros((1, n, PROMPT_TOKENS, 2)),
            labels=jnp.zeros((1, n, PROMPT_TOKENS), jnp.int32),
            mask=jnp.zeros((1, n, *model.low_res)),
            has_mask=jnp.zeros((1, n), bool),
        )
    )
    variables = jax.eval_shape(functools.partial(init_variables, model, 0))
    embedding = jax.ShapeDtypeStruct((1, *model.grid, model.embedding_dim), jnp.float32)
    decode = functools.partial(model.apply, method="decode")
    flops = n * decoder_flops(model, PROMPT_TOKENS)
    return lower_on_first(devices, decode, variables, embedding, prompts), flops


def lower_block(config: TrainConfig, devices: list[jax.Device]) -> tuple[Lowered, float]:
    """Lowers a windowed block of the image encoder on one image; returns as `lower_step`."""
    model, _ = sam_of(config, "block")
    encoder = model.image_encoder
    block = Block(
        num_heads=encoder.num_heads,
        table_size=(encoder.window_size,) * 2,
        window=encoder.window_size,
        mlp_dim=encoder.mlp_ratio * encoder.embed_dim,
        dtype=encoder.dtype,
    )
    x = jax.ShapeDtypeStruct((1, *model.grid, encoder.embed_dim), jnp.dtype(encoder.dtype))
    variables = jax.eval_shape(block.init, jax.random.key(0), x)
    return lower_on_first(devices, block.apply, variables, x), block_flops(model, in_windows=True)


def sam_of(config: TrainConfig, what: str) -> tuple[Sam, Interactive]:
    """Returns the model and the objective of a config that trains a SAM.

    Args:
      config: The config of the run.
      what: The program to lower, for the error message.

    Returns:
      The model and the objective.

    Raises:
      ConfigError: If it trains a masked autoencoder.
    """
    if not isinstance(config.model, Sam) or not isinstance(config.objective, Interactive):
        raise ConfigError(f"--what must be step for a masked autoencoder; got {what}")
    return config.model, config.objective


def lower_on_first(devices: list[jax.Device], f: Callable, *args: Any) -> Lowered:
    """Lowers a function of shapes for the first device alone."""
    sharding = jax.sharding.SingleDeviceSharding(devices[0])
    return jax.jit(f, in_shardings=sharding, out_shardings=sharding).lower(*args)


LOWER = {"step": lower_step, "encode": lower_encode, "decode": lower_decode, "block": lower_block}


def compile_report(config: TrainConfig, topology: str, what: str = "step") -> dict[str, Any]:
    """Compiles a program for a topology, and reports memory and estimated time of one device.

    Args:
      config: The config of the run.
      topology: A name, as in `devices_of`.
      what: A key of `LOWER`.

    Returns:
      Values by name, which JSON can express:
      - topology, what: The arguments.
      - chips, hosts: Their numbers.
      - hbm_bytes: The memory of a chip.
      - reference_flops: The FLOPs of the program by the reference's operation count.
      - fits: Whether the program fits into the memory of a chip.
      - peak_hbm_bytes: The memory that it needs; None if that is unknown.
      - reason: The compiler's message, if the program does not fit. The values below are missing
        then.
      - estimated_seconds: The time of one call, kernels included.
      - kernel_seconds_bound: A lower bound of the time of the kernels.
      - phases: The time by phase.
      - unmodeled_kernels: Kernels without a known cost, whose time is missing.
      - estimated_mfu: The reference's FLOPs over those that the chips could do in this time.
      - collectives: The collectives by kind.
      - compile_seconds: The time that the compilation took.

    Raises:
      ConfigError: If the compiler is missing, or the config has no such program.
    """
    devices, chip = devices_of(topology)
    with traced_for("tpu"):
        lowered, flops = LOWER[what](config, devices)
    start = time.perf_counter()
    report = {
        "topology": topology,
        "what": what,
        "chips": len(devices),
        "hosts": len({d.process_index for d in devices}),
        "hbm_bytes": chip.hbm_bytes,
        "reference_flops": flops,
    }
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return report | out_of_memory_report(str(error))
    seconds = time.perf_counter() - start
    text, memory = compiled.as_text(), compiled.memory_analysis()
    if text is None or memory is None:
        raise RuntimeError("the compiler reports neither the program nor its memory")
    cost = estimate_cost(text, chip, PHASES)
    return report | {
        "fits": True,
        "peak_hbm_bytes": memory.peak_memory_in_bytes,
        "estimated_seconds": cost.total_seconds,
        "kernel_seconds_bound": cost.total_kernel_seconds_bound,
        "phases": {
            name: cost.seconds.get(name, 0.0) + cost.kernel_seconds_bound.get(name, 0.0)
            for name in (*PHASES, "other")
        },
        "unmodeled_kernels": cost.unmodeled_kernels,
        "estimated_mfu": flops / cost.total_seconds / chip.peak_flops,
        "collectives": cost.collectives,
        "compile_seconds": seconds,
    }


def out_of_memory_report(message: str) -> dict[str, Any]:
    """Returns the reason and the needed memory from the compiler's error message."""
    reason = message.split("RESOURCE_EXHAUSTED: ")[-1].splitlines()[0]
    used = re.search(r"Used ([\d.]+)G of ([\d.]+)G hbm", message)
    peak = int(float(used[1]) * GIB) if used else None
    return {"fits": False, "reason": reason, "peak_hbm_bytes": peak}
