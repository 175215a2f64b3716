"""AdamW with warm-up, step drops, and a learning rate that falls with the encoder's depth.

Source: Kirillov et al. 2023, appendix A; the rule of the layer-wise decay is that of ViTDet
(`get_vit_lr_decay_rate`). The paper leaves unsaid what is not decayed: here biases, norms,
embeddings, tokens and positions.
"""

import flax.traverse_util
import jax
import optax

from train.config import ConfigError, Optimizer

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
)  # last part of a parameter's path


def make_optimizer(config: Optimizer, depth: int, trainable: tuple[str, ...] = ()):
    """Builds the gradient transformation.

    Args:
      config: `Optimizer`.
      depth: blocks of the image encoder.
      trainable: paths of what learns, e.g. ("mask_decoder",); empty for all.

    Returns:
      `optax.GradientTransformation` over the tree of parameters. What does not learn has no
      moments.
    """
    adam = optax.chain(
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=1e-8),
        optax.add_decayed_weights(config.weight_decay, mask=is_decayed),
        scale_by_depth(config.layer_decay, depth),
        optax.scale_by_learning_rate(make_schedule(config)),
    )
    if not trainable:
        return adam
    label = lambda params: map_paths(
        lambda path: "learns" if learns(path, trainable) else "fixed", params
    )
    return optax.partition({"learns": adam, "fixed": optax.set_to_zero()}, label)


def make_schedule(config):
    """Learning rate by step: linear from `peak / warmup` to the peak, then drops and cosine."""

    def schedule(count):
        warmup = jax.numpy.minimum(1.0, (count + 1) / max(1, config.warmup_steps))
        drops = sum(count >= step for step in config.lr_boundaries)
        rate = config.peak_lr * warmup * config.lr_decay_factor**drops
        if not config.cosine_steps:
            return rate
        done = (count - config.warmup_steps) / (config.cosine_steps - config.warmup_steps)
        return rate * (1 + jax.numpy.cos(jax.numpy.pi * jax.numpy.clip(done, 0, 1))) / 2

    return schedule


def is_decayed(params):
    """The tree of whether weight decay applies."""
    return map_paths(lambda path: path.split("/")[-1] not in NOT_DECAYED, params)


def scale_by_depth(layer_decay, depth):
    """Multiplies each update by `lr_multiplier` of its path."""

    def scale(keys, update):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        return update * lr_multiplier(path, layer_decay, depth)

    def update(updates, params=None):
        del params
        return jax.tree.map_with_path(scale, updates)

    return optax.stateless(update)


def lr_multiplier(path: str, layer_decay: float, depth: int) -> float:
    """`layer_decay ** (depth - i)` for block i, one power more for the embeddings before block 0,
    and 1 for all that comes after the blocks.
    """
    part, name = [*path.split("/"), ""][:2]
    if part != "image_encoder" or name == "neck":
        return 1.0
    if name.startswith("block_"):
        return layer_decay ** (depth - int(name.removeprefix("block_")))
    return layer_decay ** (depth + 1)


def learns(path: str, trainable: tuple[str, ...]) -> bool:
    """Whether a parameter lies in one of the parts that learn."""
    return not trainable or any(f"{path}/".startswith(f"{part}/") for part in trainable)


def check_trainable(params, trainable: tuple[str, ...]) -> None:
    """Raises ConfigError for a part that no parameter lies in."""
    paths = flax.traverse_util.flatten_dict(params, sep="/")
    for part in trainable:
        if not any(learns(path, (part,)) for path in paths):
            tops = sorted({"/".join(path.split("/")[:2]) for path in paths})
            raise ConfigError(
                f"trainable names {part!r}, where there is no parameter; there are e.g. "
                f"{', '.join(tops)}"
            )


def map_paths(f, tree):
    """Replaces each leaf by f of its path 'a/b/c'."""
    flat = flax.traverse_util.flatten_dict(tree, sep="/")
    return flax.traverse_util.unflatten_dict({path: f(path) for path in flat}, sep="/")
