"""Compares the implementations of attention within windows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from sam_jax.model.ops import window_attention
from sam_jax.model.ops.relative_positions import relative_positions

SIDE, HEADS, D, WINDOWS = 5, 3, 8, 4


@pytest.mark.parametrize("attend", ["attend_pallas", "attend_sequentially"])
def test_implementations_have_the_values_and_gradients_of_plain_jax(attend):
    attend = getattr(window_attention, attend)
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    qkv, weights = draw(WINDOWS, SIDE, SIDE, 3 * HEADS * D), draw(WINDOWS, SIDE, SIDE, HEADS * D)
    tables = draw(2 * SIDE - 1, D), draw(2 * SIDE - 1, D)

    def run(attend):
        def total(qkv, tables):
            rel_h, rel_w = (relative_positions(x, SIDE, jnp.float32) for x in tables)
            out = attend(qkv, rel_h, rel_w)
            return jnp.sum(out * weights), out

        return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(qkv, tables)

    with pltpu.force_tpu_interpret_mode():
        actual = run(lambda *x: attend(*x, HEADS))
    expected = run(lambda *x: window_attention.attend_xla(*x, HEADS))
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
