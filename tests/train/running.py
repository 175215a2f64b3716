"""Small runs in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

from train.metrics import read_rows

ROOT = Path(__file__).resolve().parents[2]

# They compile quickly: what is tested is not how fast they are.
QUICK = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false"
)

CONFIG = """
from sam_jax.model.sam import sam_tiny
from train.config import Data, Interactive, Optimizer, TrainConfig

config = TrainConfig(
    model=sam_tiny(
        image_size=(48, 64), patch_size=16, embed_dim=24, depth=1, num_heads=2, global_blocks=(0,),
        prompt_dim=16, decoder_depth=1, decoder_mlp_dim=16, iou_hidden_dim=16, drop_path=0.1,
        dropout=0.1,
    ),
    objective=Interactive(masks_per_image=2, masks_per_chunk=2, num_clicks=2),
    data=Data(source="scenes:48x64", held_out="::50000", flips=True),
    optimizer=Optimizer(peak_lr=1e-3, warmup_steps=2, lr_boundaries=(8,), layer_decay=0.8),
    batch_size=2,
    num_steps=12,
    log_every=1,
    checkpoint_every=2,
)
"""

AUTOENCODER = """
from sam_jax.model.mae import mae_tiny
from train.config import PretrainData, Optimizer, Reconstruction, TrainConfig

config = TrainConfig(
    model=mae_tiny(image_size=(32, 32), depth=1),
    data=PretrainData(source="scenes:40x48", held_out="::20000"),
    objective=Reconstruction(),
    optimizer=Optimizer(
        peak_lr=1e-3, warmup_steps=2, lr_boundaries=(), cosine_steps=8, weight_decay=0.05,
        layer_decay=1.0,
    ),
    batch_size=4,
    num_steps=8,
    log_every=1,
    checkpoint_every=2,
    evaluate_every=4,
)
"""


def start_run(config, cache, workdir, *settings, devices=None, hosts=()):
    """Starts `python -m train`.

    Args:
      config: its file; cache: a folder for compiled programs; workdir, settings: of the run.
      devices: how many the process has; all cores if None.
      hosts: arguments that say which of several hosts it is.
    """
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": QUICK,
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    if devices:
        environment["JAX_NUM_CPU_DEVICES"] = str(devices)
    arguments = [*hosts, *(["--set", *settings] if settings else [])]
    return subprocess.Popen(
        [sys.executable, "-m", "train", str(config), "--workdir", str(workdir), *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


def losses(workdir):
    rows = read_rows(workdir / "metrics.jsonl")
    return [(row["step"], row["loss"], row.get("miou_of_rounds")) for row in rows]
