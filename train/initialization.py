"""The variables that a run begins with: given ones, or drawn."""

import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

import sam_jax
from sam_jax.model.mae import MaskedAutoencoder
from sam_jax.model.sam import Sam
from sam_jax.weights import mae
from sam_jax.weights.formats import read_autoencoder
from sam_jax.weights.tensors import WeightsError
from train.config import ConfigError, TrainConfig, is_reconstruction
from train.optimizer import check_train_only
from train.overrides import differences, to_dict

# Fields of the model that no parameter of given weights depends on.
NOT_IN_WEIGHTS = (
    "drop_path",
    "dropout",
    "remat",
    "scan_blocks",
    "dtype",
    "position_scale",
    "mask_ratio",
)
# The mask decoder's attention between the image and the tokens.
CROSS_ATTENTION = ("token_to_image", "image_to_token", "final_attention")

log = logging.getLogger("train")


def initial_variables(config: TrainConfig, initialize: Callable[[], dict]) -> dict:
    """The variables of `init_from`, or else those that `initialize` draws.

    Raises:
      ConfigError: if those of `init_from` are of another model, or `trainable` names nothing.
    """
    if is_reconstruction(config):
        variables = variables_of_autoencoder(config, initialize)
    else:
        variables = variables_of_sam(config, initialize)
    check_train_only(variables["params"], config.trainable)
    return variables


def variables_of_sam(config: TrainConfig, initialize: Callable[[], dict]) -> dict:
    """Given ones, or drawn; with the encoder of an autoencoder, if `init_from` is one's."""
    autoencoder = read_autoencoder(config.init_from) if config.init_from else None
    if config.init_from and not autoencoder:
        model, variables = sam_jax.load(config.init_from)
        check_same(config, model)
        return variables
    encoder = encoder_of(config, *autoencoder) if autoencoder else {}
    variables = jax.jit(initialize)()
    if config.mimetic_init_scale:
        params = mimetic_init(variables["params"], config.mimetic_init_scale)
        variables = variables | {"params": params}
    return unflatten_dict(flatten_dict(variables, sep="/") | encoder, sep="/")


def encoder_of(
    config: TrainConfig, autoencoder: MaskedAutoencoder | None, tensors: dict
) -> dict[str, jax.Array]:
    """The parameters, by path, that the image encoder has from an autoencoder.

    Args:
      autoencoder, tensors: as `read_autoencoder` returns them.
    """
    model, notes = config.model, []
    if autoencoder and autoencoder.num_heads != model.image_encoder.num_heads:
        raise ConfigError(
            f"init_from={config.init_from!r} holds an encoder of {autoencoder.num_heads} heads; "
            f"model.image_encoder.num_heads is {model.image_encoder.num_heads}"
        )
    try:
        encoder = mae.encoder_for(model, tensors, notes, autoencoder and autoencoder.grid)
    except WeightsError as error:
        raise ConfigError(f"init_from={config.init_from!r}: {error}") from error
    for note in notes:
        log.warning("%s: %s", config.init_from, note)
    return {path: jnp.asarray(value) for path, value in encoder.items()}


def variables_of_autoencoder(config: TrainConfig, initialize: Callable[[], dict]) -> dict:
    """Given ones, or drawn."""
    if not config.init_from:
        return jax.jit(initialize)()
    autoencoder, tensors = read_autoencoder(config.init_from) or (None, {})
    if autoencoder is None:
        raise ConfigError(
            f"init_from={config.init_from!r} must be the weights directory of a masked "
            "autoencoder, with its decoder"
        )
    check_same(config, autoencoder)
    return jax.tree.map(jnp.asarray, mae.from_torch(autoencoder, tensors)) | {"constants": {}}


def check_same(config: TrainConfig, model: Sam | MaskedAutoencoder) -> None:
    """Raises ConfigError if the weights of `init_from` are those of another model."""
    if found := differences(to_dict(model), to_dict(config.model), ignore=NOT_IN_WEIGHTS):
        raise ConfigError(f"init_from={config.init_from!r} holds another model: {'; '.join(found)}")


def mimetic_init(params: dict, scale: float) -> dict:
    """Makes the mask decoder's cross-attention look where a prompt is, before it has learnt to.

    Queries and keys hold the same encoding of positions. Where they are projected alike, their
    product is largest at equal positions; projected independently, it is noise, and a short
    training spends much of its time on finding that out. After Trockman and Kolter 2023, "Mimetic
    initialization of self-attention layers".

    Args:
      params: of a model, as they were drawn.
      scale: of the queries' weights, which the keys' are then equal to.
    Returns:
      Params of the same shapes; all others are as they were.
    """
    flat = flatten_dict(params)
    queries = [p for p in flat if p[-2:] == ("q", "kernel") and p[-3] in CROSS_ATTENTION]
    for path in queries:
        flat[path] = scale * flat[path]
        # A copy: a step donates its state, and no buffer can be donated twice.
        flat[*path[:-2], "k", "kernel"] = flat[path].copy()
    return unflatten_dict(flat)
