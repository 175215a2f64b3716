"""Ahead-of-time compilation for TPU pods that are not present, and its reports."""

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from configs.sam_tiny import config as tiny
from train.aot.__main__ import (
    MAX_IMAGES_PER_CHIP,
    format_report,
    largest_batch,
    measure_loading_rate,
    schedule_cost,
)
from train.aot.lower import devices_of
from train.config import ConfigError
from train.overrides import override

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = Path(__file__).with_name("golden_tpu.json")
MAX_RATIO = 1.01  # of a figure to its golden figure; the same versions give the same estimates
HAS_COMPILER = importlib.util.find_spec("libtpu") is not None

REPORT = {
    "topology": "v5e:2x4",
    "what": "step",
    "chips": 8,
    "hosts": 2,
    "hbm_bytes": 16 * 2**30,
    "reference_flops": 25.76e12,
    "fits": True,
    "peak_hbm_bytes": 5 * 2**30,
    "estimated_seconds": 0.5,
    "kernel_seconds_bound": 0.03,
    "phases": {"encoder": 0.2, "rounds": 0.3, "other": 0.0},
    "unmodeled_kernels": [],
    "estimated_mfu": 0.26,
    "collectives": {
        "all-gather": {"count": 9, "bytes": 2**30, "asynchronous": 9, "phases": ["gather"]}
    },
    "compile_seconds": 99.0,
}


def compile_for(*arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "train.compile", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )


def report_of(config, topology, *settings):
    process = compile_for(config, "--topology", topology, "--json", "--set", *settings)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_cost_of_the_schedule_is_the_steps_times_the_estimated_time():
    config = override(tiny, ["num_steps=7200", "batch_size=64"])
    cost = schedule_cost(config, REPORT)
    assert cost == pytest.approx({"hours": 1.0, "chip_hours": 8.0, "images_per_host": 64})


def test_formatted_report_contains_its_figures():
    text = format_report(REPORT | {"hours": 1.0, "chip_hours": 8.0, "images_per_host": 64.0,
                              "images_per_core": None})  # fmt: skip
    for part in ("5.00 GiB of 16.00 GiB", "500.00 ms", "26.0%", "encoder", "all-gather", "9 async",
                 "8 chip-hours", "data.source is not on this machine",
                 "30.00 ms of it in kernels*"):  # fmt: skip
        assert part in text
    assert "other" not in text
    failed = format_report(REPORT | {"fits": False, "reason": "Ran out of memory in HBM."})
    assert failed.endswith("does not fit: Ran out of memory in HBM.")


@pytest.mark.parametrize("slope_change", [-1800, 0, 1200])  # from the third image on
@pytest.mark.parametrize("jump", [0, 5000])  # at the fourth image
@pytest.mark.parametrize("slope", [400, 2000, 3000, 6000, 9000, 20000])  # memory of an image
def test_the_largest_batch_is_found_in_few_compilations(slope, jump, slope_change):
    tried = []

    def peak(images):
        beyond = max(0, images - 2)
        change = max(slope_change, 100 - slope)
        return 1000 + slope * images + change * beyond + jump * (images > 3)

    def compile_with(images):
        tried.append(images)
        fits = peak(images) <= 16_000
        return {"fits": fits, "peak_hbm_bytes": peak(images), "hbm_bytes": 16_000}

    images, report = largest_batch(compile_with)
    assert images == max(
        (n for n in range(1, MAX_IMAGES_PER_CHIP + 1) if peak(n) <= 16_000), default=0
    )
    assert len(tried) <= 8
    assert max(tried) <= MAX_IMAGES_PER_CHIP
    assert report == (compile_with(images) if images else None)


def test_the_loading_rate_is_measured_where_the_source_exists():
    assert measure_loading_rate(tiny, seconds=0.1) > 1
    assert measure_loading_rate(override(tiny, ["data.source=sa1b:nowhere"])) is None


@pytest.mark.parametrize("topology", ["v5e", "a100:2x2", "v9:2x2"])
def test_an_unknown_chip_is_an_error(topology):
    with pytest.raises(ConfigError, match=f"CHIP:SHAPE, e.g. v5e:16x16.*got {topology}"):
        devices_of(topology)


def test_jax_is_not_imported_before_the_environment_is_set():
    """`python -m train.compile` imports these packages before it runs `train.aot.__main__`."""
    code = "import sys, train.compile, train.aot; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.skipif(HAS_COMPILER, reason="the compiler is installed")
def test_without_the_compiler_the_error_names_the_extra():
    process = compile_for("configs/sam_tiny.py", "--topology", "v5e:2x2")
    assert process.returncode == 1
    assert "pip install -e '.[tpu,train]'" in process.stderr
    assert "Traceback" not in process.stderr


needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="needs the extra [tpu]")


@pytest.mark.tpu
@needs_compiler
def test_step_of_vit_b_fits_and_is_not_slower_than_its_golden_figure():
    report = report_of("configs/sam_vit_b.py", "v5e:2x2", "batch_size=4")
    assert report["fits"]
    assert report["unmodeled_kernels"] == []
    phases = {phase for kind in report["collectives"].values() for phase in kind["phases"]}
    assert not phases & {"encoder", "rounds"}  # no activation is sent to another device
    versions = f"jax {version('jax')}, libtpu {version('libtpu')}"
    golden = json.loads(GOLDEN.read_text()).get(versions)
    if golden is None:
        pytest.skip(f"{GOLDEN.name} has no figures of {versions}; these are {report}")
    for name, figure in golden["vit_b, v5e:2x2, 4 images"].items():
        assert report[name] <= MAX_RATIO * figure, name


@pytest.mark.tpu
@needs_compiler
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
def test_only_sharded_parameters_are_gathered_and_asynchronously(topology):
    report = report_of(
        "configs/sam_vit_b.py", topology, "batch_size=4", "fsdp=4",
        "model.image_encoder.depth=4", "model.image_encoder.global_blocks=(1,3)",
        "objective.num_clicks=0", "objective.num_extra_rounds=0", "objective.masks_per_image=8",
    )  # fmt: skip
    collectives = report["collectives"]
    none = {"count": 0, "asynchronous": 0, "phases": []}
    # The all-gathers that are fused with other operations are not counted.
    gathers = collectives.get("all-gather", none)
    assert gathers["asynchronous"] == gathers["count"]
    assert set(gathers["phases"]) <= {"gather"}
    # These are the gradients of gathered parameters.
    assert collectives["reduce-scatter"]["phases"] == ["gather"]
    assert not {"encoder", "rounds"} & set(collectives["all-reduce"]["phases"])


@pytest.mark.tpu
@needs_compiler
def test_a_masked_autoencoder_compiles_with_its_kernels():
    report = report_of(
        "configs/mae_vit_b.py", "v5e:2x2", "batch_size=32", "model.depth=1",
        "model.decoder_depth=1", "model.decoder_dim=512",
    )  # fmt: skip
    assert report["fits"]
    assert report["unmodeled_kernels"] == []
    assert report["kernel_seconds_bound"] > 0
    assert min(report["phases"][phase] for phase in ("encoder", "decoder", "optimizer")) > 0
    assert report["collectives"].keys() == {"all-reduce"}  # of gradients
    assert not {"encoder", "decoder"} & set(report["collectives"]["all-reduce"]["phases"])


@pytest.mark.tpu
@needs_compiler
def test_compiling_the_decoder_of_a_masked_autoencoder_is_an_error():
    process = compile_for("configs/mae_vit_b.py", "--topology", "v5e:2x2", "--what", "decode")
    assert process.returncode == 1
    assert "--what must be step for a masked autoencoder; got decode" in process.stderr


@pytest.mark.tpu
@needs_compiler
def test_a_program_that_does_not_fit_is_reported_with_the_reason():
    process = compile_for(
        "configs/sam_vit_b.py", "--topology", "v5e:2x2", "--what", "encode",
        "--set", "batch_size=512", "model.dtype=float32",
    )  # fmt: skip
    assert process.returncode == 1
    assert "does not fit" in process.stdout
    assert "hbm" in process.stdout.lower()
