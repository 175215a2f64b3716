"""Compiles a program for a TPU pod that is not attached, and reports memory and estimated time.

    python -m train.compile configs/X.py --topology v5e:16x16 [--what encode] [--json]

Needs the extra [tpu], and no TPU.
"""

import os

from sam_jax.io.tpu import ENVIRONMENT_WITHOUT_TPU

if __name__ == "__main__":  # before JAX is imported
    os.environ |= ENVIRONMENT_WITHOUT_TPU | {
        "JAX_PLATFORMS": "cpu",  # for arrays; the compiler needs no device
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # otherwise only one process at a time could compile
    }

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, get_args

import numpy as np

from sam_jax.data.example import SourceError
from sam_jax.data.loader import Loader
from sam_jax.data.open import open_source
from sam_jax.io.console import escape_output
from sam_jax.model.image_encoder import Remat
from sam_jax.model.mae import MaskedAutoencoder
from sam_jax.model.sam import Sam, replace_fields
from train.aot.chips import CHIPS, GIB
from train.aot.lower import LOWER, compile_report, devices_of
from train.config import ConfigError, TrainConfig
from train.overrides import load_config, override
from train.tasks.base import make_task

SWEEP_FSDP = (1, 8, 16)  # values of `fsdp` that a sweep tries
MAX_IMAGES_PER_CHIP = 16  # that a sweep tries
MIN_PRINTED_SHARE = 1e-3  # of the time; shorter phases are not printed


def schedule_cost(config: TrainConfig, report: dict[str, Any]) -> dict[str, float]:
    """Returns the hours and chip-hours of all steps, and the images/s that a host must read."""
    hours = config.num_steps * report["estimated_seconds"] / 3600
    per_host = config.batch_size / report["estimated_seconds"] / report["hosts"]
    return {"hours": hours, "chip_hours": hours * report["chips"], "images_per_host": per_host}


def measure_loading_rate(config: TrainConfig, seconds: float = 3.0) -> float | None:
    """Measures the images/s that one core of this machine reads from the source of a config.

    Args:
      config: The config of the run.
      seconds: Time to measure for.

    Returns:
      Images/s; None if the source is not on this machine.
    """
    task = make_task(config)
    try:
        source = open_source(config.data.source, masks=task.needs_masks)
    except (SourceError, FileNotFoundError):
        return None
    loader = Loader(source, np.arange(len(source)), task.transform, 1, config.seed)
    loader.batch(0)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        count += 1
        loader.batch(count)
    return count / (time.perf_counter() - start)


def sweep(config: TrainConfig, topology: str) -> Iterator[dict[str, Any]]:
    """Finds the largest batch that fits, for several meshes and rematerialization policies.

    Args:
      config: The config of the run.
      topology: A name, as in `devices_of`.

    Yields:
      {"fsdp", "remat", "images", "report"} with the images of a chip and their report.
    """
    count = len(devices_of(topology)[0])
    for fsdp in (n for n in SWEEP_FSDP if count % n == 0):
        for remat in get_args(Remat):
            model = with_remat(config.model, remat)
            variant = dataclasses.replace(config, model=model, fsdp=fsdp)

            def compile_with(images: int, variant: TrainConfig = variant) -> dict[str, Any]:
                batch = dataclasses.replace(variant, batch_size=images * count)
                return compile_report(batch, topology)

            images, report = largest_batch(compile_with)
            yield {"fsdp": fsdp, "remat": remat, "images": images, "report": report}


def with_remat(model: Sam | MaskedAutoencoder, remat: Remat) -> Sam | MaskedAutoencoder:
    """Returns the model with another way to recompute."""
    if isinstance(model, Sam):
        return replace_fields(model, remat=remat)
    return model.clone(remat=remat)


def largest_batch(
    compile_with: Callable[[int], dict[str, Any]],
) -> tuple[int, dict[str, Any] | None]:
    """Finds the largest number of images of a chip that fits, up to `MAX_IMAGES_PER_CHIP`.

    Memory grows by about as much with every image. After a fit the next try extrapolates from the
    last two fits; after a failure it halves the remaining interval.

    Args:
      compile_with: Returns the report for a number of images.

    Returns:
      The number of images and their report; 0 and None if not even one image fits.
    """
    fitting: dict[int, dict[str, Any]] = {}
    low, high, images = 0, MAX_IMAGES_PER_CHIP + 1, 1
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
            bytes_per_image = max(1, (peaks[1] - peaks[0]) // (last - before))
            images = last + int((report["hbm_bytes"] - peaks[1]) // bytes_per_image)
        images = min(max(images, low + 1), high - 1)
    return low, fitting.get(low)


def format_report(report: dict[str, Any]) -> str:
    """Formats a report as text."""
    head = f"{report['what']} on {report['topology']}: {report['chips']} chips"
    if not report["fits"]:
        return f"{head}\ndoes not fit: {report['reason']}"
    lines = [
        head,
        f"memory    {_gib(report['peak_hbm_bytes'])} of {_gib(report['hbm_bytes'])} a chip: fits",
        f"time      {1e3 * report['estimated_seconds']:.2f} ms estimated, "
        f"{1e3 * report['kernel_seconds_bound']:.2f} ms of it in kernels*, "
        f"MFU {report['estimated_mfu']:.1%} of "
        f"{report['reference_flops'] / 1e12:.2f} TFLOP",
    ]
    lines += [
        f"  {name:14}{1e3 * seconds:8.2f} ms"
        for name, seconds in report["phases"].items()
        if seconds > MIN_PRINTED_SHARE * report["estimated_seconds"]
    ]
    for kind, found in report["collectives"].items():
        lines.append(
            f"{kind:14}{found['count']:5}, {_gib(found['bytes'])} in total, "
            f"{found['asynchronous']} asynchronous"
        )
    if report["unmodeled_kernels"]:
        lines.append(f"kernels not counted: {', '.join(report['unmodeled_kernels'])}")
    lines.append(f"compiled in {report['compile_seconds']:.0f} s")
    if "hours" in report:
        lines += _format_schedule(report)
    if report["kernel_seconds_bound"]:
        lines.append(
            "* a lower bound from schedules, matrix products or memory traffic; the compiler does "
            "not estimate kernels"
        )
    return "\n".join(lines)


def _format_schedule(report: dict[str, Any]) -> list[str]:
    rate = report["images_per_core"]
    return [
        f"schedule  {report['hours']:.1f} hours, {report['chip_hours']:.0f} chip-hours; each "
        f"of {report['hosts']} hosts must read {report['images_per_host']:.0f} images/s",
        "          one core of this machine reads "
        + (f"{rate:.1f}" if rate else "none: data.source is not on this machine"),
    ]


def format_sweep_row(found: dict[str, Any]) -> str:
    """Formats one result of a sweep as text."""
    name = f"fsdp={found['fsdp']} model.remat={found['remat']}:"
    if not found["report"]:
        return f"{name} not even one image a chip fits"
    report = found["report"]
    return (
        f"{name} {found['images']} images a chip, {_gib(report['peak_hbm_bytes'])}, "
        f"MFU {report['estimated_mfu']:.1%}"
    )


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f} GiB"


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m train.compile",
        description="Compile for a TPU pod that is not attached: does it fit, what will it cost?",
    )
    parser.add_argument("config", help="a Python file that assigns a TrainConfig to `config`")
    parser.add_argument(
        "--topology", required=True, help=f"one of {', '.join(CHIPS)} and a shape, e.g. v5e:16x16"
    )
    parser.add_argument(
        "--what", choices=LOWER, default="step", help="the training step, or a part of the model"
    )
    parser.add_argument("--json", action="store_true", help="print the report as a JSON object")
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="find the largest batch for several meshes and rematerialization policies",
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE",
        help="replace fields of the config, e.g. batch_size=512 fsdp=16",
    )  # fmt: skip
    return parser.parse_args()


def main() -> int:
    """Compiles a program and prints the report.

    Returns:
      The exit code: 0 if it fits; 1 if it does not fit or cannot be compiled.
    """
    escape_output()
    args = parse_arguments()
    try:
        config = override(load_config(args.config), args.set)
        if args.sweep:
            for found in sweep(config, args.topology):
                print(json.dumps(found) if args.json else format_sweep_row(found), flush=True)
            return 0
        report = compile_report(config, args.topology, args.what)
    except ConfigError as error:
        print(f"train.compile: {error}", file=sys.stderr)
        return 1
    if args.what == "step" and report["fits"]:
        report |= schedule_cost(config, report) | {"images_per_core": measure_loading_rate(config)}
    print(json.dumps(report, indent=2) if args.json else format_report(report))
    return 0 if report["fits"] else 1


if __name__ == "__main__":
    sys.exit(main())
