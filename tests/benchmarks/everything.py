"""Times everything mode on CPU against PyTorch's segment-anything: part of `make bench`.

All contestants have the same random ViT-B weights, photo, points and thresholds, float32 and two
threads; the image is encoded beforehand. Contestants and their turns are those of
`tests.benchmarks.predict`. Nothing is timed unless all find equally many masks of the same total
area.

Random weights predict low IoUs, so the thresholds are chosen to give the numbers of a trained model
on a photo: two masks in five are predicted to be good, and about a hundred of 1024 points remain.
Their masks extend over the image, whereas those of a trained model are small.
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

from tests.benchmarks.predict import CONTESTANTS, THREADS, ask, environment, write_weights

SIZE = (1200, 1800)
ROUNDS = {16: 3, 32: 1}  # points per side, and the number of rounds
GOOD, STABLE = 0.4, 0.08  # the shares of masks that are good, and of these that are stable


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contestant:
        return work(args.contestant, Path(args.folder))

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
    """Writes the inputs of all contestants: the photo, its embedding, and thresholds."""
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
    """Returns the thresholds that the shares GOOD and STABLE of masks pass."""
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
    least_iou = np.quantile(iou, 1 - GOOD)
    assert least_iou > 0, "a threshold of 0 or less would be disabled"
    return least_iou, np.quantile(stability[iou > least_iou], 1 - STABLE)


def measure(folder, side, rounds):
    """Prints the contestants' times, and their peaks in fresh processes."""
    workers = {name: start(name, folder) for name in CONTESTANTS}
    found = {name: ask(worker, side, "masks") for name, worker in workers.items()}
    check_same(found)
    times = {name: [] for name in CONTESTANTS}
    for _ in range(rounds):
        for name, worker in workers.items():
            times[name].append(ask(worker, side, "time"))
    peaks = {name: ask(worker, side, "peak") for name, worker in workers.items()}
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()

    print(f"\n{side * side} points, {found['ours'][0]} masks; {THREADS} threads, {rounds} rounds")
    for name, seconds in times.items():
        ratio = statistics.median(np.divide(times["ours"], seconds))
        print(
            f"{name:12}{statistics.median(seconds):8.1f} s [{min(seconds):.1f}, {max(seconds):.1f}]"
            f"{peaks[name]:8.0f} MiB   sam_jax / this: time {ratio:.2f}, "
            f"peak memory {peaks['ours'] / peaks[name]:.2f}",
            flush=True,
        )


def check_same(found):
    """Exits unless all find equally many masks, of equal total area to a thousandth."""
    expected_count, expected_area = found["torch"]
    for name, (count, area) in found.items():
        if count != expected_count or abs(area - expected_area) > 1e-3 * expected_area:
            sys.exit(
                f"{name} finds {count} masks of {area} pixels; "
                f"torch finds {expected_count} of {expected_area}"
            )


def start(name, folder):
    """Starts a process that answers questions, one JSON line each."""
    return subprocess.Popen(
        [sys.executable, __file__, "--contestant", name, "--folder", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(CONTESTANTS[name]),
    )


def work(name, folder):
    """Answers the questions on stdin about one contestant."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    with np.load(folder / "inputs.npz") as saved:
        inputs = dict(saved)
    generate = (sam_jax_call if name == "ours" else torch_call)(folder / "sam_vit_b.pth", inputs)
    for line in sys.stdin:
        side, question = json.loads(line)
        if question == "masks":
            masks = generate(side)
            answer = len(masks), sum(mask["area"] for mask in masks)
        elif question == "peak":
            answer = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        else:
            began = time.perf_counter()
            generate(side)
            answer = time.perf_counter() - began
        print(json.dumps(answer), flush=True)


def options_of(inputs, side):
    least_iou, least_stability = inputs["thresholds"].tolist()
    return dict(
        points_per_side=side,
        pred_iou_thresh=least_iou,
        stability_score_thresh=least_stability,
        box_nms_thresh=1.0,
        output_mode="uncompressed_rle",
    )


def sam_jax_call(weights, inputs):
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
