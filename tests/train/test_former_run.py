"""Checks that weights of version 0.1.0 load and that a run of version 0.1.0 resumes.

`tests/data/former_run` contains the workdir of a run of four steps, with the field names of that
version. It also contains the losses of steps 5 to 8 of the same run without an interruption.
"""

import json
import os
import shutil
from pathlib import Path

import jaxlib
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import sam_jax
from tests.train.running import finish, start_run
from train.rows import read_rows

FORMER_RUN = Path(__file__).parents[1] / "data" / "former_run"
RECORDED = json.loads((FORMER_RUN / "recorded.json").read_text())

CONFIG = """
from sam_jax.model.sam import sam_tiny
from train.config import Data, Interactive, Optimizer, TrainConfig

config = TrainConfig(
    model=sam_tiny(
        image_size=(32, 48), patch_size=16, embed_dim=16, depth=1, num_heads=2, global_blocks=(0,),
        prompt_dim=16, decoder_depth=1, decoder_mlp_dim=16, iou_hidden_dim=16, drop_path=0.1,
        dropout=0.1,
    ),
    objective=Interactive(
        masks_per_image=2, masks_per_chunk=2, num_clicks=2, num_extra_rounds=1, iou_loss="l1"
    ),
    data=Data(source="scenes:32x48", held_out="::50000", flips=True, rot90=False),
    optimizer=Optimizer(
        peak_lr=1e-3, warmup_steps=2, lr_boundaries=(5,), lr_decay_factor=0.3, layer_decay=0.8
    ),
    batch_size=2,
    num_steps=8,
    log_every=1,
    checkpoint_every=2,
)
"""


def describe_machine():
    """Returns the properties of the machine on which the choice of instructions depends."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = next(
        (line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), ""
    )
    return {
        "vector_instructions": sorted(flag for flag in flags.split() if flag.startswith("avx")),
        "cores": os.cpu_count(),
        "jaxlib": jaxlib.__version__,
    }


@pytest.mark.slow
def test_a_former_run_resumes_with_the_same_losses(tmp_path):
    """On the same kind of machine, the losses are equal up to one rounding."""
    workdir = tmp_path / "run"
    shutil.copytree(FORMER_RUN, workdir, ignore=shutil.ignore_patterns("recorded.json"))
    config = tmp_path / "former.py"
    config.write_text(CONFIG)
    finish(start_run(config, workdir, devices=1, quick=False))
    steps = read_rows(workdir / "metrics.jsonl")
    assert [row["step"] for row in steps] == [5, 6, 7, 8]
    # Logged means are quotients of sums. Version 0.1.0 summed quotients, which differs by one
    # rounding.
    tolerance = 2e-7 if describe_machine() == RECORDED["machine"] else 1e-4
    for row, recorded in zip(steps, RECORDED["steps"], strict=True):
        for name, value in recorded.items():
            assert row[name] == pytest.approx(value, rel=tolerance, abs=0), name


def test_former_weights_load():
    model, variables = sam_jax.load(FORMER_RUN / "weights")
    assert model.image_size == (32, 48)
    sums = {
        path: float(np.sum(np.asarray(x), dtype=np.float64))
        for path, x in flatten_dict(variables, sep="/").items()
    }
    assert sums == pytest.approx(RECORDED["parameter_sums"], rel=1e-12, abs=1e-12)
