"""Between a model with its variables and PyTorch tensors under official, Hugging Face or MAE names.

Every tensor of the source is used exactly once and every parameter is filled, or the error says
which ones are not. The size, the frame and the windows are found from the tensors' shapes.

Sources: see `names.py`; positions of another size are resized as in ViTDet and segment-anything.
"""

import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from sam_jax.model.init import init_variables
from sam_jax.model.mask_decoder import MaskDecoder
from sam_jax.model.sam import PIXEL_MEAN, PIXEL_STD, build_sam
from sam_jax.model.two_way_transformer import CROSS_DOWNSAMPLE
from sam_jax.weights import mae, names
from sam_jax.weights.tensors import WeightsError, check_names, count_blocks, listed, shape_of


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
    tensors = take_tensors(state, notes)
    if "vision_encoder.pos_embed" in tensors:
        tensors = _official_from_huggingface(tensors)
    elif mae.is_mae(tensors):
        return _from_mae(tensors, notes)
    if "image_encoder.pos_embed" not in tensors:
        raise WeightsError(
            "these are not weights of Segment Anything: neither image_encoder.pos_embed (official "
            "names), vision_encoder.pos_embed (Hugging Face) nor cls_token and blocks.0.* (MAE) is "
            f"there; got {listed(tensors)}"
        )
    model = _model_of(tensors)
    return model, _fill(model, tensors, notes)


def to_torch(model, variables):
    """Returns the official state dict {name: float32 array} of a model; undoes `from_torch`.

    Raises:
      WeightsError: if the variables are not those of the model, or its decoder has not the official
        number of heads, which the tensors cannot say.
    """
    heads = model.mask_decoder.num_heads
    if heads != MaskDecoder.num_heads:
        raise WeightsError(
            "only models with mask_decoder.num_heads="
            f"{MaskDecoder.num_heads} have an official form; got {heads}"
        )
    flat = flax.traverse_util.flatten_dict(variables, sep="/")
    table = _names_of(model)
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
    check_names(what, flat, expected)
    if odd := [
        f"{k} {v.shape} instead of {expected[k]}" for k, v in flat.items() if v.shape != expected[k]
    ]:
        raise WeightsError(f"{what} holds arrays of wrong shapes: {listed(odd)}")


@functools.cache
def _shapes(model):
    """The shapes of a model's variables, flat: {path: shape}, without computing anything."""
    shapes = jax.eval_shape(lambda: init_variables(model, 0))
    return {k: v.shape for k, v in flax.traverse_util.flatten_dict(shapes, sep="/").items()}


def _names_of(model):
    return names.official_names(model.image_encoder.depth, model.mask_decoder.depth)


def take_tensors(state, notes):
    """Takes the tensors out of a state dict or a training checkpoint, which is emptied.

    Raises:
      WeightsError: if there is anything else among them.
    """
    tensors = _without_statistics(_unwrap(state, notes))
    state.clear()
    return tensors


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


def _without_statistics(state):
    """Checks that all values are floating-point arrays, and takes the pixel statistics away."""
    odd = [k for k, v in state.items() if not isinstance(k, str) or not _is_floating(v)]
    if odd:
        raise WeightsError(
            f"weights must be floating-point tensors by name; got others: {listed(odd)}"
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
    depth = count_blocks(tensors, r"vision_encoder\.layers\.([0-9]{1,99})\.")
    decoder_depth = count_blocks(tensors, r"mask_decoder\.transformer\.layers\.([0-9]{1,99})\.")
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
    position_shape = shape_of(tensors, "image_encoder.pos_embed", 4)
    patch_shape = shape_of(tensors, "image_encoder.patch_embed.proj.weight", 4)
    _, gh, gw, embed_dim = position_shape
    patch = patch_shape[-1]
    depth = count_blocks(tensors, r"image_encoder\.blocks\.([0-9]{1,99})\.")
    tables = [
        tuple(shape_of(tensors, f"image_encoder.blocks.{i}.attn.rel_pos_{a}", 2)[0] for a in "hw")
        for i in range(depth)
    ]
    window, global_blocks = _windows(tables, (2 * gh - 1, 2 * gw - 1))
    head_width = shape_of(tensors, "image_encoder.blocks.0.attn.rel_pos_h", 2)[1]
    mlp_dim = shape_of(tensors, "image_encoder.blocks.0.mlp.lin1.weight", 2)[0]
    prompt_dim = shape_of(tensors, "prompt_encoder.no_mask_embed.weight", 2)[1]
    mask_channels = shape_of(tensors, "prompt_encoder.mask_downscaling.3.weight", 4)[0]
    decoder_mlp = "mask_decoder.transformer.layers.0.mlp.lin1.weight"
    for what, size, divisor in (
        ("the encoder's width", embed_dim, head_width),
        ("the MLPs' hidden width", mlp_dim, embed_dim),
        ("the prompt width", prompt_dim, CROSS_DOWNSAMPLE * MaskDecoder.num_heads),
        ("the channels of mask prompts", mask_channels, 4),
    ):
        if size % divisor:
            raise WeightsError(f"{what} must be a multiple of {divisor}; got {size}")
    return build_sam(
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
        decoder_depth=count_blocks(tensors, r"mask_decoder\.transformer\.layers\.([0-9]{1,99})\."),
        decoder_mlp_dim=shape_of(tensors, decoder_mlp, 2)[0],
        iou_hidden_dim=shape_of(tensors, "mask_decoder.iou_prediction_head.layers.0.weight", 2)[0],
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
    table = _names_of(model)
    check_names("the file", tensors, {official for official, _ in table.values()})
    shapes, misshapen = _shapes(model), []
    for ours, (official, layout) in table.items():
        got = tensors[official].shape
        expected = np.shape(layout.to_torch(np.broadcast_to(np.float32(0), shapes[ours])))
        is_table = "rel_pos" in ours and len(got) == 2 and got[0] > 0
        if got != expected and not (is_table and got[1] == expected[1]):
            misshapen.append(f"{official} {got} instead of {expected}")
    if misshapen:
        raise WeightsError(f"tensors of wrong shapes: {listed(misshapen)}")

    flat = {}
    for ours, (official, layout) in table.items():
        value = np.asarray(layout.from_torch(tensors.pop(official)), np.float32, order="C")
        if value.shape != shapes[ours]:
            notes.append(f"{official} was resized from {len(value)} to {shapes[ours][0]} rows")
            value = np.asarray(jax.image.resize(value, shapes[ours], "linear", antialias=False))
        flat[ours] = value
    return flax.traverse_util.unflatten_dict(flat, sep="/")


MAE_HEADS = {768: 12, 1024: 16, 1280: 16}  # by width: the heads cannot be seen from the shapes


def _from_mae(tensors, notes):
    """Puts an MAE encoder into a `Sam` whose other parts are freshly drawn from seed 0."""
    width, depth = mae.width_of(tensors), mae.depth_of(tensors)
    if width not in MAE_HEADS or depth % 4:
        raise WeightsError(
            f"an MAE encoder must be {sorted(MAE_HEADS)} wide and its depth a multiple of 4; "
            f"got {width} wide and {depth} deep"
        )
    model = build_sam(
        embed_dim=width,
        depth=depth,
        num_heads=MAE_HEADS[width],
        global_blocks=tuple(range(depth // 4 - 1, depth, depth // 4)),
    )
    encoder = mae.encoder_for(model, tensors, notes)

    @jax.jit
    def fresh():
        drawn = flax.traverse_util.flatten_dict(init_variables(model, 0), sep="/")
        return {path: value for path, value in drawn.items() if path not in encoder}

    notes.append(
        "the neck, prompt encoder and mask decoder are untrained (seed 0) and relative positions "
        "zero: train before use"
    )
    flat = encoder | {path: np.asarray(value) for path, value in fresh().items()}
    check_shapes(model, flat, "the MAE checkpoint")
    return model, flax.traverse_util.unflatten_dict(flat, sep="/")
