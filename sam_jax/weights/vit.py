"""Converts plain vision transformers to parameters of a SAM's image encoder.

Sources: timm `vision_transformer.py`, whose names facebookresearch/mae and facebookresearch/dinov2
share, and transformers' `Dinov2Model`, `ViTModel` and `ViTMAEModel`; positions are resized as
ViTDet does (`get_abs_pos`).

Differences: patches of another size are resized too, and scaled by the ratio of their areas, so
that the response to a constant patch stays the same; the class token is dropped, to which all
patches of the original attend; colors are normalized as SAM's, whatever the original learned from.
"""

import math
import re
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from sam_jax.model.bicubic import resize_bicubic
from sam_jax.model.image_encoder import ImageEncoder
from sam_jax.model.init import variable_shapes
from sam_jax.weights import names
from sam_jax.weights.tensors import (
    WeightsError,
    check_finite,
    check_names,
    check_shapes,
    count_blocks,
    format_list,
    shape_of,
)

HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}  # of the published encoders, by width
PATCH_KERNEL = "patch_embed.proj.weight"
# Names of the patch kernel, and prefixes of all names of the encoder.
_PATCH_KERNEL = re.compile(
    r"(?P<prefix>((model|backbone|encoder|vit|dinov2)\.)*)"
    r"(patch_embed\.proj\.weight|embeddings\.patch_embeddings\.(projection\.)?weight)"
)
_NOT_PLAIN = (  # patterns of names, and what an encoder with such tensors has
    (r".*\b(register_tokens|reg_token|storage_tokens)", "register tokens"),
    (r".*\b(dist_token|distillation_token)", "a distillation token"),
    (r".*\.mlp\.(weights_in|w12|w1|w2|w3|gate_proj|fc1_g)\..*", "gated (SwiGLU) MLPs"),
    (r".*\brope(_embed|_embeddings)?\..*", "rotary positions"),
    (r".*\brelative_position_bias_table", "relative positions"),
    (r"(norm_pre|pre_norm|pre_layrnorm|pre_layernorm)\..*", "a norm before its blocks"),
    (r".*\.(q_norm|k_norm)\..*", "norms of queries and keys"),
)
_ALLOWED = (
    "only plain vision transformers can be read: learned or fixed absolute positions, at most a "
    "class token next to the patches, one bias for queries, keys and values, and MLPs of two layers"
)


class PlainViT(NamedTuple):
    """A plain vision transformer, as an image encoder without its neck.

    Attributes:
      params: Float32 arrays by their path relative to the image encoder. Relative positions and the
        neck are not among them.
      norm_scale: The scale of the norm after the last block, which no SAM has; None if there is no
        such norm.
      norm_bias: The bias of this norm.
    """

    params: dict[str, np.ndarray]
    norm_scale: Float[np.ndarray, " c"] | None
    norm_bias: Float[np.ndarray, " c"] | None


def is_plain_vit(tensors: dict[str, np.ndarray]) -> bool:
    """Returns whether tensors by name are those of a vision transformer with patches alone."""
    return len(_prefixes(tensors)) == 1


def to_timm_names(tensors: dict[str, np.ndarray], notes: list[str]) -> dict[str, np.ndarray]:
    """Renames the tensors of a plain vision transformer.

    Args:
      tensors: Arrays by the names of timm, facebookresearch/mae, facebookresearch/dinov2 or
        transformers, possibly all with a prefix such as "backbone.". Arrays without the prefix
        belong to other parts of a model and are dropped.
      notes: A note is appended if arrays without the prefix were dropped.

    Returns:
      Arrays by timm's names; queries, keys and values are concatenated.

    Raises:
      WeightsError: If the encoder is not a plain one, for instance because of register tokens.
    """
    prefix = min(_prefixes(tensors), default="")
    if others := sorted(name for name in tensors if not name.startswith(prefix)):
        notes.append(f"dropped, since they are not part of {prefix}*: {', '.join(others)}")
    renamed: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            timm_name = names.timm_name(name.removeprefix(prefix))
            if timm_name in renamed:
                raise WeightsError(f"{timm_name} is there under two names")
            renamed[timm_name] = tensor
    for name in [name for name in renamed if re.search(r"\.attn\.q\.(weight|bias)$", name)]:
        thirds = [name.replace(".attn.q.", f".attn.{x}.") for x in "qkv"]
        if all(third in renamed for third in thirds):
            _check_thirds({third: renamed[third].shape for third in thirds})
            qkv = np.concatenate([renamed.pop(third) for third in thirds])
            renamed[name.replace(".attn.q.", ".attn.qkv.")] = qkv
    _check_plain(renamed)
    return renamed


def encoder_size(tensors: dict[str, np.ndarray]) -> tuple[int, int]:
    """Returns an encoder's width and depth.

    Args:
      tensors: Arrays by timm's names.

    Returns:
      The channels of a token, and the number of blocks.

    Raises:
      WeightsError: If positions or blocks are missing.
    """
    width = shape_of(tensors, "pos_embed", 3)[2]
    return width, count_blocks(tensors, r"blocks\.([0-9]{1,99})\.")


def count_heads(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> int | None:
    """Returns the attention heads of an encoder, which its tensors do not tell.

    Args:
      tensors: Arrays by timm's names.
      config: The configuration in transformers; empty if there is none.

    Returns:
      The heads in the configuration, or else those of the published encoder of this width. None if
      there is neither.

    Raises:
      WeightsError: If the configuration has another activation than GELU, or if its number of
        heads does not divide the width.
    """
    activation = config.get("hidden_act", "gelu")
    if activation != "gelu":
        raise WeightsError(f"hidden_act in config.json must be 'gelu'; got {activation!r}")
    width, _ = encoder_size(tensors)
    heads = config.get("num_attention_heads")
    if heads is None:
        return HEADS.get(width)
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise WeightsError(
            f"num_attention_heads in config.json must divide the width of {width}; got {heads!r}"
        )
    return heads


def read_plain_vit(
    encoder: ImageEncoder,
    tensors: dict[str, np.ndarray],
    notes: list[str],
    grid: tuple[int, int] | None = None,
) -> PlainViT:
    """Converts a plain vision transformer to parameters of an image encoder.

    Class token and heads are dropped. Factors of the residual branches (LayerScale) are multiplied
    into the layers before them. Positions are resized to the encoder's grid, and patches to its
    patch size.

    Args:
      encoder: An image encoder of the same width and depth.
      tensors: Arrays by name, as for `to_timm_names`.
      notes: Notes on what was dropped or resized are appended to it.
      grid: (rows, columns) of the positions; a square by default.

    Returns:
      The parameters, and the norm after the last block.

    Raises:
      WeightsError: If the tensors are not those of a plain encoder of this size.
    """
    tensors = to_timm_names(tensors, notes)
    dropped = sorted(name for name in tensors if names.VIT_DROPPED.fullmatch(name))
    if dropped:
        notes.append(f"dropped, since SAM has no such tensors: {', '.join(dropped)}")
    tensors = {name: x for name, x in tensors.items() if name not in dropped}
    width, depth = encoder_size(tensors)
    table = names.timm_names(depth)
    scaled = _scaled_layers(depth) if has_layer_scale(tensors) else {}
    norm = {name for name in ("norm.weight", "norm.bias") if name in tensors}
    layers = {name for name, _ in table.values()}
    check_names("the encoder", tensors, {"pos_embed", *layers, *scaled, *norm})
    if (width, depth) != (encoder.embed_dim, encoder.depth):
        raise WeightsError(
            f"the encoder in the file is {width} wide and {depth} deep; the model's is "
            f"{encoder.embed_dim} wide and {encoder.depth} deep"
        )
    positions = _resize_positions(tensors["pos_embed"], encoder.grid, grid, notes)
    kernel = _resize_patches(tensors[PATCH_KERNEL], encoder.patch_size, notes)
    tensors = tensors | {PATCH_KERNEL: kernel}
    shapes = variable_shapes(encoder)
    expected = {
        name: layout.torch_shape(shapes[f"params/{path}"].shape)
        for path, (name, layout) in table.items()
    }
    expected |= dict.fromkeys((*scaled, *norm), (width,))
    check_shapes(
        "tensors of wrong shapes",
        {name: (tensors[name].shape, shape) for name, shape in expected.items()},
    )
    for gamma, layer in scaled.items():
        for name in (f"{layer}.weight", f"{layer}.bias"):
            factors = tensors[gamma].astype(np.float32)  # of the rows, which are output channels
            tensors[name] = (factors * tensors[name].T).T
    if len(encoder.global_blocks) < depth:
        notes.append(
            "all blocks of the encoder attended globally; in the model only blocks "
            f"{format_list(encoder.global_blocks)} do"
        )
    params = {
        path: names.from_torch_tensor(layout, tensors[name])
        for path, (name, layout) in table.items()
    }
    norm_scale, norm_bias = (
        names.from_torch_tensor(names.SAME, tensors[name]) if name in norm else None
        for name in ("norm.weight", "norm.bias")
    )
    params["pos_embed"] = positions
    check_finite("the encoder", params)
    return PlainViT(params, norm_scale, norm_bias)


def has_layer_scale(tensors: dict[str, np.ndarray]) -> bool:
    """Returns whether tensors by timm's names have factors of the residual branches."""
    return any(re.fullmatch(r"blocks\.\d+\.ls[12]\.gamma", name) for name in tensors)


def _prefixes(tensors: dict[str, np.ndarray]) -> set[str]:
    matches = map(_PATCH_KERNEL.fullmatch, tensors)
    return {match["prefix"] for match in matches if match}


def _check_thirds(shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises WeightsError if queries, keys and values cannot be concatenated."""
    if len(set(shapes.values())) > 1 or () in shapes.values():
        raise WeightsError(f"queries, keys and values must have one shape; got {shapes}")


def _check_plain(tensors: dict[str, np.ndarray]) -> None:
    """Raises WeightsError, with the reason, if an encoder has parts that SAM's cannot express."""
    for pattern, part in _NOT_PLAIN:
        if found := sorted(name for name in tensors if re.fullmatch(pattern, name)):
            raise WeightsError(f"the encoder has {part}, {format_list(found, 2)}; {_ALLOWED}")
    if "pos_embed" not in tensors:
        raise WeightsError(f"the encoder has no absolute positions, pos_embed; {_ALLOWED}")
    qkv = "blocks.0.attn.qkv"
    if f"{qkv}.weight" in tensors and f"{qkv}.bias" not in tensors:
        raise WeightsError(f"the encoder has no {qkv}.bias; {_ALLOWED}")


def _scaled_layers(depth: int) -> dict[str, str]:
    """Returns the layer whose output each factor of a residual branch scales."""
    layers = {"ls1": "attn.proj", "ls2": "mlp.fc2"}
    return {
        f"blocks.{i}.{scale}.gamma": f"blocks.{i}.{layer}"
        for i in range(depth)
        for scale, layer in layers.items()
    }


def _resize_positions(
    table: np.ndarray,
    new_grid: tuple[int, int],
    grid: tuple[int, int] | None,
    notes: list[str],
) -> Float[np.ndarray, "1 gh gw c"]:
    """Drops the class token's row of '1 t c', if there is one, and resizes bicubically."""
    one, rows, c = table.shape
    gh, gw = grid or _square_grid(table)
    if one != 1 or rows - gh * gw not in (0, 1) or not gh:
        text = f"{gh} * {gw}" if grid else "g * g"
        raise WeightsError(
            f"pos_embed must have shape (1, 1 + {text}, {c}); got {table.shape}; the class token's "
            "row may be missing"
        )
    if (gh, gw) != new_grid:
        notes.append(f"positions were resized from {(gh, gw)} to {new_grid} patches")
    table = table[:, rows - gh * gw :].reshape(1, gh, gw, c).astype(np.float32)
    return np.asarray(resize_bicubic(table, (1, 2), new_grid))


def _square_grid(table: np.ndarray) -> tuple[int, int]:
    rows = table.shape[1]
    side = math.isqrt(rows)
    # MAE's row for the class token is zero: then 1 + 24 rows are not a square of 5 x 5.
    if side * side != rows or not table[:, 0].any():
        side = math.isqrt(rows - 1)
    return side, side


def _resize_patches(kernel: np.ndarray, size: int, notes: list[str]) -> np.ndarray:
    """Resizes a patch kernel 'o i h w', e.g. the 14 x 14 patches of ViT-H, to squares of `size`."""
    if kernel.ndim != 4 or kernel.shape[2] != kernel.shape[3] or 0 in kernel.shape:
        raise WeightsError(
            f"{PATCH_KERNEL} must have square patches, (out, 3, p, p); got {kernel.shape}"
        )
    if kernel.shape[-1] == size:
        return kernel
    notes.append(f"patches were resized from {kernel.shape[-1]} to {size} pixels")
    resized = resize_bicubic(kernel.astype(np.float32), (2, 3), (size, size))
    return np.asarray(resized) * (kernel.shape[-1] / size) ** 2
