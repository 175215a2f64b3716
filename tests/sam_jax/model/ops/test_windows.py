"""Tests that grids are split into windows and joined again."""

import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.model.ops.windows import (
    join_windows,
    project_after_split,
    project_xla,
    split_windows,
)


def test_windows_are_in_row_order_and_padded_with_the_fill_value():
    x = jnp.arange(1, 7.0).reshape(1, 2, 3, 1)  # 1 2 3 / 4 5 6
    windows = split_windows(x, 2, fill=jnp.array([-1.0]))
    np.testing.assert_array_equal(windows[..., 0], [[[1, 2], [4, 5]], [[3, -1], [6, -1]]])
    np.testing.assert_array_equal(join_windows(windows, 2, 3), x)


@pytest.mark.parametrize("grid", [(6, 9), (5, 7), (1, 10), (3, 3), (2, 2)], ids=str)
def test_joining_inverts_splitting(grid):
    x = np.random.default_rng(0).standard_normal((2, *grid, 4)).astype(np.float32)
    windows = split_windows(jnp.asarray(x), 3, fill=jnp.full(4, np.nan))
    assert windows.shape == (2 * -(-grid[0] // 3) * -(-grid[1] // 3), 3, 3, 4)
    np.testing.assert_array_equal(join_windows(windows, *grid), x)


def test_the_order_of_projection_and_split_does_not_matter():
    rng = np.random.default_rng(0)
    kernel, bias = rng.integers(-3, 4, (4, 6)), rng.integers(-3, 4, 6)
    x = jnp.asarray(rng.integers(-3, 4, (2, 5, 7, 4)), jnp.float32)

    def project(x):
        return x @ jnp.asarray(kernel, x.dtype) + jnp.asarray(bias, x.dtype)

    windows = project_xla(x, project, 3)
    assert windows.shape == (2 * 2 * 3, 3, 3, 6)
    np.testing.assert_array_equal(windows, project_after_split(x, project, 3))
