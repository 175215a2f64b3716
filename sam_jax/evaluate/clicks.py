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
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int64
from tqdm import tqdm

from sam_jax.data.example import RLE, BadSample, Source
from sam_jax.data.open import open_source, select
from sam_jax.evaluate.object_scores import (
    LARGE_AREA,
    NUM_CLICKS,
    ObjectScores,
    PromptScores,
    fill_of_masks,
    object_rows,
    one_click_upper_bound,
    summarize,
)
from sam_jax.evaluate.resolution import cut_to_tile, resolution_bound
from sam_jax.io.atomic import write_json_lines
from sam_jax.io.compilation_cache import use_compilation_cache
from sam_jax.io.output import check_file
from sam_jax.masks import rle
from sam_jax.masks.boxes import box_of_mask
from sam_jax.masks.clicks import center_click, center_click_on_error
from sam_jax.masks.overlap import mask_iou
from sam_jax.predict.predictor import SamPredictor
from sam_jax.predict.tiles_option import DEFAULT_TILES_HELP, parse_tiles, resolve_tiles
from sam_jax.weights.formats import load

OBJECTS_PER_CALL = 32  # their masks in full size take memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See `Evaluation`."""
    parser.description = (
        "Evaluates a model by the paper's protocol on every mask of a source: clicks in the center "
        "of the mask and then of the error, or a box, and the mean IoU of the predicted masks."
    )
    parser.epilog = (
        "example: sam-jax evaluate clicks --weights sam_vit_b --source coco:photos/ "
        "--json scores.json"
    )
    parser.add_argument(
        "--weights",
        type=os.path.expanduser,
        required=True,
        help="a weights directory, a checkpoint file, or one of sam_vit_b, sam_vit_l, sam_vit_h, "
        "sam_tiny, sam_nuclei and sam_photo",
    )
    parser.add_argument(
        "--tiles",
        type=parse_tiles,
        metavar="SIZE|auto|none",
        help="also evaluate with each object seen in a tile of its image: tiles of SIZE pixels per "
        f"side, auto for many sizes, or none; {DEFAULT_TILES_HELP}",
    )
    parser.add_argument(
        "--objects",
        type=os.path.expanduser,
        metavar="FILE",
        help="also write the scores of each object to a file, one JSON object per line",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """See `Evaluation`."""
    if args.objects:
        check_file(args.objects, "--objects")
    images = select(open_source(args.source), args.index)
    use_compilation_cache()
    predictor = SamPredictor(*load(args.weights))
    progress = tqdm(range(len(images)), unit=" images", disable=None)
    tiles = resolve_tiles(predictor.model, args.tiles)
    scores, num_bad = measure_objects(predictor, images, progress, tiles)
    if args.objects:
        write_json_lines(args.objects, object_rows(scores))
    return summarize(scores, tiles, num_bad)


def format_table(scores: dict[str, Any]) -> str:
    """See `Evaluation`."""
    columns = [scores, scores["tiles"]] if "tiles" in scores else [scores]
    titles = f"{'chosen':>16}  oracle" * len(columns)
    lines = [f"mean IoU over {scores['objects']} objects", f"{'':10}{titles}"]
    if "tiles" in scores:
        lines.insert(
            1, f"{'':10}{'entire image':>24}{'tiles: ' + str(scores['tiles']['size']):>24}"
        )
    for count in scores["clicks"]:
        name = f"{count} click{'' if count == '1' else 's'}"
        lines.append(_format_row(name, [x["clicks"][count] for x in columns]))
    lines.append(_format_row("box", [x["box"] for x in columns], scores["fill"]))
    if "large" in scores:
        large = scores["large"]
        row = _format_row("large, box", [x["large"]["box"] for x in columns], large["fill"])
        area = f"at least {100 * LARGE_AREA:g} % of the image"
        lines.append(f"{row}   ({large['objects']} objects, each {area})")
    lines.append(
        f"upper bound for one click, not knowing which object is meant: {scores['ceiling']:.3f}"
    )
    bounds = " and in tiles ".join(f"{x['bound']:.3f}" for x in columns)
    lines.append(f"upper bound at the resolution of the model's masks: {bounds}")
    if scores["bad_samples"]:
        lines.append(f"{scores['bad_samples']} images could not be used and were left out")
    return "\n".join(lines)


def _format_row(name: str, ious: list[dict[str, float]], fill: float | None = None) -> str:
    figures = "".join(f"{iou['chosen']:16.3f}{iou['oracle']:8.3f}" for iou in ious)
    note = "" if fill is None else f"   filled box: {fill:.3f}"
    return f"{name:10}{figures}{note}"


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
      tiles: Evaluate with these tiles too, see `resolve_tiles`; "none" for the entire image only.

    Returns:
      {"objects": number of masks, "clicks": {"1": {"chosen": IoU, "oracle": IoU}, ...}, "box":
      {"chosen": IoU, "oracle": IoU}, "fill": mean IoU of masks with their own filled boxes,
      "bound": mean of `resolution_bound`, "large": {"objects", "clicks", "box", "fill", "bound"}
      of the objects that cover at least LARGE_AREA, if there are any, "calibration": {"1": ...,
      "box": ...}, see `calibrate`, "ceiling": mean of `one_click_upper_bound`, "bad_samples":
      number of images that could not be used}. "chosen" is the output with the highest predicted
      IoU. With tiles there is also "tiles": {"size": the tiles, and "clicks" to "calibration"}.

    Raises:
      ValueError: If there is no mask at all.
    """
    resolved = resolve_tiles(predictor.model, tiles)
    scores, num_bad = measure_objects(predictor, source, indices, resolved)
    return summarize(scores, resolved, num_bad)


def measure_objects(
    predictor: SamPredictor,
    source: Source,
    indices: Iterable[int],
    tiles: int | str | None,
) -> tuple[ObjectScores, int]:
    """Measures each mask of images of a source.

    Args:
      predictor: As for `evaluate_clicks`.
      source: As for `evaluate_clicks`.
      indices: As for `evaluate_clicks`.
      tiles: Measure with these tiles too, a result of `resolve_tiles`.

    Returns:
      The scores of the objects, and the number of images that could not be used.

    Raises:
      ValueError: If there is no mask at all.
    """
    images: list[ObjectScores] = []
    num_bad = 0
    for index in indices:
        try:
            example = source[index]
            masks = decode_masks(example.masks)
        except BadSample:
            num_bad += 1
            continue
        predictor.set_image(example.image, tiles="none")
        entire, tiled = measure_prompts(predictor, masks, None), None
        if tiles is not None:
            predictor.set_image(example.image, tiles=tiles)
            tiled = measure_prompts(predictor, masks, tiles)
        images.append(
            ObjectScores(
                image=np.repeat(source.name(index), len(masks)),
                mask=np.arange(len(masks)),
                area=masks.mean(axis=(1, 2)),
                fill=fill_of_masks(masks),
                ceiling=np.array(one_click_upper_bound(masks)),
                entire=entire,
                tiled=tiled,
            )
        )
    if not images:
        raise ValueError(f"there is no mask to evaluate on; {num_bad} images could not be used")
    return jax.tree.map(lambda *parts: np.concatenate(parts), *images), num_bad


def decode_masks(encoded: Sequence[RLE]) -> Bool[np.ndarray, "n h w"]:
    """Decodes the run lengths of masks of an image.

    Raises:
      BadSample: If there are no masks, or if one is broken or empty.
    """
    if not encoded:
        raise BadSample("no masks", "the image has no masks")
    try:
        masks = np.stack([rle.decode(mask) for mask in encoded])
    except ValueError as error:
        raise BadSample("broken mask", str(error)) from error
    if not masks.any(axis=(1, 2)).all():
        raise BadSample("empty mask", "a mask has no pixel")
    return masks


def measure_prompts(
    predictor: SamPredictor, masks: Bool[np.ndarray, "n h w"], tiles: int | str | None
) -> PromptScores:
    """Prompts the model with clicks on objects, and then with their boxes.

    Args:
      predictor: The model, with the image set.
      masks: The objects, of which OBJECTS_PER_CALL are predicted at a time.
      tiles: The tiles that the image is set with; None for the entire image.
    """
    groups = []
    for start in range(0, len(masks), OBJECTS_PER_CALL):
        group = masks[start : start + OBJECTS_PER_CALL]
        columns = [
            score_outputs(predicted, scores, group)
            for count, (predicted, scores) in enumerate(predict_clicks(predictor, group), start=1)
            if count in NUM_CLICKS
        ]
        columns.append(score_outputs(*predict_boxes(predictor, group), group))
        groups.append(np.stack(columns, axis=1))
    canvas, low_res = predictor.model.image_size, predictor.model.low_res
    bounds = [resolution_bound(cut_to_tile(m, canvas, tiles), canvas, low_res) for m in masks]
    chosen, oracle, predicted = np.moveaxis(np.concatenate(groups), -1, 0)
    return PromptScores(chosen, oracle, predicted, np.array(bounds))


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
    predicted, scores, _ = predictor.predict_many([{"box": box} for box in box_prompts(masks)])
    return predicted, scores


def box_prompts(masks: Bool[np.ndarray, "*n h w"]) -> Int64[np.ndarray, "*n 4"]:
    """Returns the bounding boxes of masks, which never are empty, as prompts."""
    boxes = box_of_mask(masks)
    # A line of pixels has no area.
    boxes[..., 2:] = np.maximum(boxes[..., 2:], boxes[..., :2] + 1)
    return boxes


def score_outputs(
    predicted: Bool[np.ndarray, "n m h w"],
    scores: Float[np.ndarray, "n m"],
    masks: Bool[np.ndarray, "n h w"],
) -> Float[np.ndarray, "n 3"]:
    """Returns the IoU of the output with the highest score, that of the best output, and the score.

    Args:
      predicted: The outputs for each object.
      scores: Their predicted IoUs.
      masks: The true masks.
    """
    iou = mask_iou(predicted, masks[:, None])
    best = scores.argmax(axis=1)[:, None]
    chosen, score = (np.take_along_axis(values, best, axis=1)[:, 0] for values in (iou, scores))
    return np.stack([chosen, iou.max(axis=1), score], axis=1)
