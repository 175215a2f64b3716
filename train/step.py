"""One update of the state by one batch."""

import jax
import optax

from train.sharding import gradients_over


def make_step(objective, optimizer, seed: int, mesh):
    """Builds the update.

    Args:
      objective: f(params, constants, batch, key) -> (loss, values).
      optimizer: `optax.GradientTransformation`.
      seed: of the run; with the step it makes the key.
      mesh: `make_mesh`'s; the state lies on all of its devices, the batch is split over them.
    Returns:
      f(state, batch) -> (`TrainState`, dict of float32 values), compiled; the state is donated.
    """

    find_gradients = gradients_over(mesh, objective)

    def step(state, batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        (loss, values), gradients = find_gradients(state.params, state.constants, batch, key)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        state = state.replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            optimizer=optimizer_state,
        )
        return state, values | {"total": loss, "gradient_norm": optax.tree.norm(gradients)}

    return jax.jit(step, donate_argnums=0)
