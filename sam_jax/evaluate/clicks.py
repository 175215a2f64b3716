"""Mean IoU after 1, 2, 3, 5 and 9 clicks, and after a box, on every mask of a source.

Source: Kirillov et al. 2023, section 7.1 and appendix D.1. The first click is the point of the mask
farthest from its border, each further click that of the error region. One click and a box have
three outputs: the scores are those of the output with the highest predicted IoU, and those of the
best output, which an oracle would choose. Further clicks come with the logits of the previous
prediction and have a single output, so the two scores agree.

Differences, where the paper says nothing: The box is the bounding box of the mask, with the
outermost pixels as corners. Clicks and IoU are in pixels of the image. No click is added to a
perfect prediction. Unlike in training, masks of all sizes count.
"""

import argparse
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from tqdm import tqdm

from sam_jax.data.example import BadSample, Example, Source
from sam_jax.data.open import open_source, select
from sam_jax.masks import rle
from sam_jax.masks.boxes import box_of_mask
from sam_jax.masks.clicks import center_click, center_click_on_error
from sam_jax.masks.overlap import mask_iou
from sam_jax.predict.predictor import SamPredictor
from sam_jax.predict.tiles import parse_tiles
from sam_jax.weights.formats import load

NUM_CLICKS = (1, 2, 3, 5, 9)  # after which the IoU is measured
OBJECTS_PER_CALL = 32  # their masks in full size take memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See `Evaluation`."""
    parser.description = (
        "Evaluates a model by the paper's protocol on every mask of a source: clicks in the centre "
        "of the mask and then of the error, or a box, and the mean IoU of the predicted masks."
    )
    parser.epilog = (
        "example: sam-jax evaluate clicks --weights sam_vit_b --source coco:photos/ "
        "--json scores.json"
    )
    parser.add_argument(
        "--weights",
        required=True,
        help="a weights directory, a checkpoint file, or sam_vit_b, sam_vit_l, sam_vit_h or "
        "sam_tiny",
    )
    parser.add_argument(
        "--tiles",
        type=parse_tiles,
        metavar="SIZE|auto",
        help="also evaluate with each object seen in a tile of its image: tiles of SIZE pixels per "
        "side, or auto for many sizes",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """See `Evaluation`."""
    images = select(open_source(args.source), args.index)
    predictor = SamPredictor(*load(args.weights))
    progress = tqdm(range(len(images)), unit=" images", disable=None)
    return evaluate_clicks(predictor, images, progress, args.tiles)


def format_table(scores: dict[str, Any]) -> str:
    """See `Evaluation`."""
    columns = [scores, scores["tiles"]] if "tiles" in scores else [scores]
    titles = f"{'predicted best':>16}  oracle" * len(columns)
    lines = [f"mean IoU over {scores['objects']} objects", f"{'':10}{titles}"]
    if "tiles" in scores:
        lines.insert(
            1, f"{'':10}{'entire image':>24}{'tiles: ' + str(scores['tiles']['size']):>24}"
        )
    for count in (*scores["clicks"], "box"):
        name = count if count == "box" else f"{count} click{'' if count == '1' else 's'}"
        ious = [x["box"] if count == "box" else x["clicks"][count] for x in columns]
        figures = "".join(f"{iou['chosen']:16.3f}{iou['oracle']:8.3f}" for iou in ious)
        lines.append(f"{name:10}{figures}")
    lines.append(
        f"upper bound for one click, not knowing which object is meant: {scores['ceiling']:.3f}"
    )
    if scores["bad_samples"]:
        lines.append(f"{scores['bad_samples']} images could not be read and were left out")
    return "\n".join(lines)


def evaluate_clicks(
    predictor: SamPredictor,
    source: Source,
    indices: Iterable[int],
    tiles: int | str | None = None,
) -> dict[str, Any]:
    """Evaluates a model on images of a source.

    Args:
      predictor: The model; its image is replaced.
      source: The images and their masks.
      indices: The images to evaluate on, for example a progress bar over them.
      tiles: Evaluate with these tiles too, see `SamPredictor.set_image`.

    Returns:
      {"objects": number of masks, "clicks": {"1": {"chosen": IoU, "oracle": IoU}, ...}, "box":
      {"chosen": IoU, "oracle": IoU}, "ceiling": mean of `one_click_upper_bound`, "bad_samples":
      number of images that could not be read}. "chosen" is the output with the highest predicted
      IoU. With tiles there is also "tiles": {"size": `tiles`, "clicks": ..., "box": ...}.

    Raises:
      ValueError: If there is no mask at all.
    """
    ious: list[np.ndarray] = []
    tiled_ious: list[np.ndarray] = []
    upper_bounds: list[float] = []
    num_bad = 0
    for index in indices:
        try:
            example = source[index]
            masks = decode_masks(example)
        except BadSample:
            num_bad += 1
            continue
        upper_bounds += one_click_upper_bound(masks)
        predictor.set_image(example.image)
        ious.append(measure_prompts(predictor, masks))
        if tiles is not None:
            predictor.set_image(example.image, tiles=tiles)
            tiled_ious.append(measure_prompts(predictor, masks))
    if not ious:
        raise ValueError(f"there is no mask to evaluate on; {num_bad} images could not be read")
    scores = {
        "objects": len(upper_bounds),
        **average(np.concatenate(ious)),
        "ceiling": round(float(np.mean(upper_bounds)), 4),
        "bad_samples": num_bad,
    }
    if tiles is not None:
        scores["tiles"] = {"size": tiles, **average(np.concatenate(tiled_ious))}
    return scores


def average(ious: Float[np.ndarray, "n columns 2"]) -> dict[str, Any]:
    """Averages over objects.

    Args:
      ious: See `measure_prompts`.

    Returns:
      "clicks" and "box" of `evaluate_clicks`.
    """
    *clicks, box = [
        {"chosen": round(float(predicted_best), 4), "oracle": round(float(oracle), 4)}
        for predicted_best, oracle in ious.mean(axis=0)
    ]
    return {"clicks": dict(zip(map(str, NUM_CLICKS), clicks, strict=True)), "box": box}


def decode_masks(example: Example) -> Bool[np.ndarray, "n h w"]:
    """Decodes the run lengths of an example.

    Raises:
      BadSample: If a mask is broken or empty.
    """
    try:
        masks = np.stack([rle.decode(mask) for mask in example.masks])
    except (rle.RLEError, ValueError) as error:
        raise BadSample("broken mask", str(error)) from error
    if not masks.any(axis=(1, 2)).all():
        raise BadSample("empty mask", "a mask has no pixel")
    return masks


def measure_prompts(
    predictor: SamPredictor, masks: Bool[np.ndarray, "n h w"]
) -> Float[np.ndarray, "n columns 2"]:
    """Prompts the model with clicks on objects, and then with their boxes.

    Args:
      predictor: The model, with the image set.
      masks: The objects, of which OBJECTS_PER_CALL are predicted at a time.

    Returns:
      The IoU for each of `NUM_CLICKS` and then for the box: that of the output with the highest
      predicted IoU, and that of the best output.
    """
    ious = []
    for start in range(0, len(masks), OBJECTS_PER_CALL):
        group = masks[start : start + OBJECTS_PER_CALL]
        columns = [
            best_ious(predicted, scores, group)
            for count, (predicted, scores) in enumerate(predict_clicks(predictor, group), start=1)
            if count in NUM_CLICKS
        ]
        columns.append(best_ious(*predict_boxes(predictor, group), group))
        ious.append(np.stack(columns, axis=1))
    return np.concatenate(ious)


def predict_clicks(
    predictor: SamPredictor, masks: Bool[np.ndarray, "n h w"]
) -> Iterator[tuple[Bool[np.ndarray, "n m h w"], Float[np.ndarray, "n m"]]]:
    """Clicks on each object, then repeatedly on the error of its prediction.

    Args:
      predictor: The model, with the image set.
      masks: The objects.

    Yields:
      The predicted masks and their predicted IoUs after each click: m is 3 after the first click
      and 1 after the others.
    """
    prompts: list[dict[str, Any]] = []
    for mask in masks:
        x, y, _ = center_click(mask)
        prompts.append({"point_coords": [(x, y)], "point_labels": [1]})
    for count in range(1, max(NUM_CLICKS) + 1):
        predicted, scores, logits = predictor.predict_many(prompts, multimask_output=count == 1)
        yield predicted, scores
        if count == max(NUM_CLICKS):
            return
        for i, best in enumerate(scores.argmax(axis=1)):
            prompts[i]["mask_input"] = logits[i, best]
            if click := center_click_on_error(predicted[i, best], masks[i]):
                prompts[i]["point_coords"].append(click[:2])
                prompts[i]["point_labels"].append(click[2])


def predict_boxes(
    predictor: SamPredictor, masks: Bool[np.ndarray, "n h w"]
) -> tuple[Bool[np.ndarray, "n m h w"], Float[np.ndarray, "n m"]]:
    """Predicts three masks of each object, and their IoUs, from its bounding box."""
    boxes = box_of_mask(masks)
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)  # a line of pixels has no area
    predicted, scores, _ = predictor.predict_many([{"box": box} for box in boxes])
    return predicted, scores


def best_ious(
    predicted: Bool[np.ndarray, "n m h w"],
    scores: Float[np.ndarray, "n m"],
    masks: Bool[np.ndarray, "n h w"],
) -> Float[np.ndarray, "n 2"]:
    """Returns the IoU of the output with the highest score, and that of the best output."""
    iou = mask_iou(predicted, masks[:, None])
    predicted_best = np.take_along_axis(iou, scores.argmax(axis=1)[:, None], axis=1)[:, 0]
    return np.stack([predicted_best, iou.max(axis=1)], axis=1)


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
