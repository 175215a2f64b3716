"""The state of a training run, which changes with every step."""

from typing import Any

import flax.struct
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32


@flax.struct.dataclass
class TrainState:
    """Everything that a step reads and writes, and that a checkpoint holds.

    Attributes:
      step: The number of steps done.
      params: The model's parameters.
      constants: The model's constants.
      opt_state: The optimizer's state.
    """

    step: Int32[Array, ""]
    params: dict[str, Any]
    constants: dict[str, Any]
    opt_state: optax.OptState


def init_state(variables: dict[str, Any], optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first step."""
    return TrainState(
        step=jnp.int32(0),
        params=variables["params"],
        constants=variables["constants"],
        opt_state=optimizer.init(variables["params"]),
    )
