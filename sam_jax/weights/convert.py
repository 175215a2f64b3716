"""Converts between a `Sam` with its variables and PyTorch tensors of several naming schemes.

Every tensor of the source is used exactly once and every parameter is set; otherwise the error
lists the tensors at fault. The model's fields are found from the tensors' shapes.

Sources: see `names.py`; positions of another size are resized as in ViTDet and segment-anything.
"""

from typing import Any

import flax.traverse_util
import jax
import numpy as np

from sam_jax.model.init import variable_shapes
from sam_jax.model.mask_decoder import MaskDecoder
from sam_jax.model.sam import Sam, build_sam
from sam_jax.model.two_way_transformer import CROSS_DOWNSAMPLE
from sam_jax.weights import mae, names, vit
from sam_jax.weights.model_json import validated
from sam_jax.weights.state_dict import take_tensors
from sam_jax.weights.tensors import (
    WeightsError,
    check_finite,
    check_names,
    check_shapes,
    check_variables,
    count_blocks,
    format_list,
    shape_of,
)

DEFAULT_WINDOW = 14  # of a model without windows, whose tensors do not depend on it
MAX_RESIZED_ROWS = 1 << 12  # of relative positions; resizing makes a matrix of rows by rows


def from_torch(state: dict[Any, Any], notes: list[str]) -> tuple[Sam, dict[str, Any]]:
    """Returns the model and the variables of a state dict with any known names.

    Args:
      state: Arrays by name, possibly inside a training checkpoint ({"model": {...}, ...}). It is
        emptied, so that the arrays are not in memory twice.
      notes: Notes on what was dropped, resized or initialized are appended to it.

    Returns:
      The model and its {"params", "constants"}, float32 numpy arrays.

    Raises:
      WeightsError: If tensors are unknown, missing or have wrong shapes. The message lists them.
    """
    tensors = take_tensors(state, notes)
    return (mae.to_sam if vit.is_plain_vit(tensors) else from_tensors)(tensors, notes)


def from_tensors(tensors: dict[str, np.ndarray], notes: list[str]) -> tuple[Sam, dict[str, Any]]:
    """Like `from_torch`, for tensors with official or Hugging Face names; empties `tensors`."""
    if "vision_encoder.pos_embed" in tensors:
        tensors = _official_from_huggingface(tensors)
    if "image_encoder.pos_embed" not in tensors:
        raise WeightsError(
            "these are not weights of Segment Anything: neither image_encoder.pos_embed (official "
            "names), vision_encoder.pos_embed (Hugging Face) nor, for the encoder alone, "
            "patch_embed.proj.weight (MAE, DINOv2, timm) or embeddings.patch_embeddings.* (Hugging "
            f"Face) is there; got {format_list(tensors)}"
        )
    model = validated(_infer_model(tensors), "the tensors do not fit together")
    return model, _convert_tensors(model, tensors, notes)


def to_torch(model: Sam, variables: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns the official state dict of a model; undoes `from_torch`.

    Args:
      model: The model.
      variables: Its {"params", "constants"}.

    Returns:
      Float32 arrays by official name.

    Raises:
      WeightsError: If the variables are not those of the model, or if its decoder does not have
        the official number of heads, which cannot be found from the tensors.
    """
    heads = model.mask_decoder.num_heads
    if heads != MaskDecoder.num_heads:
        raise WeightsError(
            "only models with mask_decoder.num_heads="
            f"{MaskDecoder.num_heads} have an official form; got {heads}"
        )
    flat = flax.traverse_util.flatten_dict(variables, sep="/")
    check_variables("variables", model, flat)
    return names.to_torch_tensors(_names_of(model), flat)


def to_huggingface(model: Sam, variables: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns the state dict of transformers' `SamModel`; see `to_torch`."""
    state = {names.huggingface_name(k): v for k, v in to_torch(model, variables).items()}
    return state | {names.HF_GAUSSIAN_TWIN: state[names.HF_GAUSSIAN]}


def _names_of(model: Sam) -> names.NameTable:
    return names.official_names(model.image_encoder.depth, model.mask_decoder.depth)


def _official_from_huggingface(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Renames tensors; unknown names are kept, so that they are reported as unknown."""
    tensors = dict(tensors)
    twin = tensors.pop(names.HF_GAUSSIAN_TWIN, None)
    if twin is not None and not np.array_equal(tensors.setdefault(names.HF_GAUSSIAN, twin), twin):
        raise WeightsError(f"{names.HF_GAUSSIAN} and {names.HF_GAUSSIAN_TWIN} must be equal")
    depth = count_blocks(tensors, r"vision_encoder\.layers\.([0-9]{1,99})\.")
    decoder_depth = count_blocks(tensors, r"mask_decoder\.transformer\.layers\.([0-9]{1,99})\.")
    table = names.official_names(depth, decoder_depth).values()
    official_names = {names.huggingface_name(name): name for name, _ in table}
    renamed: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        official = official_names.get(name, name)
        if official in renamed:
            raise WeightsError(f"{official} is there under two names")
        renamed[official] = tensor
    return renamed


def _infer_model(tensors: dict[str, np.ndarray]) -> Sam:
    """Returns the `Sam` whose variables have these shapes."""
    position_shape = shape_of(tensors, "image_encoder.pos_embed", 4)
    patch_shape = shape_of(tensors, "image_encoder.patch_embed.proj.weight", 4)
    _, gh, gw, embed_dim = position_shape
    patch_size = patch_shape[-1]
    depth = count_blocks(tensors, r"image_encoder\.blocks\.([0-9]{1,99})\.")
    table_sizes = [
        (
            shape_of(tensors, f"image_encoder.blocks.{i}.attn.rel_pos_h", 2)[0],
            shape_of(tensors, f"image_encoder.blocks.{i}.attn.rel_pos_w", 2)[0],
        )
        for i in range(depth)
    ]
    window_size, global_blocks = _infer_windows(table_sizes, (2 * gh - 1, 2 * gw - 1))
    head_dim = shape_of(tensors, "image_encoder.blocks.0.attn.rel_pos_h", 2)[1]
    mlp_dim = shape_of(tensors, "image_encoder.blocks.0.mlp.lin1.weight", 2)[0]
    prompt_dim = shape_of(tensors, "prompt_encoder.no_mask_embed.weight", 2)[1]
    mask_channels = shape_of(tensors, "prompt_encoder.mask_downscaling.3.weight", 4)[0]
    decoder_mlp = "mask_decoder.transformer.layers.0.mlp.lin1.weight"
    for what, size, divisor in (
        ("the encoder's width", embed_dim, head_dim),
        ("the MLPs' hidden width", mlp_dim, embed_dim),
        ("the prompt width", prompt_dim, CROSS_DOWNSAMPLE * MaskDecoder.num_heads),
        ("the channels of mask prompts", mask_channels, 4),
    ):
        if size % divisor:
            raise WeightsError(f"{what} must be a multiple of {divisor}; got {size}")
    return build_sam(
        image_size=(gh * patch_size, gw * patch_size),
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=embed_dim // head_dim,
        global_blocks=global_blocks,
        window_size=window_size,
        mlp_ratio=mlp_dim // embed_dim,
        prompt_dim=prompt_dim,
        mask_channels=mask_channels,
        decoder_depth=count_blocks(tensors, r"mask_decoder\.transformer\.layers\.([0-9]{1,99})\."),
        decoder_mlp_dim=shape_of(tensors, decoder_mlp, 2)[0],
        iou_hidden_dim=shape_of(tensors, "mask_decoder.iou_prediction_head.layers.0.weight", 2)[0],
    )


def _infer_windows(
    table_sizes: list[tuple[int, int]], global_size: tuple[int, int]
) -> tuple[int, tuple[int, ...]]:
    """Distinguishes windowed from global blocks by their tables of relative positions.

    Args:
      table_sizes: Rows of each block's tables for (h, w).
      global_size: Rows of the tables of a block that attends to the grid of `pos_embed`.

    Returns:
      The side of a window and the indices of the global blocks.

    Raises:
      WeightsError: If the tables do not fit windows of one size.
    """
    other_sizes = sorted(set(table_sizes) - {global_size}, key=np.prod)
    window_sizes, unexpected = other_sizes[:1], other_sizes[1:]
    if len(other_sizes) == 2 and global_size not in table_sizes:
        unexpected = []  # the global tables are for another image size than pos_embed
    if unexpected or any(h != w or h % 2 == 0 for h, w in window_sizes):
        raise WeightsError(
            f"relative positions must have {global_size} rows in global blocks and 2 * window - 1 "
            f"in both directions in the others; got {sorted(set(table_sizes))}"
        )
    window_size = (window_sizes[0][0] + 1) // 2 if window_sizes else DEFAULT_WINDOW
    return window_size, tuple(i for i, s in enumerate(table_sizes) if s not in window_sizes)


def _convert_tensors(
    model: Sam, tensors: dict[str, np.ndarray], notes: list[str]
) -> dict[str, Any]:
    """Converts an official state dict, which is emptied, to a model's variables.

    Tables of relative positions are interpolated if they are for another image size than the
    absolute positions.
    """
    table = _names_of(model)
    check_names("the file", tensors, {official for official, _ in table.values()})
    # Shapes are checked before anything is computed, since a file may claim any shape.
    shapes = {path: x.shape for path, x in variable_shapes(model).items()}
    compared = {}
    for path, (official, layout) in table.items():
        shape, expected = tensors[official].shape, layout.torch_shape(shapes[path])
        is_resizable = "rel_pos" in path and len(shape) == 2 and shape[1] == expected[1]
        if not (is_resizable and shape[0] > 0 and max(shape[0], expected[0]) <= MAX_RESIZED_ROWS):
            compared[official] = shape, expected
    check_shapes("tensors of wrong shapes", compared)

    flat = {}
    for path, (official, layout) in table.items():
        value = names.from_torch_tensor(layout, tensors.pop(official))
        if value.shape != shapes[path]:
            notes.append(f"{official} was resized from {len(value)} to {shapes[path][0]} rows")
            value = np.asarray(jax.image.resize(value, shapes[path], "linear", antialias=False))
        flat[path] = value
    check_finite("the file", flat)
    return flax.traverse_util.unflatten_dict(flat, sep="/")
