"""The variables that a run starts from: given ones, or newly initialized ones."""

import logging
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float32

from sam_jax.data.segmentation_batch import Batch
from sam_jax.io.settings_guard import differences
from sam_jax.model.fields import module_to_dict
from sam_jax.model.mae import MaskedAutoencoder
from sam_jax.model.sam import Sam
from sam_jax.predict.encode import encode_images
from sam_jax.weights.formats import Checkpoint, read
from sam_jax.weights.tensors import WeightsError
from sam_jax.weights.vit import PlainViT, read_plain_vit
from train.config import ConfigError, TrainConfig
from train.neck import fit_neck
from train.widening import widen, widened_fields

# Fields of a model on which no parameter depends.
NOT_IN_WEIGHTS = (
    "object_share",
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
PARTS = ("image_encoder", "prompt_encoder", "mask_decoder")
ENCODER = PARTS[0]
# The mask decoder's attention layers between the image and the tokens.
CROSS_ATTENTION = ("token_to_image", "image_to_token", "final_attention")

InitFn = Callable[[], dict[str, Any]]

log = logging.getLogger("train")


def sam_variables(
    config: TrainConfig, init_fn: InitFn, sample_batch: Callable[[], Batch]
) -> dict[str, Any]:
    """Returns the variables that a run of a SAM starts from.

    Args:
      config: The run. Its `init_from` may name the weights of a SAM, or of a masked autoencoder or
        another plain vision transformer (DINOv2, timm), which then becomes the image encoder. It
        may also name weights for parts of the model, as
        "image_encoder=PATH,prompt_encoder=PATH,mask_decoder=PATH". A part is the path of a module
        and stands for all variables below it. Layers after the encoder are widened if the model's
        have a multiple of their channels, see `widening.py`.
      init_fn: Initializes the model's variables.
      sample_batch: Returns a batch of images, which `fit_neck` is fitted to.

    Returns:
      The variables.

    Raises:
      ConfigError: If `init_from` holds another model.
    """
    model = cast(Sam, config.model)
    variables = jax.jit(init_fn)()
    if config.mimetic_init_scale:
        params = mimetic_init(variables["params"], config.mimetic_init_scale)
        variables = variables | {"params": params}
    flat = flatten_dict(variables, sep="/")
    norm_scale, has_encoder = None, False
    for part, path in parse_init_from(config.init_from):
        checkpoint = _read_checkpoint(path)
        if isinstance(checkpoint.model, Sam):
            flat |= _sam_part(model, flat, checkpoint, part, path, config.seed)
        elif part not in ("", ENCODER):
            raise ConfigError(
                f"init_from={path!r} holds an encoder alone, which can only be used for {ENCODER}; "
                f"got {part}"
            )
        else:
            encoder = _read_encoder(model, checkpoint, path)
            norm_scale, has_encoder = encoder.norm_scale, True
            flat |= {f"params/{ENCODER}/{name}": value for name, value in encoder.params.items()}
    variables = jax.tree.map(jnp.asarray, unflatten_dict(flat, sep="/"))
    if config.fit_neck and not has_encoder:
        raise ConfigError(
            "fit_neck must be False unless init_from names an encoder without a neck, such as "
            f"DINOv2's; got init_from={config.init_from!r}"
        )
    if config.fit_neck:
        tokens = encode_tokens(model, variables, sample_batch())
        params = variables["params"][ENCODER]
        params["neck"] = fit_neck(params["neck"], tokens, norm_scale, config.seed)
    return variables


def parse_init_from(text: str) -> list[tuple[str, str]]:
    """Parses `init_from`: the path of weights, or "PART=PATH,PART=PATH".

    Returns:
      A part of the model, "" for all of it, and the path of its weights.
    """
    pieces = [piece.partition("=") for piece in text.split(",")]
    if all(equals and part.split("/")[0] in PARTS for part, equals, _ in pieces):
        return [(part, path) for part, _, path in pieces]
    return [("", text)] if text else []


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
    if not config.init_from:
        return jax.jit(init_fn)()
    checkpoint = _read_checkpoint(config.init_from)
    if not isinstance(checkpoint.model, MaskedAutoencoder):
        raise ConfigError(
            f"init_from={config.init_from!r} must be the weights directory of a masked "
            "autoencoder, with its decoder"
        )
    _check_same(config, checkpoint.model)
    return jax.tree.map(jnp.asarray, checkpoint.variables)


def _read_checkpoint(path: str) -> Checkpoint:
    checkpoint = read(path)
    _warn(path, checkpoint.notes)
    return checkpoint


def _warn(path: str, notes: list[str]) -> None:
    for note in notes:
        log.warning("%s: %s", path, note)


def _read_encoder(model: Sam, checkpoint: Checkpoint, path: str) -> PlainViT:
    """Converts a plain vision transformer for the image encoder."""
    num_heads = model.image_encoder.num_heads
    if checkpoint.num_heads not in (None, num_heads):
        raise ConfigError(
            f"init_from={path!r} holds an encoder of {checkpoint.num_heads} heads; "
            f"model.image_encoder.num_heads is {num_heads}"
        )
    grid = checkpoint.model.grid if isinstance(checkpoint.model, MaskedAutoencoder) else None
    notes: list[str] = []
    try:
        encoder = read_plain_vit(model.image_encoder, checkpoint.tensors, notes, grid)
    except WeightsError as error:
        raise ConfigError(f"init_from={path!r}: {error}") from error
    _warn(path, notes)
    return encoder


def _sam_part(
    model: Sam, initial: dict[str, Any], checkpoint: Checkpoint, part: str, path: str, seed: int
) -> dict[str, Any]:
    """Returns the variables of a part of a SAM, by path, in the shapes of the initial ones."""
    module = part.split("/")[0]
    saved: Any = checkpoint.model
    present: Any = model
    multiples = widened_fields(saved, present)
    if module:
        saved, present = getattr(saved, module), getattr(model, module)
    before, now = module_to_dict(saved), module_to_dict(present)
    irrelevant, multiples = (
        [name.removeprefix(f"{module}.") for name in names] for names in (NOT_IN_WEIGHTS, multiples)
    )
    changed = differences(before, now, [*irrelevant, *multiples])
    if changed:
        what = f"another {module}" if module else "another model"
        raise ConfigError(f"init_from={path!r} holds {what}: {'; '.join(changed)}")
    found = {
        name: value
        for name, value in flatten_dict(checkpoint.variables, sep="/").items()
        if not part or f"{name}/".split("/", 1)[1].startswith(f"{part}/")
    }
    if not found:
        raise ConfigError(f"init_from={path!r} has no variables in {part}")
    widened = widen(found, {name: initial[name].shape for name in found}, seed)
    if widths := differences(before, now, irrelevant):
        log.warning("%s: layers are widened: %s", path, "; ".join(widths))
    return widened


def encode_tokens(
    model: Sam, variables: dict[str, Any], batch: Batch
) -> Float32[np.ndarray, "n e"]:
    """Returns the tokens before the neck of a batch's images, without those of the padding."""
    tokens = []
    assert batch.image is not None
    for i in range(len(batch.image_id)):
        row = slice(i, i + 1)
        encoded = encode_images(model, variables, batch.image[row], batch.size[row], "encode_trunk")
        height, width = -(-batch.size[i] // model.patch_size)
        tokens.append(np.asarray(encoded[0, :height, :width], np.float32))
    return np.concatenate([rearrange(x, "gh gw e -> (gh gw) e") for x in tokens])


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
