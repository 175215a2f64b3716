"""Compares the losses with values computed by hand and with optax."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sam_jax.masks.overlap import mask_iou
from train.config import Interactive
from train.objectives.losses import (
    MASK_LOSSES,
    dice_loss,
    focal_loss,
    iou_losses,
    mask_losses,
    weighted_sum,
)

LN2, LN3 = np.log(2), np.log(3)


def test_focal_loss_matches_values_computed_by_hand():
    # p = 1/2 in all four pixels, so that each has the loss alpha * (1/2)^2 * ln 2. alpha is 1/4 in
    # the mask and 3/4 outside it.
    logits = jnp.zeros((2, 2))
    target = jnp.array([[True, False], [False, False]])
    expected = (0.25 + 3 * 0.75) / 4 * 0.25 * LN2
    np.testing.assert_allclose(focal_loss(logits, target), expected, rtol=1e-6)
    # p = 3/4 or 1/4: one right and one wrong pixel in the mask, and one of each outside it.
    logits = jnp.array([[LN3, -LN3, LN3, -LN3]])
    target = jnp.array([[True, True, False, False]])
    right, wrong = (1 / 4) ** 2 * np.log(4 / 3), (3 / 4) ** 2 * np.log(4)
    expected = (0.25 * right + 0.25 * wrong + 0.75 * wrong + 0.75 * right) / 4
    np.testing.assert_allclose(focal_loss(logits, target), expected, rtol=1e-6)


def test_dice_loss_matches_values_computed_by_hand():
    # sum p t = 3/4, sum p = 3/4 + 1/4 + 1/2, sum t = 1.
    logits = jnp.array([[LN3, -LN3], [0.0, -200.0]])
    target = jnp.array([[True, False], [False, False]])
    expected = 1 - (2 * 0.75 + 1) / (1.5 + 1 + 1)
    np.testing.assert_allclose(dice_loss(logits, target), expected, rtol=1e-6)
    empty = jnp.zeros((2, 2), bool)
    np.testing.assert_allclose(dice_loss(logits, empty), 1 - 1 / 2.5, rtol=1e-6)
    np.testing.assert_allclose(dice_loss(jnp.full((2, 2), -200.0), empty), 0, atol=1e-6)


def test_no_gradient_flows_through_the_iou():
    target = jnp.array([[True, False], [True, False]])
    gradient = jax.grad(lambda x: (0.3 - mask_iou(x > 0, target)) ** 2)(jnp.ones((2, 2)))
    np.testing.assert_array_equal(gradient, 0)


def test_weighted_sum_uses_the_weights_of_the_config():
    losses = {"focal": jnp.array([1.0, 2.0]), "dice": jnp.array([10.0, 30.0])}
    config = Interactive(focal=3.0, dice=0.5)
    np.testing.assert_allclose(weighted_sum(losses, config), [8.0, 21.0], rtol=1e-6)


def test_every_mask_loss_has_a_weight_in_the_config():
    weights = {field.name for field in dataclasses.fields(Interactive)}
    assert set(MASK_LOSSES) <= weights


@pytest.mark.parametrize(("iou_loss", "expected"), [("mse", [0.25, 0.01]), ("l1", [0.5, 0.1])])
def test_iou_losses_match_values_computed_by_hand(iou_loss, expected):
    found = iou_losses(jnp.array([0.2, 0.9]), jnp.array([0.7, 0.8]), Interactive(iou_loss=iou_loss))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.fixture(scope="module")
def random_batch():
    """Logits '2 3 5 7' of different magnitudes up to 30, and targets."""
    rng = np.random.default_rng(0)
    logits = rng.uniform(-30, 30, (2, 3, 5, 7)) * rng.choice([0.01, 0.1, 1], (2, 3, 5, 7))
    return jnp.array(logits, jnp.float32), jnp.array(rng.random((2, 3, 5, 7)) < 0.4)


def test_focal_loss_matches_optax(random_batch):
    logits, target = random_batch
    pixels = optax.losses.sigmoid_focal_loss(logits, target.astype(float), alpha=0.25, gamma=2)
    actual = focal_loss(logits, target)
    assert actual.shape == (2, 3)
    np.testing.assert_allclose(actual, pixels.mean(axis=(-2, -1)), rtol=1e-5)


def test_dice_loss_matches_optax_with_half_the_smoothing(random_batch):
    logits, target = random_batch

    def optax_loss(smooth):
        return optax.losses.dice_loss(
            logits[..., None],
            target[..., None].astype(float),
            smooth=smooth,
            axis=(-3, -2),
            reduction="none",
        )

    actual = dice_loss(logits, target)
    assert actual.shape == (2, 3)
    np.testing.assert_allclose(actual, optax_loss(0.5)[..., 0], rtol=1e-5)
    assert np.abs(actual - optax_loss(1.0)[..., 0]).max() > 1e-3


def test_mask_losses_returns_the_individual_losses(random_batch):
    losses = mask_losses(*random_batch)
    np.testing.assert_array_equal(losses["focal"], focal_loss(*random_batch))
    np.testing.assert_array_equal(losses["dice"], dice_loss(*random_batch))


def test_losses_of_batched_masks_are_independent(random_batch):
    logits, target = random_batch
    for loss in (focal_loss, dice_loss):
        separate = [
            [loss(x, t) for x, t in zip(*row, strict=True)]
            for row in zip(logits, target, strict=True)
        ]
        np.testing.assert_allclose(loss(logits, target), separate, rtol=1e-6)
        # One target is broadcast to several masks.
        shared = loss(logits, target[:, :1])
        np.testing.assert_allclose(shared[1, 2], loss(logits[1, 2], target[1, 0]), rtol=1e-6)


@pytest.mark.parametrize("size", [60.0, 1e4])
@pytest.mark.parametrize("loss", [focal_loss, dice_loss])
def test_values_and_gradients_of_large_logits_are_finite(loss, size):
    logits = jnp.array([[size, -size], [size, -size]])
    target = jnp.array([[True, True], [False, False]])
    value, gradient = jax.value_and_grad(loss)(logits, target)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("size", [60.0, 1e4])
def test_losses_of_large_logits_match_values_computed_by_hand(size):
    """The focal loss of a wrong pixel is alpha * size; its gradient has the magnitude alpha."""
    logits = jnp.array([[size, -size], [size, -size]])
    target = jnp.array([[True, True], [False, False]])
    value, gradient = jax.value_and_grad(focal_loss)(logits, target)
    np.testing.assert_allclose(value, (0.25 + 0.75) * size / 4, rtol=1e-6)
    expected = [[0, -0.25 / 4], [0.75 / 4, 0]]
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-20)
    # Dice: sum p t = 1, sum p = 2, sum t = 2.
    np.testing.assert_allclose(dice_loss(logits, target), 1 - 3 / 5, rtol=1e-6)


def test_gradients_match_finite_differences():
    rng = np.random.default_rng(1)
    logits, direction = rng.normal(size=(2, 3, 4)) * [[[2.0]], [[1.0]]]
    target = rng.random((3, 4)) < 0.5

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    def focal(x):
        p = np.where(target, sigmoid(x), 1 - sigmoid(x))  # probability of the true class
        return np.mean(np.where(target, 0.25, 0.75) * (1 - p) ** 2 * -np.log(p))

    def dice(x):
        p = sigmoid(x)
        return 1 - (2 * np.sum(p * target) + 1) / (np.sum(p) + target.sum() + 1)

    for loss, numpy_loss in ((focal_loss, focal), (dice_loss, dice)):
        float32 = jnp.array(logits, jnp.float32)
        jax_target = jnp.array(target)
        np.testing.assert_allclose(loss(float32, jax_target), numpy_loss(logits), rtol=1e-5)
        h = 1e-5  # in float64
        slope = (numpy_loss(logits + h * direction) - numpy_loss(logits - h * direction)) / (2 * h)
        gradient = np.asarray(jax.grad(loss)(float32, jax_target), np.float64)
        np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=1e-4)
