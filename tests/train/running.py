"""Small runs of `python -m train` in separate processes."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests import compilation
from train.rows import read_rows

ROOT = Path(__file__).resolve().parents[2]

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


def start_run(
    config: Path,
    workdir: Path,
    *settings: str,
    devices: int | None = None,
    hosts: Sequence[str] = (),
    quick: bool = True,
    new_session: bool = False,
    module: str = "train",
) -> subprocess.Popen:
    """Starts `python -m train`.

    Args:
      config: The config file.
      workdir: The workdir of the run.
      *settings: Arguments of `--set`.
      devices: Number of devices of the process; one for each core if None.
      hosts: Arguments that give the coordinator, the number of processes and the process index.
      quick: Whether to compile with few optimizations. Compilation takes most of the time of these
        runs.
      new_session: Whether the process leads a group of processes of its own, which can be sent a
        signal as a terminal does.
      module: The module to run, "train" or "train.supervise".

    Returns:
      The process. It does not compile programs again that another process of the test session has
      compiled.
    """
    environment = os.environ | {"XLA_FLAGS": compilation.XLA_FLAGS if quick else ""}
    if devices:
        environment["JAX_NUM_CPU_DEVICES"] = str(devices)
    arguments = [*hosts, *(["--set", *settings] if settings else [])]
    return subprocess.Popen(
        [sys.executable, "-m", module, str(config), "--workdir", str(workdir), *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=new_session,
    )


def finish(process: subprocess.Popen) -> str:
    """Waits for a run to succeed and returns its output."""
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


def losses(workdir: Path) -> list[tuple[int, float, list[float] | None]]:
    """Returns (step, loss, mean IoU of each round) for every logged step."""
    rows = read_rows(workdir / "metrics.jsonl")
    return [(row["step"], row["loss"], row.get("miou_of_rounds")) for row in rows]
