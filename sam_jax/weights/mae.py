"""Converts masked autoencoders to and from PyTorch tensors, and pretrained encoders into SAM's.

Source: the state dict of facebookresearch/mae (`models_mae.py`); see `vit.py` for encoders.
"""

from typing import Any

import flax.traverse_util
import jax
import numpy as np

from sam_jax.model.init import init_variables, variable_shapes
from sam_jax.model.mae import MaskedAutoencoder, encode_positions
from sam_jax.model.sam import Sam, build_sam, replace_fields
from sam_jax.weights import names, vit
from sam_jax.weights.model_json import validated
from sam_jax.weights.tensors import (
    WeightsError,
    check_finite,
    check_names,
    check_shapes,
    check_variables,
)

POSITIONS = {"pos_embed": "embed_dim", "decoder_pos_embed": "decoder_dim"}  # the field of the width
SAM_WIDTHS = (768, 1024, 1280)  # of the published sizes


def to_torch(model: MaskedAutoencoder, variables: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns the state dict of a masked autoencoder, as facebookresearch/mae has it.

    Args:
      model: The model.
      variables: Its {"params", "constants"}.

    Returns:
      Float32 arrays by name.

    Raises:
      WeightsError: If the variables are not those of the model.
    """
    flat = flax.traverse_util.flatten_dict(variables, sep="/")
    check_variables("variables", model, flat)
    table = names.mae_names(model.depth, model.decoder_depth)
    positions = {name: _positions(model, field) for name, field in POSITIONS.items()}
    return names.to_torch_tensors(table, flat) | positions


def from_torch(model: MaskedAutoencoder, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """Returns the variables of a masked autoencoder; undoes `to_torch`.

    Args:
      model: The model.
      tensors: Arrays by name.

    Returns:
      {"params", "constants"}, of which "constants" is empty.

    Raises:
      WeightsError: If the tensors are not those of the model, or if its positions are not the
        sines and cosines of `encode_positions`.
    """
    table = names.mae_names(model.depth, model.decoder_depth)
    check_names("the file", tensors, {*(name for name, _ in table.values()), *POSITIONS})
    shapes = variable_shapes(model)
    expected = {
        name: layout.torch_shape(shapes[path].shape) for path, (name, layout) in table.items()
    }
    expected |= {
        name: (1, 1 + model.num_patches, getattr(model, field)) for name, field in POSITIONS.items()
    }
    check_shapes(
        "tensors of wrong shapes",
        {name: (tensors[name].shape, shape) for name, shape in expected.items()},
    )
    check_finite("the file", tensors)
    for name, field in POSITIONS.items():
        if abs(tensors[name] - _positions(model, field)).max() > 1e-4:
            raise WeightsError(f"{name} must be the sines and cosines of the model's grid")
    flat = {
        path: names.from_torch_tensor(layout, tensors[name])
        for path, (name, layout) in table.items()
    }
    return flax.traverse_util.unflatten_dict(flat, sep="/") | {"constants": {}}


def to_sam(
    tensors: dict[str, np.ndarray], notes: list[str], num_heads: int | None = None
) -> tuple[Sam, dict[str, Any]]:
    """Builds a `Sam` with a plain vision transformer as its encoder; initializes its other parts.

    An encoder of a published SAM's width without LayerScale, such as MAE's, gets the global blocks
    of that size. In any other, all blocks attend globally.

    Args:
      tensors: Arrays by name, as for `vit.to_timm_names`.
      notes: Notes on what was dropped, resized or initialized are appended to it.
      num_heads: Attention heads of each block; by default those of the published encoder of this
        width.

    Returns:
      The model and its {"params", "constants"}, float32 numpy arrays.

    Raises:
      WeightsError: If the encoder is not a plain one, has none of the published widths and no
        `num_heads`, or is damaged.
    """
    tensors = vit.to_timm_names(tensors, notes)
    width, depth = vit.encoder_size(tensors)
    num_heads = num_heads or vit.count_heads(tensors, {})
    if num_heads is None:
        raise WeightsError(
            f"an encoder without a config.json must be {sorted(vit.HEADS)} wide; got {width} wide "
            f"and {depth} deep"
        )
    global_blocks = tuple(range(depth))
    if width in SAM_WIDTHS and not vit.has_layer_scale(tensors):
        if depth % 4:
            raise WeightsError(
                f"an encoder of {width} channels without LayerScale must have as its depth a "
                f"multiple of 4; got {width} wide and {depth} deep"
            )
        global_blocks = tuple(range(depth // 4 - 1, depth, depth // 4))
    model = build_sam(
        embed_dim=width, depth=depth, num_heads=num_heads, global_blocks=global_blocks
    )
    validated(model, "the encoder is too large")
    encoder = encoder_for(model, tensors, notes)
    tables = {
        path: np.zeros(x.shape, np.float32)
        for path, x in variable_shapes(model).items()
        if "/rel_pos_" in path
    }
    # The other parts do not depend on the number of blocks, each of which takes time to trace.
    shallow = replace_fields(model, depth=1, global_blocks=(0,))

    @jax.jit
    def init_other_parts() -> dict[str, jax.Array]:
        flat = flax.traverse_util.flatten_dict(init_variables(shallow, 0), sep="/")
        return {path: value for path, value in flat.items() if path not in encoder}

    notes.append(
        "the neck, prompt encoder and mask decoder are untrained (seed 0) and relative positions "
        "zero: train before use"
    )
    other_parts = {path: np.asarray(value) for path, value in init_other_parts().items()}
    flat = encoder | tables | other_parts
    check_variables("the checkpoint", model, flat)
    return model, flax.traverse_util.unflatten_dict(flat, sep="/")


def encoder_for(
    model: Sam,
    tensors: dict[str, np.ndarray],
    notes: list[str],
    grid: tuple[int, int] | None = None,
) -> dict[str, np.ndarray]:
    """Converts a plain vision transformer to parameters of a SAM's image encoder.

    The norm after the last block is dropped; see `vit.read_plain_vit` for everything else.

    Args:
      model: A model of the encoder's width and depth.
      tensors: Arrays by name, as for `vit.to_timm_names`.
      notes: Notes on what was dropped or resized are appended to it.
      grid: (rows, columns) of the encoder's positions; a square by default.

    Returns:
      Float32 arrays by parameter path.

    Raises:
      WeightsError: If the checkpoint has another encoder, or is damaged.
    """
    encoder = vit.read_plain_vit(model.image_encoder, tensors, notes, grid)
    if encoder.norm_scale is not None or encoder.norm_bias is not None:
        notes.append("the norm after the last block, norm.weight and norm.bias, was dropped")
    return {f"params/image_encoder/{path}": value for path, value in encoder.params.items()}


def _positions(model: MaskedAutoencoder, width_field: str) -> np.ndarray:
    """Returns positions '1 (1 + gh gw) c', which are zero for the class token."""
    width = getattr(model, width_field)
    table = encode_positions(*model.grid, width)
    return np.concatenate([np.zeros((1, width), np.float32), table])[None]
