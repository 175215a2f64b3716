"""The masked autoencoder's objective; `tests/reference/test_mae.py` has it against theirs."""

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


def test_hidden_patches_alone_count_each_by_its_own_scale():
    image = np.zeros((2, 4, 4, 3), np.float32)
    image[0, :2, :2] = np.arange(12).reshape(2, 2, 3)  # patches of 2 x 2 pixels
    image[0, 2:, 2:] = 7 + 100 * np.arange(12).reshape(2, 2, 3)
    scaled = (np.arange(12) - 5.5) / np.sqrt(13)  # of a variance over 11
    patches = np.stack([scaled + 1, np.full(12, 9), np.full(12, 9), scaled + 3])[None]
    hidden = np.array([[True, False, False, True]])
    patches = np.concatenate([patches, np.full((1, 4, 12), 2)]).astype(np.float32)
    losses = reconstruction_loss(
        ReconstructedPatches(patches, np.repeat(hidden, 2, 0)), image, 2, normalized=True
    )
    np.testing.assert_allclose(losses, [(1 + 9) / 2, 4], rtol=1e-4)


def test_plain_colours_can_be_painted_instead():
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
    return jit(lambda *args: ReconstructionObjective(MODEL, Reconstruction())(*args).mean())


def batch_of(*ids):
    image = lambda i: np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)
    return ImageBatch(np.stack([image(i) for i in ids]), np.array(ids, np.int32))


def test_what_is_hidden_depends_on_the_image_and_the_step_alone(objective, params):
    key = jax.random.key(0)
    loss = lambda *ids, key=key: float(objective(params, {}, batch_of(*ids), key)[0])
    alone = [loss(i, i) for i in (3, 4)]
    assert loss(3, 4) == pytest.approx(np.mean(alone), rel=1e-5)
    assert loss(4, 3) == pytest.approx(np.mean(alone), rel=1e-5)
    assert abs(loss(3, 3, key=jax.random.key(1)) - alone[0]) > 1e-4


def test_gradients_reach_every_parameter(jit, params):
    objective = lambda *args: ReconstructionObjective(MODEL, Reconstruction())(*args).mean()
    gradient = jit(jax.grad(lambda p: objective(p, {}, batch_of(1, 2), jax.random.key(0))[0]))
    for path, x in jax.tree_util.tree_leaves_with_path(gradient(params)):
        assert np.isfinite(x).all()
        assert np.abs(x).max() > 0, path
