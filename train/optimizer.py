"""AdamW with warm-up, step drops, and a learning rate that depends on the encoder block.

Source: Kirillov et al. 2023, appendix A. Layer-wise decay follows ViTDet (`get_vit_lr_decay_rate`).
The paper does not say which parameters have no weight decay: here biases, norms, positions, and the
embeddings and tokens of the prompt encoder and the mask decoder. Masked autoencoders decay their
class and mask tokens, as in the code of He et al. 2021.
"""

from collections.abc import Callable
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from train.config import ConfigError, Optimizer

# Last parts of the paths of parameters without weight decay.
NOT_DECAYED = (
    "bias",
    "scale",
    "pos_embed",
    "rel_pos_h",
    "rel_pos_w",
    "background",
    "foreground",
    "top_left",
    "bottom_right",
    "not_a_point",
    "no_mask",
    "iou_token",
    "mask_tokens",
)


def make_optimizer(
    config: Optimizer, depth: int, trainable: tuple[str, ...] = ()
) -> optax.GradientTransformation:
    """Builds the gradient transformation of a tree of parameters.

    Args:
      config: The optimizer's configuration.
      depth: Blocks of the image encoder.
      trainable: Paths of the parts to train, e.g. ("mask_decoder",); empty for all parts. Other
        parameters have no moments.

    Returns:
      The gradient transformation.
    """
    adam = optax.chain(
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=1e-8),
        optax.add_decayed_weights(config.weight_decay, mask=is_decayed),
        scale_by_depth(config.layer_decay, depth),
        optax.scale_by_learning_rate(make_schedule(config)),
    )
    if not trainable:
        return adam

    def label(path: str) -> str:
        return "trained" if is_trainable(path, trainable) else "frozen"

    return optax.partition(
        {"trained": adam, "frozen": optax.set_to_zero()}, lambda params: map_paths(label, params)
    )


def make_schedule(config: Optimizer) -> Callable[[int | Int[Array, ""]], float | Float[Array, ""]]:
    """Builds the learning rate by step: a linear warm-up, then drops and a half-cosine.

    It is a product of three factors. The schedules of optax differ in two ways: their warm-ups
    interpolate from a given value, where this one begins at peak / warmup_steps; and joined
    schedules count from their own start, so that rates differ by up to 0.8 %.
    """

    def schedule(count: int | Int[Array, ""]) -> float | Float[Array, ""]:
        warmup = jnp.minimum(1.0, (count + 1) / max(1, config.warmup_steps))
        num_drops = sum(count >= step for step in config.lr_boundaries)
        rate = config.peak_lr * warmup * config.lr_decay_factor**num_drops
        if not config.cosine_steps:
            return rate
        start = config.cosine_start or config.warmup_steps
        progress = (count - start) / (config.cosine_steps - start)
        return rate * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1))) / 2

    return schedule


def keep_schedule(old: Any, new: Any) -> Any:
    """Continues the learning rate of an optimizer's state in that of another optimizer.

    Moments start at zero, with their bias correction. If some were kept, those of newly trained
    parts would lack the correction, and their first updates would be several times too large.

    Args:
      old: The state to continue.
      new: The initial state of an optimizer that trains other parts.

    Returns:
      `new` with the number of steps of `old` in the schedule of the learning rate.
    """

    def is_schedule(x: Any) -> bool:
        return isinstance(x, optax.ScaleByScheduleState)

    (schedule,) = filter(is_schedule, jax.tree.leaves(old, is_leaf=is_schedule))
    return jax.tree.map(lambda x: schedule if is_schedule(x) else x, new, is_leaf=is_schedule)


def is_decayed(params: Any) -> Any:
    """Returns a tree that is True for parameters with weight decay."""
    return map_paths(lambda path: path.split("/")[-1] not in NOT_DECAYED, params)


def scale_by_depth(layer_decay: float, depth: int) -> optax.GradientTransformation:
    """Multiplies each update by the `lr_multiplier` of its path."""

    def scale(keys: Any, update: Any) -> Any:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        return update * lr_multiplier(path, layer_decay, depth)

    def update(updates: Any, params: Any = None) -> Any:
        del params
        return jax.tree.map_with_path(scale, updates)

    return optax.stateless(update)


def lr_multiplier(path: str, layer_decay: float, depth: int) -> float:
    """Returns the factor of a parameter's learning rate.

    It is `layer_decay ** (depth - i)` for block i of the image encoder, one power more for the
    embeddings before block 0, and 1 for everything after the blocks.

    Args:
      path: The path of the parameter.
      layer_decay: The base.
      depth: Blocks of the image encoder.
    """
    part, name = [*path.split("/"), ""][:2]
    if part != "image_encoder" or name == "neck":
        return 1.0
    if name.startswith("block_"):
        return layer_decay ** (depth - int(name.removeprefix("block_")))
    return layer_decay ** (depth + 1)


def is_trainable(path: str, trainable: tuple[str, ...]) -> bool:
    """Returns True if a parameter is in one of the parts to train."""
    return not trainable or any(f"{path}/".startswith(f"{part}/") for part in trainable)


def stop_gradients(params: Any, trainable: tuple[str, ...]) -> Any:
    """Stops the gradients of all parameters outside the parts to train; empty for all parts."""

    def stop(path: str, x: Any) -> Any:
        return x if is_trainable(path, trainable) else jax.lax.stop_gradient(x)

    flat = flax.traverse_util.flatten_dict(params, sep="/")
    stopped = {path: stop(path, x) for path, x in flat.items()}
    return flax.traverse_util.unflatten_dict(stopped, sep="/")


def check_trainable(params: Any, trainable: tuple[str, ...]) -> None:
    """Checks that every part to train has parameters.

    Args:
      params: The parameters.
      trainable: Paths of the parts to train.

    Raises:
      ConfigError: If there is no parameter in a part.
    """
    paths = flax.traverse_util.flatten_dict(params, sep="/")
    for part in trainable:
        if not any(is_trainable(path, (part,)) for path in paths):
            parts = sorted({"/".join(path.split("/")[:2]) for path in paths})
            raise ConfigError(
                f"trainable names {part!r}, where there is no parameter; there are e.g. "
                f"{', '.join(parts)}"
            )


def map_paths(f: Callable[[str], Any], tree: Any) -> Any:
    """Replaces each leaf of nested dicts by f of its path 'a/b/c'."""
    flat = flax.traverse_util.flatten_dict(tree, sep="/")
    return flax.traverse_util.unflatten_dict({path: f(path) for path in flat}, sep="/")
