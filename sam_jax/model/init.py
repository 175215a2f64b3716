"""Initial variables of a model, sampled from a seed, and their shapes."""

import functools
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp

from sam_jax.model.image_encoder import ImageEncoder
from sam_jax.model.mae import MaskedAutoencoder
from sam_jax.model.prompt_encoder import Prompts
from sam_jax.model.sam import Sam


def init_variables(model: Sam | MaskedAutoencoder | ImageEncoder, seed: int) -> dict[str, Any]:
    """Initializes a model's variables.

    >>> variables = init_variables(sam_jax.sam_tiny(), seed=0)
    >>> embedding = model.apply(variables, image, method="encode")

    Args:
      model: The model.
      seed: Seed of the random initial values.

    Returns:
      {"params", "constants"}: float32 arrays by module and parameter name. "constants" is empty
      for a masked autoencoder and for an image encoder alone.
    """
    image = jnp.zeros((1, *model.image_size, 3))
    if isinstance(model, MaskedAutoencoder):
        keys = jax.random.split(jax.random.key(0), 1)
        return {**model.init(jax.random.key(seed), image, keys), "constants": {}}
    if isinstance(model, ImageEncoder):
        return {**model.init(jax.random.key(seed), image), "constants": {}}
    prompts = Prompts(
        points=jnp.zeros((1, 1, 1, 2)),
        labels=jnp.zeros((1, 1, 1), jnp.int32),
        # Without a mask, the convolutions of mask prompts would get no parameters.
        mask=jnp.zeros((1, 1, *model.low_res)),
        has_mask=jnp.ones((1, 1), bool),
    )
    return dict(model.init(jax.random.key(seed), image, prompts))


@functools.lru_cache(maxsize=32)
def variable_shapes(
    model: Sam | MaskedAutoencoder | ImageEncoder,
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes and dtypes of a model's variables by path, without computing anything.

    >>> variable_shapes(sam_jax.sam_tiny())["params/mask_decoder/iou_token"].shape
    (1, 64)

    Args:
      model: The model.

    Returns:
      Shapes and dtypes by path. The dict is shared by all callers and must not be changed.
    """
    shapes = jax.eval_shape(lambda: init_variables(model, 0))
    return flax.traverse_util.flatten_dict(shapes, sep="/")
