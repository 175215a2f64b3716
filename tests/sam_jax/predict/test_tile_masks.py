"""Logits move between tiles and into the image where they belong, and cut masks count less."""

import numpy as np
import pytest

from sam_jax.images.resize import postprocess_masks
from sam_jax.predict.tile_masks import (
    OUTSIDE_LOGIT,
    MaskTiles,
    mask_corners,
    move_logits,
    paste,
    score_masks,
)
from sam_jax.predict.tiles import Tile, plan_pyramid

CANVAS, LOW_RES = (64, 64), (16, 16)
PYRAMID = plan_pyramid((200, 300), CANVAS, 60)


def logits_of(mask, size=LOW_RES):
    """Logits of 4 in a box (rows, columns), and of -4 elsewhere."""
    logits = np.full(size, -4, np.float32)
    logits[mask] = 4
    return logits


def test_moving_to_a_larger_tile_keeps_the_place_in_the_image():
    source, target = Tile(64, 64, 64, 64), Tile(32, 0, 128, 160)
    logits = logits_of(np.s_[16:48, 24:40], (64, 64))
    moved = move_logits(logits, source, target, CANVAS)
    before, after = np.zeros((2, 200, 300), bool)
    before[source.region] = postprocess_masks(logits, source.size, CANVAS) > 0
    after[target.region] = postprocess_masks(moved, target.size, CANVAS) > 0
    assert (before & after).sum() > 0.85 * (before | after).sum()
    rows, columns = np.nonzero(after)
    assert abs(rows.mean() - (64 + 8 * 4)) < 1
    assert abs(columns.mean() - (64 + 8 * 4)) < 1


def test_logits_outside_of_the_former_tile_are_the_lowest():
    logits = np.full(LOW_RES, 5, np.float32)
    logits[3, 3] = -7
    moved = move_logits(logits, Tile(0, 0, 64, 64), Tile(0, 0, 128, 128), CANVAS)
    assert (moved[8:] == -7).all()
    assert (moved[:, 8:] == -7).all()
    assert moved[:8, :8].min() > -7
    positive = move_logits(abs(logits), Tile(0, 0, 64, 64), Tile(0, 0, 128, 128), CANVAS)
    assert (positive[8:] == -1).all()


def test_moving_within_a_padded_tile_does_not_read_the_padding():
    """A tile of half the canvas' height has logits in the upper half only."""
    logits = np.full(LOW_RES, 99, np.float32)
    logits[:8] = np.arange(16)
    moved = move_logits(logits, Tile(0, 0, 32, 64), Tile(0, 0, 64, 64), CANVAS)
    np.testing.assert_allclose(moved[:8], logits[:8], atol=1e-5)
    assert (moved[8:] == -1).all()


def test_corners_are_those_of_the_mask_in_the_image():
    corners = mask_corners(logits_of(np.s_[4:12, 6:10]), Tile(100, 50, 32, 32), CANVAS)
    np.testing.assert_allclose(corners, [[50 + 6 * 2, 100 + 4 * 2], [50 + 20, 100 + 24]])
    assert len(mask_corners(logits_of(np.s_[:0]), Tile(100, 50, 32, 32), CANVAS)) == 0


def test_a_mask_that_its_tile_cuts_off_counts_half():
    iou = np.array([0.8], np.float32)
    inner = logits_of(np.s_[4:12, 6:10])[None]
    left = logits_of(np.s_[4:12, 0:10])[None]
    bottom = logits_of(np.s_[4:16, 2:10])[None]
    middle, corner = Tile(70, 70, 60, 60), Tile(0, 0, 60, 60)
    assert score_masks(inner, iou, middle, PYRAMID) == pytest.approx(0.8)
    assert score_masks(left, iou, middle, PYRAMID) == pytest.approx(0.4)
    assert score_masks(left, iou, corner, PYRAMID) == pytest.approx(0.8)  # the side of the image
    assert score_masks(bottom, iou, corner, PYRAMID) == pytest.approx(0.4)
    assert score_masks(bottom, iou, Tile(140, 0, 60, 60), PYRAMID) == pytest.approx(0.8)


def test_the_score_is_the_best_iou_times_stability():
    logits = np.stack([logits_of(np.s_[4:12, 6:10]), logits_of(np.s_[4:12, 6:10])])
    logits[0, 4:8, 6:10] = 0.5  # above -1, but not above 1
    iou = np.array([0.8, 0.3], np.float32)
    assert score_masks(logits, iou, Tile(70, 70, 60, 60), PYRAMID) == pytest.approx(0.4)
    empty = np.full((1, *LOW_RES), -9, np.float32)
    assert score_masks(empty, iou[:1], Tile(70, 70, 60, 60), PYRAMID) == 0


def test_masks_that_are_small_in_their_tile_count_less():
    iou = np.array([0.8], np.float32)
    tile = Tile(70, 70, 60, 60)
    scores = [
        score_masks(logits_of(np.s_[4 : 4 + side, 4:6])[None], iou, tile, PYRAMID)
        for side in (1, 4, 7, 9)
    ]
    assert scores[1] == pytest.approx(0.8 * (4 / 16) / 0.4)
    assert scores[0] < scores[1] < scores[2] == scores[3] == pytest.approx(0.8)


def test_pixels_outside_of_the_tile_are_not_in_the_mask():
    tile = Tile(2, 3, 4, 5)
    masks = np.empty((1, 9, 10), bool)
    paste(masks, np.ones((1, 4, 5), bool), tile)
    assert masks.sum() == 20
    assert masks[0, 2:6, 3:8].all()
    logits = np.empty((1, 9, 10), np.float32)
    paste(logits, np.ones((1, 4, 5), np.float32), tile)
    assert (logits == OUTSIDE_LOGIT).sum() == 70


def test_tiles_of_logits_are_remembered_and_others_are_errors():
    known = MaskTiles()
    logits = np.random.default_rng(0).normal(size=(3, *LOW_RES)).astype(np.float32)
    known.add(logits, Tile(1, 2, 3, 4))
    assert known.find(logits[2].copy()) == Tile(1, 2, 3, 4)
    with pytest.raises(ValueError, match=r"mask_input must be .* an earlier prediction on this"):
        known.find(logits[2] + 1)


def test_the_oldest_logits_are_forgotten(monkeypatch):
    monkeypatch.setattr("sam_jax.predict.tile_masks.REMEMBERED_MASKS", 2)
    known = MaskTiles()
    logits = np.arange(3, dtype=np.float32)[:, None, None] * np.ones(LOW_RES, np.float32)
    known.add(logits, Tile(1, 2, 3, 4))
    assert known.find(logits[2]) == known.find(logits[1])
    with pytest.raises(ValueError, match="mask_input"):
        known.find(logits[0])
