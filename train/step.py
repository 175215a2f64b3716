"""One update of the state by one batch."""

import jax
import optax

from train.sharding import compile_step, make_sharded_grad_fn


def make_step(objective, optimizer, seed: int, mesh, state, dtype="float32"):
    """Builds the update.

    Args:
      objective: f(params, constants, batch, key) -> (loss, values).
      optimizer: `optax.GradientTransformation`.
      seed: of the run; with the step it makes the key.
      mesh: `make_mesh`'s.
      state: a `TrainState`, or its shapes.
      dtype: in which parameters and gradients travel where the mesh splits them.
    Returns:
      f(state, batch) -> (`TrainState`, dict of float32 values), compiled; the state is donated.
    """
    grad_fn = make_sharded_grad_fn(mesh, objective, state.params, dtype)

    def step(state, batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        (loss, values), gradients = grad_fn(state.params, state.constants, batch, key)
        with jax.named_scope("optimizer"):
            updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
            state = state.replace(
                step=state.step + 1,
                params=optax.apply_updates(state.params, updates),
                optimizer=optimizer_state,
            )
            norm = optax.tree.norm(gradients)
        return state, values | {"total": loss, "gradient_norm": norm}

    return compile_step(mesh, step, state)
