"""The kernel against the plain products that it stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from sam_jax.model.attention import attend_without_positions
from sam_jax.model.ops import token_attention
from sam_jax.model.ops.platform import traced_for

IMAGES, TOKENS, HEADS, D = 3, 13, 2, 8


@pytest.fixture(scope="module")
def qkv():
    draw = np.random.default_rng(0).standard_normal((IMAGES, TOKENS, 3 * HEADS * D))
    return 2 * draw.astype(np.float32)


def test_the_kernel_has_the_values_and_gradients_of_plain_products(qkv):
    weights = np.random.default_rng(1).standard_normal((IMAGES, TOKENS, HEADS * D))

    def run(attend):
        def total(qkv):
            out = attend(qkv)
            return jnp.sum(out * weights), out

        return jax.jit(jax.value_and_grad(total, has_aux=True))(qkv)

    with pltpu.force_tpu_interpret_mode():
        found = run(lambda x: token_attention.attend(x, HEADS))
    expected = run(lambda x: attend_without_positions(x[:, None], HEADS)[:, 0])
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize(
    ("kind", "dtype", "tokens", "expected"),
    [
        ("tpu", jnp.bfloat16, 50, True),
        ("tpu", jnp.bfloat16, 512, True),
        ("tpu", jnp.bfloat16, 513, False),
        ("tpu", jnp.float32, 50, False),
        ("gpu", jnp.bfloat16, 50, False),
        ("cpu", jnp.bfloat16, 50, False),
    ],
)
def test_where_the_kernel_is_chosen(kind, dtype, tokens, expected):
    with traced_for(kind):
        assert token_attention.has_kernel(jnp.zeros((1, tokens, 24), dtype)) == expected
