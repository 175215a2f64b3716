"""Times everything mode on CPU against PyTorch's segment-anything: part of `make bench`.

All implementations use the same random ViT-B weights, photo, points and thresholds, float32 and two
threads. The image is encoded beforehand. The implementations are those of
`tests.benchmarks.predict`, and they are timed in the same way. Nothing is timed unless all return
the same number of masks with the same total area.

Random weights predict low IoUs. The thresholds are therefore chosen to give numbers like those of a
trained model on a photo: two masks in five pass the threshold on predicted IoU, and about a hundred
masks remain with 1024 points. These masks extend over the image, whereas those of a trained model
are small.
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

from tests.benchmarks.predict import IMPLEMENTATIONS, THREADS, ask, environment, write_weights

SIZE = (1200, 1800)
ROUNDS = {16: 3, 32: 1}  # {points per side: number of rounds}
GOOD, STABLE = 0.4, 0.08  # share of masks that pass the threshold on IoU, and of these on stability


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--implementation", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.implementation:
        return serve(args.implementation, Path(args.folder))

    with tempfile.TemporaryDirectory() as folder:
        write_weights(str(Path(folder) / "sam_vit_b.pth"))
        subprocess.run([sys.executable, "-c", PREPARE, folder], check=True, env=environment({}))
        for side, rounds in ROUNDS.items():
            measure(folder, side, rounds)


PREPARE = """
import sys
from pathlib import Path
from tests.benchmarks.everything import write_inputs
write_inputs(Path(sys.argv[1]))
"""


def write_inputs(folder):
    """Writes the inputs of all implementations: the photo, its embedding, and thresholds."""
    import sam_jax
    from tests.reference.conftest import make_photo

    photo = make_photo(SIZE)
    model, variables = sam_jax.load(folder / "sam_vit_b.pth")
    predictor = sam_jax.SamPredictor(model, variables)
    predictor.set_image(photo)
    embedding = predictor.get_image_embedding()
    thresholds = thresholds_of(model, variables, photo)
    np.savez(folder / "inputs.npz", photo=photo, embedding=embedding, thresholds=thresholds)


def thresholds_of(model, variables, photo):
    """Returns the (predicted IoU, stability score) thresholds of the shares GOOD and STABLE."""
    import sam_jax

    masks = sam_jax.SamAutomaticMaskGenerator(
        model,
        variables,
        points_per_side=8,
        pred_iou_thresh=0.0,
        stability_score_thresh=0.0,
        box_nms_thresh=1.0,
        output_mode="coco_rle",
    ).generate(photo)
    iou, stability = (
        np.array([mask[name] for mask in masks]) for name in ("predicted_iou", "stability_score")
    )
    min_iou = np.quantile(iou, 1 - GOOD)
    assert min_iou > 0, "a threshold of 0 or less would be disabled"
    return min_iou, np.quantile(stability[iou > min_iou], 1 - STABLE)


def measure(folder, side, rounds):
    """Prints the times and the peak memory of each implementation, all in new processes."""
    workers = {name: start(name, folder) for name in IMPLEMENTATIONS}
    results = {name: ask(worker, side, "masks") for name, worker in workers.items()}
    check_same(results)
    times = {name: [] for name in IMPLEMENTATIONS}
    for _ in range(rounds):
        for name, worker in workers.items():
            times[name].append(ask(worker, side, "time"))
    peaks = {name: ask(worker, side, "peak") for name, worker in workers.items()}
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()

    count, _ = results["sam_jax"]
    print(f"\n{side * side} points, {count} masks; {THREADS} threads, {rounds} rounds")
    for name, seconds in times.items():
        ratio = statistics.median(np.divide(times["sam_jax"], seconds))
        print(
            f"{name:12}{statistics.median(seconds):8.1f} s [{min(seconds):.1f}, {max(seconds):.1f}]"
            f"{peaks[name]:8.0f} MiB   sam_jax / this: time {ratio:.2f}, "
            f"peak memory {peaks['sam_jax'] / peaks[name]:.2f}",
            flush=True,
        )


def check_same(results):
    """Exits unless all have the same number of masks, and total areas within 0.1 % of torch."""
    expected_count, expected_area = results["torch"]
    for name, (count, area) in results.items():
        if count != expected_count or abs(area - expected_area) > 1e-3 * expected_area:
            sys.exit(
                f"{name} returns {count} masks with a total area of {area} pixels; "
                f"torch returns {expected_count} masks with {expected_area} pixels"
            )


def start(name, folder):
    """Starts a process that runs `serve` for one implementation."""
    return subprocess.Popen(
        [sys.executable, __file__, "--implementation", name, "--folder", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(IMPLEMENTATIONS[name]),
    )


def serve(name, folder):
    """Answers questions about one implementation; each is a line of JSON on stdin."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    with np.load(folder / "inputs.npz") as saved:
        inputs = dict(saved)
    make_generate = sam_jax_call if name == "sam_jax" else torch_call
    generate = make_generate(folder / "sam_vit_b.pth", inputs)
    for line in sys.stdin:
        side, question = json.loads(line)
        if question == "masks":
            masks = generate(side)
            answer = len(masks), sum(mask["area"] for mask in masks)
        elif question == "peak":
            answer = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        else:
            start_time = time.perf_counter()
            generate(side)
            answer = time.perf_counter() - start_time
        print(json.dumps(answer), flush=True)


def options_of(inputs, side):
    min_iou, min_stability = inputs["thresholds"].tolist()
    return dict(
        points_per_side=side,
        pred_iou_thresh=min_iou,
        stability_score_thresh=min_stability,
        box_nms_thresh=1.0,
        output_mode="uncompressed_rle",
    )


def sam_jax_call(weights, inputs):
    """Returns a function that generates masks with sam_jax, given the points per side."""
    import jax.numpy as jnp

    import sam_jax

    model, variables = sam_jax.load(weights)
    embedding = jnp.moveaxis(jnp.asarray(inputs["embedding"]), 1, -1)

    class Encoded(sam_jax.SamAutomaticMaskGenerator):
        def _encode(self, images):
            return [embedding]

    return lambda side: Encoded(model, variables, **options_of(inputs, side)).generate(
        inputs["photo"]
    )


def torch_call(weights, inputs):
    """Returns a function that generates masks with PyTorch, given the points per side."""
    import torch

    from tests.reference.conftest import import_segment_anything

    torch.set_num_threads(THREADS)
    package = import_segment_anything()
    model = package.sam_model_registry["vit_b"](weights).eval()
    embedding = torch.from_numpy(inputs["embedding"])
    model.image_encoder.forward = lambda image: embedding

    return lambda side: package.SamAutomaticMaskGenerator(
        model, **options_of(inputs, side)
    ).generate(inputs["photo"])


if __name__ == "__main__":
    main()
