"""Masked autoencoders: to and from PyTorch tensors as facebookresearch/mae has them, and into SAM.

Sources: the state dict of facebookresearch/mae (`models_mae.py`); positions are resized as ViTDet
does (`get_abs_pos`).

Differences: patches of another size are resized too, times the ratio of their areas, so that a
constant patch gives what it gave.
"""

import math

import flax.traverse_util
import jax
import numpy as np

from sam_jax.model.init import init_variables
from sam_jax.model.mae import MaskedAutoencoder, encode_positions
from sam_jax.weights import names
from sam_jax.weights.tensors import WeightsError, check_names, count_blocks, listed, shape_of

POSITIONS = {"pos_embed": "embed_dim", "decoder_pos_embed": "decoder_dim"}  # and their channels


def to_torch(model, variables):
    """Returns the state dict {name: float32 array} of a masked autoencoder, as MAE has it.

    Raises:
      WeightsError: if the variables are not those of the model.
    """
    flat = flax.traverse_util.flatten_dict(variables, sep="/")
    table = names.mae_names(model.depth, model.decoder_depth)
    check_names("variables", flat, table)
    state = {
        theirs: np.ascontiguousarray(layout.to_torch(np.asarray(flat[ours], np.float32)))
        for ours, (theirs, layout) in table.items()
    }
    for name, channels in POSITIONS.items():
        state[name] = _positions_of(model, getattr(model, channels))
    return state


def from_torch(model, tensors):
    """Returns the variables of a masked autoencoder; undoes `to_torch`.

    Raises:
      WeightsError: if the tensors are not those of the model, or its positions others than ours.
    """
    table = names.mae_names(model.depth, model.decoder_depth)
    check_names("the file", tensors, {*(theirs for theirs, _ in table.values()), *POSITIONS})
    for name, channels in POSITIONS.items():
        expected = _positions_of(model, getattr(model, channels))
        if tensors[name].shape != expected.shape or abs(tensors[name] - expected).max() > 1e-4:
            raise WeightsError(f"{name} must be the sines and cosines of the model's grid")
    shapes = jax.eval_shape(lambda: init_variables(model, 0))
    flat = {}
    for ours, shape in flax.traverse_util.flatten_dict(shapes, sep="/").items():
        theirs, layout = table[ours]
        expected = np.shape(layout.to_torch(np.broadcast_to(np.float32(0), shape.shape)))
        if tensors[theirs].shape != expected:
            raise WeightsError(f"{theirs} must have shape {expected}; got {tensors[theirs].shape}")
        flat[ours] = np.asarray(layout.from_torch(tensors[theirs]), np.float32, order="C")
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def is_mae(tensors):
    """Whether tensors by name are those of an MAE checkpoint."""
    return "cls_token" in tensors and "blocks.0.attn.qkv.weight" in tensors


def width_of(tensors):
    """Channels of an MAE encoder."""
    return shape_of(tensors, "pos_embed", 3)[2]


def depth_of(tensors):
    """Blocks of an MAE encoder."""
    return count_blocks(tensors, r"blocks\.([0-9]{1,99})\.")


def encoder_for(model, tensors, notes, grid=None):
    """What of an MAE checkpoint a SAM's image encoder begins as.

    Class token, last norm and decoder are dropped; positions, and patches of another size, resized.

    Args:
      model: `Sam`, of the encoder's width and depth.
      tensors: {name: array}, as MAE has them.
      notes: a list; what was dropped or resized is appended to it.
      grid: (gh, gw) of the positions, where they are not of a square.
    Returns:
      {path: float32 array} of the model's parameters.
    Raises:
      WeightsError: if the checkpoint is of another encoder, or damaged.
    """
    dropped = sorted(k for k in tensors if names.MAE_DROPPED.fullmatch(k))
    tensors = {k: v for k, v in tensors.items() if k not in dropped}
    width, depth = width_of(tensors), depth_of(tensors)
    table = names.mae_encoder_names(depth)
    check_names("the MAE checkpoint", tensors, {"pos_embed", *(name for name, _ in table.values())})
    encoder = model.image_encoder
    if (width, depth) != (encoder.embed_dim, encoder.depth):
        raise WeightsError(
            f"the MAE encoder is {width} wide and {depth} deep; the model's is "
            f"{encoder.embed_dim} wide and {encoder.depth} deep"
        )
    positions = _resize_positions(tensors["pos_embed"], model, grid)
    kernel = _resize_patches(tensors["patch_embed.proj.weight"], model.patch_size)
    tensors = tensors | {"patch_embed.proj.weight": kernel}
    _check_layers(tensors, width, model)
    notes.append(f"dropped, as SAM has no place for them: {', '.join(dropped)}")
    notes.append(f"positions resized to the {model.image_size} frame")
    params = {
        ours: np.asarray(layout.from_torch(tensors[theirs]), np.float32, order="C")
        for ours, (theirs, layout) in table.items()
    }
    return {f"params/image_encoder/{k}": v for k, v in (params | {"pos_embed": positions}).items()}


def _check_layers(tensors, width, model):
    hidden, p = model.image_encoder.mlp_ratio * width, model.patch_size
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj": (width, 3, p, p),
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "mlp.fc1": (hidden, width),
        "mlp.fc2": (width, hidden),
        "norm1": (width,),
        "norm2": (width,),
    }
    misshapen = []
    for name, x in tensors.items():
        for layer, shape in shapes.items():
            expected = shape if name.endswith("weight") else shape[:1]
            if layer in name and x.shape != expected:
                misshapen.append(f"{name} {x.shape} instead of {expected}")
    if misshapen:
        raise WeightsError(f"tensors of wrong shapes: {listed(misshapen)}")


def _positions_of(model: MaskedAutoencoder, channels):
    """'1 (1 + gh gw) c', zeros for the class token."""
    table = encode_positions(*model.grid, channels)
    return np.concatenate([np.zeros((1, channels), np.float32), table])[None]


def _resize_positions(table, model, grid):
    """'1 (1 + gh gw) c' with a class token -> '1 gh gw c' of a SAM, bicubic."""
    one, rows, c = table.shape
    side = math.isqrt(max(0, rows - 1))
    gh, gw = grid or (side, side)
    if one != 1 or gh * gw != rows - 1 or not gh:
        what = f"1 + {gh} * {gw}" if grid else "1 + g * g"
        raise WeightsError(f"pos_embed must have shape (1, {what}, {c}); got {table.shape}")
    table = table[:, 1:].reshape(1, gh, gw, c).astype(np.float32)
    method = jax.image.ResizeMethod.CUBIC_PYTORCH
    return np.asarray(jax.image.resize(table, (1, *model.grid, c), method, antialias=False))


def _resize_patches(kernel, size):
    """'o i h w' -> 'o i h w' of another size, e.g. the 14 x 14 patches of ViT-H."""
    if kernel.ndim != 4 or kernel.shape[2] != kernel.shape[3] or 0 in kernel.shape:
        raise WeightsError(
            f"patch_embed.proj.weight must be of square patches, (out, 3, p, p); got {kernel.shape}"
        )
    if kernel.shape[-1] == size:
        return kernel
    method = jax.image.ResizeMethod.CUBIC_PYTORCH
    shape = (*kernel.shape[:2], size, size)
    resized = jax.image.resize(kernel.astype(np.float32), shape, method, antialias=False)
    return np.asarray(resized) * (kernel.shape[-1] / size) ** 2
