"""Widened models compute the same, and copies of a channel have different weights."""

import dataclasses

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import sam_jax
from sam_jax.model.init import init_variables
from sam_jax.model.sam import build_sam
from train.config import ConfigError, Data, TrainConfig
from train.initialization import sam_variables
from train.widening import widen


def build(dim=16, mask_channels=8, mlp_dim=24, iou_hidden_dim=20):
    return build_sam(
        image_size=(32, 32),
        patch_size=8,
        embed_dim=32,
        depth=1,
        num_heads=2,
        global_blocks=(0,),
        prompt_dim=dim,
        mask_channels=mask_channels,
        decoder_heads=2,
        decoder_mlp_dim=mlp_dim,
        iou_hidden_dim=iou_hidden_dim,
    )


NARROW = build()
DATA = Data(source="scenes")


@pytest.fixture(scope="module")
def narrow_variables():
    """Variables of the narrow model, in which no bias is zero and no scale is one."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: np.asarray(x) + 0.1 * rng.standard_normal(x.shape, np.float32),
        init_variables(NARROW, 0),
    )


def initial_variables(model, path, **changes):
    config = TrainConfig(model=model, data=DATA, init_from=str(path), **changes)
    return sam_variables(config, lambda: init_variables(model, 0), no_batch)


def no_batch():
    raise AssertionError("no images are needed")


def predict(model, variables):
    """Returns the logits and the predicted IoUs for clicks with a mask, and for a box."""
    rng = np.random.default_rng(1)
    predictor = sam_jax.SamPredictor(model, variables)
    predictor.set_image(rng.integers(0, 256, (32, 32, 3), np.uint8))
    logits = rng.standard_normal((1, *model.low_res)).astype(np.float32)
    clicks = {"point_coords": [[5.0, 9], [20, 25]], "point_labels": [1, 0], "mask_input": logits}
    prompts = [clicks, {"box": [3.0, 4, 25, 30]}]
    results = predictor.predict_many(prompts, return_logits=True)
    return results[2], results[1]


@pytest.mark.parametrize(
    "wide",
    [
        build(dim=32),
        pytest.param(build(dim=48, mlp_dim=48, iou_hidden_dim=60), marks=pytest.mark.slow),
        pytest.param(build(mask_channels=16, mlp_dim=72), marks=pytest.mark.slow),
    ],
)
def test_a_widened_model_computes_the_same(narrow_variables, tmp_path, wide, caplog):
    sam_jax.save(tmp_path, NARROW, narrow_variables)
    variables = initial_variables(wide, tmp_path)
    assert "are widened" in caplog.text
    expected = init_variables(wide, 0)
    assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, expected)
    for after, before in zip(
        predict(wide, variables), predict(NARROW, narrow_variables), strict=True
    ):
        np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5 * np.abs(before).max())


def test_copies_of_all_outputs_have_different_weights(narrow_variables):
    """Copies of queries and keys with equal weights would have equal gradients for ever."""
    shapes = {
        k: v.shape for k, v in flatten_dict(init_variables(build(dim=32), 0), sep="/").items()
    }
    flat = widen(flatten_dict(narrow_variables, sep="/"), shapes, 0)
    narrow = flatten_dict(narrow_variables, sep="/")
    kernels = [
        name
        for name in flat
        if name.endswith("/kernel") and flat[name].size == 4 * np.asarray(narrow[name]).size
    ]
    assert any("/q/" in name for name in kernels)
    for name in kernels:
        outputs = flat[name].reshape(-1, flat[name].shape[-1])
        assert (outputs[:, ::2] != outputs[:, 1::2]).any(axis=0).all(), name


def test_widening_depends_on_the_seed_only(narrow_variables, tmp_path):
    sam_jax.save(tmp_path, NARROW, narrow_variables)
    first, second = (initial_variables(build(dim=32), tmp_path) for _ in range(2))
    assert jax.tree.all(jax.tree.map(np.array_equal, first, second))
    other = initial_variables(build(dim=32), tmp_path, seed=1)
    assert not jax.tree.all(jax.tree.map(np.array_equal, first, other))


@pytest.mark.parametrize("dim", [24, pytest.param(8, marks=pytest.mark.slow)])
def test_sizes_that_are_not_multiples_are_an_error(narrow_variables, tmp_path, dim):
    sam_jax.save(tmp_path, NARROW, narrow_variables)
    with pytest.raises(ConfigError, match=rf"prompt_encoder.dim was 16, is {dim}"):
        initial_variables(build(dim=dim), tmp_path)


def test_the_encoder_is_not_widened(narrow_variables, tmp_path):
    sam_jax.save(tmp_path, NARROW, narrow_variables)
    wide = dataclasses.replace(
        build(dim=32), image_encoder=build(dim=32).image_encoder.clone(embed_dim=64)
    )
    with pytest.raises(ConfigError, match="embed_dim was 32, is 64"):
        initial_variables(wide, tmp_path)
