"""Tests that prompts become the expected arrays, and that invalid prompts are errors."""

import numpy as np
import pytest

from sam_jax.model.prompt_encoder import ABSENT, NOT_A_POINT, UNLABELED
from sam_jax.predict.prompts import (
    PROMPT_KEYS,
    ObjectPrompt,
    prepare_mask,
    prepare_points,
    prepare_prompt,
    stack_prompts,
)

SIZE, CANVAS = (50, 100), (64, 64)  # the image becomes 32 by 64: the scale is 0.64
POINTS = {"point_coords": [[10, 20], [100, 50]], "point_labels": [1, 0]}
BOX = {"box": [5, 0, 50, 25]}


def tokens(prompt, size=SIZE, canvas=CANVAS):
    points, labels = prepare_points(prompt, size, canvas)
    assert points.dtype == np.float32
    assert labels.dtype == np.int32
    return [(round(float(x), 4), round(float(y), 4)) for x, y in points], labels.tolist()


def test_points_are_followed_by_the_padding_point():
    assert tokens(POINTS) == ([(6.4, 12.8), (64, 32), (0, 0)], [1, 0, NOT_A_POINT])


def test_a_box_is_two_corners_without_a_padding_point():
    assert tokens(BOX) == ([(3.2, 0), (32, 16)], [2, 3])


def test_points_precede_the_box_without_a_padding_point():
    expected = [(6.4, 12.8), (64, 32), (3.2, 0), (32, 16)], [1, 0, 2, 3]
    assert tokens(POINTS | BOX) == expected
    assert tokens(BOX | POINTS) == expected


@pytest.mark.parametrize(
    "prompt", [{}, dict.fromkeys(PROMPT_KEYS), {"mask_input": np.zeros((3, 3))}]
)
def test_without_points_and_box_there_are_no_tokens(prompt):
    assert tokens(prompt) == ([], [])


def test_empty_points_give_the_padding_point_unless_there_is_a_box():
    empty = {"point_coords": np.zeros((0, 2)), "point_labels": []}
    assert tokens(empty) == ([(0, 0)], [NOT_A_POINT])
    assert tokens(empty | BOX) == tokens(BOX)


def test_other_labels_are_the_official_ones():
    prompt = {"point_coords": [[10, 20]] * 5, "point_labels": [1, 0, -1, 2, 3]}
    _, labels = tokens(prompt)
    assert labels == [1, 0, NOT_A_POINT, UNLABELED, UNLABELED, NOT_A_POINT]


def test_boxes_may_be_reversed_or_empty():
    assert tokens({"box": [50, 25, 5, 0]}) == ([(32, 16), (3.2, 0)], [2, 3])
    assert tokens({"box": [5, 0, 5, 0]}) == ([(3.2, 0), (3.2, 0)], [2, 3])


def test_axes_have_different_scales_since_sides_are_rounded():
    # 30 by 70 becomes 27 by 64, since 27.43 is rounded. 90 by 7 becomes 64 by 5, from 4.98.
    coords = {"point_coords": [[35, 15]], "point_labels": [1]}
    assert tokens(coords, (30, 70))[0][0] == (32, 13.5)
    coords = {"point_coords": [[7, 45]], "point_labels": [1]}
    assert tokens(coords, (90, 7))[0][0] == (5, 32)
    assert tokens(coords, (90, 7), (45, 90))[0][0] == (4, 22.5)  # the height fills that canvas


@pytest.mark.parametrize("kind", [list, tuple, np.array, lambda x: np.array(x, np.int16)])
def test_lists_tuples_and_arrays_are_equivalent(kind):
    prompt = {name: kind(value) for name, value in (POINTS | BOX).items()}
    assert tokens(prompt) == tokens(POINTS | BOX)


def test_a_box_may_be_a_row_and_labels_may_be_bools_or_floats():
    assert tokens({"box": [[5, 0, 50, 25]]}) == tokens(BOX)
    assert tokens(POINTS | {"point_labels": [True, False]}) == tokens(POINTS)
    assert tokens(POINTS | {"point_labels": [1.0, 0.0]}) == tokens(POINTS)


def test_arguments_are_not_changed():
    prompt = {"point_coords": np.array([[10.0, 20.0]]), "point_labels": np.array([1])}
    prompt |= {"box": np.array([5.0, 0, 50, 25]), "mask_input": np.ones((1, 3, 4))}
    copies = {name: value.copy() for name, value in prompt.items()}
    points, _ = prepare_points(prompt, SIZE, CANVAS)
    points[:] = -1
    prepare_mask(prompt, (3, 4))[:] = -1
    for name, value in copies.items():
        np.testing.assert_array_equal(prompt[name], value)


def test_masks_with_and_without_a_leading_axis():
    mask = np.arange(12.0).reshape(3, 4)
    for given in (mask, mask[None], mask.tolist(), mask.astype(np.float16)):
        actual = prepare_mask({"mask_input": given}, (3, 4))
        assert actual.dtype == np.float32
        np.testing.assert_array_equal(actual, mask)
    assert prepare_mask({}, (3, 4)) is None
    assert prepare_mask({"mask_input": None}, (3, 4)) is None


def make_object(*labels, mask=None):
    points = np.arange(2 * len(labels), dtype=np.float32).reshape(-1, 2)
    return ObjectPrompt(points, np.array(labels, np.int32), mask)


def test_stacking_pads_with_absent_slots_not_with_the_padding_point():
    objects = [[make_object(1, NOT_A_POINT), make_object(2, 3, 1)], []]
    prompts = stack_prompts(objects, 3, 4)
    _ = ABSENT
    np.testing.assert_array_equal(
        prompts.labels, [[[1, -1, _, _], [2, 3, 1, _], [_, _, _, _]], [[_, _, _, _]] * 3]
    )
    assert prompts.labels.dtype == np.int32
    assert prompts.points.shape == (2, 3, 4, 2)
    assert prompts.points.dtype == np.float32
    np.testing.assert_array_equal(prompts.points[0, 1], [[0, 1], [2, 3], [4, 5], [0, 0]])
    assert prompts.mask is None
    assert prompts.has_mask is None


def test_stacking_marks_objects_with_masks():
    mask = np.ones((3, 4), np.float32)
    prompts = stack_prompts(
        [[make_object(1), make_object(1, mask=mask)], [make_object(mask=2 * mask)]], 2, 1
    )
    np.testing.assert_array_equal(prompts.has_mask, [[False, True], [True, False]])
    assert prompts.mask.shape == (2, 2, 3, 4)
    assert prompts.mask.dtype == np.float32
    np.testing.assert_array_equal(prompts.mask[:, :, 0, 0], [[0, 1], [2, 0]])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"point_coords": [[1, 2]]}, r"point_coords.*without point_labels"),
        ({"point_labels": [1]}, r"point_labels.*without point_coords"),
        ({"point_coords": [1, 2], "point_labels": [1]}, r"point_coords.*\(k, 2\).*got \(2,\)"),
        (
            {"point_coords": [[[1, 2]]], "point_labels": [1]},
            r"point_coords.*\(k, 2\).*got \(1, 1, 2\)",
        ),
        ({"point_coords": [[1, 2, 3]], "point_labels": [1]}, r"point_coords.*got \(1, 3\)"),
        ({"point_coords": [[1, 2]], "point_labels": [1, 0]}, r"point_labels.*\(1,\).*got \(2,\)"),
        ({"point_coords": [[1, 2]], "point_labels": 1}, r"point_labels.*\(1,\).*got \(\)"),
        ({"point_coords": [[1, 2]], "point_labels": [4]}, r"point_labels.*1.*0.*got \[4"),
        ({"point_coords": [[1, 2]], "point_labels": [-2]}, r"point_labels.*1.*0.*got \[-2"),
        ({"point_coords": [[1, 2]], "point_labels": [0.5]}, r"point_labels.*1.*0.*got \[0.5"),
        ({"point_coords": [[1, 2]], "point_labels": [np.nan]}, r"point_labels must be finite"),
        ({"point_coords": [[np.nan, 2]], "point_labels": [1]}, r"point_coords must be finite"),
        ({"point_coords": [[np.inf, 2]], "point_labels": [1]}, r"point_coords must be finite"),
        # This value is finite in float64, but not in float32.
        ({"point_coords": [[1e39, 2]], "point_labels": [1]}, r"point_coords must be finite"),
        ({"point_coords": [["a", "b"]], "point_labels": [1]}, r"point_coords.*numbers; got"),
        ({"point_coords": [[1, 2], [3]], "point_labels": [1, 1]}, r"point_coords.*numbers; got"),
        ({"point_coords": [[1j, 2]], "point_labels": [1]}, r"point_coords.*numbers; got"),
        ({"point_coords": object(), "point_labels": [1]}, r"point_coords.*numbers; got"),
        ({"point_coords": [[1, 2]], "point_labels": [None]}, r"point_labels.*numbers; got"),
        ({"box": [1, 2, 3]}, r"box must have shape \(4,\).*got \(3,\)"),
        ({"box": [[1, 2, 3, 4]] * 2}, r"box must have shape \(4,\).*got \(2, 4\)"),
        ({"box": [0, 0, np.nan, 1]}, r"box must be finite"),
        ({"box": [0, 0, np.inf, 1]}, r"box must be finite"),
        ({"box": [0, 0, 1e39, 1]}, r"box must be finite"),
        ({"box": "0,0,5,5"}, r"box.*numbers; got"),
        ({"mask_input": np.zeros((4, 3))}, r"mask_input.*\(1, 3, 4\).*got \(4, 3\)"),
        ({"mask_input": np.zeros((2, 3, 4))}, r"mask_input.*\(1, 3, 4\).*got \(2, 3, 4\)"),
        ({"mask_input": 3}, r"mask_input.*\(1, 3, 4\).*got \(\)"),
        ({"mask_input": np.full((3, 4), np.nan)}, r"mask_input must be finite"),
        ({"mask_input": np.full((3, 4), 1e39)}, r"mask_input must be finite"),
        ({"mask_input": [["a"] * 4] * 3}, r"mask_input.*numbers; got"),
        ({"points": [[1, 2]]}, r"keys among point_coords, .*mask_input; got \['points'\]"),
        ({"box": [1, 2, 3, 4], 7: None}, r"keys among .*got .*7"),
        ([[1, 2]], r"must be a dict.*got list"),
        (None, r"must be a dict.*got NoneType"),
    ],
)
def test_invalid_prompts_are_errors(without_type_checks, prompt, message):
    with pytest.raises(ValueError, match=message):
        prepare_prompt(prompt, SIZE, CANVAS, (3, 4))
