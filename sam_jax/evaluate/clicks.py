"""Mean IoU after 1, 2, 3, 5 and 9 clicks, and after a box, on every mask of a source.

Source: Kirillov et al. 2023, section 7.1 and appendix D.1. The first click lies where the mask is
farthest from its border, the next where what is still wrong is. One click has three outputs: the
one with the highest predicted IoU is `chosen`, the best one is the `oracle`'s. Later clicks go with
the logits of the prediction before them and have a single output, so that the two are equal.

What the paper leaves unsaid: the box is the mask's own, its corners the outermost pixels, and has
three outputs too; clicks and IoU are in pixels of the image; where nothing is wrong any more, no
click is added. Unlike in training, no mask is left out for its size.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from sam_jax.data.example import BadSample, Example, Source
from sam_jax.masks import rle
from sam_jax.masks.boxes import box_of_mask
from sam_jax.masks.clicks import center_click, center_click_on_error
from sam_jax.predict.predictor import SamPredictor

CLICKS = (1, 2, 3, 5, 9)
GROUP = 32  # objects at a time: their masks in full size take memory


def evaluate_clicks(predictor: SamPredictor, source: Source, indices: Sequence[int]) -> dict:
    """Evaluates a model on images of a source.

    Args:
      predictor: `SamPredictor`; its image is replaced.
      source: the examples; indices: which of them, e.g. a tqdm bar over them.
    Returns:
      {"objects": count, "clicks": {"1": {"chosen": IoU, "oracle": IoU}, ...}, "box": the same,
      "ceiling": see `one_click_ceiling`, "bad_samples": how many images could not be read}.
    Raises:
      ValueError: if there is no mask at all.
    """
    rows, ceilings, bad = [], [], 0
    for index in indices:
        try:
            masks = paint_masks(example := source[index])
        except BadSample:
            bad += 1
            continue
        predictor.set_image(example.image)
        ceilings += one_click_ceiling(masks)
        for start in range(0, len(masks), GROUP):
            rows.append(play_clicks(predictor, masks[start : start + GROUP]))
    if not rows:
        raise ValueError(f"there is no mask to evaluate on; {bad} images could not be read")
    # 'object column': chosen and oracle of each number of clicks, then of the box
    mean = np.concatenate(rows).mean(axis=0).reshape(-1, 2)
    scores = [{"chosen": round(float(c), 4), "oracle": round(float(o), 4)} for c, o in mean]
    return {
        "objects": sum(map(len, rows)),
        "clicks": dict(zip(map(str, CLICKS), scores, strict=False)),
        "box": scores[-1],
        "ceiling": round(float(np.mean(ceilings)), 4),
        "bad_samples": bad,
    }


def table(scores: dict) -> str:
    """What `evaluate_clicks` returns, as lines for people."""
    rows = [(f"{n} click{'s' * (n != '1')}", iou) for n, iou in scores["clicks"].items()]
    lines = [f"mean IoU over {scores['objects']} objects", f"{'':10}   chosen   oracle"]
    lines += [
        f"{name:10}{iou['chosen']:9.3f}{iou['oracle']:9.3f}"
        for name, iou in [*rows, ("box", scores["box"])]
    ]
    lines.append(
        f"ceiling of one click, not knowing which object is meant: {scores['ceiling']:.3f}"
    )
    if scores["bad_samples"]:
        lines.append(f"{scores['bad_samples']} images could not be read and are left out")
    return "\n".join(lines)


def paint_masks(example: Example) -> np.ndarray:
    """The masks 'n h w' of an example, painted.

    Raises:
      BadSample: if one is broken or empty.
    """
    try:
        masks = np.stack([rle.decode(mask) for mask in example.masks])
    except (rle.RLEError, ValueError) as error:
        raise BadSample("broken mask", str(error)) from error
    if not masks.any(axis=(1, 2)).all():
        raise BadSample("empty mask", "a mask has no pixel")
    return masks


def play_clicks(predictor: SamPredictor, masks: np.ndarray) -> np.ndarray:
    """Clicks on masks 'n h w' of the image that is set.

    Returns:
      'n column': the IoUs of chosen and oracle for each of CLICKS, then for the box.
    """
    columns: list[np.ndarray] = []
    for number, (predicted, scores) in enumerate(rounds_of(predictor, masks), start=1):
        if number in CLICKS:
            columns += chosen_and_oracle(predicted, scores, masks)
    columns += chosen_and_oracle(*predict_boxes(predictor, masks), masks)
    return np.stack(columns, axis=1)


def rounds_of(
    predictor: SamPredictor, masks: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """After each click: predicted masks 'n m h w' and their scores 'n m', m being 3 at first."""
    prompts: list[dict] = []
    for mask in masks:
        x, y, _ = center_click(mask)
        prompts.append({"point_coords": [(x, y)], "point_labels": [1]})
    for number in range(1, max(CLICKS) + 1):
        predicted, scores, logits = predictor.predict_many(prompts, multimask_output=number == 1)
        yield predicted, scores
        if number == max(CLICKS):
            return
        for i, best in enumerate(scores.argmax(axis=1)):
            prompts[i]["mask_input"] = logits[i, best]
            if click := center_click_on_error(predicted[i, best], masks[i]):
                prompts[i]["point_coords"].append(click[:2])
                prompts[i]["point_labels"].append(click[2])


def predict_boxes(predictor: SamPredictor, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Masks 'n 3 h w' and scores 'n 3' predicted from the boxes of masks 'n h w'."""
    boxes = box_of_mask(masks)
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)  # of a line of pixels
    predicted, scores, _ = predictor.predict_many([{"box": box} for box in boxes])
    return predicted, scores


def chosen_and_oracle(predicted, scores, masks) -> tuple[np.ndarray, np.ndarray]:
    """The IoUs 'n' of the masks with the highest scores 'n m', and of the best ones."""
    iou = mask_iou(predicted, masks[:, None])
    return np.take_along_axis(iou, scores.argmax(axis=1)[:, None], axis=1)[:, 0], iou.max(axis=1)


def mask_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of masks '... h w' bool, which may broadcast -> '...'; 1 for two empty ones."""
    intersection = np.count_nonzero(a & b, axis=(-2, -1))
    union = np.count_nonzero(a | b, axis=(-2, -1))
    return np.where(union == 0, 1.0, intersection / np.maximum(union, 1))


def one_click_ceiling(masks: np.ndarray) -> list[float]:
    """The IoU with each mask of who knows all masks of the image, but not which one is meant.

    Of the masks that hold the first click, any may be meant; the best answer is the one with the
    highest mean IoU over them.

    Args:
      masks: 'n h w' bool, none empty.
    """
    area = masks.sum(axis=(1, 2))
    flat = masks.reshape(len(masks), -1).astype(np.float32)
    intersection = flat @ flat.T
    iou = intersection / (area[:, None] + area - intersection)
    result = []
    for i, mask in enumerate(masks):
        x, y, _ = center_click(mask)
        meant = np.flatnonzero(masks[:, y, x])
        answer = meant[np.argmax(iou[np.ix_(meant, meant)].mean(axis=1))]
        result.append(float(iou[answer, i]))
    return result
