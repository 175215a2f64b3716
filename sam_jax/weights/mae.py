"""Converts masked autoencoders to and from PyTorch tensors, and their encoders into SAM's.

Sources: the state dict of facebookresearch/mae (`models_mae.py`); positions are resized as ViTDet
does (`get_abs_pos`).

Differences: patches of another size are resized too, and scaled by the ratio of their areas, so
that the response to a constant patch stays the same.
"""

import math
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from sam_jax.model.init import init_variables, variable_shapes
from sam_jax.model.mae import MaskedAutoencoder, encode_positions
from sam_jax.model.sam import Sam, build_sam
from sam_jax.weights import names
from sam_jax.weights.tensors import (
    WeightsError,
    check_names,
    check_shapes,
    check_variables,
    count_blocks,
    shape_of,
)

POSITIONS = {"pos_embed": "embed_dim", "decoder_pos_embed": "decoder_dim"}  # the field of the width
HEADS = {768: 12, 1024: 16, 1280: 16}  # by width, since the tensors' shapes do not tell them
PATCH_KERNEL = "patch_embed.proj.weight"


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
    for name, field in POSITIONS.items():
        expected = _positions(model, field)
        if tensors[name].shape != expected.shape or abs(tensors[name] - expected).max() > 1e-4:
            raise WeightsError(f"{name} must be the sines and cosines of the model's grid")
    shapes = variable_shapes(model)
    check_shapes(
        "tensors of wrong shapes",
        {
            name: (tensors[name].shape, layout.torch_shape(shapes[path].shape))
            for path, (name, layout) in table.items()
        },
    )
    flat = {
        path: names.from_torch_tensor(layout, tensors[name])
        for path, (name, layout) in table.items()
    }
    return flax.traverse_util.unflatten_dict(flat, sep="/") | {"constants": {}}


def is_mae(tensors: dict[str, np.ndarray]) -> bool:
    """Returns whether tensors by name are those of an MAE checkpoint."""
    return "cls_token" in tensors and "blocks.0.attn.qkv.weight" in tensors


def to_sam(tensors: dict[str, np.ndarray], notes: list[str]) -> tuple[Sam, dict[str, Any]]:
    """Builds a `Sam` with an MAE checkpoint's encoder, and initializes its other parts.

    Args:
      tensors: Arrays by name, as facebookresearch/mae has them.
      notes: Notes on what was dropped, resized or initialized are appended to it.

    Returns:
      The model and its {"params", "constants"}, float32 numpy arrays.

    Raises:
      WeightsError: If the encoder has none of the published widths, or is damaged.
    """
    width, depth = _encoder_size(tensors)
    if width not in HEADS or depth % 4:
        raise WeightsError(
            f"an MAE encoder must be {sorted(HEADS)} wide and its depth a multiple of 4; "
            f"got {width} wide and {depth} deep"
        )
    model = build_sam(
        embed_dim=width,
        depth=depth,
        num_heads=HEADS[width],
        global_blocks=tuple(range(depth // 4 - 1, depth, depth // 4)),
    )
    encoder = encoder_for(model, tensors, notes)

    @jax.jit
    def init_other_parts() -> dict[str, jax.Array]:
        flat = flax.traverse_util.flatten_dict(init_variables(model, 0), sep="/")
        return {path: value for path, value in flat.items() if path not in encoder}

    notes.append(
        "the neck, prompt encoder and mask decoder are untrained (seed 0) and relative positions "
        "zero: train before use"
    )
    flat = encoder | {path: np.asarray(value) for path, value in init_other_parts().items()}
    check_variables("the MAE checkpoint", model, flat)
    return model, flax.traverse_util.unflatten_dict(flat, sep="/")


def encoder_for(
    model: Sam,
    tensors: dict[str, np.ndarray],
    notes: list[str],
    grid: tuple[int, int] | None = None,
) -> dict[str, np.ndarray]:
    """Converts an MAE encoder into parameters of a SAM's image encoder.

    Class token, last norm and decoder are dropped. Positions are resized to the model's grid, and
    patches to its patch size.

    Args:
      model: A model of the encoder's width and depth.
      tensors: Arrays by name, as facebookresearch/mae has them.
      notes: Notes on what was dropped or resized are appended to it.
      grid: (rows, columns) of the encoder's positions; a square by default.

    Returns:
      Float32 arrays by parameter path.

    Raises:
      WeightsError: If the checkpoint has another encoder, or is damaged.
    """
    dropped = sorted(name for name in tensors if names.MAE_DROPPED.fullmatch(name))
    tensors = {name: x for name, x in tensors.items() if name not in dropped}
    width, depth = _encoder_size(tensors)
    table = names.mae_encoder_names(depth)
    check_names("the MAE checkpoint", tensors, {"pos_embed", *(name for name, _ in table.values())})
    encoder = model.image_encoder
    if (width, depth) != (encoder.embed_dim, encoder.depth):
        raise WeightsError(
            f"the MAE encoder is {width} wide and {depth} deep; the model's is "
            f"{encoder.embed_dim} wide and {encoder.depth} deep"
        )
    positions = _resize_positions(tensors["pos_embed"], model.grid, grid)
    tensors = tensors | {PATCH_KERNEL: _resize_patches(tensors[PATCH_KERNEL], model.patch_size)}
    shapes = variable_shapes(model)
    paths = {path: f"params/image_encoder/{path}" for path in (*table, "pos_embed")}
    check_shapes(
        "tensors of wrong shapes",
        {
            name: (tensors[name].shape, layout.torch_shape(shapes[paths[path]].shape))
            for path, (name, layout) in table.items()
        },
    )
    notes.append(f"dropped, since SAM has no such tensors: {', '.join(dropped)}")
    notes.append(f"positions were resized for images of {model.image_size}")
    params = {
        paths[path]: names.from_torch_tensor(layout, tensors[name])
        for path, (name, layout) in table.items()
    }
    return params | {paths["pos_embed"]: positions}


def _encoder_size(tensors: dict[str, np.ndarray]) -> tuple[int, int]:
    """Returns an MAE encoder's width and depth."""
    width = shape_of(tensors, "pos_embed", 3)[2]
    return width, count_blocks(tensors, r"blocks\.([0-9]{1,99})\.")


def _positions(model: MaskedAutoencoder, width_field: str) -> np.ndarray:
    """Returns positions '1 (1 + gh gw) c', which are zero for the class token."""
    width = getattr(model, width_field)
    table = encode_positions(*model.grid, width)
    return np.concatenate([np.zeros((1, width), np.float32), table])[None]


def _resize_positions(
    table: np.ndarray, new_grid: tuple[int, int], grid: tuple[int, int] | None
) -> np.ndarray:
    """Drops the class token of '1 (1 + gh gw) c' and resizes to '1 gh gw c', bicubically."""
    one, rows, c = table.shape
    side = math.isqrt(max(0, rows - 1))
    gh, gw = grid or (side, side)
    if one != 1 or gh * gw != rows - 1 or not gh:
        expected_rows = f"1 + {gh} * {gw}" if grid else "1 + g * g"
        raise WeightsError(
            f"pos_embed must have shape (1, {expected_rows}, {c}); got {table.shape}"
        )
    table = table[:, 1:].reshape(1, gh, gw, c).astype(np.float32)
    method = jax.image.ResizeMethod.CUBIC_PYTORCH
    return np.asarray(jax.image.resize(table, (1, *new_grid, c), method, antialias=False))


def _resize_patches(kernel: np.ndarray, size: int) -> np.ndarray:
    """Resizes a patch kernel 'o i h w', e.g. the 14 x 14 patches of ViT-H, to squares of `size`."""
    if kernel.ndim != 4 or kernel.shape[2] != kernel.shape[3] or 0 in kernel.shape:
        raise WeightsError(
            f"{PATCH_KERNEL} must have square patches, (out, 3, p, p); got {kernel.shape}"
        )
    if kernel.shape[-1] == size:
        return kernel
    method = jax.image.ResizeMethod.CUBIC_PYTORCH
    shape = (*kernel.shape[:2], size, size)
    resized = jax.image.resize(kernel.astype(np.float32), shape, method, antialias=False)
    return np.asarray(resized) * (kernel.shape[-1] / size) ** 2
