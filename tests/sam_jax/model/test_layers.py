"""Tests GELU and layer norm."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ndtr

from sam_jax.model.layers import gelu, layer_norm


def test_gelu_is_exact():
    """Compares with the exact value at 1, 0.84134. The approximation by tanh gives 0.84119."""
    x = np.linspace(-6, 6, 101)
    np.testing.assert_allclose(gelu(jnp.asarray(x, jnp.float32)), x * ndtr(x), atol=3e-7)
    assert gelu(jnp.float32(1.0)) == pytest.approx(0.8413447, abs=1e-6)


@pytest.mark.parametrize("epsilon", [1e-6, 1e-5])
def test_norms_are_precise_for_large_means_and_small_values(epsilon):
    """Uses inputs with a large mean, and inputs so small that epsilon affects the result.

    With a large mean, a variance computed as E[x^2] - E[x]^2 would lose all precision.
    """

    class Norm(nn.Module):
        @nn.compact
        def __call__(self, x):
            return layer_norm(epsilon, "float32", "norm")(x)

    norm = Norm()
    variables = {"params": {"norm": {"scale": np.array([2.0, 2, 2, 2]), "bias": np.ones(4)}}}
    far = np.array([4096.0, 4097, 4098, 4099], np.float32)
    by_hand = 1 + 2 * np.array([-1.5, -0.5, 0.5, 1.5]) / (1.25 + epsilon) ** 0.5
    np.testing.assert_allclose(norm.apply(variables, jnp.asarray(far)), by_hand, rtol=1e-6)
    near = 1e-3 * np.array([-1.5, -0.5, 0.5, 1.5], np.float32)
    by_hand = 1 + 2 * near / (1.25e-6 + epsilon) ** 0.5
    np.testing.assert_allclose(norm.apply(variables, jnp.asarray(near)), by_hand, rtol=1e-5)
