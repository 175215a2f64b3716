"""Validates prompts and converts them to the arrays that the model takes.

Source: segment-anything `predictor.py`. The reference's prompt encoder adds a padding point to
points without a box, even to no points; here it is added to the prompt.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int32

from sam_jax.images.resize import apply_coords
from sam_jax.model.prompt_encoder import (
    ABSENT,
    BACKGROUND,
    BOTTOM_RIGHT,
    FOREGROUND,
    NOT_A_POINT,
    TOP_LEFT,
    UNLABELED,
    Prompts,
)

Prompt = dict[str, Any]
PROMPT_KEYS = ("point_coords", "point_labels", "box", "mask_input")

# The labels of points that a prompt may have, and those that the model takes. The reference adds
# nothing to the positions of points with labels 2 and 3.
POINT_LABELS = {
    1: FOREGROUND,
    0: BACKGROUND,
    -1: NOT_A_POINT,
    2: UNLABELED,
    3: UNLABELED,
}


class ObjectPrompt(NamedTuple):
    """The prompt of one object, ready to be stacked into `Prompts`.

    Attributes:
      points: (x, y) of points and box corners in pixels of the canvas.
      labels: One label per point, see `Prompts`.
      mask: Low-resolution logits, or None.
    """

    points: Float32[np.ndarray, "k 2"]
    labels: Int32[np.ndarray, " k"]
    mask: Float32[np.ndarray, "lh lw"] | None


def prepare_prompt(
    prompt: Prompt,
    original_size: tuple[int, int],
    canvas: tuple[int, int],
    low_res_size: tuple[int, int],
) -> ObjectPrompt:
    """Validates one object's prompt and moves it from the image to the canvas.

    Args:
      prompt: A dict of the first four arguments of `SamPredictor.predict`, each optional.
      original_size: (height, width) of the image.
      canvas: (height, width) of the padded input that the model takes.
      low_res_size: (height, width) of the model's low-resolution masks.

    Raises:
      ValueError: If an argument is invalid. The message names it.
    """
    check_prompt(prompt)
    points, labels = prepare_points(prompt, original_size, canvas)
    return ObjectPrompt(points, labels, prepare_mask(prompt, low_res_size))


def check_prompt(prompt: object) -> None:
    """Raises ValueError unless a prompt is a dict with keys among PROMPT_KEYS."""
    if not isinstance(prompt, dict) or not prompt.keys() <= set(PROMPT_KEYS):
        got = sorted(map(str, prompt)) if isinstance(prompt, dict) else type(prompt).__name__
        keys = ", ".join(PROMPT_KEYS)
        raise ValueError(f"a prompt must be a dict with keys among {keys}; got {got}")


def prepare_points(
    prompt: Prompt, original_size: tuple[int, int], canvas: tuple[int, int]
) -> tuple[Float32[np.ndarray, "k 2"], Int32[np.ndarray, " k"]]:
    """Converts one object's points and box to points on the canvas, a box being two points.

    Points without a box, even no points, are followed by the official padding point, NOT_A_POINT.

    Args:
      prompt: A dict that may have "point_coords", (x, y) in pixels of the image; "point_labels",
        see POINT_LABELS; and "box", (x0, y0, x1, y1).
      original_size: (height, width) of the image.
      canvas: (height, width) of the padded input that the model takes.

    Returns:
      (x, y) in pixels of the canvas, and labels. See `Prompts`.

    Raises:
      ValueError: If an argument is invalid. The message names it.
    """
    points, labels = _check_points(prompt.get("point_coords"), prompt.get("point_labels"))
    corners = _check_box(prompt.get("box"))
    points = apply_coords(points, original_size, canvas)
    corners = apply_coords(corners, original_size, canvas)
    if len(corners):
        points = np.concatenate([points, corners])
        labels = np.concatenate([labels, [TOP_LEFT, BOTTOM_RIGHT]])
    elif prompt.get("point_coords") is not None:
        points = np.concatenate([points, np.zeros((1, 2))])
        labels = np.concatenate([labels, [NOT_A_POINT]])
    return points.astype(np.float32), labels.astype(np.int32)


def prepare_mask(
    prompt: Prompt, low_res_size: tuple[int, int]
) -> Float32[np.ndarray, "lh lw"] | None:
    """Returns the logits of "mask_input", or None if the prompt has none.

    Args:
      prompt: A dict that may have "mask_input", logits of shape `low_res_size` or with one more
        axis of size 1 in front.
      low_res_size: (height, width) of the model's low-resolution masks.

    Raises:
      ValueError: If the mask has another shape, or values that are not finite.
    """
    mask = prompt.get("mask_input")
    if mask is None:
        return None
    mask = _finite_array(mask, "mask_input")
    if mask.shape not in (low_res_size, (1, *low_res_size)):
        raise ValueError(
            f"mask_input must be low-resolution logits of shape {(1, *low_res_size)}, as an "
            f"earlier prediction returns them; got {mask.shape}"
        )
    return mask.reshape(low_res_size).astype(np.float32)


@contextlib.contextmanager
def named_in_errors(name: str) -> Iterator[None]:
    """Puts the name of a prompt in front of the message of a ValueError.

    Args:
      name: The name, or "" to leave the message as it is.
    """
    try:
        yield
    except ValueError as error:
        if not name:
            raise
        raise ValueError(f"{name}: {error}") from error


def stack_prompts(
    objects: Sequence[Sequence[ObjectPrompt]], num_objects: int, num_slots: int
) -> Prompts:
    """Stacks the prompts of each image's objects, padded with absent slots.

    Args:
      objects: For each image, its objects.
      num_objects: The result's number of objects, n, at least that of each image.
      num_slots: The result's number of point slots, k, at least the points of each object.

    Returns:
      Numpy arrays. `mask` and `has_mask` are None if no object has a mask.
    """
    b = len(objects)
    points = np.zeros((b, num_objects, num_slots, 2), np.float32)
    labels = np.full((b, num_objects, num_slots), ABSENT, np.int32)
    masks = {}
    for i, image_objects in enumerate(objects):
        for j, prompt in enumerate(image_objects):
            points[i, j, : len(prompt.points)] = prompt.points
            labels[i, j, : len(prompt.labels)] = prompt.labels
            if prompt.mask is not None:
                masks[i, j] = prompt.mask
    if not masks:
        return Prompts(points=points, labels=labels)
    shape = next(iter(masks.values())).shape
    mask = np.zeros((b, num_objects, *shape), np.float32)
    has_mask = np.zeros((b, num_objects), bool)
    for index, logits in masks.items():
        mask[index] = logits
        has_mask[index] = True
    return Prompts(points=points, labels=labels, mask=mask, has_mask=has_mask)


def _check_points(
    coords: object, labels: object
) -> tuple[Float[np.ndarray, "k 2"], Int32[np.ndarray, " k"]]:
    if coords is None and labels is None:
        return np.zeros((0, 2)), np.zeros(0, np.int32)
    if coords is None or labels is None:
        given, missing = ("point_labels", "point_coords")[:: 1 if coords is None else -1]
        raise ValueError(f"{given} were given without {missing}: each point needs a label, 1 or 0")
    points, classes = _finite_array(coords, "point_coords"), _finite_array(labels, "point_labels")
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(
            f"point_coords must have shape (k, 2), one (x, y) per point; got {points.shape}"
        )
    if classes.shape != points.shape[:1]:
        raise ValueError(
            f"point_labels must have shape {points.shape[:1]}, one per point; got {classes.shape}"
        )
    if invalid := sorted(set(classes.tolist()) - POINT_LABELS.keys()):
        raise ValueError(
            "point_labels must be 1 (foreground) or 0 (background), or -1, 2 or 3 as in "
            f"segment-anything; got {invalid}"
        )
    return points, np.array([POINT_LABELS[label] for label in classes.tolist()], np.int32)


def _check_box(box: object) -> Float[np.ndarray, "corners 2"]:
    """Returns the two corners of a box, or no corners if there is none."""
    if box is None:
        return np.zeros((0, 2))
    corners = _finite_array(box, "box")
    if corners.shape not in ((4,), (1, 4)):
        raise ValueError(f"box must have shape (4,): x0, y0, x1, y1; got {corners.shape}")
    return corners.reshape(2, 2)


def _finite_array(value: object, name: str) -> Float[np.ndarray, "..."]:
    """Converts the value of the argument `name` to float64, all finite as float32."""
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
