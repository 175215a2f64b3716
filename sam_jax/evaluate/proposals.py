"""Average recall of proposed masks: how many objects the best k masks of an image find.

Source: Kirillov et al. 2023, section 7.3 and appendix D.3, and `cocoeval.py` in cocodataset/cocoapi
with all categories as one (useCats = 0). For each of ten IoUs from 0.5 to 0.95, the proposals of an
image, best first, each find the object with the highest IoU of those that none before has found, if
it is no lower. An object's size is its number of pixels; as in COCO, one on the border between two
sizes is of both.

Deliberate difference: proposals have no scores. They are a source of masks, whose order is their
ranking. The paper's are those of everything mode without crops, which puts the highest predicted
IoU first; where there are more than 1000, the paper ranks by the mean of that and of stability.
"""

from collections.abc import Sequence

import numpy as np

from sam_jax.data.example import RLE, BadSample, Source
from sam_jax.data.open import Subset
from sam_jax.data.sources.sa1b import Sa1b
from sam_jax.evaluate.pairs import iou_of_both, read_masks
from sam_jax.masks import rle

TOP = (10, 100, 1000)  # how many proposals of an image are looked at, ascending
THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of the IoU
AREAS = {
    "all": (0, np.inf),
    "small": (0, 32**2),
    "medium": (32**2, 96**2),
    "large": (96**2, np.inf),
}


def evaluate_proposals(proposals: Source, truths: Source, pairs: Sequence[tuple[int, int]]) -> dict:
    """Evaluates proposals on images.

    Args:
      proposals: a source of masks, the best of an image first; an image may have none.
      truths: a source of the masks that should be found.
      pairs: the index of each image in both, e.g. a tqdm bar over what `pair_images` returns.
    Returns:
      {"images": count, "objects": {"all": count, "small": ..., "medium": ..., "large": ...},
      "recall": {"all": {"10": average recall, "100": ..., "1000": ...}, ...}, "bad_samples": how
      many images could not be read}; the recall is None where there is no object of a size.
    Raises:
      ValueError: if there is no object at all, or if an image has different sizes in both.
    """
    objects = np.zeros(len(AREAS), np.int64)
    found = np.zeros((len(AREAS), len(TOP)))
    bad = 0
    for proposed, true in pairs:
        try:
            masks = read_masks(truths, true)
            best = read_masks(proposals, proposed)[: TOP[-1]]
            iou = iou_of_both(truths.name(true), best, masks)
        except BadSample:
            bad += 1
            continue
        of_size = sizes_of(masks)
        objects += of_size.sum(axis=1)
        found += count_found(find(iou, of_size))
    if not objects[0]:
        raise ValueError(f"there is no object to be found; {bad} images could not be read")
    recall = {
        name: {
            str(top): round(float(number / count), 4) if count else None
            for top, number in zip(TOP, numbers, strict=True)
        }
        for name, count, numbers in zip(AREAS, objects, found, strict=True)
    }
    return {
        "images": len(pairs) - bad,
        "objects": dict(zip(AREAS, objects.tolist(), strict=True)),
        "recall": recall,
        "bad_samples": bad,
    }


def table(scores: dict) -> str:
    """What `evaluate_proposals` returns, as lines for people."""
    lines = [f"average recall of the best proposals of {scores['images']} images"]
    lines.append(f"{'':8}{'objects':>9}" + "".join(f"{f'AR@{top}':>9}" for top in TOP))
    for name, count in scores["objects"].items():
        recall = scores["recall"][name].values()
        numbers = "".join(f"{'' if ar is None else f'{ar:.3f}':>9}" for ar in recall)
        lines.append(f"{name:8}{count:9}{numbers}".rstrip())
    if scores["bad_samples"]:
        lines.append(f"{scores['bad_samples']} images could not be read and are left out")
    return "\n".join(lines)


def pair_images(proposals: Source, truths: Subset) -> list[tuple[int, int]]:
    """Finds the proposals of selected images.

    Of files of SA-1B's kind, `sa_7` is for image 7 of the source of `truths`, as everything mode
    names them, so that a labelling that has not come to its end is evaluated on what it has. Any
    other source must have all images, in the same order.

    Returns:
      The index in `proposals`, and in the source of `truths`, of each selected image of both.
    Raises:
      ValueError: if there is none, or if they are not of the same images.
    """
    count = len(truths.source)
    if isinstance(proposals, Sa1b):
        ids = proposals.ids
        if ids[-1] >= count:
            raise ValueError(
                f"proposals sa_0 to sa_{count - 1} are those of the {count} images in the source; "
                f"got sa_{ids[-1]}"
            )
    else:
        ids = np.arange(len(proposals))
        if len(proposals) != count:
            raise ValueError(
                "proposals must be of the same images in the same order; got "
                f"{len(proposals)} images with proposals, and {count} in the source"
            )
    both, proposed, _ = np.intersect1d(ids, truths.indices, return_indices=True)
    if not len(both):
        raise ValueError(f"none of the {len(truths)} selected images has proposals")
    return list(zip(proposed.tolist(), both.tolist(), strict=True))


def sizes_of(masks: Sequence[RLE]) -> np.ndarray:
    """Which of n masks are of each of AREAS -> 's n' bool."""
    area = np.array([rle.area(mask) for mask in masks])
    return np.array([(least <= area) & (area <= most) for least, most in AREAS.values()])


def find(iou: np.ndarray, of_size: np.ndarray) -> np.ndarray:
    """Which proposals find an object.

    Args:
      iou: 'p n' of p proposals, best first, and n objects.
      of_size: 's n' bool; the objects of each size are looked for apart.
    Returns:
      'x s p' bool, for each of THRESHOLDS.
    """
    free = np.tile(of_size, (len(THRESHOLDS), 1, 1))
    found = np.zeros((*free.shape[:2], len(iou)), bool)
    for i in np.flatnonzero((iou >= THRESHOLDS[0]).any(axis=1)):
        fits = np.where(free & (iou[i] >= THRESHOLDS[:, None, None]), iou[i], 0)
        best = fits.shape[-1] - 1 - fits[..., ::-1].argmax(axis=-1)  # of equals COCO takes the last
        found[..., i] = fits.any(axis=-1)
        x, s = np.nonzero(found[..., i])
        free[x, s, best[x, s]] = False
    return found


def count_found(found: np.ndarray) -> np.ndarray:
    """How many objects the best of each of TOP find.

    Args:
      found: 'x s p', see `find`.
    Returns:
      's t' float64, the mean over THRESHOLDS.
    """
    return np.stack([found[..., :top].sum(axis=-1).mean(axis=0) for top in TOP], axis=-1)
