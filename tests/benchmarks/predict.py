"""Times prediction on CPU against PyTorch's segment-anything: `make bench`.

All implementations use the same random ViT-B weights and inputs, float32 and two threads. Each runs
in a separate process. In each round, they are timed one after the other. The table shows medians
over the rounds, and medians of the ratios of each round. Outputs are compared before anything is
timed. PyTorch is timed with the default allocator, and with an allocator that does not return
memory to the system, which is faster ("torch kept").

Peak memory is the largest resident set of a new process that does the work once, including
compilation.
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
IMPLEMENTATIONS = {"sam_jax": {}, "torch": {}, "torch kept": {"GLIBC_TUNABLES": KEEP_MEMORY}}
WORK = ("encoder", "decoder, 1 prompt", "decoder, 64 prompts")
CALLS = {"encoder": 1, "decoder, 1 prompt": 20, "decoder, 64 prompts": 1}  # calls in one round


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--implementation", help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.implementation:
        return serve(args.implementation, args.weights)

    with tempfile.TemporaryDirectory() as folder:
        weights = str(Path(folder) / "sam_vit_b.pth")
        write_weights(weights)
        times = time_implementations(weights, args.rounds)
        peaks = {name: {w: peak_memory(name, weights, w) for w in WORK} for name in IMPLEMENTATIONS}
    print_table(times, peaks)


def time_implementations(weights, rounds):
    """Returns {work: {implementation: seconds of each round}}."""
    workers = {name: start(name, weights) for name in IMPLEMENTATIONS}
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
    """Returns the peak memory, in MiB, of a new process that does the work once."""
    worker = start(name, weights)
    ask(worker, w, "output")
    peak = ask(worker, w, "peak")
    worker.stdin.close()
    worker.wait()
    return peak


def compare(outputs):
    """Exits if sampled values differ from torch by more than 1e-3 of the largest value."""
    expected = np.array(outputs["torch"])
    for name, output in outputs.items():
        if np.abs(np.array(output) - expected).max() > 1e-3 * np.abs(expected).max():
            sys.exit(f"{name} differs from torch: got {output}, expected {expected}")


def print_table(times, peaks):
    rounds = len(times[WORK[0]]["sam_jax"])
    print(f"\nmedian seconds [fastest, slowest]; {THREADS} threads, {rounds} rounds")
    print(f"{'':22}" + "".join(f"{name:>26}" for name in IMPLEMENTATIONS))
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
            name: statistics.median(np.divide(by_name["sam_jax"], by_name[name]))
            for name in ("torch", "torch kept")
        }
        memory = [peaks["sam_jax"][w] / peaks[name][w] for name in ("torch", "torch kept")]
        print(
            f"{w:22}{ratios['torch']:20.2f}{ratios['torch kept']:7.2f}"
            f"{memory[0]:27.2f}{memory[1]:7.2f}   (sam_jax: {peaks['sam_jax'][w]:.0f} MiB)"
        )


def write_weights(path):
    subprocess.run(  # in a new process, which releases the memory of torch when it ends
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
    """Returns the environment of a process that is timed."""
    settings = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": str(THREADS)}
    return os.environ | settings | extra


def start(name, weights):
    """Starts a process that runs `serve` for one implementation."""
    return subprocess.Popen(
        [sys.executable, __file__, "--implementation", name, "--weights", weights],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(IMPLEMENTATIONS[name]),
    )


def ask(worker, w, question):
    """Sends a question to a process and returns its answer."""
    worker.stdin.write(json.dumps([w, question]) + "\n")
    worker.stdin.flush()
    return json.loads(worker.stdout.readline())


def serve(name, weights):
    """Answers questions about one implementation; each is a line of JSON on stdin."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    calls = (sam_jax_calls if name == "sam_jax" else torch_calls)(weights)
    for line in sys.stdin:
        w, question = json.loads(line)
        if question == "output":
            output = np.asarray(calls[w]()).ravel()
            answer = output[:: len(output) // 5].tolist()
        elif question == "peak":
            answer = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        else:
            start_time = time.perf_counter()
            for _ in range(CALLS[w]):
                calls[w]()
            answer = (time.perf_counter() - start_time) / CALLS[w]
        print(json.dumps(answer), flush=True)


def inputs():
    """Returns a normalized image, an embedding, and 64 points in an image of 1024 x 1024 pixels."""
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
