"""Trains variants of `configs/sam_nuclei.py`, each without one of its ingredients.

    python -m tests.benchmarks.ablation --source labels:DIR --workdir runs/ablation --seeds 0 1 2

All variants have the same budget in seconds of training, by the costs of a step below. Runs that
were interrupted resume, and runs that are done are not repeated. The table shows the mean over the
seeds, and the standard deviation where there are several.

Variants:
  all: the recipe of the config.
  no windows: the model sees entire images in training and evaluation.
  best mask only: only the IoU of the best mask is supervised, as in the paper.
  eleven rounds only: no stages with fewer rounds, and no mimetic initialization.
  none: none of the three.
"""

import argparse
import dataclasses
import json
import os
from pathlib import Path

import jax
import numpy as np

from configs.sam_nuclei import config as recipe
from configs.sam_nuclei import eleven_rounds, one_round, three_rounds
from train.config import Stage
from train.run import run

# Seconds per step on two CPU cores, of 4 images x 4 masks, and of 8 images x 4 and x 2 masks.
STEP_SECONDS = {"one": 0.16, "three": 0.38, "eleven": 0.47}
# The stages of the recipe, and their shares of the time.
SCHEDULE = {"one": 0.12, "three": 0.42, "eleven": 0.2, "last three": 0.26}
VARIANTS = ("all", "no windows", "best mask only", "eleven rounds only", "none")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", required=True)
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--seconds", type=float, default=300, help="the budget of one run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", os.cpu_count())
    evaluations = {name: [] for name in args.variants}
    for seed in args.seeds:
        for name in args.variants:
            config = make_config(name, args.source, args.seconds, seed)
            workdir = args.workdir / f"{name.replace(' ', '_')}_{seed}"
            if not (workdir / "report" / "index.html").exists():
                run(config, workdir)
            evaluations[name].append(json.loads((workdir / "evaluation.json").read_text()))
    print_table(evaluations)


def make_config(name, source, seconds, seed):
    """Returns the config of a variant with a budget in seconds."""
    without = set(VARIANTS[1:]) if name == "none" else {name}
    objectives = {"one": one_round, "three": three_rounds, "eleven": eleven_rounds}
    if "best mask only" in without:
        objectives = {
            key: dataclasses.replace(objective, iou_supervision="best")
            for key, objective in objectives.items()
        }
    data = dataclasses.replace(recipe.data, source=source)
    if "no windows" in without:
        data = dataclasses.replace(data, jitter=(), jitter_unit="canvas")
    schedule, mimetic_init_scale = SCHEDULE, recipe.mimetic_init_scale
    if "eleven rounds only" in without:
        schedule, mimetic_init_scale = {"eleven": 1.0}, 0.0

    starts, parts = [0], []
    for stage, share in schedule.items():
        rounds = stage.split()[-1]
        parts.append((objectives[rounds], 4 if rounds == "one" else 8))
        starts.append(starts[-1] + round(share * seconds / STEP_SECONDS[rounds]))
    num_steps = starts.pop()
    stages = tuple(
        Stage(start, objective=objective, batch_size=batch_size)
        for start, (objective, batch_size) in zip(starts[1:], parts[1:], strict=True)
    )
    return dataclasses.replace(
        recipe,
        data=data,
        objective=parts[0][0],
        batch_size=parts[0][1],
        optimizer=dataclasses.replace(
            recipe.optimizer, cosine_start=num_steps // 2, cosine_steps=num_steps
        ),
        mimetic_init_scale=mimetic_init_scale,
        stages=stages,
        num_steps=num_steps,
        checkpoint_every=num_steps,
        seed=seed,
    )


def print_table(evaluations):
    """Prints the mean IoUs of the variants: in tiles, if the model was trained on windows."""
    columns = ("1 click", "oracle", "9 clicks", "box", "oracle", "bound")
    print(f"{'without':20}" + "".join(f"{title:>16}" for title in columns))
    for name, runs in evaluations.items():
        rows = np.array([summarize(evaluation) for evaluation in runs])
        cells = [
            f"{mean:.3f} ± {deviation:.3f}" if len(runs) > 1 else f"{mean:.3f}"
            for mean, deviation in zip(rows.mean(axis=0), rows.std(axis=0), strict=True)
        ]
        print(f"{name:20}" + "".join(f"{cell:>16}" for cell in cells))


def summarize(evaluation):
    """Returns the figures of a row of the table for one run."""
    scores = evaluation.get("tiles", evaluation)
    one, nine, box = scores["clicks"]["1"], scores["clicks"]["9"], scores["box"]
    chosen, oracle = "chosen", "oracle"
    return one[chosen], one[oracle], nine[chosen], box[chosen], box[oracle], scores["bound"]


if __name__ == "__main__":
    main()
