"""Tests the lookup of relative positions."""

import jax.numpy as jnp
import numpy as np

from sam_jax.model.ops.relative_positions import relative_positions


def test_relative_positions_by_hand():
    table = jnp.array([[0.0], [3.0], [6.0]])  # of offsets -1, 0, 1
    np.testing.assert_array_equal(relative_positions(table, 2, "float32")[..., 0], [[3, 0], [6, 3]])
    # The centers of five rows are -0.2 (clamped to 0), 0.4, 1, 1.6 and 2.2 (clamped to 2).
    np.testing.assert_allclose(
        relative_positions(table, 3, "float32")[..., 0],
        [[3, 1.2, 0], [4.8, 3, 1.2], [6, 4.8, 3]],
        atol=1e-6,
    )
    # Without antialiasing, a single row is the middle row.
    np.testing.assert_allclose(relative_positions(table, 1, "float32"), [[[3]]], atol=1e-6)
    assert relative_positions(table, 3, "bfloat16").dtype == jnp.bfloat16
