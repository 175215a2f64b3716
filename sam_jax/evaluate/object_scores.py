"""Scores of single objects, and their summary.

Differences from the paper, which reports the mean over all objects: A mask is also compared with
its filled box, which a model that is prompted with boxes must beat. Large objects are also averaged
on their own. The predicted IoU is compared with the true one.
"""

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Float64, Int64, Shaped

from sam_jax.masks.boxes import box_of_mask
from sam_jax.masks.clicks import center_click

NUM_CLICKS = (1, 2, 3, 5, 9)  # after which the IoU is measured
PROMPTS = (*map(str, NUM_CLICKS), "box")
LARGE_AREA = 0.01  # fraction of the image, from which on an object is large
CALIBRATED = ("1", "box")  # prompts with several outputs, which the predicted IoU chooses from
CALIBRATION_BINS = 10


class PromptScores(NamedTuple):
    """Scores of n objects for each of PROMPTS, all of them seen in the same way.

    Attributes:
      chosen: The IoU of the output with the highest predicted IoU.
      oracle: The IoU of the best output.
      predicted: The predicted IoU of the chosen output.
      bound: See `resolution_bound`, for the tile in which the box is answered.
    """

    chosen: Float[np.ndarray, "n prompts"]
    oracle: Float[np.ndarray, "n prompts"]
    predicted: Float[np.ndarray, "n prompts"]
    bound: Float[np.ndarray, " n"]


class ObjectScores(NamedTuple):
    """Scores of n objects.

    Attributes:
      image: The name of the image.
      mask: The index of the mask in its image.
      area: The area as a fraction of the image.
      fill: The IoU of the mask with its own filled box.
      ceiling: See `one_click_upper_bound`.
      entire: The scores when the model sees the entire image.
      tiled: The scores when the model sees each object in a tile; None if not measured.
    """

    image: Shaped[np.ndarray, " n"]
    mask: Int64[np.ndarray, " n"]
    area: Float[np.ndarray, " n"]
    fill: Float[np.ndarray, " n"]
    ceiling: Float[np.ndarray, " n"]
    entire: PromptScores
    tiled: PromptScores | None


def fill_of_masks(masks: Bool[np.ndarray, "n h w"]) -> Float64[np.ndarray, " n"]:
    """Computes the IoU of each mask, none of them empty, with its own filled bounding box."""
    left, top, right, bottom = box_of_mask(masks).T
    return masks.sum(axis=(1, 2)) / ((right - left + 1) * (bottom - top + 1))


def one_click_upper_bound(masks: Bool[np.ndarray, "n h w"]) -> list[float]:
    """Returns the IoUs that are possible after one click on each mask of an image.

    A predictor that knows all masks does not know which of those under the click is meant. Its
    best answer is the one with the highest mean IoU over them. On average no predictor can do
    better, if each of them is equally likely.

    Args:
      masks: All masks of the image, none of them empty.
    """
    area = masks.sum(axis=(1, 2))
    flat = masks.reshape(len(masks), -1).astype(np.float32)
    intersection = flat @ flat.T
    iou = intersection / (area[:, None] + area - intersection)
    result = []
    for i, mask in enumerate(masks):
        x, y, _ = center_click(mask)
        under_click = np.flatnonzero(masks[:, y, x])
        answer = under_click[np.argmax(iou[np.ix_(under_click, under_click)].mean(axis=1))]
        result.append(float(iou[answer, i]))
    return result


def summarize(scores: ObjectScores, tiles: int | str | None, num_bad: int) -> dict[str, Any]:
    """Averages over objects.

    Args:
      scores: The objects, at least one.
      tiles: The tiles of `scores.tiled`, if there are any.
      num_bad: The number of images that could not be used.

    Returns:
      See `evaluate_clicks`.
    """
    summary = {
        "objects": len(scores.image),
        **_summarize_prompts(scores, scores.entire),
        "ceiling": _mean(scores.ceiling),
        "bad_samples": num_bad,
    }
    if scores.tiled is not None:
        summary["tiles"] = {"size": tiles, **_summarize_prompts(scores, scores.tiled)}
    return summary


def calibrate(
    predicted: Float[np.ndarray, " n"], true: Float[np.ndarray, " n"]
) -> list[dict[str, Any]]:
    """Compares the predicted IoU with the true one, in bins of the predicted IoU.

    Args:
      predicted: The predicted IoU of each object. Values below 0 are in the first bin and those
        above 1 in the last one. Objects without a finite value are left out.
      true: The true IoU.

    Returns:
      {"predicted": mean, "true": mean, "objects": count} for each bin that is not empty.
    """
    is_finite = np.isfinite(predicted)
    predicted, true = predicted[is_finite], true[is_finite]
    bins = np.clip((predicted * CALIBRATION_BINS).astype(int), 0, CALIBRATION_BINS - 1)
    return [
        {
            "predicted": _mean(predicted[bins == i]),
            "true": _mean(true[bins == i]),
            "objects": int(np.sum(bins == i)),
        }
        for i in np.unique(bins)
    ]


def object_rows(scores: ObjectScores) -> list[dict[str, Any]]:
    """Returns the scores of each object for JSON.

    Args:
      scores: The objects.

    Returns:
      {"image": name, "mask": index, "area": fraction of the image, "fill": IoU of the filled box,
      "ceiling": IoU, "bound": IoU, "clicks": {"1": {"chosen", "oracle", "predicted"}, "9": ...},
      "box": {...}} for each object; with tiles also "tiles": {"bound", "clicks", "box"}. A
      predicted IoU that is not finite is None.
    """
    rows = []
    for i, name in enumerate(scores.image):
        row = {
            "image": str(name),
            "mask": int(scores.mask[i]),
            "area": round(float(scores.area[i]), 8),
            "fill": _number(scores.fill[i]),
            "ceiling": _number(scores.ceiling[i]),
            **_prompt_row(scores.entire, i),
        }
        if scores.tiled is not None:
            row["tiles"] = _prompt_row(scores.tiled, i)
        rows.append(row)
    return rows


def _summarize_prompts(scores: ObjectScores, prompts: PromptScores) -> dict[str, Any]:
    """Averages over all objects, and over large ones, which were seen in the same way."""
    is_large = scores.area >= LARGE_AREA
    summary = _averages(prompts, scores.fill)
    if is_large.any():
        large = jax.tree.map(lambda x: x[is_large], prompts)
        averages = _averages(large, scores.fill[is_large])
        summary["large"] = {"objects": int(is_large.sum()), **averages}
    summary["calibration"] = {
        name: calibrate(prompts.predicted[:, column], prompts.chosen[:, column])
        for column, name in enumerate(PROMPTS)
        if name in CALIBRATED
    }
    return summary


def _averages(prompts: PromptScores, fill: Float[np.ndarray, " n"]) -> dict[str, Any]:
    clicks = {
        name: {"chosen": _mean(prompts.chosen[:, i]), "oracle": _mean(prompts.oracle[:, i])}
        for i, name in enumerate(PROMPTS)
    }
    box = clicks.pop("box")
    return {"clicks": clicks, "box": box, "fill": _mean(fill), "bound": _mean(prompts.bound)}


def _prompt_row(prompts: PromptScores, i: int) -> dict[str, Any]:
    chosen, oracle, predicted = (values[i] for values in prompts[:3])
    few, many, box = (
        {
            "chosen": _number(chosen[column]),
            "oracle": _number(oracle[column]),
            "predicted": _number(predicted[column]),
        }
        for column in map(PROMPTS.index, ("1", "9", "box"))
    )
    return {"bound": _number(prompts.bound[i]), "clicks": {"1": few, "9": many}, "box": box}


def _mean(values: Float[np.ndarray, " n"]) -> float:
    return round(float(np.mean(values)), 4)


def _number(value: float | np.floating[Any]) -> float | None:
    return round(float(value), 4) if math.isfinite(value) else None
