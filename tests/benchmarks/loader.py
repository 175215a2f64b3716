"""Times the preparation of samples against a naive one: `python -m tests.benchmarks.loader`.

One core, and JPEG files of 1500 x 2250 pixels with about 100 masks as run lengths, in memory; both
give an image in a frame of 1024 and 64 of its masks there. The naive way is what one would write
with Pillow and pycocotools: decode, resize, paint whole masks, resize them. The two take turns; a
row is the median over the turns, a ratio the median of the turns' ratios. Time is what the process
spends on the core, as nothing here waits. Results are compared before anything is timed: images to
equality, masks up to ties of the nearest neighbour.
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

FRAME = (1024, 1024)
SIZE = (1500, 2250)
NUM_MASKS, MASKS_PER_IMAGE = 100, 64
AREAS = (100, 0.4 * SIZE[0] * SIZE[1])  # pixels of the smallest and the largest mask
JPEG_QUALITY = 90


@dataclasses.dataclass(frozen=True)
class Sample:
    """A file's bytes, and its masks."""

    jpeg: bytes
    masks: list


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--turns", type=int, default=7)
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])

    samples = [make_sample(np.random.default_rng(i)) for i in range(args.images)]
    describe(samples)
    compare(samples)
    ways = {
        "naive": naive,
        "naive, masks transposed": lambda sample: naive(sample, transposed=True),
        "ours": ours,
        "ours, JPEG at half size": lambda sample: ours(sample, decode_size=FRAME),
        "both, image alone": naive_image,
    }
    times = {name: [] for name in ways}
    for _ in range(args.turns):
        for name, way in ways.items():
            began = time.process_time()
            for sample in samples:
                way(sample)
            times[name].append((time.process_time() - began) / len(samples))
    print(f"\n{args.turns} turns of {len(samples)} images, one core")
    print(f"{'':26}{'images/s':>10}   CPU ms an image [least, most]     naive / this")
    for name, t in times.items():
        ratio = statistics.median(np.divide(times["naive"], t))
        ms = [1e3 * x for x in (statistics.median(t), min(t), max(t))]
        spread = f"{ms[0]:.1f} [{ms[1]:.1f}, {ms[2]:.1f}]"
        print(f"{name:26}{1e3 / ms[0]:10.2f}   {spread:30}{ratio:15.2f}")


def ours(sample, decode_size=None):
    """The loader's preparation; every call draws the same masks."""
    example = Example(image=read_image(sample.jpeg, decode_size), masks=sample.masks)
    return SegmentationTransform(FRAME, MASKS_PER_IMAGE)(example, np.random.default_rng(0))


def naive(sample, transposed=False):
    """The same, with 'n h w' bool masks.

    pycocotools paints by columns and Pillow wants rows: to resize a mask `transposed` saves a copy
    in an order that memory dislikes, if one knows of it.
    """
    image, size = naive_image(sample)
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


def naive_image(sample):
    """The image in the frame, and the (height, width) that it fills."""
    image = Image.open(io.BytesIO(sample.jpeg)).convert("RGB")
    size = fit_size((image.height, image.width), FRAME)
    padded = np.zeros((*FRAME, 3), np.uint8)
    padded[: size[0], : size[1]] = image.resize(size[::-1], Image.Resampling.BILINEAR)
    return padded, size


def compare(samples):
    """Nobody may be fast and wrong."""
    height, width = fit_size(SIZE, FRAME)
    tie = np.zeros(FRAME, bool)
    tie[:height][is_tie(SIZE[0], height)] = True
    tie[:, :width][:, is_tie(SIZE[1], width)] = True
    differing = painted = 0
    for sample in samples:
        got, expected = ours(sample), naive(sample)
        if not np.array_equal(got["image"], expected["image"]):
            sys.exit("the images differ")
        masks = np.unpackbits(got["masks"], axis=-1).astype(bool)
        difference = masks != expected["masks"]
        if (difference & ~tie).any():
            sys.exit("the masks differ, and not only where two pixels are as near")
        differing += np.count_nonzero(difference)
        painted += np.count_nonzero(masks)
    print(
        f"images are equal; masks differ in {differing / painted:.1e} of their pixels, all of them "
        f"ties of the nearest neighbour"
    )


def is_tie(size, new_size):
    """'new_size': whether two pixels of an axis of `size` are equally near."""
    return (2 * np.arange(new_size) + 1) * size % (2 * new_size) == 0


def describe(samples):
    jpeg = np.mean([len(sample.jpeg) for sample in samples]) / 1e6
    lengths = [len(mask["counts"]) for sample in samples for mask in sample.masks]
    areas = [rle.area(mask) for sample in samples for mask in sample.masks]
    print(
        f"JPEG of {jpeg:.2f} MB on average; run lengths of {np.mean(lengths):.0f} characters on "
        f"average, {np.median(lengths):.0f} in the median, {max(lengths)} at most; masks of "
        f"{np.median(areas):.0f} pixels in the median, {np.mean(areas) / np.prod(SIZE):.1%} of the "
        f"image on average"
    )


def make_sample(rng):
    image = io.BytesIO()
    Image.fromarray(draw_texture(rng)).save(image, "JPEG", quality=JPEG_QUALITY)
    masks = [rle.encode(draw_blob(rng)) for _ in range(NUM_MASKS)]
    return Sample(jpeg=image.getvalue(), masks=masks)


def draw_texture(rng):
    """Noise of all scales, 'h w 3' uint8; the coarser, the stronger."""
    image = np.zeros((*SIZE, 3), np.float32)
    for cell in (256, 64, 16, 4, 1):
        shape = (-(-SIZE[0] // cell), -(-SIZE[1] // cell), 3)
        noise = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        noise = noise.resize(SIZE[::-1], Image.Resampling.BICUBIC)
        image += (np.asarray(noise, np.float32) - 128) * cell**0.2
    image *= 50 / image.std()
    return np.clip(image + 128, 0, 255).astype(np.uint8)


def draw_blob(rng):
    """A lobed region with a ragged outline, 'h w' bool, cut off at the image's border."""
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
    outline = radius * np.exp(outline) + rng.normal(0, 0.7, angles.shape)  # ragged
    box = [slice(max(0, int(c - 3 * radius)), int(c + 3 * radius) + 2) for c in (cy, cx)]
    y, x = (np.arange(n)[part] - c for n, part, c in zip(SIZE, box, (cy, cx), strict=True))
    y = y[:, None]
    angle = np.arctan2(y, x) % (2 * np.pi) / (2 * np.pi) * len(angles)
    mask[*box] = np.hypot(y, x) <= outline[angle.astype(int) % len(angles)]
    return mask


if __name__ == "__main__":
    main()
