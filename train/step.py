"""One update of the state by one batch."""

import jax
import optax


def make_step(objective, optimizer, seed: int):
    """Builds the update.

    Args:
      objective: f(params, constants, batch, key) -> (loss, values).
      optimizer: `optax.GradientTransformation`.
      seed: of the run; with the step it makes the key.
    Returns:
      f(state, batch) -> (`TrainState`, dict of float32 values), compiled; the state is donated.
    """

    def step(state, batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        gradients = jax.value_and_grad(objective, has_aux=True)
        (loss, values), gradients = gradients(state.params, state.constants, batch, key)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        state = state.replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            optimizer=optimizer_state,
        )
        return state, values | {"total": loss, "gradient_norm": optax.tree.norm(gradients)}

    return jax.jit(step, donate_argnums=0)
