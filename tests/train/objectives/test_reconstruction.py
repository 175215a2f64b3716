"""The masked autoencoder's objective.

`tests/reference/test_mae.py` compares it with Hugging Face.
"""

import dataclasses

import jax
import numpy as np
import pytest

from configs.mae_tiny import config as tiny
from sam_jax.data.crop_batch import ImageBatch
from sam_jax.model.mae import ReconstructedPatches, mae_tiny, reconstruction_loss
from train.config import Reconstruction
from train.objectives.reconstruction import ReconstructionObjective
from train.tasks.base import make_task

MODEL = mae_tiny(image_size=(32, 32), depth=1)


def test_loss_uses_only_hidden_patches_and_normalizes_each():
    image = np.zeros((2, 4, 4, 3), np.float32)
    image[0, :2, :2] = np.arange(12).reshape(2, 2, 3)  # patches of 2 x 2 pixels
    image[0, 2:, 2:] = 7 + 100 * np.arange(12).reshape(2, 2, 3)
    scaled = (np.arange(12) - 5.5) / np.sqrt(13)  # the variance is divided by 11
    patches = np.stack([scaled + 1, np.full(12, 9), np.full(12, 9), scaled + 3])[None]
    hidden = np.array([[True, False, False, True]])
    patches = np.concatenate([patches, np.full((1, 4, 12), 2)]).astype(np.float32)
    losses = reconstruction_loss(
        ReconstructedPatches(patches, np.repeat(hidden, 2, 0)), image, 2, normalized=True
    )
    np.testing.assert_allclose(losses, [(1 + 9) / 2, 4], rtol=1e-4)


def test_loss_without_normalization_compares_colors():
    image = np.random.default_rng(0).standard_normal((1, 4, 4, 3)).astype(np.float32)
    patches = image.reshape(1, 2, 2, 2, 2, 3).swapaxes(2, 3).reshape(1, 4, 12) + 2
    hidden = np.array([[True, True, False, False]])
    losses = reconstruction_loss(ReconstructedPatches(patches, hidden), image, 2, normalized=False)
    np.testing.assert_allclose(losses, [4], rtol=1e-5)


@pytest.fixture(scope="module")
def params():
    return make_task(dataclasses.replace(tiny, model=MODEL)).init_fn()["params"]


@pytest.fixture(scope="module")
def objective(jit):
    return jit(mean_objective)


def mean_objective(*args):
    return ReconstructionObjective(MODEL, Reconstruction())(*args).mean()


def make_batch(*ids):
    """Returns images of noise that depend on their ids."""
    images = [np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8) for i in ids]
    return ImageBatch(np.stack(images), np.array(ids, np.int32))


def test_hidden_patches_depend_only_on_the_image_and_the_step(objective, params):
    def loss(*ids, seed=0):
        return float(objective(params, {}, make_batch(*ids), jax.random.key(seed))[0])

    separate = [loss(i, i) for i in (3, 4)]
    assert loss(3, 4) == pytest.approx(np.mean(separate), rel=1e-5)
    assert loss(4, 3) == pytest.approx(np.mean(separate), rel=1e-5)
    assert abs(loss(3, 3, seed=1) - separate[0]) > 1e-4


def test_gradients_reach_every_parameter(jit, params):
    @jit
    @jax.grad
    def gradient(params):
        return mean_objective(params, {}, make_batch(1, 2), jax.random.key(0))[0]

    for path, x in jax.tree_util.tree_leaves_with_path(gradient(params)):
        assert np.isfinite(x).all()
        assert np.abs(x).max() > 0, path
