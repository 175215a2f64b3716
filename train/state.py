"""What a run changes step by step."""

import flax.struct
import jax
import jax.numpy as jnp
import optax

from sam_jax.model.prompt_encoder import Prompts
from sam_jax.model.sam import Sam


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


def init_variables(model: Sam, seed: int) -> dict:
    """The model's variables, drawn from a seed."""
    gh, gw = (side // model.patch_size for side in model.image_size)
    prompts = Prompts(
        points=jnp.zeros((1, 1, 2, 2)),
        labels=jnp.ones((1, 1, 2), jnp.int32),
        mask=jnp.zeros((1, 1, 4 * gh, 4 * gw)),
        has_mask=jnp.ones((1, 1), bool),
    )
    image = jnp.zeros((1, *model.image_size, 3))
    return model.init(jax.random.key(seed), image, prompts)


def init_state(variables: dict, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(
        step=jnp.int32(0),
        params=variables["params"],
        constants=variables["constants"],
        optimizer=optimizer.init(variables["params"]),
    )
