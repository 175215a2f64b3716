"""Tests softmax with masks, and softmax whose normalization is applied later."""

import jax
import jax.numpy as jnp
import numpy as np

from sam_jax.model.ops.softmax import masked_softmax, softmax_matmul, unnormalized_softmax


def test_softmax_of_large_logits_is_finite():
    logits = jnp.array([[1e4, 1e4, -1e4], [-3e38, -3e38, -3e38]])
    values = jnp.array([[1.0], [3.0], [8.0]])
    np.testing.assert_allclose(softmax_matmul(logits, values), [[2], [4]], rtol=1e-6)


def test_masked_softmax_by_hand():
    logits = jnp.array([[0.0, np.log(3), 50], [7, 7, 7]])
    mask = jnp.array([[True, True, False], [False, True, False]])
    weights = masked_softmax(logits, mask, axis=-1)
    np.testing.assert_allclose(weights, [[0.25, 0.75, 0], [0, 1, 0]], atol=1e-7)
    nothing = masked_softmax(logits, jnp.zeros((2, 3), bool), axis=-1)
    assert np.isfinite(nothing).all()
    assert masked_softmax(logits.astype(jnp.bfloat16), mask, axis=-1).dtype == jnp.bfloat16


def test_unnormalized_softmax_leaves_the_division_to_the_caller():
    rng = np.random.default_rng(0)
    logits, mask = rng.standard_normal((3, 5)).astype(np.float32), rng.random((3, 1)) < 0.7
    weights, total = unnormalized_softmax(jnp.asarray(logits), axis=0)
    np.testing.assert_allclose(weights / total, jax.nn.softmax(logits, axis=0), rtol=1e-6)
    weights, total = unnormalized_softmax(jnp.asarray(logits), jnp.asarray(mask), axis=0)
    expected = jax.nn.softmax(np.where(mask, logits, -np.inf), axis=0)
    np.testing.assert_allclose(weights / total, expected, rtol=1e-6)
