"""Prompts as people write them, as the arrays that the model reads.

Source: segment-anything `predictor.py`. The padding point that the reference adds to points without
a box is added here, the one place that builds prompts.
"""

import numpy as np

from sam_jax.images.resize import apply_coords
from sam_jax.model.prompt_encoder import ABSENT, BOTTOM_RIGHT, NOT_A_POINT, TOP_LEFT, Prompts

KEYS = ("point_coords", "point_labels", "box", "mask_input")


def points_of(prompt, original_size, frame):
    """Turns one object's prompt into points and labels, a box being two points.

    Args:
      prompt: dict with any of "point_coords" 'k 2' (x, y) in pixels of the image, "point_labels"
        'k' of 1 (foreground) or 0 (background), and "box" '4' (x0, y0, x1, y1).
      original_size: (height, width) of the image; frame: of the model's frame.
    Returns:
      'k 2' float32 in pixels of the frame, and 'k' int32; see `Prompts`.
    Raises:
      ValueError: naming what is wrong with which argument.
    """
    points, labels = _checked_points(prompt.get("point_coords"), prompt.get("point_labels"))
    box = _checked_box(prompt.get("box"))
    points, corners = (apply_coords(x, original_size, frame) for x in (points, box))
    if len(corners):
        points = np.concatenate([points, corners])
        labels = np.concatenate([labels, [TOP_LEFT, BOTTOM_RIGHT]])
    elif len(points):
        points = np.concatenate([points, np.zeros((1, 2))])
        labels = np.concatenate([labels, [NOT_A_POINT]])
    return points.astype(np.float32), labels.astype(np.int32)


def mask_of(prompt, shape):
    """The mask prompt 'lh lw' float32 of logits, or None.

    Raises:
      ValueError: if it is not finite, or has another shape than `shape` (or 1 before it).
    """
    mask = prompt.get("mask_input")
    if mask is None:
        return None
    mask = _numbers(mask, "mask_input")
    if mask.shape not in (shape, (1, *shape)):
        raise ValueError(
            f"mask_input must be low-resolution logits of shape {(1, *shape)}, as an earlier "
            f"prediction returns them; got {mask.shape}"
        )
    return mask.reshape(shape).astype(np.float32)


def stack_prompts(objects, num_objects, num_slots):
    """Pads the objects of each image into one `Prompts` of numpy arrays.

    Args:
      objects: for each image, a list of (points, labels, mask or None).
      num_objects: n of the result; num_slots: its k. Both at least as large as any list.
    Returns:
      `Prompts`, its mask None if no object has one.
    """
    b = len(objects)
    points = np.zeros((b, num_objects, num_slots, 2), np.float32)
    labels = np.full((b, num_objects, num_slots), ABSENT, np.int32)
    masks = {}
    for i, of_image in enumerate(objects):
        for j, (object_points, object_labels, mask) in enumerate(of_image):
            points[i, j, : len(object_points)] = object_points
            labels[i, j, : len(object_labels)] = object_labels
            if mask is not None:
                masks[i, j] = mask
    if not masks:
        return Prompts(points=points, labels=labels)
    shape = next(iter(masks.values())).shape
    mask, has_mask = (
        np.zeros((b, num_objects, *shape), np.float32),
        np.zeros((b, num_objects), bool),
    )
    for index, value in masks.items():
        mask[index], has_mask[index] = value, True
    return Prompts(points=points, labels=labels, mask=mask, has_mask=has_mask)


def check_prompt(prompt):
    """Raises ValueError unless the prompt is a dict of known keys."""
    if not isinstance(prompt, dict) or not prompt.keys() <= set(KEYS):
        got = sorted(map(str, prompt)) if isinstance(prompt, dict) else type(prompt).__name__
        raise ValueError(f"a prompt must be a dict with keys among {', '.join(KEYS)}; got {got}")


def _checked_points(coords, labels):
    if coords is None and labels is None:
        return np.zeros((0, 2)), np.zeros(0, np.int32)
    if coords is None or labels is None:
        given, missing = ("point_labels", "point_coords")[:: 1 if coords is None else -1]
        raise ValueError(f"{given} were given without {missing}: each point needs a label, 1 or 0")
    coords, labels = _numbers(coords, "point_coords"), _numbers(labels, "point_labels")
    if coords.ndim != 2 or coords.shape[1] != 2:
        raise ValueError(
            f"point_coords must have shape (k, 2), one (x, y) a point; got {coords.shape}"
        )
    if labels.shape != coords.shape[:1]:
        raise ValueError(
            f"point_labels must have shape {coords.shape[:1]}, one a point; got {labels.shape}"
        )
    if not np.isin(labels, (0, 1)).all():
        odd = sorted(set(labels.tolist()) - {0, 1})
        raise ValueError(f"point_labels must be 1 (foreground) or 0 (background); got {odd}")
    return coords, labels.astype(np.int32)


def _checked_box(box):
    """The box's corners '2 2', or no corners '0 2'."""
    if box is None:
        return np.zeros((0, 2))
    box = _numbers(box, "box")
    if box.shape not in ((4,), (1, 4)):
        raise ValueError(f"box must have shape (4,): x0, y0, x1, y1; got {box.shape}")
    x0, y0, x1, y1 = box.ravel()
    if x1 <= x0 or y1 <= y0:
        raise ValueError(f"box must have x0 < x1 and y0 < y1; got {box.ravel().tolist()}")
    return box.reshape(2, 2)


def _numbers(value, name):
    """The value as a float array, all finite."""
    try:
        array = np.asarray(value)
        if array.dtype == object or array.dtype.kind not in "iufb":
            raise TypeError(f"dtype {array.dtype}")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array of numbers; got {error}") from error
    array = array.astype(np.float64)
    if not (np.abs(array) <= np.finfo(np.float32).max).all():
        raise ValueError(f"{name} must be finite; got NaN or infinity, or beyond float32")
    return array
