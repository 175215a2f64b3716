"""The initial neck for an encoder that was trained elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.model.image_encoder import Neck
from train.neck import fit_neck, principal_components

WIDTH, CHANNELS = 24, 8


@pytest.fixture(scope="module")
def tokens():
    """Tokens of different lengths, whose features have a mean and few large directions."""
    rng = np.random.default_rng(0)
    latent = rng.normal(size=(2000, CHANNELS)) * np.linspace(3, 1, CHANNELS)
    noise = 0.05 * rng.normal(size=(2000, WIDTH))
    mean = rng.normal(size=WIDTH)
    features = latent @ rng.normal(size=(CHANNELS, WIDTH)) + noise + mean
    return (features * rng.uniform(0.5, 4, (2000, 1))).astype(np.float32)


@pytest.fixture(scope="module")
def params():
    neck = Neck(CHANNELS, "float32")
    return neck.init(jax.random.key(0), jnp.zeros((1, 2, 2, WIDTH)))["params"]


def layer_norm(x, eps=1e-6):
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)


def test_the_neck_projects_normalized_features_without_their_mean(tokens, params):
    """Folding the last LayerNorm into the neck is exact: scale, bias and mean."""
    rng = np.random.default_rng(1)
    scale, bias = rng.uniform(0.3, 2, WIDTH), rng.normal(size=WIDTH)
    fitted = fit_neck(params, tokens, scale, seed=0)
    output = Neck(CHANNELS, "float32").apply(
        {"params": fitted}, jnp.asarray(tokens.reshape(1, 40, 50, WIDTH))
    )

    features = scale * layer_norm(tokens.astype(np.float64)) + bias
    components = principal_components(scale * layer_norm(tokens.astype(np.float64)), CHANNELS)
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(CHANNELS, CHANNELS)))[0]
    projected = (features - features.mean(axis=0)) @ components @ rotation
    expected = layer_norm(layer_norm(projected))
    np.testing.assert_allclose(output.reshape(-1, CHANNELS), expected, atol=2e-3)


def test_the_projection_keeps_most_of_the_variance(tokens):
    features = layer_norm(tokens.astype(np.float64))
    components = principal_components(features, CHANNELS)
    np.testing.assert_allclose(components.T @ components, np.eye(CHANNELS), atol=1e-9)
    np.testing.assert_allclose(features.mean(axis=0) @ components, 0, atol=1e-9)
    centered = features - features.mean(axis=0)
    kept = ((centered @ components) ** 2).sum() / (centered**2).sum()
    assert kept > 0.9


def test_more_channels_than_directions_are_padded_with_zeros(tokens):
    components = principal_components(layer_norm(tokens), WIDTH + 3)
    assert components.shape == (WIDTH, WIDTH + 3)
    assert not components[:, WIDTH - 1 :].any()


def test_directions_without_variance_are_zero():
    features = np.random.default_rng(0).normal(size=(5, WIDTH)) + 3
    components = principal_components(features, CHANNELS)
    assert np.linalg.matrix_rank(components) == 4  # five points
    np.testing.assert_allclose(features.mean(axis=0) @ components, 0, atol=1e-8)
