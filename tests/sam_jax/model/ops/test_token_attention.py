"""Compares the TPU kernel, in interpret mode, with plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from sam_jax.model.ops import token_attention

IMAGES, TOKENS, HEADS, D = 3, 13, 2, 8


@pytest.fixture(scope="module")
def qkv():
    sample = np.random.default_rng(0).standard_normal((IMAGES, TOKENS, 3 * HEADS * D))
    return 2 * sample.astype(np.float32)


def test_the_kernel_has_the_values_and_gradients_of_plain_jax(qkv):
    weights = np.random.default_rng(1).standard_normal((IMAGES, TOKENS, HEADS * D))

    def run(attend):
        def total(qkv):
            out = attend(qkv)
            return jnp.sum(out * weights), out

        return jax.jit(jax.value_and_grad(total, has_aux=True))(qkv)

    with pltpu.force_tpu_interpret_mode():
        found = run(lambda x: token_attention.attend_pallas(x, HEADS))
    expected = run(lambda x: token_attention.attend_xla(x, HEADS))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
