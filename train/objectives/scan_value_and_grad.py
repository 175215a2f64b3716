"""Sums a function over a scan, with its gradient computed inside the scan.

`jax.grad` of a scan stores the intermediate results of every step for its backward pass. Where no
gradient flows from one step into the next, each step's gradient can be computed within the step
and added up. Then only one step's intermediate results are in memory at a time, and nothing is
recomputed.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# f(params, carry, x) -> (value, (next carry, outputs)), where value is a float32 scalar.
StepFn = Callable[[Any, Any, Any], tuple[jax.Array, tuple[Any, Any]]]


def scan_value(f: StepFn, params: Any, carry: Any, xs: Any, total: Any) -> tuple[Any, Any, Any]:
    """Sums a function over a scan.

    Args:
      f: The function of a step: f(params, carry, x) -> (value, (next carry, outputs)).
      params: The first argument of every step.
      carry: The second argument of the first step.
      xs: Arrays whose leading axis is scanned over.
      total: The value to add to.

    Returns:
      (total, carry, outputs): the sum of `total` and all values, the last carry, and the stacked
      outputs.
    """

    def step(state: tuple[Any, Any], x: Any) -> tuple[tuple[Any, Any], Any]:
        total, carry = state
        value, (carry, outputs) = f(params, carry, x)
        return (jax.tree.map(jnp.add, total, value), carry), outputs

    (total, carry), outputs = jax.lax.scan(step, (total, carry), xs)
    return total, carry, outputs


def scan_value_and_grad(
    f: StepFn, params: Any, carry: Any, xs: Any, total: Any
) -> tuple[Any, Any, Any]:
    """Sums a function and its gradient over a scan; no gradient flows through the carry.

    >>> total = 0.0, jax.tree.map(jnp.zeros_like, params)
    >>> (value, gradients), carry, outputs = scan_value_and_grad(f, params, carry, xs, total)

    Args:
      f: As for `scan_value`.
      params: As for `scan_value`; the gradient is taken with respect to it.
      carry: As for `scan_value`.
      xs: As for `scan_value`.
      total: (value, gradients) to add to.

    Returns:
      As for `scan_value`, with the total (value, gradients).
    """
    value_and_grad = jax.value_and_grad(f, has_aux=True)

    def step(params: Any, carry: Any, x: Any) -> tuple[Any, tuple[Any, Any]]:
        (value, aux), gradients = value_and_grad(params, carry, x)
        return (value, gradients), aux

    return scan_value(step, params, carry, xs, total)


def with_gradient(
    f: Callable[[Any], tuple[jax.Array, Any]],
    value_and_grad: Callable[[Any], tuple[tuple[jax.Array, Any], Any]],
) -> Callable[[Any], tuple[jax.Array, Any]]:
    """Gives a function a gradient that is computed together with its value.

    Args:
      f: f(params) -> (value, aux), where value is a scalar.
      value_and_grad: A function of params that returns ((value, aux), gradients).

    Returns:
      A function that equals `f`, and whose reverse-mode gradient calls `value_and_grad` instead. No
      gradient flows through aux.
    """

    def backward(gradients: Any, cotangents: tuple[jax.Array, Any]) -> tuple[Any]:
        return (jax.tree.map(lambda g: g * cotangents[0], gradients),)

    f_with_gradient = jax.custom_vjp(f)
    f_with_gradient.defvjp(value_and_grad, backward)
    return f_with_gradient
