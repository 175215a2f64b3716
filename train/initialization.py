"""The variables that a run starts from: given ones, or newly initialized ones."""

import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from sam_jax.data.open import Subset
from sam_jax.io.settings_guard import differences
from sam_jax.model.fields import module_to_dict
from sam_jax.model.mae import MaskedAutoencoder
from sam_jax.model.sam import Sam
from sam_jax.weights import mae
from sam_jax.weights.formats import Checkpoint, read
from sam_jax.weights.tensors import WeightsError
from train.config import ConfigError, TrainConfig

# Fields of a model on which no parameter depends.
NOT_IN_WEIGHTS = (
    "image_encoder.drop_path",
    "image_encoder.remat",
    "image_encoder.scan_blocks",
    "image_encoder.dtype",
    "prompt_encoder.position_scale",
    "prompt_encoder.dtype",
    "mask_decoder.dropout",
    "mask_decoder.dtype",
    *("remat", "dtype", "mask_ratio"),  # of a masked autoencoder
)
# The mask decoder's attention layers between the image and the tokens.
CROSS_ATTENTION = ("token_to_image", "image_to_token", "final_attention")

InitFn = Callable[[], dict[str, Any]]

log = logging.getLogger("train")


def sam_variables(
    config: TrainConfig, init_fn: InitFn, train_split: Subset | None = None
) -> dict[str, Any]:
    """Returns the variables that a run of a SAM starts from.

    Args:
      config: The run. Its `init_from` may name the weights of a SAM, or of a masked autoencoder or
        another plain vision transformer (DINOv2, timm), which then becomes the image encoder.
      init_fn: Initializes the model's variables.

    Returns:
      The variables.

    Raises:
      ConfigError: If `init_from` holds another model.
    """
    checkpoint = _read_checkpoint(config)
    if checkpoint and isinstance(checkpoint.model, Sam):
        _check_same(config, checkpoint.model)
        return jax.tree.map(jnp.asarray, checkpoint.variables)
    encoder = _encoder_params(config, checkpoint) if checkpoint else {}
    variables = jax.jit(init_fn)()
    if config.mimetic_init_scale:
        params = mimetic_init(variables["params"], config.mimetic_init_scale)
        variables = variables | {"params": params}
    return unflatten_dict(flatten_dict(variables, sep="/") | encoder, sep="/")


def autoencoder_variables(config: TrainConfig, init_fn: InitFn) -> dict[str, Any]:
    """Returns the variables that a run of a masked autoencoder starts from.

    Args:
      config: The run. Its `init_from` may name the weights directory of a masked autoencoder.
      init_fn: Initializes the model's variables.

    Returns:
      The variables.

    Raises:
      ConfigError: If `init_from` holds another model.
    """
    checkpoint = _read_checkpoint(config)
    if checkpoint is None:
        return jax.jit(init_fn)()
    if not isinstance(checkpoint.model, MaskedAutoencoder):
        raise ConfigError(
            f"init_from={config.init_from!r} must be the weights directory of a masked "
            "autoencoder, with its decoder"
        )
    _check_same(config, checkpoint.model)
    return jax.tree.map(jnp.asarray, checkpoint.variables)


def _read_checkpoint(config: TrainConfig) -> Checkpoint | None:
    if not config.init_from:
        return None
    checkpoint = read(config.init_from)
    for note in checkpoint.notes:
        log.warning("%s: %s", config.init_from, note)
    return checkpoint


def _encoder_params(config: TrainConfig, checkpoint: Checkpoint) -> dict[str, jax.Array]:
    """Converts a plain vision transformer to parameters of the image encoder, by path."""
    model: Any = config.model
    if checkpoint.num_heads not in (None, model.image_encoder.num_heads):
        raise ConfigError(
            f"init_from={config.init_from!r} holds an encoder of {checkpoint.num_heads} "
            f"heads; model.image_encoder.num_heads is {model.image_encoder.num_heads}"
        )
    grid = checkpoint.model.grid if isinstance(checkpoint.model, MaskedAutoencoder) else None
    notes: list[str] = []
    try:
        params = mae.encoder_for(model, checkpoint.tensors, notes, grid)
    except WeightsError as error:
        raise ConfigError(f"init_from={config.init_from!r}: {error}") from error
    for note in notes:
        log.warning("%s: %s", config.init_from, note)
    return {path: jnp.asarray(value) for path, value in params.items()}


def _check_same(config: TrainConfig, model: Sam | MaskedAutoencoder) -> None:
    """Raises ConfigError if the weights of `init_from` are those of another model."""
    changed = differences(module_to_dict(model), module_to_dict(config.model), NOT_IN_WEIGHTS)
    if changed:
        raise ConfigError(
            f"init_from={config.init_from!r} holds another model: {'; '.join(changed)}"
        )


def mimetic_init(params: dict[str, Any], scale: float) -> dict[str, Any]:
    """Makes the mask decoder's cross-attention attend to a prompt's position before training.

    Queries and keys contain the same encoding of positions. Where they are projected alike, their
    product is largest at equal positions. Where they are projected independently, it is noise, and
    a short training spends much of its time on learning this.

    Source: after Trockman and Kolter 2023, "Mimetic initialization of self-attention layers".

    Args:
      params: A model's initial parameters.
      scale: The scale of the queries' weights, which the keys' weights are then set to.

    Returns:
      The parameters; those of other layers are unchanged.
    """
    flat = flatten_dict(params)
    queries = [p for p in flat if p[-2:] == ("q", "kernel") and p[-3] in CROSS_ATTENTION]
    for path in queries:
        flat[path] = scale * flat[path]
        # A copy, because a step donates its state, and no buffer can be donated twice.
        flat[*path[:-2], "k", "kernel"] = flat[path].copy()
    return unflatten_dict(flat)
