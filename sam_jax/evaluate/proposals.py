"""Average recall: the share of objects that the best k proposed masks of an image find.

Source: Kirillov et al. 2023, section 7.3 and appendix D.3, and `cocoeval.py` in cocodataset/cocoapi
with all categories as one (useCats = 0). For each of ten IoU thresholds from 0.5 to 0.95, the
proposals of an image are matched in order, best first: each finds the object with the highest IoU
among those not found yet, if the IoU reaches the threshold. The size of an object is its number of
pixels; as in COCO, an object on the border between two sizes belongs to both.

Differences: Proposals have no scores. They are a source of masks whose order is their ranking. In
the paper they are those of everything mode without crops, ordered by predicted IoU; where there are
more than 1000, the paper ranks them by the mean of predicted IoU and stability.
"""

import argparse
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from tqdm import tqdm

from sam_jax.data.example import RLE, BadSample, Source
from sam_jax.data.open import Subset, open_source, select
from sam_jax.data.sources.sa1b import Sa1b
from sam_jax.evaluate.pairs import MASKS_ONLY, pairwise_iou, read_masks
from sam_jax.masks import rle

NUM_PROPOSALS = (10, 100, 1000)  # the best k of an image, ascending
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
AREA_RANGES = {
    "all": (0, np.inf),
    "small": (0, 32**2),
    "medium": (32**2, 96**2),
    "large": (96**2, np.inf),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See `Evaluation`."""
    parser.description = (
        "Computes the average recall of proposed masks, as COCO does: the share of the objects "
        "that the best 10, 100 and 1000 masks of an image find."
    )
    parser.epilog = (
        "example: sam-jax evaluate proposals sa1b:masks/ --source coco:photos/ --json recall.json"
    )
    parser.add_argument(
        "proposals",
        metavar="PROPOSALS",
        help="a source of masks of the same images, the best of each image first; in sa1b:PATH, "
        "sa_7.json holds the masks for image 7 of the source",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """See `Evaluation`."""
    ground_truth = select(open_source(args.source, decode_size=MASKS_ONLY), args.index)
    proposals = open_source(args.proposals, decode_size=MASKS_ONLY)
    pairs = pair_images(proposals, ground_truth)
    print(f"{len(pairs)} of {len(ground_truth)} images have proposals")
    progress = tqdm(pairs, unit=" images", disable=None)
    scores = evaluate_proposals(proposals, ground_truth.source, progress)
    return {"proposals": args.proposals} | scores


def format_table(scores: dict[str, Any]) -> str:
    """See `Evaluation`."""
    lines = [f"average recall of the best proposals of {scores['images']} images"]
    header = "".join(f"{f'AR@{count}':>9}" for count in NUM_PROPOSALS)
    lines.append(f"{'':8}{'objects':>9}{header}")
    for name, count in scores["objects"].items():
        cells = [
            "" if recall is None else f"{recall:.3f}" for recall in scores["recall"][name].values()
        ]
        lines.append(f"{name:8}{count:9}{''.join(f'{cell:>9}' for cell in cells)}".rstrip())
    if scores["bad_samples"]:
        lines.append(f"{scores['bad_samples']} images could not be used and were left out")
    return "\n".join(lines)


def evaluate_proposals(
    proposals: Source, ground_truth: Source, pairs: Iterable[tuple[int, int]]
) -> dict[str, Any]:
    """Evaluates proposals on images.

    Args:
      proposals: A source of masks, the best of an image first; an image may have none.
      ground_truth: A source of the masks to be found.
      pairs: The index of each image in both sources, for example a progress bar over the result
        of `pair_images`.

    Returns:
      {"images": count, "objects": {"all": count, "small": ..., "medium": ..., "large": ...},
      "recall": {"all": {"10": average recall, "100": ..., "1000": ...}, ...}, "bad_samples":
      number of images that could not be used}. The recall is None if there is no object of a size.

    Raises:
      ValueError: If there is no object at all, or if an image differs in size between the sources.
    """
    num_objects = np.zeros(len(AREA_RANGES), np.int64)
    num_found = np.zeros((len(AREA_RANGES), len(NUM_PROPOSALS)))
    num_images = num_bad = 0
    for proposed_index, true_index in pairs:
        try:
            objects = read_masks(ground_truth, true_index)
            best = read_masks(proposals, proposed_index)[: NUM_PROPOSALS[-1]]
            iou = pairwise_iou(ground_truth.name(true_index), best, objects)
        except BadSample:
            num_bad += 1
            continue
        num_images += 1
        in_range = classify_by_area(objects)
        num_objects += in_range.sum(axis=1)
        num_found += count_found(match_proposals(iou, in_range))
    if not num_objects[0]:
        raise ValueError(f"there is no object to be found; {num_bad} images could not be used")
    return {
        "images": num_images,
        "objects": dict(zip(AREA_RANGES, num_objects.tolist(), strict=True)),
        "recall": {
            name: {
                str(k): round(float(found / count), 4) if count else None
                for k, found in zip(NUM_PROPOSALS, found_of_range, strict=True)
            }
            for name, count, found_of_range in zip(AREA_RANGES, num_objects, num_found, strict=True)
        },
        "bad_samples": num_bad,
    }


def pair_images(proposals: Source, ground_truth: Subset) -> list[tuple[int, int]]:
    """Finds the proposals of selected images.

    In files named as in SA-1B, `sa_7` belongs to image 7 of the source of `ground_truth`, as
    everything mode names them, so an unfinished run is evaluated on the images it has. Any other
    source must have all images, in the same order.

    Args:
      proposals: A source of masks.
      ground_truth: The selected images.

    Returns:
      The index in `proposals`, and in the source of `ground_truth`, of each image in both.

    Raises:
      ValueError: If there is no such image, or if the sources do not have the same images.
    """
    count = len(ground_truth.source)
    if isinstance(proposals, Sa1b):
        ids = proposals.ids
        if ids[-1] >= count:
            raise ValueError(
                f"proposals must be sa_0 to sa_{count - 1} for the {count} images in the source; "
                f"got sa_{ids[-1]}"
            )
    else:
        ids = np.arange(len(proposals))
        if len(proposals) != count:
            raise ValueError(
                "proposals must be of the same images in the same order; got "
                f"{len(proposals)} images with proposals, and {count} in the source"
            )
    common, positions, _ = np.intersect1d(ids, ground_truth.indices, return_indices=True)
    if not len(common):
        raise ValueError(f"none of the {len(ground_truth)} selected images has proposals")
    return list(zip(positions.tolist(), common.tolist(), strict=True))


def classify_by_area(masks: Sequence[RLE]) -> Bool[np.ndarray, "s n"]:
    """Returns which of n masks are in each of `AREA_RANGES`."""
    area = np.array([rle.area(mask) for mask in masks])
    return np.array([(least <= area) & (area <= most) for least, most in AREA_RANGES.values()])


def match_proposals(
    iou: Float[np.ndarray, "p n"], in_range: Bool[np.ndarray, "s n"]
) -> Bool[np.ndarray, "x s p"]:
    """Returns which proposals find an object.

    Args:
      iou: The IoU of p proposals, best first, with n objects.
      in_range: The objects of each size; sizes are matched independently.

    Returns:
      For each of x `IOU_THRESHOLDS` and each size, whether a proposal finds an object.
    """
    available = np.tile(in_range, (len(IOU_THRESHOLDS), 1, 1))
    finds = np.zeros((*available.shape[:2], len(iou)), bool)
    for i in np.flatnonzero((iou >= IOU_THRESHOLDS[0]).any(axis=1)):
        candidates = np.where(available & (iou[i] >= IOU_THRESHOLDS[:, None, None]), iou[i], 0)
        # COCO takes the last of several objects with the same IoU.
        best = candidates.shape[-1] - 1 - candidates[..., ::-1].argmax(axis=-1)
        finds[..., i] = candidates.any(axis=-1)
        x, s = np.nonzero(finds[..., i])
        available[x, s, best[x, s]] = False
    return finds


def count_found(finds: Bool[np.ndarray, "x s p"]) -> Float[np.ndarray, "s k"]:
    """Counts the objects that the best proposals find, averaged over `IOU_THRESHOLDS`.

    Args:
      finds: See `match_proposals`.

    Returns:
      For each size and each of `NUM_PROPOSALS`, the mean number of objects found.
    """
    counts = [finds[..., :k].sum(axis=-1).mean(axis=0) for k in NUM_PROPOSALS]
    return np.stack(counts, axis=-1)
