"""Tests the names of segment-anything; `tests/reference` compares their values."""

import numpy as np
import pytest

import sam_jax
from sam_jax import segment_anything
from sam_jax.segment_anything import remove_small_regions, sam_model_registry


def test_every_name_is_there():
    for name in segment_anything.__all__:
        assert callable(getattr(segment_anything, name)) or name == "sam_model_registry"


def test_checkpoints_are_bound_models(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model, variables = sam_jax.load("sam_tiny")
    sam_jax.save(tmp_path / "weights", model, variables)
    build = segment_anything.functools.partial(segment_anything._build, lambda: model)
    sam = build(checkpoint="~/weights")
    predictor = segment_anything.SamPredictor(sam)
    assert predictor.model == model
    np.testing.assert_array_equal(
        predictor.variables["params"]["prompt_encoder"]["no_mask"],
        variables["params"]["prompt_encoder"]["no_mask"],
    )
    assert segment_anything.SamAutomaticMaskGenerator(sam, points_per_side=2).points_per_side == 2
    monkeypatch.setattr(segment_anything, "init_variables", lambda model, seed: variables)
    assert build().variables == variables
    message = r"with embed_dim and depth \(768, 12\); sam_tiny has \(64, 2\)"
    with pytest.raises(ValueError, match=message):
        sam_model_registry["vit_b"](checkpoint="sam_tiny")


def test_the_registry_has_the_official_sizes():
    assert sam_model_registry.keys() == {"default", "vit_h", "vit_l", "vit_b"}
    assert sam_model_registry["default"] is sam_model_registry["vit_h"]


def test_an_unknown_mode_is_an_error():
    with pytest.raises(ValueError, match='mode must be "holes" or "islands"; got'):
        remove_small_regions(np.zeros((3, 3), bool), 2, "both")
