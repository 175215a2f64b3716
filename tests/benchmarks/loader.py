"""Times the preparation of samples against a baseline: `python -m tests.benchmarks.loader`.

The samples are JPEG files of 1500 x 2250 pixels with 100 masks as run lengths, in memory. The
result is an image padded to 1024 x 1024 pixels and 64 of its masks at this size. The baseline is a
direct implementation with Pillow and pycocotools: it decodes and resizes the image, decodes each
mask at its full size, and resizes it.

Everything runs on one core, and the times are CPU times of the process. In each round, the
implementations are timed one after the other. The table shows medians over the rounds, and medians
of the ratios of each round. Results are compared before anything is timed: images must be equal,
and masks must be equal except at ties of the nearest neighbor.
"""

import argparse
import dataclasses
import io
import os
import statistics
import sys
import time

import numpy as np
import pycocotools.mask
from PIL import Image

from sam_jax.data.example import Example
from sam_jax.data.segmentation_batch import MAX_AREA, SegmentationTransform
from sam_jax.images.read import read_image
from sam_jax.images.resize import fit_size
from sam_jax.masks import rle

FRAME = (1024, 1024)  # the padded image
SIZE = (1500, 2250)
NUM_MASKS, MASKS_PER_IMAGE = 100, 64
AREAS = (100, 0.4 * SIZE[0] * SIZE[1])  # pixels of the smallest and of the largest mask
JPEG_QUALITY = 90


@dataclasses.dataclass(frozen=True)
class Sample:
    """An image and its masks.

    Attributes:
      jpeg: The content of a JPEG file.
      masks: Run lengths.
    """

    jpeg: bytes
    masks: list


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])

    samples = [make_sample(np.random.default_rng(i)) for i in range(args.images)]
    describe(samples)
    compare(samples)
    functions = {
        "baseline": baseline,
        "baseline, transposed masks": lambda sample: baseline(sample, transposed=True),
        "sam_jax": sam_jax_prepare,
        "sam_jax, JPEG at half size": lambda sample: sam_jax_prepare(sample, decode_size=FRAME),
        "baseline, only the image": baseline_image,
    }
    times = {name: [] for name in functions}
    for _ in range(args.rounds):
        for name, function in functions.items():
            start = time.process_time()
            for sample in samples:
                function(sample)
            times[name].append((time.process_time() - start) / len(samples))
    print(f"\n{args.rounds} rounds of {len(samples)} images, one core")
    print(f"{'':26}{'images/s':>10}   CPU ms per image [min, max]     baseline / this")
    for name, t in times.items():
        ratio = statistics.median(np.divide(times["baseline"], t))
        ms = [1e3 * x for x in (statistics.median(t), min(t), max(t))]
        spread = f"{ms[0]:.1f} [{ms[1]:.1f}, {ms[2]:.1f}]"
        print(f"{name:26}{1e3 / ms[0]:10.2f}   {spread:29}{ratio:16.2f}")


def sam_jax_prepare(sample, decode_size=None):
    """Prepares a sample as the loader does; every call chooses the same masks."""
    example = Example(image=read_image(sample.jpeg, decode_size), masks=sample.masks)
    return SegmentationTransform(FRAME, MASKS_PER_IMAGE)(example, np.random.default_rng(0))


def baseline(sample, transposed=False):
    """Prepares a sample with Pillow and pycocotools; its masks are 'n h w' bool.

    Masks of pycocotools are in column-major order, and Pillow needs row-major order. Resizing the
    transposed mask (`transposed`) avoids a slow copy.
    """
    image, size = baseline_image(sample)
    masks = np.zeros((MASKS_PER_IMAGE, *FRAME), bool)
    count = 0
    for i in np.random.default_rng(0).permutation(len(sample.masks)):
        if count == MASKS_PER_IMAGE:
            break
        if pycocotools.mask.area(sample.masks[i]) > MAX_AREA * np.prod(SIZE):
            continue
        mask = pycocotools.mask.decode(sample.masks[i])
        if transposed:
            mask = np.asarray(Image.fromarray(mask.T).resize(size, Image.Resampling.NEAREST)).T
        else:
            mask = Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST)
            mask = np.asarray(mask)
        if mask.any():
            masks[count, : size[0], : size[1]] = mask
            count += 1
    return {"image": image, "masks": masks}


def baseline_image(sample):
    """Returns the padded image and its (height, width) without padding."""
    image = Image.open(io.BytesIO(sample.jpeg)).convert("RGB")
    size = fit_size((image.height, image.width), FRAME)
    padded = np.zeros((*FRAME, 3), np.uint8)
    padded[: size[0], : size[1]] = image.resize(size[::-1], Image.Resampling.BILINEAR)
    return padded, size


def compare(samples):
    """Exits if the results of the baseline and of sam_jax differ, except at ties."""
    height, width = fit_size(SIZE, FRAME)
    tie = np.zeros(FRAME, bool)
    tie[:height][is_tie(SIZE[0], height)] = True
    tie[:, :width][:, is_tie(SIZE[1], width)] = True
    num_different = num_pixels = 0
    for sample in samples:
        actual, expected = sam_jax_prepare(sample), baseline(sample)
        if not np.array_equal(actual["image"], expected["image"]):
            sys.exit("the images differ")
        masks = np.unpackbits(actual["masks"], axis=-1).astype(bool)
        difference = masks != expected["masks"]
        if (difference & ~tie).any():
            sys.exit("the masks differ where the nearest pixel is unique")
        num_different += np.count_nonzero(difference)
        num_pixels += np.count_nonzero(masks)
    print(
        f"images are equal; masks differ in {num_different / num_pixels:.1e} of their pixels, all "
        f"of which are ties of the nearest neighbor"
    )


def is_tie(size, new_size):
    """Returns where two pixels of an axis of `size` are equally near, as 'new_size' bool."""
    return (2 * np.arange(new_size) + 1) * size % (2 * new_size) == 0


def describe(samples):
    """Prints the sizes of the files and of the masks."""
    jpeg = np.mean([len(sample.jpeg) for sample in samples]) / 1e6
    lengths = [len(mask["counts"]) for sample in samples for mask in sample.masks]
    areas = [rle.area(mask) for sample in samples for mask in sample.masks]
    print(
        f"JPEG files: {jpeg:.2f} MB on average. Run lengths: {np.mean(lengths):.0f} characters on "
        f"average, {np.median(lengths):.0f} in the median, {max(lengths)} at most. Masks: "
        f"{np.median(areas):.0f} pixels in the median, {np.mean(areas) / np.prod(SIZE):.1%} of the "
        f"image on average."
    )


def make_sample(rng):
    image = io.BytesIO()
    Image.fromarray(draw_texture(rng)).save(image, "JPEG", quality=JPEG_QUALITY)
    masks = [rle.encode(draw_blob(rng)) for _ in range(NUM_MASKS)]
    return Sample(jpeg=image.getvalue(), masks=masks)


def draw_texture(rng):
    """Returns noise 'h w 3' uint8 at several scales; coarser noise has a larger amplitude."""
    image = np.zeros((*SIZE, 3), np.float32)
    for cell in (256, 64, 16, 4, 1):
        shape = (-(-SIZE[0] // cell), -(-SIZE[1] // cell), 3)
        noise = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        noise = noise.resize(SIZE[::-1], Image.Resampling.BICUBIC)
        image += (np.asarray(noise, np.float32) - 128) * cell**0.2
    image *= 50 / image.std()
    return np.clip(image + 128, 0, 255).astype(np.uint8)


def draw_blob(rng):
    """Returns a mask 'h w' bool of a lobed region with an irregular outline."""
    mask = np.zeros(SIZE, bool)
    radius = np.sqrt(np.exp(rng.uniform(*np.log(AREAS))) / np.pi)
    cy, cx = rng.uniform(0, 1, 2) * SIZE
    angles = np.linspace(0, 2 * np.pi, 1 << 12, endpoint=False)
    waves = np.arange(2, 200)
    outline = (
        rng.normal(0, 0.3, waves.shape)
        / waves
        @ np.cos(waves[:, None] * angles + rng.uniform(0, 2 * np.pi, waves.shape)[:, None])
    )
    outline = radius * np.exp(outline) + rng.normal(0, 0.7, angles.shape)  # makes it irregular
    box = [slice(max(0, int(c - 3 * radius)), int(c + 3 * radius) + 2) for c in (cy, cx)]
    y, x = (np.arange(n)[part] - c for n, part, c in zip(SIZE, box, (cy, cx), strict=True))
    y = y[:, None]
    angle = np.arctan2(y, x) % (2 * np.pi) / (2 * np.pi) * len(angles)
    mask[*box] = np.hypot(y, x) <= outline[angle.astype(int) % len(angles)]
    return mask


if __name__ == "__main__":
    main()
