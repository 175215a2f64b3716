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
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, get_args

import numpy as np

from sam_jax.data.example import SourceError
from sam_jax.data.loader import Loader
from sam_jax.data.open import open_source
from sam_jax.model.image_encoder import Remat
from sam_jax.model.mae import MaskedAutoencoder
from sam_jax.model.sam import Sam, replace_fields
from train.aot.hlo_cost import CHIPS, GIB
from train.aot.lower import LOWER, analyse, devices_of
from train.config import ConfigError, TrainConfig, is_reconstruction
from train.overrides import load_config, override
from train.tasks.base import task_of

FSDP = (1, 8, 16)  # that a sweep tries
MOST_IMAGES = 16  # a chip, likewise
NEGLIGIBLE = 1e-3  # of the time; phases of less are not printed


def schedule(config: TrainConfig, report: dict[str, Any]) -> dict[str, float]:
    """What the whole run would cost at the modelled time, and what a host has to read."""
    hours = config.num_steps * report["modelled_seconds"] / 3600
    per_host = config.batch_size / report["modelled_seconds"] / report["hosts"]
    return {"hours": hours, "chip_hours": hours * report["chips"], "images_per_host": per_host}


def reading_rate(config: TrainConfig, seconds: float = 3.0) -> float | None:
    """Images/s that one core reads here, of the config's source; None if it is not here."""
    try:
        source = open_source(config.data.source, masks=not is_reconstruction(config))
    except (SourceError, FileNotFoundError):
        return None
    loader = Loader(source, np.arange(len(source)), task_of(config).transform, 1, config.seed)
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
        for remat in get_args(Remat):
            model = with_remat(config.model, remat)

            def compile_with(images, model=model, fsdp=fsdp):
                tried = dataclasses.replace(
                    config, model=model, fsdp=fsdp, batch_size=images * count
                )
                return analyse(tried, topology)

            images, report = most_images(compile_with)
            yield {"fsdp": fsdp, "remat": remat, "images": images, "report": report}


def with_remat(model: Sam | MaskedAutoencoder, remat: Remat) -> Sam | MaskedAutoencoder:
    """Returns a model that recomputes what `remat` says."""
    if isinstance(model, Sam):
        return replace_fields(model, remat=remat)
    return model.clone(remat=remat)


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
    name = f"fsdp={found['fsdp']} remat={found['remat']}:"
    if not found["report"]:
        return f"{name} not one image a chip fits"
    report = found["report"]
    return (
        f"{name} {found['images']} images a chip, {report['peak_hbm_bytes'] / GIB:.1f} GiB, "
        f"MFU {report['modelled_mfu']:.1%}"
    )


if __name__ == "__main__":
    sys.exit(main())
