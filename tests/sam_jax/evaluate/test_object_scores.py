"""Scores of single objects, and their summary."""

import numpy as np
import pytest

from sam_jax.evaluate.object_scores import (
    PROMPTS,
    ObjectScores,
    PromptScores,
    calibrate,
    fill_of_masks,
    object_rows,
    one_click_upper_bound,
    summarize,
)

SIZE = (40, 50)


def rectangle(top, left, bottom, right):
    mask = np.zeros(SIZE, bool)
    mask[top:bottom, left:right] = True
    return mask


def scores_of(chosen, predicted, area, tiled=None):
    """Scores of objects that are the same for each prompt; the oracle is 0.1 better."""
    n = len(chosen)

    def prompts(chosen):
        columns = np.repeat(np.array(chosen)[:, None], len(PROMPTS), axis=1)
        guesses = np.repeat(np.array(predicted)[:, None], len(PROMPTS), axis=1)
        return PromptScores(columns, columns + 0.1, guesses, np.linspace(0.8, 1, n))

    return ObjectScores(
        image=np.array([f"{i}.png" for i in range(n)]),
        mask=np.arange(n) % 2,
        area=np.array(area),
        fill=np.linspace(0.5, 0.7, n),
        ceiling=np.ones(n),
        entire=prompts(chosen),
        tiled=None if tiled is None else prompts(tiled),
    )


def test_the_upper_bound_of_disjoint_objects_is_one():
    disjoint = np.stack([rectangle(0, 0, 10, 10), rectangle(20, 20, 30, 30)])
    assert one_click_upper_bound(disjoint) == [1, 1]


def test_the_upper_bound_of_nested_objects():
    # The center of either mask is in both masks. Either answer has the mean IoU (1 + iou) / 2.
    part, full = rectangle(14, 14, 24, 34), rectangle(4, 4, 34, 44)
    iou = 200 / 1200
    assert sorted(one_click_upper_bound(np.stack([part, full]))) == pytest.approx([iou, 1])
    # Of three nested masks, the middle one is the best answer to every click.
    inner, middle, outer = rectangle(16, 16, 22, 32), part, full
    assert one_click_upper_bound(np.stack([inner, middle, outer])) == pytest.approx(
        [96 / 200, 1, iou]
    )


def test_the_fill_is_the_share_of_the_box():
    disk = np.hypot(*(np.mgrid[: SIZE[0], : SIZE[1]] - np.array([20, 25])[:, None, None])) < 15.5
    fill = fill_of_masks(np.stack([rectangle(3, 4, 9, 30), rectangle(5, 5, 6, 6), disk]))
    assert fill[:2].tolist() == [1, 1]
    assert fill[2] == pytest.approx(np.pi / 4, abs=0.03)


def test_large_objects_are_also_averaged_on_their_own():
    scores = scores_of([0.2, 0.4, 0.9], [0.5] * 3, [0.001, 0.01, 0.5])
    summary = summarize(scores, None, 4)
    assert (summary["objects"], summary["bad_samples"]) == (3, 4)
    assert summary["box"] == {"chosen": 0.5, "oracle": 0.6}
    assert (summary["fill"], summary["bound"]) == (0.6, 0.9)
    assert "tiles" not in summary
    large = summary["large"]
    assert large["objects"] == 2
    assert large["box"] == large["clicks"]["9"] == {"chosen": 0.65, "oracle": 0.75}
    assert (large["fill"], large["bound"]) == (0.65, 0.95)


def test_without_large_objects_there_are_no_means_of_them():
    summary = summarize(scores_of([0.2], [0.5], [0.009], tiled=[0.8]), "auto", 0)
    assert "large" not in summary
    assert "large" not in summary["tiles"]
    assert summary["tiles"]["size"] == "auto"
    assert summary["tiles"]["box"]["chosen"] == 0.8
    assert set(summary["calibration"]) == {"1", "box"}
    assert summary["tiles"]["calibration"]["1"] == [{"predicted": 0.5, "true": 0.8, "objects": 1}]


def test_calibration_has_a_row_for_each_bin_with_objects():
    predicted = np.array([-0.2, 0.05, 0.45, 0.41, 1.0, 1.3, np.nan])
    true = np.array([0.0, 0.2, 0.5, 0.7, 0.9, 0.8, 0.0])
    assert calibrate(predicted, true) == [
        {"predicted": -0.075, "true": 0.1, "objects": 2},
        {"predicted": 0.43, "true": 0.6, "objects": 2},
        {"predicted": 1.15, "true": 0.85, "objects": 2},
    ]
    assert calibrate(np.array([np.nan]), np.array([0.5])) == []


def test_rows_of_objects():
    rows = object_rows(scores_of([0.2, 0.4], [0.5, np.nan], [0.25, 0.5], tiled=[0.3, 0.6]))
    assert rows[0] == {
        "image": "0.png",
        "mask": 0,
        "area": 0.25,
        "fill": 0.5,
        "ceiling": 1.0,
        "bound": 0.8,
        "clicks": {key: {"chosen": 0.2, "oracle": 0.3, "predicted": 0.5} for key in ("1", "9")},
        "box": {"chosen": 0.2, "oracle": 0.3, "predicted": 0.5},
        "tiles": {
            "bound": 0.8,
            "clicks": {key: {"chosen": 0.3, "oracle": 0.4, "predicted": 0.5} for key in ("1", "9")},
            "box": {"chosen": 0.3, "oracle": 0.4, "predicted": 0.5},
        },
    }
    assert rows[1]["mask"] == 1
    assert rows[1]["box"]["predicted"] is None
    assert "tiles" not in object_rows(scores_of([0.2], [0.5], [0.25]))[0]
