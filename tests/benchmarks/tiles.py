"""Compares prediction in tiles with prediction on the entire image.

    python -m tests.benchmarks.tiles --weights sam_photo [--source coco:DIR --index 0:50:5]

The first table has the time and the peak memory of setting a photograph and predicting masks of
some of its objects. Both ways are timed one after the other in each round. The table shows medians
over the rounds, and medians of the ratios of each round. Peak memory is the largest resident set of
a new process that does the work once, including compilation.

With a source of masks, a second table tells how well the masks of the two ways agree. Each object
is prompted with its bounding box. The objects are grouped by the share of the image's longer side
that their box takes: the model sees small ones well only in tiles, and large ones in both.
"""

import argparse
import itertools
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import sam_jax
from sam_jax.data.open import open_source, select
from sam_jax.evaluate.clicks import box_prompts, decode_masks
from sam_jax.images.read import read_image
from sam_jax.masks.overlap import mask_iou

PHOTO = Path(__file__).parents[2] / "docs" / "photos" / "dogs.jpg"
WAYS = ("none", "auto")  # the argument `tiles` of `set_image`
WORK = {"1 box": 1, "10 boxes": 10, "100 boxes": 100, "1 point": 1, "10 points": 10}
BOX_SIDE = 60  # pixels
SHARES = (0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.01)  # limits of the groups


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="sam_photo")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--source", help="a source of masks, for the second table")
    parser.add_argument("--index", default=":", help="its images, a slice as in Python")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    predictor = sam_jax.SamPredictor(*sam_jax.load(args.weights))
    if args.peak:
        work, tiles = args.peak
        run(predictor, work, tiles)
        print(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])
        return
    print_times(predictor, args.weights, args.rounds)
    if args.source:
        print_agreement(predictor, select(open_source(args.source), args.index))


def print_times(predictor, weights, rounds):
    """Prints the first table."""
    print(f"{'':12}{'entire image':>14}{'tiles':>10}{'ratio':>8}{'encoded tiles':>15}", end="")
    print(f"{'peak memory':>14}{'ratio':>8}")
    for work in WORK:
        seconds = {tiles: [] for tiles in WAYS}
        for i in range(rounds + 1):
            for tiles in WAYS:
                start = time.perf_counter()
                used = run(predictor, work, tiles)
                if i > 0:  # the first round compiles
                    seconds[tiles].append(time.perf_counter() - start)
        entire, tiled = (statistics.median(seconds[tiles]) for tiles in WAYS)
        ratio = statistics.median(np.divide(seconds["auto"], seconds["none"]))
        peaks = [peak_memory(weights, work, tiles) for tiles in WAYS]
        print(f"{work:12}{entire:12.3f} s{tiled:8.3f} s{ratio:8.2f}{len(set(used)):15}", end="")
        print(f"{peaks[1]:10.0f} MiB{peaks[1] / peaks[0]:8.2f}", flush=True)


def run(predictor, work, tiles):
    """Sets the photograph, predicts the objects of WORK, and returns the tiles of the answers."""
    photo = read_image(PHOTO)
    height, width = photo.shape[:2]
    corners = np.random.default_rng(0).uniform(0, 1, (WORK[work], 2))
    corners *= (width - BOX_SIDE, height - BOX_SIDE)
    if "point" in work:
        prompts = [{"point_coords": [c + BOX_SIDE / 2], "point_labels": [1]} for c in corners]
    else:
        prompts = [{"box": [*c, *(c + BOX_SIDE)]} for c in corners]
    predictor.set_image(photo, tiles=tiles)
    predictor.predict_tiles(prompts)
    return predictor.tiles_used


def peak_memory(weights, work, tiles):
    """Returns the peak memory, in MiB, of a new process that does the work once."""
    command = [sys.executable, "-m", "tests.benchmarks.tiles", "--weights", weights]
    output = subprocess.run(
        [*command, "--peak", work, tiles], check=True, capture_output=True, text=True
    )
    return int(output.stdout) / 1024


def print_agreement(predictor, images):
    """Prints the second table."""
    rows = []  # share of the side, IoU of both ways, IoU of each way with the true mask
    for i in range(len(images)):
        example = images.source[images.indices[i]]
        masks = decode_masks(example.masks)
        boxes = box_prompts(masks)
        sides = (boxes[:, 2:] - boxes[:, :2]).max(axis=1)
        predicted = []
        for tiles in WAYS:
            predictor.set_image(example.image, tiles=tiles)
            outputs, scores, _ = predictor.predict_many([{"box": box} for box in boxes])
            predicted.append(outputs[np.arange(len(masks)), scores.argmax(axis=1)])
        rows += zip(
            sides / max(masks.shape[1:]),
            mask_iou(*predicted),
            *(mask_iou(output, masks) for output in predicted),
            strict=True,
        )
    table = np.array(rows)
    print(f"\n{'share of side':14}{'objects':>9}{'IoU of both ways':>18}", end="")
    print(f"{'IoU, entire image':>19}{'IoU, tiles':>12}")
    for low, high in itertools.pairwise(SHARES):
        group = table[(table[:, 0] >= low) & (table[:, 0] < high)]
        if len(group):
            both, entire, tiled = group[:, 1:].mean(axis=0)
            name = f"{low:.1f} to {min(high, 1):.1f}"
            print(f"{name:14}{len(group):9}{both:18.3f}{entire:19.3f}{tiled:12.3f}")


if __name__ == "__main__":
    main()
