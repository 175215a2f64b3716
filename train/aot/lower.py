"""Programs lowered for TPUs that are not here, compiled, and what the compiler says of them."""

import functools
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from sam_jax.model.image_encoder import Block
from sam_jax.model.init import init_variables
from sam_jax.model.ops.platform import traced_for
from sam_jax.model.prompt_encoder import Prompts
from train.aot.hlo_cost import CHIPS, GIB, Chip, model_program
from train.config import ConfigError, TrainConfig, is_reconstruction
from train.flops import block_flops, decoder_flops, encoder_flops
from train.optimizer import make_optimizer
from train.sharding import make_mesh
from train.state import init_state
from train.step import make_step
from train.tasks.base import task_of

PHASES = {  # patterns of scopes
    "gather": r"\bgather\b",
    "encoder": r"\bencoder\b|\bBlock\b|\bMaskedAutoencoder\.encode\b",
    "decoder": r"\bMaskedAutoencoder\.decode\b",
    "rounds": r"\brounds\b",
    "add_gradients": r"\badd_gradients\b",
    "optimizer": r"\boptimizer\b",
}
PROMPT_TOKENS = 7  # of a prompt that is decoded: two of the first, five clicks


def devices_of(topology: str) -> tuple[list, Chip]:
    """The devices of a named topology, and what one of its chips can do.

    Raises:
      ConfigError: if the compiler is missing, or does not know the name.
    """
    kind = topology.split(":")[0]
    if kind not in CHIPS or ":" not in topology:
        raise ConfigError(
            f"--topology must be CHIP:SHAPE, e.g. v5e:16x16, of {', '.join(CHIPS)}; got {topology}"
        )
    megacore = {"chip_config_name": "megacore"} if kind == "v4" else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **megacore)
    except Exception as error:  # of many kinds, by what is missing
        raise ConfigError(
            f"no TPU compiler for --topology {topology}: {str(error).splitlines()[0]}. It comes "
            "with the extra: pip install 'sam_jax[tpu,train]'"
        ) from error
    return list(found.devices), CHIPS[kind]


def lower_step(config: TrainConfig, devices: list):
    """The training step, before it is compiled; and what of it one device does, in FLOPs."""
    mesh = make_mesh(config.batch_size, config.fsdp, devices)
    task = task_of(config)
    optimizer = make_optimizer(config.optimizer, task.encoder_depth, config.trainable)
    state = jax.eval_shape(lambda: init_state(task.initialize(), optimizer))
    step = make_step(task.objective, optimizer, config.seed, mesh, state, config.model.dtype)
    images = config.batch_size / mesh.devices.size
    return step.lower(state, task.batch_like()), images * (task.flops or 0)


def lower_encode(config: TrainConfig, devices: list):
    """The encoding of a device's share of a batch."""
    images = max(1, config.batch_size // len(devices))
    variables = jax.eval_shape(functools.partial(init_variables, config.model, 0))
    image = jax.ShapeDtypeStruct((images, *config.model.image_size, 3), jnp.float32)
    encode = functools.partial(config.model.apply, method="encode")
    return on_one(devices, encode, variables, image), images * encoder_flops(config.model)


def lower_decode(config: TrainConfig, devices: list):
    """The decoding of an image's masks from clicks and an earlier prediction."""
    model, n = config.model, config.objective.masks_per_image
    gh, gw = (side // model.patch_size for side in model.image_size)
    like = jax.ShapeDtypeStruct
    prompts = Prompts(
        points=like((1, n, PROMPT_TOKENS, 2), jnp.float32),
        labels=like((1, n, PROMPT_TOKENS), jnp.int32),
        mask=like((1, n, 4 * gh, 4 * gw), jnp.float32),
        has_mask=like((1, n), bool),
    )
    variables = jax.eval_shape(functools.partial(init_variables, model, 0))
    embedding = like((1, gh, gw, model.embedding_dim), jnp.float32)
    decode = functools.partial(model.apply, method="decode")
    flops = n * decoder_flops(model, PROMPT_TOKENS)
    return on_one(devices, decode, variables, embedding, prompts), flops


def lower_block(config: TrainConfig, devices: list):
    """The first block of the image encoder, which attends in windows, of an image."""
    model = config.model
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
    return on_one(devices, block.apply, variables, x), block_flops(model, in_windows=True)


def on_one(devices: list, f, *args):
    """F lowered for the first device alone."""
    sharding = jax.sharding.SingleDeviceSharding(devices[0])
    return jax.jit(f, in_shardings=sharding, out_shardings=sharding).lower(*args)


LOWER = {"step": lower_step, "encode": lower_encode, "decode": lower_decode, "block": lower_block}


def analyse(config: TrainConfig, topology: str, what: str = "step") -> dict[str, Any]:
    """Compiles, and reads what the compiler says, of one device: see the README."""
    if what != "step" and is_reconstruction(config):
        raise ConfigError(f"--what must be step for a masked autoencoder; got {what}")
    devices, chip = devices_of(topology)
    with traced_for("tpu"):
        lowered, flops = LOWER[what](config, devices)
    began = time.perf_counter()
    report = {
        "topology": topology,
        "what": what,
        "chips": len(devices),
        "hosts": len({d.process_index for d in devices}),
        "hbm_bytes": int(chip.hbm),
        "reference_flops": flops,
    }
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).split("RESOURCE_EXHAUSTED: ")[-1].splitlines()[0]
        used = re.search(r"Used ([\d.]+)G of ([\d.]+)G hbm", str(error))
        peak = int(float(used[1]) * GIB) if used else None
        return report | {"fits": False, "reason": reason, "peak_hbm_bytes": peak}
    seconds = time.perf_counter() - began
    text = compiled.as_text()
    modelled = model_program(text, chip, PHASES)
    kernels = sum(modelled.kernel_seconds.values())
    total = sum(modelled.seconds.values()) + kernels
    return report | {
        "fits": True,
        "peak_hbm_bytes": compiled.memory_analysis().peak_memory_in_bytes,
        "modelled_seconds": total,
        "of_which_bounded": kernels,
        "phases": {
            name: modelled.seconds.get(name, 0.0) + modelled.kernel_seconds.get(name, 0.0)
            for name in (*PHASES, "other")
        },
        "unbounded": modelled.unbounded,
        "modelled_mfu": flops / total / chip.flops,
        "collectives": modelled.collectives,
        "compile_seconds": seconds,
    }
