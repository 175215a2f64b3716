"""Checks gradients that are computed inside a scan whose carry has no gradient."""

import jax
import jax.numpy as jnp
import numpy as np

from train.objectives.scan_value_and_grad import scan_value, scan_value_and_grad, with_gradient

PARAMS = {"a": jnp.array([0.3, -0.2]), "b": jnp.float32(0.7)}
XS = jnp.array([1.0, 2.0, -1.5, 0.25])
CARRY = jnp.array([0.5, 1.5])


def step(params, carry, x):
    carry = jnp.tanh(params["a"] * jax.lax.stop_gradient(carry) + x)
    value = jnp.sum(carry**2) * params["b"]
    return value, (carry, {"value": value, "x": x})


def test_gradients_equal_those_of_the_plain_scan():
    def loss(params):
        total, carry, outputs = scan_value(step, params, CARRY, XS, 0.0)
        return total, (carry, outputs)

    (value, (carry, outputs)), gradients = jax.value_and_grad(loss, has_aux=True)(PARAMS)
    zero = 0.0, jax.tree.map(jnp.zeros_like, PARAMS)
    total, inner_carry, inner_outputs = scan_value_and_grad(step, PARAMS, CARRY, XS, zero)
    np.testing.assert_allclose(total[0], value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), total[1], gradients)
    np.testing.assert_array_equal(inner_carry, carry)
    jax.tree.map(np.testing.assert_array_equal, inner_outputs, outputs)
    assert outputs["x"].tolist() == XS.tolist()


def test_sums_are_added_to_the_initial_ones():
    zero = 0.0, jax.tree.map(jnp.zeros_like, PARAMS)
    total, carry, _ = scan_value_and_grad(step, PARAMS, CARRY, XS[:2], zero)
    total, _, _ = scan_value_and_grad(step, PARAMS, carry, XS[2:], total)
    expected, _, _ = scan_value_and_grad(step, PARAMS, CARRY, XS, zero)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), total, expected)


def test_no_gradient_flows_through_the_carry():
    def leaky_step(params, carry, x):
        carry = carry * params["b"] + x
        return jnp.sum(carry), (carry, None)

    zero = 0.0, jax.tree.map(jnp.zeros_like, PARAMS)
    (_, gradients), _, _ = scan_value_and_grad(leaky_step, PARAMS, CARRY, XS, zero)
    carry, expected = CARRY, 0.0
    for x in XS:
        expected += jnp.sum(carry)  # d/db of carry * b + x with a constant carry
        carry = carry * PARAMS["b"] + x
    np.testing.assert_allclose(gradients["b"], expected, rtol=1e-6)


def test_a_given_gradient_is_scaled_by_the_cotangent_of_the_value():
    def f(params):
        return params["b"] ** 2, {"aux": params["b"]}

    def value_and_grad(params):
        return f(params), jax.tree.map(lambda x: 10 * jnp.ones_like(x), params)

    def loss(params):
        value, aux = with_gradient(f, value_and_grad)(params)
        return 3 * value + aux["aux"]

    value, gradients = jax.value_and_grad(loss)(PARAMS)
    np.testing.assert_allclose(value, 3 * PARAMS["b"] ** 2 + PARAMS["b"], rtol=1e-6)
    jax.tree.map(lambda g, x: np.testing.assert_array_equal(g, 30 + 0 * x), gradients, PARAMS)


def test_only_one_step_of_intermediate_results_is_kept():
    """The backward pass of a plain scan keeps those of every step; the inner gradient does not."""

    def wide_step(params, carry, x):
        hidden = jnp.sin(params["w"] * x)
        return jnp.sum(hidden**2), (carry, None)

    params, xs = {"w": jnp.ones(1000)}, jnp.arange(64.0)

    def plain(params):
        return scan_value(wide_step, params, 0.0, xs, 0.0)[0]

    def inner(params):
        zero = 0.0, jax.tree.map(jnp.zeros_like, params)
        return scan_value_and_grad(wide_step, params, 0.0, xs, zero)[0][1]

    def temporaries(f):
        return jax.jit(f).lower(params).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(inner) < temporaries(jax.grad(plain)) / 8
