"""Times a training step on CPU against PyTorch: `python -m tests.benchmarks.train`.

It times a complete step of `sam_tiny`: prompts, forward pass, backward pass and AdamW. All
implementations use the same scenes, masks and initial weights, float32 and two threads. The PyTorch
step is that of `tests.reference.training_twin`; `tests.reference.test_training` compares its losses
and gradients with those of sam_jax. The implementations are those of `tests.benchmarks.predict`,
and they are timed in the same way. Each implementation samples different prompts.

It then measures how the cost of a sam_jax step depends on the number of rounds. It measures in new
processes the time, the memory that the compiled program allocates, and the largest resident set
during the steps, without compilation.
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

from tests.benchmarks.predict import IMPLEMENTATIONS, THREADS, ask, environment

# {rounds: (sampled clicks, rounds without a new click)}
ROUNDS = {1: (0, 0), 3: (2, 0), 9: (8, 0), 11: (8, 2)}
COMPARED = (3, 11)  # numbers of rounds
CALLS = 3  # steps that are timed together
LOSS_TOLERANCE = 0.03  # losses differ because prompts do


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--masks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--implementation", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.implementation:
        return serve(args.implementation, Path(args.folder))

    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(  # in a new process, which releases the memory of torch when it ends
            [sys.executable, "-c", WRITE_WEIGHTS, folder], check=True, env=environment({})
        )
        for images in args.images:
            np.savez(Path(folder) / f"{images}.npz", **make_scenes(images, args.masks))
        times, first_step = time_implementations(folder, args.images, args.repeats)
        print_times(times, first_step, args.masks)
        for images in args.images:
            print_costs(images, args.masks, {r: measure_cost(folder, images, r) for r in ROUNDS})


WRITE_WEIGHTS = """
import sys, torch
from sam_jax.model.sam import Sam, sam_tiny
from sam_jax.model.init import init_variables
from sam_jax.weights.convert import to_torch
model = sam_tiny(decoder_heads=8)  # the number of heads changes no shape
state = to_torch(model, init_variables(model, seed=0))
torch.save({name: torch.tensor(x) for name, x in state.items()}, f"{sys.argv[1]}/weights.pth")
"""


def make_scenes(images, masks):
    """Returns the arrays of a `Batch` of the first generated scenes with enough masks."""
    from sam_jax.data.segmentation_batch import SegmentationTransform
    from sam_jax.data.sources.synthetic import SyntheticScenes
    from sam_jax.model.sam import sam_tiny

    transform, source = SegmentationTransform(sam_tiny().image_size, masks), SyntheticScenes()
    rng = np.random.default_rng(0)
    indices = (i for i in range(len(source)) if len(source[i].masks) >= masks)
    rows = []
    for i in (next(indices) for _ in range(images)):
        row = transform(source[i], rng)
        rows.append(row | {"image_id": np.int32(i)})
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def time_implementations(folder, images, repeats):
    """Times the steps of all implementations, one after the other in each repetition.

    Returns:
      {(images, rounds): {implementation: seconds of a step, for each repetition}}, and
      {(images, rounds): {implementation: seconds of the first step, including compilation}}.
    """
    workers = {name: start(name, folder) for name in IMPLEMENTATIONS}
    times, first_step = {}, {}
    for case in ((n, rounds) for n in images for rounds in COMPARED):
        losses, first_step[case] = {}, {}
        for name, worker in workers.items():
            losses[name], first_step[case][name] = ask(worker, case, "first")
        for name, loss in losses.items():
            if abs(loss / losses["torch"] - 1) > LOSS_TOLERANCE:
                sys.exit(f"the loss of {name} differs from that of torch: {losses}")
        times[case] = {name: [] for name in workers}
        for i in range(repeats):
            for name, worker in workers.items():
                times[case][name].append(ask(worker, case, "time"))
            print(f"{case}, repetition {i + 1} of {repeats}", file=sys.stderr)
    for worker in workers.values():
        finish(worker)
    return times, first_step


def measure_cost(folder, images, rounds):
    """Returns the results of `cost_of` for sam_jax in a new process."""
    worker = start("sam_jax", folder)
    answer = ask(worker, (images, rounds), "cost")
    finish(worker)
    return answer


def print_times(times, first_step, masks):
    repeats = len(next(iter(times.values()))["sam_jax"])
    print(f"\nmedian seconds of a step [min, max]; {THREADS} threads, {repeats} repetitions")
    names = "".join(f"{name:>26}" for name in IMPLEMENTATIONS)
    print(f"{'':32}{names}  first step, sam_jax")
    for (images, rounds), by_name in times.items():
        cells = (
            f"{statistics.median(t):.4f} [{min(t):.4f}, {max(t):.4f}]" for t in by_name.values()
        )
        case = f"{images} x {masks} masks, {rounds} rounds"
        compilation = first_step[images, rounds]["sam_jax"]
        print(f"{case:32}" + "".join(f"{cell:>26}" for cell in cells) + f"{compilation:21.1f}")
    print(f"\n{'sam_jax / PyTorch':32}{'default':>26}{'kept':>26}")
    for (images, rounds), by_name in times.items():
        case = f"{images} x {masks} masks, {rounds} rounds"
        ratios = (np.divide(by_name["sam_jax"], by_name[name]) for name in ("torch", "torch kept"))
        cells = (f"{np.median(r):.2f} [{r.min():.2f}, {r.max():.2f}]" for r in ratios)
        print(f"{case:32}" + "".join(f"{cell:>26}" for cell in cells))


def print_costs(images, masks, costs):
    """Prints costs and their growth per round; 9 and 11 rounds have the same number of clicks."""
    print(f"\nsam_jax, {images} x {masks} masks")
    print(f"{'rounds':8}{'seconds':>10}{'program, MiB':>14}{'resident, MiB':>15}")
    for rounds, (seconds, program, resident) in costs.items():
        print(f"{rounds:<8}{seconds:10.4f}{program:14.1f}{resident:15.1f}")
    for a, b in ((1, 3), (1, 11), (9, 11)):
        growth = [100 * (y / x - 1) / (b - a) for x, y in zip(costs[a], costs[b], strict=True)]
        print(
            f"per round, from {a} to {b} rounds: program {growth[1]:+.2f} %, "
            f"resident {growth[2]:+.2f} %, "
            f"{(costs[b][0] - costs[a][0]) / (b - a):.4f} s"
        )


def start(name, folder):
    """Starts a process that runs `serve` for one implementation."""
    module = "tests.benchmarks.train"
    return subprocess.Popen(
        [sys.executable, "-m", module, "--implementation", name, "--folder", folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(IMPLEMENTATIONS[name]),
    )


def finish(worker):
    """Ends a process that runs `serve`."""
    worker.stdin.close()
    worker.wait()


def serve(name, folder):
    """Answers questions about one implementation; each is a line of JSON on stdin."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    make, steps = (sam_jax_step if name == "sam_jax" else torch_step), {}
    for line in sys.stdin:
        (images, rounds), question = json.loads(line)
        case = folder, images, *ROUNDS[rounds]
        if question == "cost":
            answer = cost_of(*sam_jax_step(*case))
        elif question == "first":
            start_time = time.perf_counter()
            steps[images, rounds], _ = make(*case)
            losses = [steps[images, rounds]()]
            seconds = time.perf_counter() - start_time
            losses += [steps[images, rounds]() for _ in range(9)]
            answer = statistics.mean(losses), seconds
        else:
            answer = seconds_of(steps[images, rounds])
        print(json.dumps(answer), flush=True)


def seconds_of(step):
    """Returns the mean seconds of CALLS steps."""
    start_time = time.perf_counter()
    for _ in range(CALLS):
        step()
    return (time.perf_counter() - start_time) / CALLS


def cost_of(step, program):
    """Returns the seconds of a step, the MiB of its program, and the peak resident MiB."""
    step()
    Path("/proc/self/clear_refs").write_text("5")  # resets the largest resident set
    seconds = statistics.median(seconds_of(step) for _ in range(3))
    resident = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return seconds, program, int(resident[1]) / 1024


def sam_jax_step(folder, images, num_clicks, num_extra_rounds):
    """Returns a function that runs a step and returns its loss, and the MiB of its program."""
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
        model, Interactive(num_clicks=num_clicks, num_extra_rounds=num_extra_rounds)
    )
    optimizer = make_optimizer(Optimizer(), model.image_encoder.depth)
    mesh = make_mesh(images)
    state = init_sharded(mesh, lambda x: init_state(x, optimizer), variables)
    batch = shard_batch(mesh, batch)
    compiled = make_step(objective, optimizer, 0, mesh, state).lower(state, batch).compile()
    memory = compiled.memory_analysis()

    def step():
        nonlocal state
        state, values = jax.block_until_ready(compiled(state, batch))
        return float(values["loss"])

    return step, (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 2**20


def torch_step(folder, images, num_clicks, num_extra_rounds):
    """Returns a function that runs a step and returns its loss, and None."""
    import torch

    from sam_jax.model.sam import sam_tiny
    from tests.reference import training_twin as twin
    from train.config import Optimizer

    torch.set_num_threads(THREADS)
    model = twin.use_native(build_same_reference(sam_tiny())).train()
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
        return twin.train_step(model, optimizer, batch, num_clicks, num_extra_rounds, generator)

    return step, None


def build_same_reference(model):
    """Builds the model of segment-anything with the sizes of a given `Sam`."""
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
