"""Times a training step on CPU against PyTorch: `python -m tests.benchmarks.train`.

A whole step of `sam_tiny` (prompts, forward, backward, AdamW) of the same scenes, masks and first
weights, float32, two threads each, against `tests.reference.training_twin`, whose losses and
gradients are compared with ours in `tests.reference.test_training`. Contestants and their turns are
as in `tests.benchmarks.predict`; everyone draws prompts of their own.

Then what our step costs by the number of rounds, in fresh processes: what the compiled program
allocates, and the largest resident set while steps are taken, compilation not included.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.benchmarks.predict import CONTESTANTS, THREADS, ask, environment

ROUNDS = {1: (0, 0), 3: (2, 0), 9: (8, 0), 11: (8, 2)}  # clicks, and rounds without one
COMPARED = (3, 11)
CALLS = 3  # steps a turn
LOSS_TOLERANCE = 0.03  # prompts differ, and so do losses


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--masks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contestant:
        return work(args.contestant, Path(args.folder))

    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(  # their memory must not stay in this process
            [sys.executable, "-c", WRITE_WEIGHTS, folder], check=True, env=environment({})
        )
        for images in args.images:
            np.savez(Path(folder) / f"{images}.npz", **scenes(images, args.masks))
        times, first = time_in_turns(folder, args.images, args.repeats)
        print_times(times, first, args.masks)
        for images in args.images:
            print_costs(images, args.masks, {r: cost(folder, images, r) for r in ROUNDS})


WRITE_WEIGHTS = """
import sys, torch
from sam_jax.model.sam import Sam, sam_tiny
from sam_jax.model.init import init_variables
from sam_jax.weights.convert import to_torch
model = sam_tiny(decoder_heads=8)  # no weight has a shape that tells
state = to_torch(model, init_variables(model, seed=0))
torch.save({name: torch.tensor(x) for name, x in state.items()}, f"{sys.argv[1]}/weights.pth")
"""


def scenes(images, masks):
    """The arrays of a `Batch`: the first generated scenes that have so many masks."""
    from sam_jax.data.segmentation_batch import SegmentationTransform
    from sam_jax.data.sources.synthetic import SyntheticScenes
    from sam_jax.model.sam import sam_tiny

    transform, source = SegmentationTransform(sam_tiny().image_size, masks), SyntheticScenes()
    rng = np.random.default_rng(0)
    found = (i for i in range(len(source)) if len(source[i].masks) >= masks)
    rows = []
    for i in (next(found) for _ in range(images)):
        row = transform(source[i], rng)
        rows.append(row | {"image_id": np.int32(i)})
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def time_in_turns(folder, images, repeats):
    """{(images, rounds): {contestant: seconds of each turn}}, and the same of the first steps."""
    workers = {name: start(name, folder) for name in CONTESTANTS}
    times, first = {}, {}
    for case in ((n, rounds) for n in images for rounds in COMPARED):
        losses, first[case] = {}, {}
        for name, worker in workers.items():
            losses[name], first[case][name] = ask(worker, case, "first")
        for name, loss in losses.items():
            if abs(loss / losses["torch"] - 1) > LOSS_TOLERANCE:
                sys.exit(f"{name} computes something else than torch: losses {losses}")
        times[case] = {name: [] for name in workers}
        for i in range(repeats):
            for name, worker in workers.items():
                times[case][name].append(ask(worker, case, "time"))
            print(f"{case}, turn {i + 1} of {repeats}", file=sys.stderr)
    for worker in workers.values():
        finish(worker)
    return times, first


def cost(folder, images, rounds):
    """Returns the seconds and MiB that a fresh process of sam_jax needs for a step."""
    worker = start("ours", folder)
    answer = ask(worker, (images, rounds), "cost")
    finish(worker)
    return answer


def print_times(times, first, masks):
    repeats = len(next(iter(times.values()))["ours"])
    print(f"\nmedian seconds of a step [fastest, slowest]; {THREADS} threads, {repeats} turns")
    print(f"{'':32}" + "".join(f"{name:>26}" for name in CONTESTANTS) + "   first step of ours")
    for (images, rounds), by_name in times.items():
        cells = (
            f"{statistics.median(t):.4f} [{min(t):.4f}, {max(t):.4f}]" for t in by_name.values()
        )
        case = f"{images} x {masks} masks, {rounds} rounds"
        compiling = first[images, rounds]["ours"]
        print(f"{case:32}" + "".join(f"{cell:>26}" for cell in cells) + f"{compiling:19.1f}")
    print(f"\n{'ours / PyTorch, of each turn':32}{'as it comes':>26}{'kept':>26}")
    for (images, rounds), by_name in times.items():
        case = f"{images} x {masks} masks, {rounds} rounds"
        ratios = (np.divide(by_name["ours"], by_name[name]) for name in ("torch", "torch kept"))
        cells = (f"{np.median(r):.2f} [{r.min():.2f}, {r.max():.2f}]" for r in ratios)
        print(f"{case:32}" + "".join(f"{cell:>26}" for cell in cells))


def print_costs(images, masks, costs):
    """By round: growth over one round; 9 to 11 rounds have equally many slots for clicks."""
    print(f"\nour step alone, {images} x {masks} masks")
    print(f"{'rounds':8}{'seconds':>10}{'program, MiB':>14}{'resident, MiB':>15}")
    for rounds, (seconds, program, resident) in costs.items():
        print(f"{rounds:<8}{seconds:10.4f}{program:14.1f}{resident:15.1f}")
    for a, b in ((1, 3), (1, 11), (9, 11)):
        growth = [100 * (y / x - 1) / (b - a) for x, y in zip(costs[a], costs[b], strict=True)]
        print(
            f"a round more, {a} to {b}: program {growth[1]:+.2f} %, resident {growth[2]:+.2f} %, "
            f"{(costs[b][0] - costs[a][0]) / (b - a):.4f} s"
        )


def start(name, folder):
    """A process that answers questions, one JSON line each."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.train", "--contestant", name, "--folder", folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(CONTESTANTS[name]),
    )


def finish(worker):
    worker.stdin.close()
    worker.wait()


def work(name, folder):
    """Answers questions on stdin about one contestant."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    make, steps = (our_step if name == "ours" else torch_step), {}
    for line in sys.stdin:
        (images, rounds), question = json.loads(line)
        case = folder, images, *ROUNDS[rounds]
        if question == "cost":
            answer = cost_of(*our_step(*case))
        elif question == "first":
            began = time.perf_counter()
            steps[images, rounds], _ = make(*case)
            losses = [steps[images, rounds]()]
            seconds = time.perf_counter() - began
            losses += [steps[images, rounds]() for _ in range(9)]
            answer = statistics.mean(losses), seconds
        else:
            answer = seconds_of(steps[images, rounds])
        print(json.dumps(answer), flush=True)


def seconds_of(step):
    began = time.perf_counter()
    for _ in range(CALLS):
        step()
    return (time.perf_counter() - began) / CALLS


def cost_of(step, program):
    """Seconds of a step, MiB of the compiled program, MiB resident while it runs."""
    step()
    Path("/proc/self/clear_refs").write_text("5")  # the largest resident set starts anew
    seconds = statistics.median(seconds_of(step) for _ in range(3))
    resident = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return seconds, program, int(resident[1]) / 1024


def our_step(folder, images, points, num_extra_rounds):
    """A function that takes a step and returns its loss, and MiB: temporaries and results."""
    import jax

    import sam_jax
    from sam_jax.data.segmentation_batch import Batch
    from sam_jax.model.sam import sam_tiny
    from train.config import Interactive, Optimizer
    from train.objectives.interactive import InteractiveObjective
    from train.optimizer import make_optimizer
    from train.sharding import init_sharded, make_mesh, shard_batch
    from train.state import init_state
    from train.step import make_step

    model, (_, variables) = sam_tiny(), sam_jax.load(folder / "weights.pth")
    batch = Batch(**np.load(folder / f"{images}.npz"))
    objective = InteractiveObjective(
        model, Interactive(num_clicks=points, num_extra_rounds=num_extra_rounds)
    )
    optimizer = make_optimizer(Optimizer(), model.image_encoder.depth)
    mesh = make_mesh(images)
    state = init_sharded(mesh, lambda given: init_state(given, optimizer), variables)
    batch = shard_batch(mesh, batch)
    compiled = make_step(objective, optimizer, 0, mesh, state).lower(state, batch).compile()
    memory = compiled.memory_analysis()

    def step():
        nonlocal state
        state, values = jax.block_until_ready(compiled(state, batch))
        return float(values["loss"])

    return step, (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 2**20


def torch_step(folder, images, points, num_extra_rounds):
    """A function that takes a step and returns its loss, and None."""
    import torch

    from sam_jax.model.sam import sam_tiny
    from tests.reference import training_twin as twin
    from train.config import Optimizer

    torch.set_num_threads(THREADS)
    model = twin.use_native(reference_like(sam_tiny())).train()
    model.load_state_dict(torch.load(folder / "weights.pth"))
    arrays = np.load(folder / f"{images}.npz")
    assert arrays["valid"].all()
    masks = np.unpackbits(arrays["masks"], axis=-1).astype(bool)
    batch = twin.Batch(
        image=torch.from_numpy(arrays["image"]).permute(0, 3, 1, 2).float(),
        size=[tuple(size) for size in arrays["size"].tolist()],
        mask=torch.from_numpy(masks).flatten(0, 1),
        owner=torch.arange(images).repeat_interleave(masks.shape[1]),
    )
    optimizer, generator = twin.make_optimizer(model, Optimizer()), torch.Generator()
    count = 0

    def step():
        nonlocal count
        twin.set_rates(optimizer, Optimizer(), count)
        count += 1
        return twin.train_step(model, optimizer, batch, points, num_extra_rounds, generator)

    return step, None


def reference_like(model):
    """segment-anything's model of the same sizes as ours."""
    from tests.reference.conftest import build_reference

    fields = "patch_size embed_dim depth num_heads global_blocks window_size prompt_dim"
    fields += " mask_channels decoder_depth decoder_mlp_dim iou_hidden_dim"
    sizes = {name: getattr(model, name) for name in fields.split()}
    reference = build_reference(image_size=model.image_size[0], **sizes)
    for module in reference.mask_decoder.transformer.modules():
        if hasattr(module, "num_heads"):
            module.num_heads = model.mask_decoder.num_heads
    return reference


if __name__ == "__main__":
    main()
