"""Statistics of the masks of a source: their number, relative size, concavity and position.

Source: Kirillov et al. 2023, section 5, figures 5 and 6.

Differences, and where the paper says nothing:
- The first bin of masks per image is "<10" in the paper, and the next one begins at 11; here the
  first one is 0 to 10.
- The center of a mask is the mean of its pixels, divided by the width and height of the image.
- The convex hull is that of pixels as squares, so a filled rectangle has a concavity of exactly 0.
- Concavity is that of all masks. The paper compares data sets, and samples the masks of each so
  that their sizes are distributed alike.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float

from sam_jax.data import validate
from sam_jax.data.example import RLE, BadSample, Source
from sam_jax.data.validate import Finding
from sam_jax.evaluate.pairs import read_masks
from sam_jax.masks import rle
from sam_jax.masks.geometry import center, hull_area

COUNT_BINS = ("0-10", "11-50", "51-100", "101-200", ">200")  # masks per image
COUNT_BIN_ENDS = (10, 50, 100, 200)  # inclusive
BIN_EDGES = np.linspace(0, 1, 51)  # of relative size, concavity and IoU; the last bin includes 1
CENTER_EDGES = np.linspace(0, 1, 21)  # of both axes


@dataclasses.dataclass(frozen=True)
class Measurement(Finding):
    """The measurements of one image.

    Attributes:
      values: Relative size, concavity, and x and y of the center of each mask, all from 0 to 1.
    """

    values: Float[np.ndarray, "n 4"] = dataclasses.field(default_factory=lambda: np.zeros((0, 4)))


def measure(source: Source, indices: Iterable[int]) -> Iterator[Measurement]:
    """Measures the masks of a source, image by image."""
    for index in indices:
        name = source.name(index)
        try:
            values = [measure_mask(i, mask) for i, mask in enumerate(read_masks(source, index))]
        except BadSample as error:
            yield Measurement(index, name, reason=error.reason, detail=error.detail)
        else:
            yield Measurement(index, name, len(values), values=np.array(values).reshape(-1, 4))


def measure_mask(number: int, mask: RLE) -> tuple[float, float, float, float]:
    """Measures a mask.

    Args:
      number: Its index in the image, for errors.
      mask: Its run lengths.

    Returns:
      The square root of its share of the image; the share of its convex hull that it does not
      cover; x of its center over the width of the image; y of its center over the height.

    Raises:
      BadSample: If it is broken or empty.
    """
    try:
        area = rle.area(mask)
    except rle.RLEError as error:
        raise BadSample("broken mask", f"mask {number}: {error}") from error
    if not area:
        raise BadSample("empty mask", f"mask {number} has no pixels")
    (height, width), (x, y) = mask["size"], center(mask)
    relative_size = float(np.sqrt(area / (height * width)))
    return relative_size, 1 - area / hull_area(mask), x / width, y / height


def summarize(measurements: Iterable[Measurement]) -> dict[str, Any]:
    """Computes means and histograms for JSON.

    Args:
      measurements: The result of `measure`.

    Returns:
      The result of `sam_jax.data.validate.summarize`, and {"masks_per_image": {"mean", "bins",
      "images": count in each bin}, "relative_size" and "concavity": {"mean", "bounds": edges of
      the bins, "masks": count in each bin}, "center": {"mean": [x, y], "bounds", "masks": for each
      bin of y, the count in each bin of x}}.

    Raises:
      ValueError: If there is no mask at all.
    """
    measurements = list(measurements)
    summary = validate.summarize(measurements)
    if not summary["masks"]:
        raise ValueError(f"there is no mask to measure in {summary['samples']} images")
    counts = [measurement.masks for measurement in measurements if measurement.reason is None]
    images = np.bincount(np.searchsorted(COUNT_BIN_ENDS, counts), minlength=len(COUNT_BINS))
    values = np.concatenate([measurement.values for measurement in measurements])
    size, concavity, x, y = values.T
    means = [round(float(mean), 4) for mean in values.mean(axis=0)]
    centers = np.histogram2d(y, x, (CENTER_EDGES, CENTER_EDGES))[0].astype(int)
    return summary | {
        "masks_per_image": {
            "mean": round(float(np.mean(counts)), 4),
            "bins": list(COUNT_BINS),
            "images": images.tolist(),
        },
        "relative_size": _histogram(size, means[0]),
        "concavity": _histogram(concavity, means[1]),
        "center": {
            "mean": means[2:],
            "bounds": CENTER_EDGES.round(2).tolist(),
            "masks": centers.tolist(),
        },
    }


def _histogram(values: Float[np.ndarray, " n"], mean: float) -> dict[str, Any]:
    return {
        "mean": mean,
        "bounds": BIN_EDGES.round(2).tolist(),
        "masks": np.histogram(values, BIN_EDGES)[0].tolist(),
    }


def format_table(statistics: dict[str, Any]) -> str:
    """Formats the result of `summarize` as text for a terminal."""
    samples, usable = statistics["samples"], statistics["usable"]
    count = statistics["masks_per_image"]
    x, y = statistics["center"]["mean"]
    means = {
        "masks per image": count["mean"],
        "relative size": statistics["relative_size"]["mean"],
        "concavity": statistics["concavity"]["mean"],
        "center, x": x,
        "center, y": y,
    }
    shares = ", ".join(
        f"{name} in {100 * images / usable:.0f} %"
        for name, images in zip(count["bins"], count["images"], strict=True)
    )
    lines = [f"{statistics['masks']} masks in {usable} of {samples} images; means:"]
    lines += [f"{name:16}{value:9.3f}" for name, value in means.items()]
    return "\n".join([*lines, f"masks per image: {shares}"])
