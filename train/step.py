"""One training step: the state is updated by the gradient of one batch."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from train.optimizer import stop_gradients
from train.sharding import CompiledStep, Objective, compile_step, make_sharded_grad_fn
from train.state import TrainState


def make_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    seed: int,
    mesh: Mesh,
    state: TrainState,
    dtype: DTypeLike = "float32",
    trainable: tuple[str, ...] = (),
) -> CompiledStep:
    """Builds the compiled step.

    Args:
      objective: The objective, a function of (params, constants, batch, key).
      optimizer: The optimizer.
      seed: The seed of the run. The step's key is derived from it and the step's number.
      mesh: The devices, see `make_mesh`.
      state: The state, or its shapes.
      dtype: The dtype of all-gathered parameters and reduce-scattered gradients.
      trainable: Paths of the parts that the optimizer trains; empty for all parts. No gradients are
        computed for other parts, and "gradient_norm" is that of the trained parts.

    Returns:
      The step, a function of (state, batch) that returns the next state and a dict of float32
      values. The state is donated. "is_finite" is True if the loss and the gradient of the global
      batch are finite. Otherwise the next state differs in the number of steps only, on all
      devices.
    """

    def trained_objective(params: Any, constants: Any, batch: Any, key: jax.Array) -> Any:
        return objective(stop_gradients(params, trainable), constants, batch, key)

    grad_fn = make_sharded_grad_fn(mesh, trained_objective, state.params, dtype)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        (loss, values), gradients = grad_fn(state.params, state.constants, batch, key)
        with jax.named_scope("optimizer"):
            norm = optax.tree.norm(gradients)
            is_finite = jnp.isfinite(loss) & jnp.isfinite(norm)
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            new = optax.apply_updates(state.params, updates), opt_state
            old = state.params, state.opt_state
            # XLA fuses the selection with the update, which has to wait for the norm.
            params, opt_state = jax.tree.map(functools.partial(jnp.where, is_finite), new, old)
            state = dataclasses.replace(
                state, step=state.step + 1, params=params, opt_state=opt_state
            )
        return state, values | {"loss": loss, "gradient_norm": norm, "is_finite": is_finite}

    return compile_step(mesh, step, state)
