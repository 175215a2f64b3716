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
    shallow, templates = _without_equal_blocks(model)
    shapes = jax.eval_shape(lambda: init_variables(shallow, 0))
    traced = flax.traverse_util.flatten_dict(shapes, sep="/")
    blocks = {f"{template}/" for template in templates.values()}
    flat = {path: shape for path, shape in traced.items() if not path.startswith((*blocks,))}
    for block, template in templates.items():
        for path, shape in traced.items():
            if path.startswith(f"{template}/"):
                flat[block + path.removeprefix(template)] = shape
    return dict(sorted(flat.items(), key=lambda item: item[0].split("/")))


def _without_equal_blocks(
    model: Sam | MaskedAutoencoder | ImageEncoder,
) -> tuple[Sam | MaskedAutoencoder | ImageEncoder, dict[str, str]]:
    """Keeps one block of each kind, because tracing takes time for each block.

    Args:
      model: The model.

    Returns:
      The model with fewer blocks; and for the path of each block of `model`, the path of the block
      of its kind. The parameters of an autoencoder do not depend on its image size, which is
      reduced too.
    """
    if isinstance(model, MaskedAutoencoder):
        side = 2 * model.patch_size
        shallow = model.clone(depth=1, decoder_depth=1, image_size=(side, side), mask_ratio=0.5)
        templates = {f"params/block_{i:02d}": "params/block_00" for i in range(model.depth)}
        for i in range(model.decoder_depth):
            templates[f"params/decoder_block_{i:02d}"] = "params/decoder_block_00"
        return shallow, templates
    encoder = model.image_encoder if isinstance(model, Sam) else model
    folder = "params/image_encoder" if isinstance(model, Sam) else "params"
    is_global = [i in encoder.global_blocks for i in range(encoder.depth)]
    kinds = sorted(set(is_global))
    templates = {
        f"{folder}/block_{i:02d}": f"{folder}/block_{kinds.index(kind):02d}"
        for i, kind in enumerate(is_global)
    }
    global_blocks = tuple(i for i, kind in enumerate(kinds) if kind)
    encoder = encoder.clone(depth=len(kinds), global_blocks=global_blocks)
    if isinstance(model, ImageEncoder):
        return encoder, templates
    transformer = "params/mask_decoder/transformer"
    for i in range(model.mask_decoder.depth):
        templates[f"{transformer}/layer_{i}"] = f"{transformer}/layer_0"
    decoder = model.mask_decoder.clone(depth=1)
    return model.clone(image_encoder=encoder, mask_decoder=decoder), templates
