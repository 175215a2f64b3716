"""Between a model with its variables and PyTorch tensors under official, Hugging Face or MAE names.

Every tensor of the source is used exactly once and every parameter is filled, or the error says
which ones are not. The size, the frame and the windows are found from the tensors' shapes.

Sources: see `names.py`; positions of another size are resized as in ViTDet and segment-anything.
"""

import functools
import math
import re

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from sam_jax.model.prompt_encoder import Prompts
from sam_jax.model.sam import PIXEL_MEAN, PIXEL_STD, Sam
from sam_jax.model.two_way_transformer import CROSS_DOWNSAMPLE
from sam_jax.weights import names


class WeightsError(ValueError):
    """Weights that are not those of a Segment Anything model, or not whole."""


def from_torch(state, notes):
    """Makes a model and its variables from a state dict of any known family.

    Args:
      state: {name: array}, possibly inside a training checkpoint ({"model": {...}, ...}). It is
        emptied on the way, so that the arrays are not in memory twice.
      notes: a list; what was dropped, resized or drawn afresh is appended to it.
    Returns:
      (`Sam`, {"params", "constants"} of float32 numpy arrays).
    Raises:
      WeightsError: with the names of unknown, missing or misshapen tensors.
    """
    tensors = _take_tensors(_unwrap(state, notes))
    state.clear()
    if "vision_encoder.pos_embed" in tensors:
        tensors = _official_from_huggingface(tensors)
    elif "cls_token" in tensors and "blocks.0.attn.qkv.weight" in tensors:
        return _from_mae(tensors, notes)
    if "image_encoder.pos_embed" not in tensors:
        raise WeightsError(
            "these are not weights of Segment Anything: neither image_encoder.pos_embed (official "
            "names), vision_encoder.pos_embed (Hugging Face) nor cls_token and blocks.0.* (MAE) is "
            f"there; got {_listed(tensors)}"
        )
    model = _model_of(tensors)
    return model, _fill(model, tensors, notes)


def to_torch(model, variables):
    """Returns the official state dict {name: float32 array} of a model; undoes `from_torch`.

    Raises:
      WeightsError: if the variables are not those of the model, or its decoder has not the official
        number of heads, which the tensors cannot say.
    """
    if model.decoder_heads != Sam.decoder_heads:
        raise WeightsError(
            f"only models with decoder_heads={Sam.decoder_heads} have an official form; "
            f"got {model.decoder_heads}"
        )
    flat = flax.traverse_util.flatten_dict(variables, sep="/")
    table = names.official_names(model.depth, model.decoder_depth)
    check_shapes(model, flat, "variables")
    return {
        official: np.ascontiguousarray(layout.to_torch(np.asarray(flat[ours], np.float32)))
        for ours, (official, layout) in table.items()
    }


def to_huggingface(model, variables):
    """Returns the state dict of transformers' `SamModel`; undoes `from_torch`."""
    state = {names.huggingface_name(k): v for k, v in to_torch(model, variables).items()}
    return state | {names.HF_GAUSSIAN_TWIN: state[names.HF_GAUSSIAN]}


def check_shapes(model, flat, what):
    """Raises WeightsError unless {path: array} has a model's paths and shapes."""
    expected = _shapes(model)
    _check_names(what, flat, expected)
    if odd := [
        f"{k} {v.shape} instead of {expected[k]}" for k, v in flat.items() if v.shape != expected[k]
    ]:
        raise WeightsError(f"{what} holds arrays of wrong shapes: {_listed(odd)}")


@functools.cache
def _shapes(model):
    """The shapes of a model's variables, flat: {path: shape}, without computing anything."""
    shapes = jax.eval_shape(lambda: initialize(model, 0))
    return {k: v.shape for k, v in flax.traverse_util.flatten_dict(shapes, sep="/").items()}


def initialize(model, seed):
    """Draws a model's variables."""
    gh, gw = (side // model.patch_size for side in model.image_size)
    prompts = Prompts(
        points=jnp.zeros((1, 1, 1, 2)),
        labels=jnp.zeros((1, 1, 1), jnp.int32),
        mask=jnp.zeros((1, 1, 4 * gh, 4 * gw)),
        has_mask=jnp.ones((1, 1), bool),
    )
    return model.init(jax.random.key(seed), jnp.zeros((1, *model.image_size, 3)), prompts)


def _unwrap(state, notes):
    """Takes the model out of a training checkpoint, and common prefixes off the names."""
    for key in ("model", "state_dict", "model_state_dict"):
        if isinstance(state.get(key), dict):
            others = sorted(str(k) for k in state if k != key)
            if others:
                notes.append(f"of the checkpoint only {key!r} was read, not {', '.join(others)}")
            state = state[key]
            break
    while state:
        prefixes = ("module.", "sam.", "sam_model.", "_orig_mod.")
        found = [p for p in prefixes if all(str(k).startswith(p) for k in state)]
        if not found:
            break
        state = {k.removeprefix(found[0]): v for k, v in state.items()}
    return state


def _take_tensors(state):
    """Checks that all values are floating-point arrays, and takes the pixel statistics away."""
    odd = [k for k, v in state.items() if not isinstance(k, str) or not _is_floating(v)]
    if odd:
        raise WeightsError(
            f"weights must be floating-point tensors by name; got others: {_listed(odd)}"
        )
    for key, expected in (("pixel_mean", PIXEL_MEAN), ("pixel_std", PIXEL_STD)):
        if key in state and not _is_close(np.ravel(state[key]), expected):
            raise WeightsError(
                f"{key} must be {expected}, as the model has it; got {np.ravel(state[key])}"
            )
    return {k: v for k, v in state.items() if k not in ("pixel_mean", "pixel_std")}


def _is_close(values, expected):
    return len(values) == len(expected) and np.allclose(values, expected, atol=1e-3)


def _is_floating(value):
    return isinstance(value, np.ndarray) and jnp.issubdtype(value.dtype, jnp.floating)


def _official_from_huggingface(tensors):
    """Renames Hugging Face tensors; those with unknown names keep them, and are reported later."""
    tensors = dict(tensors)
    twin = tensors.pop(names.HF_GAUSSIAN_TWIN, None)
    if twin is not None and not np.array_equal(tensors.setdefault(names.HF_GAUSSIAN, twin), twin):
        raise WeightsError(f"{names.HF_GAUSSIAN} and {names.HF_GAUSSIAN_TWIN} must be equal")
    depth = _count(tensors, r"vision_encoder\.layers\.([0-9]{1,99})\.")
    decoder_depth = _count(tensors, r"mask_decoder\.transformer\.layers\.([0-9]{1,99})\.")
    table = names.official_names(depth, decoder_depth).values()
    official = {names.huggingface_name(name): name for name, _ in table}
    renamed = {}
    for name, tensor in tensors.items():
        if official.get(name, name) in renamed:
            raise WeightsError(f"{official.get(name, name)} is there under two names")
        renamed[official.get(name, name)] = tensor
    return renamed


def _model_of(tensors):
    """The `Sam` whose variables have these shapes."""
    position_shape = _shape(tensors, "image_encoder.pos_embed", 4)
    patch_shape = _shape(tensors, "image_encoder.patch_embed.proj.weight", 4)
    _, gh, gw, embed_dim = position_shape
    patch = patch_shape[-1]
    depth = _count(tensors, r"image_encoder\.blocks\.([0-9]{1,99})\.")
    tables = [
        tuple(_shape(tensors, f"image_encoder.blocks.{i}.attn.rel_pos_{a}", 2)[0] for a in "hw")
        for i in range(depth)
    ]
    window, global_blocks = _windows(tables, (2 * gh - 1, 2 * gw - 1))
    head_width = _shape(tensors, "image_encoder.blocks.0.attn.rel_pos_h", 2)[1]
    mlp_dim = _shape(tensors, "image_encoder.blocks.0.mlp.lin1.weight", 2)[0]
    prompt_dim = _shape(tensors, "prompt_encoder.no_mask_embed.weight", 2)[1]
    mask_channels = _shape(tensors, "prompt_encoder.mask_downscaling.3.weight", 4)[0]
    for what, size, divisor in (
        ("the encoder's width", embed_dim, head_width),
        ("the MLPs' hidden width", mlp_dim, embed_dim),
        ("the prompt width", prompt_dim, CROSS_DOWNSAMPLE * Sam.decoder_heads),
        ("the channels of mask prompts", mask_channels, 4),
    ):
        if size % divisor:
            raise WeightsError(f"{what} must be a multiple of {divisor}; got {size}")
    return Sam(
        image_size=(gh * patch, gw * patch),
        patch_size=patch,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=embed_dim // head_width,
        global_blocks=global_blocks,
        window_size=window,
        mlp_ratio=mlp_dim // embed_dim,
        prompt_dim=prompt_dim,
        mask_channels=mask_channels,
        decoder_depth=_count(tensors, r"mask_decoder\.transformer\.layers\.([0-9]{1,99})\."),
        decoder_mlp_dim=_shape(tensors, "mask_decoder.transformer.layers.0.mlp.lin1.weight", 2)[0],
        iou_hidden_dim=_shape(tensors, "mask_decoder.iou_prediction_head.layers.0.weight", 2)[0],
    )


def _windows(tables, grid_table):
    """Tells windowed from global blocks by the rows (h, w) of their relative positions.

    Returns:
      The side of a window (14 if there is none) and the indices of the global blocks.
    """
    sizes = sorted(set(tables) - {grid_table}, key=np.prod)
    window_sizes, odd = sizes[:1], sizes[1:]
    if len(sizes) == 2 and grid_table not in tables:  # stored for another frame than pos_embed
        odd = []
    if odd or any(h != w or h % 2 == 0 for h, w in window_sizes):
        raise WeightsError(
            f"relative positions must have {grid_table} rows in global blocks and 2 * window - 1 "
            f"in both directions in the others; got {sorted(set(tables))}"
        )
    window = (window_sizes[0][0] + 1) // 2 if window_sizes else 14
    return window, tuple(i for i, table in enumerate(tables) if table not in window_sizes)


def _fill(model, tensors, notes):
    """Lays every tensor of an official state dict where the model has it, emptying the dict.

    Relative positions of a file whose absolute positions are for another frame are interpolated.
    """
    table = names.official_names(model.depth, model.decoder_depth)
    _check_names("the file", tensors, {official for official, _ in table.values()})
    shapes, misshapen = _shapes(model), []
    for ours, (official, layout) in table.items():
        got = tensors[official].shape
        expected = np.shape(layout.to_torch(np.broadcast_to(np.float32(0), shapes[ours])))
        is_table = "rel_pos" in ours and len(got) == 2 and got[0] > 0
        if got != expected and not (is_table and got[1] == expected[1]):
            misshapen.append(f"{official} {got} instead of {expected}")
    if misshapen:
        raise WeightsError(f"tensors of wrong shapes: {_listed(misshapen)}")

    flat = {}
    for ours, (official, layout) in table.items():
        value = np.asarray(layout.from_torch(tensors.pop(official)), np.float32, order="C")
        if value.shape != shapes[ours]:
            notes.append(f"{official} was resized from {len(value)} to {shapes[ours][0]} rows")
            value = np.asarray(jax.image.resize(value, shapes[ours], "linear", antialias=False))
        flat[ours] = value
    return flax.traverse_util.unflatten_dict(flat, sep="/")


MAE_HEADS = {768: 12, 1024: 16, 1280: 16}  # by width: the heads cannot be seen from the shapes
PATCH, FRAME = 16, (1024, 1024)  # what an MAE encoder is turned into


def _from_mae(tensors, notes):
    """Puts an MAE encoder into a `Sam` whose other parts are freshly drawn from seed 0."""
    dropped = sorted(k for k in tensors if names.MAE_DROPPED.fullmatch(k))
    tensors = {k: v for k, v in tensors.items() if k not in dropped}
    depth = _count(tensors, r"blocks\.([0-9]{1,99})\.")
    mae_names = names.mae_names(depth)
    _check_names("the MAE checkpoint", tensors, {"pos_embed", *mae_names.values()})
    width = _shape(tensors, "pos_embed", 3)[2]
    _shape(tensors, "patch_embed.proj.weight", 4)
    if width not in MAE_HEADS or depth % 4:
        raise WeightsError(
            f"an MAE encoder must be {sorted(MAE_HEADS)} wide and its depth a multiple of 4; "
            f"got {width} wide and {depth} deep"
        )
    model = Sam(
        image_size=FRAME,
        patch_size=PATCH,
        embed_dim=width,
        depth=depth,
        num_heads=MAE_HEADS[width],
        global_blocks=tuple(range(depth // 4 - 1, depth, depth // 4)),
    )
    official = {ours: tensors[theirs] for ours, theirs in mae_names.items()}
    official["image_encoder.pos_embed"] = _mae_positions(tensors["pos_embed"], model)
    kernel = official["image_encoder.patch_embed.proj.weight"]
    official["image_encoder.patch_embed.proj.weight"] = _mae_patch_kernel(kernel)

    @jax.jit
    def fresh():
        drawn = flax.traverse_util.flatten_dict(initialize(model, 0), sep="/")
        table = names.official_names(depth, model.decoder_depth)
        return {
            name: layout.to_torch(drawn[ours])
            for ours, (name, layout) in table.items()
            if name not in official
        }

    notes.append(f"dropped, as SAM has no place for them: {', '.join(dropped)}")
    notes.append(
        f"positions resized to the {FRAME} frame; the neck, prompt encoder and mask decoder are "
        "untrained (seed 0) and relative positions zero: train before use"
    )
    drawn = {name: np.asarray(value) for name, value in fresh().items()}
    return model, _fill(model, official | drawn, notes)


def _mae_positions(table, model):
    """'1 (1 + g g) c' with a class token -> '1 gh gw c', bicubic."""
    one, rows, c = table.shape
    side = math.isqrt(rows - 1)
    if one != 1 or side * side != rows - 1 or not side:
        raise WeightsError(f"pos_embed must have shape (1, 1 + g * g, {c}); got {table.shape}")
    table = table[:, 1:].reshape(1, side, side, c).astype(np.float32)
    grid = [size // model.patch_size for size in model.image_size]
    method = jax.image.ResizeMethod.CUBIC_PYTORCH
    return np.asarray(jax.image.resize(table, (1, *grid, c), method, antialias=False))


def _mae_patch_kernel(kernel):
    """Resizes the 14x14 patches of ViT-H to 16x16, keeping the response to a constant patch."""
    out, channels, height, width = kernel.shape
    if height != width:
        raise WeightsError(f"patch_embed.proj.weight must be square; got {kernel.shape}")
    if height == PATCH:
        return kernel
    method = jax.image.ResizeMethod.CUBIC_PYTORCH
    shape = (out, channels, PATCH, PATCH)
    resized = jax.image.resize(kernel.astype(np.float32), shape, method, antialias=False)
    return np.asarray(resized) * (height * width / PATCH**2)


def _count(tensors, pattern):
    """How many blocks there are, numbered from 0 without a gap where the pattern says."""
    found = {int(m[1]) for name in tensors if (m := re.match(pattern, name))}
    if not found:
        raise WeightsError(f"no tensor is named like {pattern}; got {_listed(sorted(tensors))}")
    if found != set(range(len(found))):
        raise WeightsError(
            f"names like {pattern} must count from 0 without a gap; got {_listed(sorted(found))}"
        )
    return len(found)


def _shape(tensors, name, ndim):
    if name not in tensors:
        raise WeightsError(f"{name} is missing; got {_listed(tensors)}")
    if tensors[name].ndim != ndim or 0 in tensors[name].shape:
        raise WeightsError(f"{name} must have {ndim} axes, none empty; got {tensors[name].shape}")
    return tensors[name].shape


def _check_names(what, got, expected):
    unknown, missing = sorted(set(got) - set(expected)), sorted(set(expected) - set(got))
    if unknown or missing:
        raise WeightsError(
            f"{what} does not hold exactly the tensors of this model: "
            f"unknown {_listed(unknown)}; missing {_listed(missing)}"
        )


def _listed(items, limit=12):
    """Names some of the items and counts the others."""
    items = [str(item) for item in items]
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return f"[{', '.join(items[:limit])}{more}]" if items else "none"
