"""Compares `SamPredictor` with recorded predictions of segment-anything.

`tests/reference/record.py` records them.
"""

from pathlib import Path

import numpy as np
import pytest

import sam_jax

DATA = Path(__file__).parents[2] / "data"
MODELS = {"reference_tiny": 8, "reference_deep": 4}  # the number of recorded kinds of prompts
TOLERANCE = 1e-4  # of the largest magnitude
MASK_IOU = 0.9999


@pytest.fixture(scope="module", params=MODELS)
def recorded(request):
    """Returns a predictor with recorded weights, the recorded arrays and the number of prompts."""
    predictor = sam_jax.SamPredictor(*sam_jax.load(DATA / f"{request.param}.safetensors"))
    with np.load(DATA / f"{request.param}.npz") as arrays:
        return predictor, dict(arrays), MODELS[request.param]


@pytest.mark.parametrize("photo", ["landscape", "portrait"])
def test_predictions_equal_the_recorded_ones(recorded, photo):
    predictor, arrays, num_prompts = recorded
    predictor.set_image(arrays[f"{photo}/image"])
    kinds = {name.split("/")[1] for name in arrays if name.startswith(f"{photo}/")} - {"image"}
    assert len(kinds) == num_prompts
    for kind in kinds:
        prefix = f"{photo}/{kind}/"
        found = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
        expected = {k: found.pop(k) for k in ("low_res_logits", "scores", "masks")}
        for multimask_output, kept in ((False, slice(0, 1)), (True, slice(1, 4))):
            masks, scores, low_res = predictor.predict(**found, multimask_output=multimask_output)
            _assert_close(low_res, expected["low_res_logits"][kept])
            _assert_close(scores, expected["scores"][kept])
            width = masks.shape[-1]
            recorded_masks = np.unpackbits(expected["masks"][kept], axis=-1, count=width) > 0
            for mask, recorded_mask in zip(masks, recorded_masks, strict=True):
                union = (mask | recorded_mask).sum()
                assert (mask & recorded_mask).sum() >= MASK_IOU * union


def _assert_close(actual, expected):
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= TOLERANCE * np.abs(expected).max()
