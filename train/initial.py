"""The variables that a run begins with: given ones, or drawn."""

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

import sam_jax
from sam_jax.weights.convert import initialize
from train.config import ConfigError, TrainConfig, differences, to_dict
from train.optimizer import check_train_only

# Fields of the model that no parameter of given weights depends on.
NOT_IN_WEIGHTS = (
    "drop_path",
    "dropout",
    "remat",
    "scan_blocks",
    "dtype",
    "position_scale",
)
# The mask decoder's attention between the image and the tokens.
CROSS_ATTENTION = ("token_to_image", "image_to_token", "final_attention")


def initial_variables(config: TrainConfig) -> dict:
    """The variables of `init_from`, or else drawn from the seed.

    Raises:
      ConfigError: if those of `init_from` are of another model, or `train_only` names nothing.
    """
    if config.init_from:
        model, variables = sam_jax.load(config.init_from)
        if found := differences(to_dict(model), to_dict(config.model), ignore=NOT_IN_WEIGHTS):
            raise ConfigError(
                f"init_from={config.init_from!r} holds another model: {'; '.join(found)}"
            )
    else:
        variables = jax.jit(initialize, static_argnums=(0, 1))(config.model, config.seed)
        if config.match_attention:
            params = match_attention(variables["params"], config.match_attention)
            variables = variables | {"params": params}
    check_train_only(variables["params"], config.train_only)
    return variables


def match_attention(params: dict, scale: float) -> dict:
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
