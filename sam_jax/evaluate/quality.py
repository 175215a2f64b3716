"""How well two annotations of the same images agree, as masks do with their corrections.

Source: Kirillov et al. 2023, section 5, "Mask quality": professionals corrected all masks of 500
images, and the shares are given of the pairs, a mask and its correction, whose IoU is above 0.9 and
above 0.75. Deliberate difference: which mask was made from which is not asked. Masks are paired one
to one, so that the sum of the IoUs in an image is the largest there is; two masks without a common
pixel are no pair, and masks that are left without a partner are counted apart.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from sam_jax.data.example import BadSample, Source
from sam_jax.data.validate import Finding, summarize
from sam_jax.evaluate.pairs import iou_of_both, read_masks
from sam_jax.evaluate.statistics import BOUNDS

ABOVE = (0.9, 0.75)


@dataclasses.dataclass(frozen=True)
class Compared(Finding):
    """An image, usable in both sources or not; `masks` are its pairs.

    Attributes:
      iou: 'p' float64, of the pairs.
      alone: how many masks of the first source have no partner, and how many of the second.
    """

    iou: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    alone: tuple[int, int] = (0, 0)


def compare(first: Source, second: Source, indices: Sequence[int]) -> Iterator[Compared]:
    """Compares images of two sources, one at a time.

    Args:
      first, second: sources of the same images in the same order; indices: which images.
    Raises:
      ValueError: at once if the numbers of images differ, and later if the sizes of one do.
    """
    if len(first) != len(second):
        raise ValueError(
            "two sources must have the same images in the same order to be compared; got "
            f"{len(first)} images and {len(second)}"
        )
    return (compare_image(first, second, index) for index in indices)


def compare_image(first: Source, second: Source, index: int) -> Compared:
    """Pairs the masks of an image in two sources."""
    name = first.name(index)
    try:
        masks = read_masks(first, index), read_masks(second, index)
        iou = pair(iou_of_both(name, *masks))
    except BadSample as error:
        return Compared(index, name, reason=error.reason, detail=error.detail)
    alone = len(masks[0]) - len(iou), len(masks[1]) - len(iou)
    return Compared(index, name, len(iou), iou=iou, alone=alone)


def pair(iou: np.ndarray) -> np.ndarray:
    """The IoUs 'p' of the pairs of n and k masks with the IoU 'n k', whose sum is the largest."""
    best = iou[linear_sum_assignment(iou, maximize=True)]
    return best[best > 0]


def collect(compared: Iterable[Compared]) -> dict:
    """How well pairs agree, fit for JSON.

    Returns:
      {"samples", "usable": how many images, "reasons", "bad": see
      `sam_jax.data.validate.summarize`,
      "pairs": how many, "alone": [in the first source, in the second], "above": {"0.9": share of
      the pairs, "0.75": share}, "mean_iou", "iou": {"bounds", "pairs": how many in each bin}}.
    Raises:
      ValueError: if there is no pair.
    """
    found = list(compared)
    summary = summarize(found)
    pairs = summary.pop("masks")
    if not pairs:
        raise ValueError(
            f"no two masks overlap in {summary['usable']} images of both sources: they must be of "
            "the same images in the same order"
        )
    iou = np.concatenate([one.iou for one in found])
    return summary | {
        "pairs": pairs,
        "alone": [sum(one.alone[i] for one in found) for i in (0, 1)],
        "above": {str(least): round(float(np.mean(iou > least)), 4) for least in ABOVE},
        "mean_iou": round(float(iou.mean()), 4),
        "iou": {
            "bounds": BOUNDS.round(2).tolist(),
            "pairs": np.histogram(iou, BOUNDS)[0].tolist(),
        },
    }


def table(quality: dict) -> str:
    """What `collect` returns, as lines for people."""
    shares = ", ".join(
        f"{100 * share:.1f} % above {least}" for least, share in quality["above"].items()
    )
    first, second = quality["alone"]
    return "\n".join([
        f"{quality['pairs']} pairs of masks in {quality['usable']} images of both sources",
        f"IoU of a pair: {shares}, {quality['mean_iou']:.3f} on average",
        f"without a partner: {first} masks of the first source, {second} of the second",
    ])  # fmt: skip
