"""python -m train.compile configs/X.py --topology v5e:16x16 [--what step|encode|decode] [--json]

Compiles for a TPU pod that is not here, and says whether it fits, and what the compiler expects of
it. Needs the extra [tpu], and no TPU.
"""

import os

if __name__ == "__main__":  # before JAX is imported
    os.environ |= {
        "JAX_PLATFORMS": "cpu",  # of arrays; the compiler needs no device
        "TPU_SKIP_MDS_QUERY": "1",  # or it asks the network what machine this is
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # or one process at a time could compile
        "TPU_STDERR_LOG_LEVEL": "3",  # it also says at length that it is not on a TPU
        "TPU_MIN_LOG_LEVEL": "3",
    }

import argparse
import dataclasses
import functools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from sam_jax.data.example import SourceError
from sam_jax.data.loader import Batch, Loader
from sam_jax.data.source import open_source
from sam_jax.model.image_encoder import Block
from sam_jax.model.platform import traced_for
from sam_jax.model.prompt_encoder import Prompts
from sam_jax.model.sam import Sam
from sam_jax.weights.convert import initialize
from train.config import ConfigError, TrainConfig, load_config, override
from train.flops import block_flops, decoder_flops, encoder_flops, step_flops
from train.interactive import make_interactive
from train.modelled import CHIPS, GIB, Chip, model_program
from train.optimizer import make_optimizer
from train.sharding import make_mesh
from train.state import init_state
from train.step import make_step

PHASES = {  # patterns of scopes
    "gather": r"\bgather\b",
    "encoder": r"\bencoder\b|\bBlock\b",
    "rounds": r"\brounds\b",
    "add_gradients": r"\badd_gradients\b",
    "optimizer": r"\boptimizer\b",
}
FSDP = (1, 8, 16)  # that a sweep tries
MOST_IMAGES = 16  # a chip, likewise
NEGLIGIBLE = 1e-3  # of the time; phases of less are not printed
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


def batch_like(config: TrainConfig) -> Batch:
    """The shapes of a batch."""
    b, n = config.batch_size, config.objective.masks_per_image
    h, w = config.model.image_size
    like = jax.ShapeDtypeStruct
    return Batch(
        image=like((b, h, w, 3), jnp.uint8),
        size=like((b, 2), jnp.int32),
        image_id=like((b,), jnp.int32),
        masks=like((b, n, h, -(-w // 8)), jnp.uint8),
        mask_id=like((b, n), jnp.int32),
        valid=like((b, n), bool),
    )


def lower_step(config: TrainConfig, devices: list):
    """The training step, before it is compiled; and what of it one device does, in FLOPs."""
    mesh = make_mesh(config.batch_size, config.fsdp, devices)
    optimizer = make_optimizer(config.optimizer, config.model.depth, config.train_only)
    variables = jax.eval_shape(functools.partial(initialize, config.model, 0))
    state = jax.eval_shape(lambda v: init_state(v, optimizer), variables)
    objective = make_interactive(config.model, config.objective)
    step = make_step(objective, optimizer, config.seed, mesh, state, config.model.dtype)
    images = config.batch_size / mesh.devices.size
    return step.lower(state, batch_like(config)), images * step_flops(
        config.model, config.objective
    )


def lower_encode(config: TrainConfig, devices: list):
    """The encoding of a device's share of a batch."""
    images = max(1, config.batch_size // len(devices))
    variables = jax.eval_shape(functools.partial(initialize, config.model, 0))
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
    variables = jax.eval_shape(functools.partial(initialize, model, 0))
    embedding = like((1, gh, gw, model.prompt_dim), jnp.float32)
    decode = functools.partial(model.apply, method="decode")
    flops = n * decoder_flops(model, PROMPT_TOKENS)
    return on_one(devices, decode, variables, embedding, prompts), flops


def lower_block(config: TrainConfig, devices: list):
    """The first block of the image encoder, which attends in windows, of an image."""
    model = config.model
    gh, gw = (side // model.patch_size for side in model.image_size)
    block = Block(
        num_heads=model.num_heads,
        table_size=(model.window_size,) * 2,
        window=model.window_size,
        mlp_dim=model.mlp_ratio * model.embed_dim,
        dtype=model.dtype,
    )
    x = jax.ShapeDtypeStruct((1, gh, gw, model.embed_dim), jnp.dtype(model.dtype))
    variables = jax.eval_shape(block.init, jax.random.key(0), x)
    return on_one(devices, block.apply, variables, x), block_flops(model, in_windows=True)


def on_one(devices: list, f, *args):
    """f lowered for the first device alone."""
    sharding = jax.sharding.SingleDeviceSharding(devices[0])
    return jax.jit(f, in_shardings=sharding, out_shardings=sharding).lower(*args)


LOWER = {"step": lower_step, "encode": lower_encode, "decode": lower_decode, "block": lower_block}


def analyse(config: TrainConfig, topology: str, what: str = "step") -> dict[str, Any]:
    """Compiles, and reads what the compiler says, of one device: see the README."""
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


def schedule(config: TrainConfig, report: dict[str, Any]) -> dict[str, float]:
    """What the whole run would cost at the modelled time, and what a host has to read."""
    hours = config.num_steps * report["modelled_seconds"] / 3600
    per_host = config.batch_size / report["modelled_seconds"] / report["hosts"]
    return {"hours": hours, "chip_hours": hours * report["chips"], "images_per_host": per_host}


def reading_rate(config: TrainConfig, seconds: float = 3.0) -> float | None:
    """Images/s that one core reads here, of the config's source; None if it is not here."""
    try:
        source = open_source(config.data.source)
    except (SourceError, FileNotFoundError):
        return None
    masks = config.objective.masks_per_image
    indices, frame = np.arange(len(source)), config.model.image_size
    loader = Loader(source, indices, frame, 1, masks, config.seed)
    loader.batch(0)
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        done += 1
        loader.batch(done)
    return done / (time.perf_counter() - began)


def sweep(config: TrainConfig, topology: str) -> Iterator[dict[str, Any]]:
    """The largest batch that fits, for a few meshes and ways to recompute."""
    count = len(devices_of(topology)[0])
    for fsdp in (n for n in FSDP if count % n == 0):
        for remat in get_args(get_type_hints(Sam)["remat"]):
            model = config.model.clone(remat=remat)

            def compile_with(images, model=model, fsdp=fsdp):
                tried = dataclasses.replace(
                    config, model=model, fsdp=fsdp, batch_size=images * count
                )
                return analyse(tried, topology)

            images, report = most_images(compile_with)
            yield {"fsdp": fsdp, "remat": remat, "images": images, "report": report}


def most_images(compile_with: Callable[[int], dict]) -> tuple[int, dict | None]:
    """The most images a chip that fit, up to MOST_IMAGES, and their report; or 0 and None.

    Memory grows by about as much with every image: after a fit the next try follows the line
    through the last two, after a failure it halves what is left.
    """
    fitting: dict[int, dict] = {}
    low, high, images = 0, MOST_IMAGES + 1, 1
    while high - low > 1:
        report = compile_with(images)
        if not report["fits"]:
            high = images
            images = (low + high) // 2
            continue
        fitting[images], low = report, images
        images = 2
        if len(fitting) > 1:
            before, last = sorted(fitting)[-2:]
            peaks = [fitting[n]["peak_hbm_bytes"] for n in (before, last)]
            each = max(1, (peaks[1] - peaks[0]) // (last - before))
            images = last + int((report["hbm_bytes"] - peaks[1]) // each)
        images = min(max(images, low + 1), high - 1)
    return low, fitting.get(low)


def describe(report: dict[str, Any]) -> str:
    """A report for people."""
    gib = lambda n: f"{n / GIB:.2f} GiB"
    head = f"{report['what']} on {report['topology']}: {report['chips']} chips"
    if not report["fits"]:
        return f"{head}\ndoes not fit: {report['reason']}"
    lines = [
        head,
        f"memory    {gib(report['peak_hbm_bytes'])} of {gib(report['hbm_bytes'])} a chip: fits",
        f"time      {1e3 * report['modelled_seconds']:.2f} ms modelled, "
        f"{1e3 * report['of_which_bounded']:.2f} ms of it bounded*, "
        f"MFU {report['modelled_mfu']:.1%} of "
        f"{report['reference_flops'] / 1e12:.2f} TFLOP",
    ]
    lines += [
        f"  {name:14}{1e3 * seconds:8.2f} ms"
        for name, seconds in report["phases"].items()
        if seconds > NEGLIGIBLE * report["modelled_seconds"]
    ]
    for kind, found in report["collectives"].items():
        lines.append(
            f"{kind:14}{found['count']:5} of {gib(found['bytes'])} in all, "
            f"{found['asynchronous']} asynchronous"
        )
    if report["unbounded"]:
        lines.append(f"not counted at all: {', '.join(report['unbounded'])}")
    lines.append(f"compiled in {report['compile_seconds']:.0f} s")
    if "hours" in report:
        lines.append(
            f"schedule  {report['hours']:.1f} hours, {report['chip_hours']:.0f} chip-hours; each "
            f"of {report['hosts']} hosts has to read {report['images_per_host']:.0f} images/s"
        )
        rate = report["images_per_core"]
        lines.append(
            "          one core here reads "
            + (f"{rate:.1f}" if rate else "none: data.source is not here")
        )
    if report["of_which_bounded"]:
        lines.append(
            "* kernels, which the compiler does not model: by their schedules, products or traffic"
        )
    return "\n".join(lines)


def main() -> int:
    """Compiles and prints -> the exit code: 0 it fits, 1 it does not or cannot be compiled."""
    parser = argparse.ArgumentParser(
        prog="python -m train.compile",
        description="Compile for a TPU pod that is not here: does it fit, and what will it cost?",
    )
    parser.add_argument("config", help="a Python file that assigns a TrainConfig to `config`")
    parser.add_argument(
        "--topology", required=True, help=f"one of {', '.join(CHIPS)}, e.g. v5e:16x16"
    )
    parser.add_argument(
        "--what", choices=LOWER, default="step", help="the training step, or a part"
    )
    parser.add_argument("--json", action="store_true", help="print one object")
    parser.add_argument(
        "--sweep", action="store_true", help="find the largest batch, by mesh and recomputation"
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE",
        help="replace fields of the config, e.g. batch_size=512 fsdp=16",
    )  # fmt: skip
    args = parser.parse_args()
    try:
        config = override(load_config(args.config), args.set)
        if args.sweep:
            for found in sweep(config, args.topology):
                print(json.dumps(found) if args.json else describe_found(found), flush=True)
            return 0
        report = analyse(config, args.topology, args.what)
    except ConfigError as error:
        print(f"train.compile: {error}", file=sys.stderr)
        return 1
    if args.what == "step" and report["fits"]:
        report |= schedule(config, report) | {"images_per_core": reading_rate(config)}
    print(json.dumps(report, indent=2) if args.json else describe(report))
    return 0 if report["fits"] else 1


def describe_found(found: dict[str, Any]) -> str:
    """A line of a sweep for people."""
    name = f"fsdp={found['fsdp']} model.remat={found['remat']}:"
    if not found["report"]:
        return f"{name} not one image a chip fits"
    report = found["report"]
    return (
        f"{name} {found['images']} images a chip, {report['peak_hbm_bytes'] / GIB:.1f} GiB, "
        f"MFU {report['modelled_mfu']:.1%}"
    )


if __name__ == "__main__":
    sys.exit(main())
