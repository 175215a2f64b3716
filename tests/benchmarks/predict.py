"""Times prediction on CPU against PyTorch's segment-anything: `make bench`.

All contestants have the same random ViT-B weights and inputs, float32 and two threads. Each runs in
a separate process, and they take turns within one run. A row is the median over the rounds, and a
ratio is the median of the rounds' ratios. Outputs are compared before anything is timed. PyTorch
runs twice: with its default allocator, and with one that keeps its memory, which is faster.

Peak memory is the resident set of a fresh process that does one thing once, compilation included.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

THREADS = 2
KEEP_MEMORY = (
    "glibc.malloc.mmap_threshold=34359738368:glibc.malloc.trim_threshold=34359738368"
    ":glibc.malloc.mmap_max=0"
)
CONTESTANTS = {"ours": {}, "torch": {}, "torch kept": {"GLIBC_TUNABLES": KEEP_MEMORY}}
WORK = ("encoder", "decoder, 1 prompt", "decoder, 64 prompts")
REPEATS = {"encoder": 1, "decoder, 1 prompt": 20, "decoder, 64 prompts": 1}  # calls in one round


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contestant:
        return work(args.contestant, args.weights)

    with tempfile.TemporaryDirectory() as folder:
        weights = str(Path(folder) / "sam_vit_b.pth")
        write_weights(weights)
        times = time_in_turns(weights, args.rounds)
        peaks = {name: {w: peak_memory(name, weights, w) for w in WORK} for name in CONTESTANTS}
    print_table(times, peaks)


def time_in_turns(weights, rounds):
    """Returns {work: {contestant: seconds of each round}}."""
    workers = {name: start(name, weights) for name in CONTESTANTS}
    times = {w: {name: [] for name in workers} for w in WORK}
    for w in WORK:
        compare({name: ask(worker, w, "output") for name, worker in workers.items()})
        for i in range(rounds):
            for name, worker in workers.items():
                times[w][name].append(ask(worker, w, "time"))
            print(f"{w}, round {i + 1} of {rounds}", file=sys.stderr)
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    return times


def peak_memory(name, weights, w):
    """Returns the MiB that a fresh process needs to load the weights and do the work once."""
    worker = start(name, weights)
    ask(worker, w, "output")
    peak = ask(worker, w, "peak")
    worker.stdin.close()
    worker.wait()
    return peak


def compare(outputs):
    """Exits unless 5 sampled values of each output agree, to 1e-3 of the largest."""
    expected = np.array(outputs["torch"])
    for name, output in outputs.items():
        if np.abs(np.array(output) - expected).max() > 1e-3 * np.abs(expected).max():
            sys.exit(f"{name} differs from torch: got {output}, expected {expected}")


def print_table(times, peaks):
    rounds = len(times[WORK[0]]["ours"])
    print(f"\nmedian seconds [fastest, slowest]; {THREADS} threads, {rounds} rounds")
    print(f"{'':22}" + "".join(f"{name:>26}" for name in CONTESTANTS))
    for w, by_name in times.items():
        cells = (
            f"{statistics.median(t):.4f} [{min(t):.4f}, {max(t):.4f}]" for t in by_name.values()
        )
        print(f"{w:22}" + "".join(f"{cell:>26}" for cell in cells))
    print(
        f"\n{'sam_jax / PyTorch':22}   time: default       kept   peak memory: default       kept"
    )
    for w, by_name in times.items():
        ratios = {
            name: statistics.median(np.divide(by_name["ours"], by_name[name]))
            for name in ("torch", "torch kept")
        }
        memory = [peaks["ours"][w] / peaks[name][w] for name in ("torch", "torch kept")]
        print(
            f"{w:22}{ratios['torch']:20.2f}{ratios['torch kept']:7.2f}"
            f"{memory[0]:27.2f}{memory[1]:7.2f}   (sam_jax: {peaks['ours'][w]:.0f} MiB)"
        )


def write_weights(path):
    subprocess.run(  # so that this process does not keep the memory of torch
        [sys.executable, "-c", WRITE_WEIGHTS, path], check=True, env=environment({})
    )


WRITE_WEIGHTS = """
import sys, torch
from tests.reference.conftest import import_segment_anything, randomize
torch.manual_seed(0)
model = import_segment_anything().sam_model_registry["vit_b"]()
torch.save(randomize(model.eval()).state_dict(), sys.argv[1])
"""


def environment(extra):
    settings = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": str(THREADS)}
    return os.environ | settings | extra


def start(name, weights):
    """Starts a process that answers questions, one JSON line each."""
    return subprocess.Popen(
        [sys.executable, __file__, "--contestant", name, "--weights", weights],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(CONTESTANTS[name]),
    )


def ask(worker, w, question):
    worker.stdin.write(json.dumps([w, question]) + "\n")
    worker.stdin.flush()
    return json.loads(worker.stdout.readline())


def work(name, weights):
    """Answers the questions on stdin about one contestant."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    calls = (sam_jax_calls if name == "ours" else torch_calls)(weights)
    for line in sys.stdin:
        w, question = json.loads(line)
        if question == "output":
            output = np.asarray(calls[w]()).ravel()
            answer = output[:: len(output) // 5].tolist()
        elif question == "peak":
            answer = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        else:
            began = time.perf_counter()
            for _ in range(REPEATS[w]):
                calls[w]()
            answer = (time.perf_counter() - began) / REPEATS[w]
        print(json.dumps(answer), flush=True)


def inputs():
    """Returns a normalized image, an embedding, and 64 points on a canvas of 1024 pixels."""
    rng = np.random.default_rng(0)
    image = rng.normal(size=(1, 1024, 1024, 3)).astype(np.float32)
    embedding = rng.normal(size=(1, 64, 64, 256)).astype(np.float32)
    return image, embedding, rng.uniform(0, 1024, (64, 1, 2)).astype(np.float32)


def sam_jax_calls(weights):
    import jax
    import jax.numpy as jnp

    import sam_jax
    from sam_jax.predict.decode import decode_objects
    from sam_jax.predict.prompts import ObjectPrompt

    image, embedding, points = inputs()
    model, variables = sam_jax.load(weights)
    embedding = jnp.asarray(embedding)
    encode = jax.jit(lambda variables, image: model.apply(variables, image, method="encode"))
    label = np.array([1, -1], np.int32)
    padding = np.zeros((1, 2), np.float32)
    objects = [ObjectPrompt(np.concatenate([p, padding]), label, None) for p in points]

    def decode(objects):
        ((logits, _),) = decode_objects(model, variables, embedding, [objects], True)
        return logits

    return {
        WORK[0]: lambda: np.moveaxis(jax.block_until_ready(encode(variables, image)), -1, 1),
        WORK[1]: lambda: decode(objects[:1]),
        WORK[2]: lambda: decode(objects),
    }


def torch_calls(weights):
    import torch

    from tests.reference.conftest import import_segment_anything

    torch.set_num_threads(THREADS)
    model = import_segment_anything().sam_model_registry["vit_b"](weights).eval()
    image, embedding, points = (torch.from_numpy(x) for x in inputs())
    image, embedding = image.permute(0, 3, 1, 2), embedding.permute(0, 3, 1, 2).contiguous()

    @torch.no_grad()
    def encode():
        return model.image_encoder(image)

    @torch.no_grad()
    def decode(points):
        prompts = (points, torch.ones(points.shape[:2]))
        sparse, dense = model.prompt_encoder(points=prompts, boxes=None, masks=None)
        return model.mask_decoder(
            image_embeddings=embedding,
            image_pe=model.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )[0]

    return {
        WORK[0]: encode,
        WORK[1]: lambda: decode(points[:1]),
        WORK[2]: lambda: decode(points),
    }


if __name__ == "__main__":
    main()
