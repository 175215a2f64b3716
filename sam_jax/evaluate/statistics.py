"""What the masks of a source are like: how many, how large, how concave, and where.

Source: Kirillov et al. 2023, section 5, figures 5 and 6. What the paper leaves unsaid, or differs:
- Its first bin of masks an image is "<10", and the next one begins at 11; ours is 0 to 10.
- A mask's centre is the mean of its pixels, over width and height of the image.
- The convex hull is that of pixels as squares: a filled rectangle has a concavity of exactly 0.
- Concavity is that of all masks. The paper compares data sets, and samples masks of each so that
  their sizes are alike.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from sam_jax.data.example import RLE, BadSample, Source
from sam_jax.data.validate import Finding, summarize
from sam_jax.evaluate.pairs import read_masks
from sam_jax.masks import rle
from sam_jax.masks.geometry import center, hull_area

COUNTS = ("0-10", "11-50", "51-100", "101-200", ">200")  # masks an image
AT_MOST = (10, 50, 100, 200)
BOUNDS = np.linspace(0, 1, 51)  # of bins of relative size and concavity; the last one includes 1
CENTER_BOUNDS = np.linspace(0, 1, 21)  # of both axes


@dataclasses.dataclass(frozen=True)
class Measured(Finding):
    """An image, usable or not, and what was measured of its masks.

    Attributes:
      values: 'n 4' float64: relative size, concavity, and x and y of the centre; each from 0 to 1.
    """

    values: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 4)))


def measure(source: Source, indices: Sequence[int]) -> Iterator[Measured]:
    """Measures the masks of images of a source, an image at a time."""
    for index in indices:
        name = source.name(index)
        try:
            values = [measure_mask(i, mask) for i, mask in enumerate(read_masks(source, index))]
        except BadSample as error:
            yield Measured(index, name, reason=error.reason, detail=error.detail)
        else:
            yield Measured(index, name, len(values), values=np.array(values).reshape(-1, 4))


def measure_mask(number: int, mask: RLE) -> tuple[float, float, float, float]:
    """Measures a mask of an image.

    Args:
      number: its index, to name it by; mask: run lengths.
    Returns:
      The root of its share of the image; the share of its hull that it leaves out; (x, y) of its
      centre, over the image's width and height.
    Raises:
      BadSample: if it is broken or empty.
    """
    try:
        area = rle.area(mask)
    except rle.RLEError as error:
        raise BadSample("broken mask", f"mask {number}: {error}") from error
    if not area:
        raise BadSample("empty mask", f"mask {number} has no pixels")
    (height, width), (x, y) = mask["size"], center(mask)
    size = float(np.sqrt(area / (height * width)))
    return size, 1 - area / hull_area(mask), x / width, y / height


def collect(measured: Iterable[Measured]) -> dict:
    """Histograms of what was measured, fit for JSON.

    Returns:
      What `sam_jax.data.validate.summarize` does, and {"masks_per_image": {"mean", "bins",
      "images"},
      "relative_size" and "concavity": {"mean", "bounds", "masks"}, "center": {"mean": [x, y],
      "bounds", "masks": a list for each bin of y, of a number for each bin of x}}, where "images"
      and "masks" are how many are in each bin.
    Raises:
      ValueError: if there is no mask at all.
    """
    found = list(measured)
    summary = summarize(found)
    if not summary["masks"]:
        raise ValueError(f"there is no mask to measure in {summary['samples']} images")
    counts = [one.masks for one in found if one.reason is None]
    images = np.bincount(np.searchsorted(AT_MOST, counts), minlength=len(COUNTS))
    values = np.concatenate([one.values for one in found])
    size, concavity, x, y = values.T
    histogram = lambda numbers: np.histogram(numbers, BOUNDS)[0].tolist()
    centers = np.histogram2d(y, x, (CENTER_BOUNDS, CENTER_BOUNDS))[0].astype(int)
    mean = [round(float(value), 4) for value in values.mean(axis=0)]
    bounds = BOUNDS.round(2).tolist()
    return summary | {
        "masks_per_image": {
            "mean": round(float(np.mean(counts)), 4),
            "bins": list(COUNTS),
            "images": images.tolist(),
        },
        "relative_size": {"mean": mean[0], "bounds": bounds, "masks": histogram(size)},
        "concavity": {"mean": mean[1], "bounds": bounds, "masks": histogram(concavity)},
        "center": {
            "mean": mean[2:],
            "bounds": CENTER_BOUNDS.round(2).tolist(),
            "masks": centers.tolist(),
        },
    }


def table(statistics: dict) -> str:
    """What `collect` returns, as lines for people."""
    samples, usable = statistics["samples"], statistics["usable"]
    count = statistics["masks_per_image"]
    x, y = statistics["center"]["mean"]
    means = {
        "masks an image": count["mean"],
        "relative size": statistics["relative_size"]["mean"],
        "concavity": statistics["concavity"]["mean"],
        "centre, x": x,
        "centre, y": y,
    }
    shares = ", ".join(
        f"{name} in {100 * images / usable:.0f} %"
        for name, images in zip(count["bins"], count["images"], strict=True)
    )
    lines = [f"{statistics['masks']} masks in {usable} of {samples} images, on average"]
    lines += [f"{name:16}{value:9.3f}" for name, value in means.items()]
    return "\n".join([*lines, f"masks an image: {shares}"])
