"""The kernel against the folded products that it stands for."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from sam_jax.model.attention import attend_folded, relative_positions
from sam_jax.model.ops import window_attention

SIDE, HEADS, D, WINDOWS = 5, 3, 8, 4


def test_the_kernel_has_the_values_and_gradients_of_folded_products():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    qkv, weights = draw(WINDOWS, SIDE, SIDE, 3 * HEADS * D), draw(WINDOWS, SIDE, SIDE, HEADS * D)
    tables = draw(2 * SIDE - 1, D), draw(2 * SIDE - 1, D)

    def run(attend):
        def total(qkv, tables):
            rel_h, rel_w = (relative_positions(x, SIDE, jnp.float32) for x in tables)
            out = attend(qkv, rel_h, rel_w)
            return jnp.sum(out * weights), out

        return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(qkv, tables)

    with pltpu.force_tpu_interpret_mode():
        found = run(lambda *x: window_attention.attend_in_windows(*x, HEADS))
    expected = run(lambda qkv, *rel: jax.vmap(lambda x: attend_folded(x, *rel, HEADS))(qkv))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
