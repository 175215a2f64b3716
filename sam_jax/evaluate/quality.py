"""The agreement of two annotations of the same images, such as masks and their corrections.

Source: Kirillov et al. 2023, section 5, "Mask quality": professionals corrected all masks of 500
images, and the paper reports the share of pairs of a mask and its correction whose IoU is above
0.9, and above 0.75.

Differences: It is not known which mask was made from which. Masks are matched one to one, so that
the sum of the IoUs in an image is the largest possible. Two masks without a common pixel are not
matched, and unmatched masks are counted separately.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment

from sam_jax.data import validate
from sam_jax.data.example import BadSample, Source
from sam_jax.data.validate import Finding
from sam_jax.evaluate.pairs import pairwise_iou, read_masks
from sam_jax.evaluate.statistics import BIN_EDGES

IOU_THRESHOLDS = (0.9, 0.75)


@dataclasses.dataclass(frozen=True)
class Comparison(Finding):
    """The agreement in one image. `masks` is the number of matched pairs.

    Attributes:
      iou: The IoU of each pair.
      unmatched: The number of unmatched masks in the first source, and in the second.
    """

    iou: Float[np.ndarray, " p"] = dataclasses.field(default_factory=lambda: np.zeros(0))
    unmatched: tuple[int, int] = (0, 0)


def compare(first: Source, second: Source, indices: Iterable[int]) -> Iterator[Comparison]:
    """Compares two sources image by image.

    Args:
      first: A source.
      second: A source of the same images in the same order.
      indices: The images to compare.

    Returns:
      An iterator over the comparisons.

    Raises:
      ValueError: At once if the numbers of images differ, and while iterating if an image differs
        in size between the sources.
    """
    if len(first) != len(second):
        raise ValueError(
            "two sources must have the same images in the same order to be compared; got "
            f"{len(first)} images and {len(second)}"
        )
    return (compare_image(first, second, index) for index in indices)


def compare_image(first: Source, second: Source, index: int) -> Comparison:
    """Matches the masks of an image in two sources."""
    name = first.name(index)
    try:
        first_masks, second_masks = read_masks(first, index), read_masks(second, index)
        iou = match_masks(pairwise_iou(name, first_masks, second_masks))
    except BadSample as error:
        return Comparison(index, name, reason=error.reason, detail=error.detail)
    unmatched = len(first_masks) - len(iou), len(second_masks) - len(iou)
    return Comparison(index, name, len(iou), iou=iou, unmatched=unmatched)


def match_masks(iou: Float[np.ndarray, "n k"]) -> Float[np.ndarray, " p"]:
    """Returns the IoU of each pair of a one-to-one matching with the largest sum of IoUs."""
    matched = iou[linear_sum_assignment(iou, maximize=True)]
    return matched[matched > 0]


def summarize(comparisons: Iterable[Comparison]) -> dict[str, Any]:
    """Summarizes comparisons for JSON.

    Args:
      comparisons: The result of `compare`.

    Returns:
      {"samples", "usable", "reasons", "bad": see `sam_jax.data.validate.summarize`, "pairs":
      count, "alone": unmatched masks [in the first source, in the second], "above": {"0.9": share
      of the pairs, "0.75": share}, "mean_iou", "iou": {"bounds": edges of the bins, "pairs": count
      in each bin}}.

    Raises:
      ValueError: If no masks are matched.
    """
    comparisons = list(comparisons)
    summary = validate.summarize(comparisons)
    num_pairs = summary.pop("masks")
    if not num_pairs:
        raise ValueError(
            f"no two masks overlap in {summary['usable']} images of both sources: they must be of "
            "the same images in the same order"
        )
    iou = np.concatenate([comparison.iou for comparison in comparisons])
    unmatched = np.sum([comparison.unmatched for comparison in comparisons], axis=0)
    return summary | {
        "pairs": num_pairs,
        "alone": unmatched.tolist(),
        "above": {
            str(threshold): round(float(np.mean(iou > threshold)), 4)
            for threshold in IOU_THRESHOLDS
        },
        "mean_iou": round(float(iou.mean()), 4),
        "iou": {
            "bounds": BIN_EDGES.round(2).tolist(),
            "pairs": np.histogram(iou, BIN_EDGES)[0].tolist(),
        },
    }


def format_table(quality: dict[str, Any]) -> str:
    """Formats the result of `summarize` as text for a terminal."""
    shares = ", ".join(
        f"{100 * share:.1f} % above {threshold}" for threshold, share in quality["above"].items()
    )
    first, second = quality["alone"]
    lines = [
        f"{quality['pairs']} matched pairs of masks in {quality['usable']} images of both sources",
        f"IoU of a pair: {shares}, mean {quality['mean_iou']:.3f}",
        f"unmatched: {first} masks of the first source, {second} of the second",
    ]
    return "\n".join(lines)
