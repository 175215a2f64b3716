"""What a run changes step by step."""

import flax.struct
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class TrainState:
    """Everything that a step reads and writes, and a checkpoint holds.

    Attributes:
      step: '' int32, steps done.
      params, constants: of the model.
      optimizer: the optimizer's state.
    """

    step: jax.Array
    params: dict
    constants: dict
    optimizer: optax.OptState


def init_state(variables: dict, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(
        step=jnp.int32(0),
        params=variables["params"],
        constants=variables["constants"],
        optimizer=optimizer.init(variables["params"]),
    )
