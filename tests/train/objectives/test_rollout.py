"""Checks that a rollout has the rounds of the objective, with points in image pixels."""

import dataclasses

import jax
import numpy as np
import pytest

from sam_jax.data.segmentation_batch import Batch
from train.config import Interactive
from train.objectives.interactive import InteractiveObjective
from train.objectives.rollout import rollout

KEY = jax.random.key(3)
BOX = (9, 7, 40, 33)
CONFIG = Interactive(loss_scale=2)  # a pixel of the loss is then one pixel of the image


@pytest.fixture(scope="module", autouse=True)
def _few_optimizations():
    """Disables most optimizations, because `rollout` does not compile with the fixture `jit`."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def make_batch(model, size, box, mask_id=1):
    """Returns one image of noise with one mask, a brighter rectangle (x0, y0, x1, y1)."""
    x0, y0, x1, y1 = box
    mask = np.zeros((1, 1, *model.image_size), bool)
    mask[..., y0:y1, x0:x1] = True
    image = np.random.default_rng(0).integers(0, 128, (1, *model.image_size, 3), np.uint8)
    image[0, y0:y1, x0:x1] += 100
    return Batch(
        image=image,
        size=np.array([size], np.int32),
        image_id=np.array([5], np.int32),
        masks=np.packbits(mask, axis=-1),
        mask_id=np.array([[mask_id]], np.int32),
        valid=np.ones((1, 1), bool),
    )


def test_rounds_match_the_objective(tiny, jit):
    model, variables = tiny
    batch = make_batch(model, (48, 60), BOX)
    rounds = rollout(model, variables, CONFIG, batch, KEY)
    miou = np.array([r.iou[r.chosen] for r in rounds])
    assert len(np.unique(miou)) > 3, "the rounds differ"

    @jit
    def objective(*args):
        return InteractiveObjective(model, CONFIG, train=False)(*args).mean()

    _, values = objective(variables["params"], variables["constants"], batch, KEY)
    np.testing.assert_allclose(miou, values["miou"], atol=1e-5)


def test_rounds_contain_the_prompts_and_predictions(tiny):
    model, variables = tiny
    low_res = (4 * 48 // model.patch_size, 4 * 72 // model.patch_size)
    first_labels = set()
    for mask_id in range(8):
        batch = make_batch(model, (48, 60), BOX, mask_id)
        first, *later = rounds = rollout(model, variables, CONFIG, batch, KEY)
        assert len(rounds) == 11
        first_labels.add(tuple(first.labels.tolist()))
        assert first.logits.shape == (3, *low_res)
        assert all(r.logits.shape == (1, *low_res) and r.chosen == 0 for r in later)
        assert first.chosen == first.predicted.argmax()
        num_points = [len(r.labels) for r in rounds]
        assert num_points[-1] - num_points[0] == 8
        assert sorted(np.diff(num_points)) == [0, 0, *[1] * 8], "two rounds add no point"
        for before, after in zip(rounds, later, strict=False):
            np.testing.assert_array_equal(after.points[: len(before.points)], before.points)
        last = rounds[-1]
        assert np.all((last.points >= 0) & (last.points <= (59, 47))), "points must be in the image"
        for (x, y), label in zip(last.points, last.labels, strict=True):
            if label in (0, 1):
                assert label == (9 <= x < 40 and 7 <= y < 33)
    assert first_labels == {(1,), (2, 3)}, "the first prompt must be a click or a box"


def test_more_than_one_mask_is_an_error(tiny):
    model, variables = tiny
    batch = make_batch(model, (48, 72), BOX)
    two_masks = dataclasses.replace(batch, valid=np.ones((1, 2), bool))
    with pytest.raises(ValueError, match=r"masks_per_image=1; got .* \(1, 2\)"):
        rollout(model, variables, CONFIG, two_masks, KEY)
