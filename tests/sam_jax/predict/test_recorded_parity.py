"""`SamPredictor` against what segment-anything predicted: see `tests/reference/record.py`."""

from pathlib import Path

import numpy as np
import pytest

import sam_jax

DATA = Path(__file__).parents[2] / "data"
MODELS = {"reference_tiny": 8, "reference_deep": 4}  # and the kinds of prompts that are recorded
TOLERANCE = 1e-4  # of the largest magnitude
MASK_IOU = 0.9999


@pytest.fixture(scope="module", params=MODELS)
def recorded(request):
    """Our predictor with recorded weights, the recorded arrays, and the number of prompts."""
    predictor = sam_jax.SamPredictor(*sam_jax.load(DATA / f"{request.param}.safetensors"))
    with np.load(DATA / f"{request.param}.npz") as arrays:
        return predictor, dict(arrays), MODELS[request.param]


@pytest.mark.parametrize("photo", ["landscape", "portrait"])
def test_predictions(recorded, photo):
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
            for ours, theirs in zip(masks, recorded_masks, strict=True):
                assert (ours & theirs).sum() >= MASK_IOU * (ours | theirs).sum()


def _assert_close(ours, theirs):
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max()
