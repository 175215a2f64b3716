"""Tests that conversion uses each tensor once, in the right layout, and is lossless."""

import math
import random
import re

import jax
import ml_dtypes
import numpy as np
import pytest

from sam_jax.model.sam import replace_fields, sam_tiny
from sam_jax.weights import names
from sam_jax.weights.convert import from_torch, to_huggingface, to_torch
from sam_jax.weights.tensors import WeightsError, check_variables
from tests.sam_jax.weights.official_state import (
    ZEROS,
    assert_same_arrays,
    flatten,
    renamed,
    without,
)

FUZZ_INPUTS = 3_000


def load(state):
    """Returns (model, variables, notes), and leaves `state` unchanged."""
    notes = []
    return *from_torch(dict(state), notes), notes


@pytest.fixture
def state(tiny):
    """Returns the official state dict of a tiny model. Tests may modify it."""
    return to_torch(*tiny)


# Round trips.

MODELS = {
    "images that are not square": {},
    "square images": dict(image_size=(64, 64), window_size=3),
    "another patch": dict(image_size=(24, 20), patch_size=4),
    "windows larger than the grid": dict(window_size=10),
    "windows of one token": dict(window_size=1),
    "no global block": dict(global_blocks=()),
    "no windows": dict(global_blocks=(0, 1), window_size=14),
    "one block": dict(depth=1, global_blocks=()),
    "twelve blocks, as numbers of two digits": dict(depth=12, global_blocks=(2, 11)),
    "three decoder layers": dict(decoder_depth=3),
    "other widths": dict(embed_dim=16, num_heads=1, mlp_ratio=2, prompt_dim=48, mask_channels=4),
}


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS.keys())
def test_the_model_is_inferred_from_the_shapes(tiny, variables_of, fields):
    model = replace_fields(tiny[0], **fields)
    variables = variables_of(model)
    found, again, notes = load(to_torch(model, variables))
    assert found == model
    assert notes == []
    assert_same_arrays(flatten(again), flatten(variables))


def test_compute_options_are_not_in_the_file(tiny):
    model, variables = tiny
    training = replace_fields(model, dtype="bfloat16", dropout=0.1, drop_path=0.4, remat="blocks")
    assert load(to_torch(training, variables))[0] == model


def random_bits(shapes):
    """Returns random float32 bits without NaNs. They include infinities and subnormal numbers."""
    rng = np.random.default_rng(0)
    arrays = {}
    for name, shape in shapes.items():
        bits = rng.integers(0, 1 << 32, shape, np.uint32)
        bits[np.isnan(bits.view(np.float32))] = 0x80000000
        arrays[name] = bits.view(np.float32)
    return arrays


def test_official_to_sam_jax_and_back_is_bitwise(state):
    source = random_bits({name: x.shape for name, x in state.items()})
    model, variables, _ = load(source)
    again = to_torch(model, variables)
    assert again.keys() == source.keys()
    for name, array in again.items():
        assert array.flags.c_contiguous, name
        np.testing.assert_array_equal(array.view(np.uint32), source[name].view(np.uint32), name)


def test_huggingface_to_sam_jax_and_back_is_bitwise(square):
    source = to_huggingface(*square)
    assert len(source) == len(to_torch(*square)) + 1  # the Fourier matrix has two names
    model, variables, notes = load(source)
    assert model == square[0]
    assert notes == []
    assert_same_arrays(flatten(variables), flatten(square[1]))
    assert_same_arrays(to_huggingface(model, variables), source)


def test_tensors_have_the_paths_and_layouts_of_the_model(state):
    _, variables, _ = load(state)
    params, constants = variables["params"], variables["constants"]
    name = "image_encoder.blocks.1.mlp.lin1.weight"
    np.testing.assert_array_equal(
        params["image_encoder"]["block_01"]["lin1"]["kernel"], state[name].T
    )
    name = "image_encoder.patch_embed.proj.weight"
    kernel = params["image_encoder"]["patch_embed"]["kernel"]
    assert kernel[1, 2, 0, 5] == state[name][5, 0, 1, 2]
    prompts = params["prompt_encoder"]
    labels = ["background", "foreground", "top_left", "bottom_right"]
    for label, part in enumerate(labels):
        row = state[f"prompt_encoder.point_embeddings.{label}.weight"][0]
        np.testing.assert_array_equal(prompts[part], row)
    name = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
    np.testing.assert_array_equal(constants["prompt_encoder"]["gaussian"], state[name])
    # Embeddings with several rows are not transposed.
    name = "mask_decoder.mask_tokens.weight"
    np.testing.assert_array_equal(params["mask_decoder"]["mask_tokens"], state[name])


def test_arrays_are_contiguous_float32_arrays(state):
    _, variables, _ = load(state)
    for path, array in flatten(variables).items():
        assert array.dtype == np.float32, path
        assert array.flags.c_contiguous, path


# Accepted files.


WRAPPERS = ["model", "state_dict", "model_state_dict", "model_state", "net", "module", "sam", 3]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_training_checkpoints_are_loaded(tiny, state, wrapper):
    model, variables, notes = load({wrapper: state, "epoch": 3, "optimizer": {"lr": [0.1]}})
    assert model == tiny[0]
    assert_same_arrays(flatten(variables), flatten(tiny[1]))
    (note,) = notes
    assert "epoch" in note
    assert "optimizer" in note
    assert load({wrapper: state})[2] == []


def test_a_wrapper_in_a_wrapper_is_loaded(tiny, state):
    model, _, notes = load({"epoch": 3, "net": {"state_dict": state, "step": 7}})
    assert model == tiny[0]
    assert notes == ["of the checkpoint only 'net.state_dict' was read, not epoch, step"]


def test_the_likely_one_of_several_models_is_loaded(tiny, state):
    other = {name: np.zeros_like(x) for name, x in state.items()}
    optimizer = {"state": {name: {"step": 1} for name in state}}
    assert load({"best": state, "optimizer": optimizer})[0] == tiny[0]
    _, variables, notes = load({"ema": other, "model": state})
    assert_same_arrays(flatten(variables), flatten(tiny[1]))
    assert notes == ["of the checkpoint only 'model' was read, not ema"]
    with pytest.raises(WeightsError, match=r"several models.* one of \[teacher.sam, student.sam\]"):
        load({"teacher": {"sam": other}, "student": {"sam": state}})


def test_values_beside_the_weights_are_skipped(tiny, state):
    others = {"epoch": 3, "sizes": [1], 7: ZEROS, "steps": np.zeros(2, int), "best": None}
    model, variables, notes = load(state | others)
    assert model == tiny[0]
    assert_same_arrays(flatten(variables), flatten(tiny[1]))
    (note,) = notes
    assert note.endswith("not floating-point tensors: [epoch, sizes, 7, steps, best]")
    assert load({"net": {f"model.{k}": x for k, x in state.items()} | others})[0] == model


PREFIXES = ["module.", "sam.", "_orig_mod.", "module._orig_mod.", "model.", "model.sam.", "net."]


@pytest.mark.parametrize("prefix", [*PREFIXES, "any.thing.at_all."])
@pytest.mark.parametrize("naming", ["official", "huggingface"])
def test_prefixes_of_names_are_removed(tiny, square, state, prefix, naming):
    if naming == "huggingface":
        tiny, state = square, to_huggingface(*square)
    model, variables, _ = load({f"{prefix}{name}": x for name, x in state.items()})
    assert model == tiny[0]
    assert_same_arrays(flatten(variables), flatten(tiny[1]))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64, ">f4"])
def test_other_floats_become_float32(state, dtype):
    state = {name: x.astype(dtype) for name, x in state.items()}
    _, variables, _ = load(state)
    assert_same_arrays(
        to_torch(load(state)[0], variables), {k: x.astype("f4") for k, x in state.items()}
    )


def test_pixel_statistics_are_checked_and_left_out(tiny, state):
    mean = np.array([123.675, 116.28, 103.53], np.float32).reshape(3, 1, 1)
    std = np.array([58.395, 57.12, 57.375], np.float32).reshape(-1, 1, 1)
    assert load(state | {"pixel_mean": mean, "pixel_std": std})[0] == tiny[0]
    wrapped = {f"module.{k}": x for k, x in (state | {"pixel_mean": mean}).items()}
    assert load({"model": wrapped})[0] == tiny[0]


@pytest.mark.parametrize("key", ["pixel_mean", "pixel_std"])
@pytest.mark.parametrize(
    "value",
    [np.zeros((3, 1, 1)), np.full(3, np.nan), np.ones(1), np.ones(4), np.ones(0), np.ones((3, 3))],
    ids=["zeros", "nan", "one", "four", "none", "a matrix"],
)
def test_other_pixel_statistics_are_refused(state, key, value):
    with pytest.raises(WeightsError, match=rf"{key} must be \(.*\).*got"):
        load(state | {key: value.astype(np.float32)})


@pytest.mark.parametrize("given", ["first", "second"])
def test_one_of_the_tied_matrices_is_enough(square, given):
    source = to_huggingface(*square)
    del source[names.HF_GAUSSIAN if given == "first" else names.HF_GAUSSIAN_TWIN]
    assert_same_arrays(flatten(load(source)[1]), flatten(square[1]))


def test_tied_matrices_must_be_equal(square):
    source = to_huggingface(*square)
    source[names.HF_GAUSSIAN_TWIN] = source[names.HF_GAUSSIAN_TWIN] + 1
    message = f"{re.escape(names.HF_GAUSSIAN)}.*{re.escape(names.HF_GAUSSIAN_TWIN)}.*equal"
    with pytest.raises(WeightsError, match=message):
        load(source)


# Another image size.


def test_positions_for_another_image_size_than_the_tables(tiny, state):
    """Checks that absolute positions determine the image size.

    The tables of global blocks are interpolated, and a note reports it.
    """
    state["image_encoder.pos_embed"] = np.ones((1, 4, 11, 24), np.float32)
    old = {axis: state[f"image_encoder.blocks.1.attn.rel_pos_{axis}"] for axis in "hw"}
    model, variables, notes = load(state)
    assert model == replace_fields(tiny[0], image_size=(32, 88))
    blocks = variables["params"]["image_encoder"]
    for axis, rows in (("h", 7), ("w", 21)):
        table = old[axis]
        position = np.clip((np.arange(rows) + 0.5) * len(table) / rows - 0.5, 0, len(table) - 1)
        columns = [np.interp(position, np.arange(len(table)), column) for column in table.T]
        actual = blocks["block_01"]["attention"][f"rel_pos_{axis}"]
        np.testing.assert_allclose(actual, np.stack(columns, axis=1), atol=1e-6)
        name = f"image_encoder.blocks.1.attn.rel_pos_{axis}"
        assert any(f"{name} was resized from {len(table)} to {rows} rows" in note for note in notes)
        windowed = state[f"image_encoder.blocks.0.attn.rel_pos_{axis}"]
        np.testing.assert_array_equal(blocks["block_00"]["attention"][f"rel_pos_{axis}"], windowed)
    assert len(notes) == 2


@pytest.mark.parametrize(
    ("tables", "rows"),
    [
        ({0: (9, 7), 1: (11, 17)}, r"\(9, 7\)"),  # windows are square
        ({0: (8, 8), 1: (11, 17)}, r"\(8, 8\)"),  # tables have 2 n - 1 rows
        (
            {0: (5, 5), 1: (7, 7), 2: (9, 9)},
            r"\(5, 5\).*\(7, 7\).*\(9, 9\)",
        ),  # windows have one size
        ({0: (5, 5), 1: (7, 7), 2: (11, 17)}, r"\(5, 5\).*\(7, 7\)"),
    ],
)
def test_tables_that_fit_no_windows_are_refused(tiny, variables_of, tables, rows):
    model = replace_fields(tiny[0], depth=len(tables))
    state = to_torch(model, variables_of(model))
    for block, (h, w) in tables.items():
        state[f"image_encoder.blocks.{block}.attn.rel_pos_h"] = np.zeros((h, 8), np.float32)
        state[f"image_encoder.blocks.{block}.attn.rel_pos_w"] = np.zeros((w, 8), np.float32)
    with pytest.raises(
        WeightsError, match=rf"relative positions must have \(11, 17\).*got.*{rows}"
    ):
        load(state)


def test_tiny_size_round_trips(variables_of):
    model = sam_tiny(decoder_heads=8, position_scale=1.0)  # cannot be inferred from the weights
    assert load(to_torch(model, variables_of(model)))[0] == model


# Refused files.


REFUSED = {
    "SAM-HQ": (
        lambda s: s | {"mask_decoder.hf_token.weight": ZEROS, "mask_decoder.hf_mlp.x": ZEROS},
        r"unknown \[mask_decoder.hf_mlp.x, mask_decoder.hf_token.weight\]; missing none",
    ),
    "MobileSAM": (
        lambda s: {"image_encoder.layers.0.blocks.0.c.weight": ZEROS} | without(s, "image_enc"),
        r"not weights of Segment Anything.*image_encoder.layers.0.blocks.0.c.weight",
    ),
    "other blocks": (
        lambda s: renamed(s, "image_encoder.blocks.", "image_encoder.stages."),
        r"image_encoder.stages.0.attn.proj.bias",
    ),
    "an image encoder alone": (
        lambda s: {k: x for k, x in s.items() if k.startswith("image_encoder")},
        r"prompt_encoder.no_mask_embed.weight",
    ),
    "a mask decoder alone": (
        lambda s: {k: x for k, x in s.items() if k.startswith("mask_decoder")},
        r"not weights of Segment Anything.*mask_decoder",
    ),
    "nothing": (lambda s: {}, r"not weights of Segment Anything.*got none"),
    "a missing tensor": (
        lambda s: without(s, "iou_token"),
        r"unknown none; missing \[mask_decoder.iou_token.weight\]",
    ),
    "a renamed tensor": (
        lambda s: renamed(s, "neck.0.weight", "neck.0.kernel"),
        r"unknown \[image_encoder.neck.0.kernel\]; missing \[image_encoder.neck.0.weight\]",
    ),
    "many unknown tensors": (
        lambda s: s | {f"extra.{i:03d}": ZEROS for i in range(40)},
        r"unknown \[extra.000, extra.001, .* and 28 more\]; missing none",
    ),
    "a prefix on some names": (
        lambda s: without(s, "neck") | {f"module.{k}": x for k, x in s.items() if "neck" in k},
        r"unknown \[module.image_encoder.neck.0.weight, .*missing \[image_encoder.neck.0.weight",
    ),
    "a transposed kernel": (
        lambda s: s | {"mask_decoder.iou_prediction_head.layers.2.weight": np.zeros((20, 4), "f4")},
        r"iou_prediction_head.layers.2.weight \(20, 4\) instead of \(4, 20\)",
    ),
    "an additional row": (
        lambda s: s | {"mask_decoder.mask_tokens.weight": np.zeros((5, 32), "f4")},
        r"mask_tokens.weight \(5, 32\) instead of \(4, 32\)",
    ),
    "a scalar": (
        lambda s: s | {"mask_decoder.iou_token.weight": np.zeros((), "f4")},
        r"iou_token.weight \(\) instead of \(1, 32\)",
    ),
    "positions without a batch": (
        lambda s: s | {"image_encoder.pos_embed": np.zeros((6, 9, 24), "f4")},
        r"image_encoder.pos_embed must have 4 axes, none empty; got \(6, 9, 24\)",
    ),
    "positions of nothing": (
        lambda s: s | {"image_encoder.pos_embed": np.zeros((1, 0, 9, 24), "f4")},
        r"image_encoder.pos_embed must have 4 axes, none empty; got \(1, 0, 9, 24\)",
    ),
    "patches that are not square": (
        lambda s: s | {"image_encoder.patch_embed.proj.weight": np.zeros((24, 3, 8, 4), "f4")},
        r"image_encoder.patch_embed.proj.weight \(24, 3, 8, 4\)",
    ),
    "heads that do not fit": (
        lambda s: s | {"image_encoder.blocks.0.attn.rel_pos_h": np.zeros((7, 7), "f4")},
        r"width must be a multiple of 7; got 24",
    ),
    "a gap in the blocks": (
        lambda s: renamed(s, "blocks.1.", "blocks.2."),
        r"image_encoder.*blocks.*count from 0 without a gap; got \[0, 2\]",
    ),
    "a block of a huge number": (
        lambda s: renamed(s, "blocks.1.", f"blocks.{10**30}."),
        r"count from 0 without a gap; got \[0, 1000000000000000000000000000000\]",
    ),
    "a block of more digits than Python reads": (
        lambda s: renamed(s, "blocks.1.", f"blocks.{'9' * 5000}."),
        r"blocks",
    ),
    "a block of other digits": (
        lambda s: renamed(s, "blocks.1.", "blocks.\u0661."),  # an Arabic one
        r"blocks",
    ),
    "a block twice": (
        lambda s: s | {k.replace("s.1.", "s.01."): x for k, x in s.items() if "blocks.1." in k},
        r"unknown \[image_encoder.blocks.01.attn.proj.bias",
    ),
    "an incomplete decoder layer": (
        lambda s: s | {"mask_decoder.transformer.layers.2.norm1.weight": ZEROS[0]},
        r"missing \[mask_decoder.transformer.layers.2.cross",
    ),
    "integers": (
        lambda s: s | {"mask_decoder.iou_token.weight": np.zeros((1, 32), int)},
        r"missing \[mask_decoder.iou_token.weight\]",
    ),
    "complex numbers": (
        lambda s: s | {"mask_decoder.iou_token.weight": np.zeros((1, 32), complex)},
        r"missing \[mask_decoder.iou_token.weight\]",
    ),
    "no tensors": (
        lambda s: {"model": {"epoch": 3, 7: None}},
        r"must be floating-point tensors.*got others: \[epoch, 7\]",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_state_dicts_are_refused(state, kind):
    change, message = REFUSED[kind]
    changed = change(state)
    with pytest.raises(WeightsError, match=message):
        load(changed)


def test_errors_of_huggingface_files_name_the_tensors(square):
    source = to_huggingface(*square)
    with pytest.raises(WeightsError, match=r"unknown \[text_encoder.x\]; missing none"):
        load(source | {"text_encoder.x": ZEROS})
    with pytest.raises(WeightsError, match=r"missing \[mask_decoder.iou_token.weight\]"):
        load(without(source, "iou_token"))
    with pytest.raises(WeightsError, match=r"gaussian_matrix|positional_embedding"):
        load(without(source, "positional_embedding"))
    # If a tensor has both names, one of them would be dropped silently.
    name = "image_encoder.pos_embed"
    with pytest.raises(WeightsError, match=name):
        load(source | {name: np.zeros((1, 8, 8, 24), np.float32)})


@pytest.mark.parametrize("write", [to_torch, to_huggingface])
def test_variables_of_another_model_are_not_written(tiny, square, write):
    with pytest.raises(WeightsError, match=r"missing \[constants/prompt_encoder/gaussian\]"):
        write(tiny[0], {"params": tiny[1]["params"]})
    with pytest.raises(WeightsError, match=r"unknown \[params/image_encoder/block_01/"):
        write(replace_fields(tiny[0], depth=1), tiny[1])
    with pytest.raises(
        WeightsError, match=r"block_00/attention/rel_pos_h \(7, 8\) instead of \(5, 8\)"
    ):
        write(square[0], tiny[1])


def test_shapes_are_checked_before_anything_is_computed(state, monkeypatch):
    """Checks that nothing is resized if a shape is wrong, since shapes in a file may be huge."""
    state["image_encoder.pos_embed"] = np.ones((1, 4, 11, 24), np.float32)  # tables to resize
    state["mask_decoder.iou_token.weight"] = np.zeros((2, 32), np.float32)
    monkeypatch.setattr(jax.image, "resize", lambda *args, **kwargs: pytest.fail("resized"))
    with pytest.raises(WeightsError, match="iou_token"):
        load(state)


# Fuzz.

HUGE = 1 << 45


def edit(state, rng):
    """Changes a name or a value at random."""
    name = rng.choice(list(state)) if state else "x"
    x = state.get(name)
    kind = rng.randrange(16)
    if kind == 0:
        state.pop(name, None)
    elif kind == 1:  # a character
        at = rng.randrange(max(1, len(str(name))))
        other = rng.choice(["", ".", "0", "9", "a", "\n", "\u0661", "\x00", "weight", str(1 << 70)])
        state[str(name)[:at] + other + str(name)[at + 1 :]] = state.pop(name, None)
    elif kind == 2:  # a block's number
        number = rng.choice(["0", "1", "2", "7", "01", "-1", "", str(HUGE), "9" * 5000])
        state[re.sub(r"\.\d+\.", f".{number}.", str(name), count=1)] = state.pop(name, None)
    elif kind == 3:  # a part of the name of another tensor
        other = str(rng.choice(list(state) or ["y"]))
        state[other.split(".")[0] + "." + str(name).split(".")[-1]] = x
    elif kind == 4:
        prefix = rng.choice(["module.", "sam.", "model.", "vision_encoder."])
        return {f"{prefix}{k}": v for k, v in state.items()}
    elif kind == 5:
        return {rng.choice(["model", "state_dict", "weights", 3]): state}
    elif kind == 6:
        others = [None, 3, "text", [1.0], {}, {"a": 1}, np.float32(3), np.array("a"), object()]
        state[name] = rng.choice(others)
    elif kind == 7:
        state[rng.choice(["cls_token", "pixel_mean", "vision_encoder.pos_embed", "model", "x"])] = x
    elif not isinstance(x, np.ndarray):
        state[name] = np.zeros(rng.choice([(), (0,), (1,), (3, 1, 1), (1, 1 + 14 * 14, 24)]), "f4")
    elif kind == 8:
        state[name] = x.T
    elif kind == 9:
        state[name] = rng.choice([x.reshape(-1), x[None], x[..., None], x[:0], x[..., :0]])
    elif kind == 10:
        dtype = rng.choice(["f2", "f8", ml_dtypes.bfloat16, "i8", "?", "c8", "u1"])
        state[name] = np.broadcast_to(np.zeros((), dtype), x.shape)
    elif kind == 11:
        state[name] = np.broadcast_to(np.float32(rng.choice([np.nan, np.inf, 1e38])), x.shape)
    else:  # another length of an axis, in one tensor or in all that have an axis of this length
        old = rng.choice(x.shape or (1,))
        resized, lengths = [name], [0, 1, 2, old + 1, 2 * old, 255, 256, HUGE, HUGE + 1]
        if kind == 15:  # without huge lengths: files with many of them would be huge
            resized = [k for k, v in state.items() if isinstance(v, np.ndarray)]
            lengths = lengths[:-2]
        new = rng.choice(lengths)
        for k in resized:
            shape = tuple(new if side == old else side for side in state[k].shape)
            if math.prod(shape) < 1 << 60:
                state[k] = np.broadcast_to(np.float32(0), shape)
    return state


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Explicitly requested dtype int64")  # JAX warns for huge axes
def test_random_edits_raise_only_weights_errors(tiny, square, state, monkeypatch):
    resize = jax.image.resize

    def bounded_resize(image, shape, *args, **kwargs):
        # The resize makes a matrix. If it does not fit in memory, XLA ends the process.
        if image.shape[0] * shape[0] > 1 << 26:
            raise MemoryError(f"{image.shape} to {shape}")
        return resize(image, shape, *args, **kwargs)

    monkeypatch.setattr(jax.image, "resize", bounded_resize)
    sources = [state, to_huggingface(*square)]
    refusals, loaded, faults = [], 0, {}
    for seed in range(FUZZ_INPUTS):
        rng = random.Random(seed)
        changed = dict(sources[seed % 2])
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            changed = edit(changed, rng)
        try:
            model, variables = from_torch(dict(changed), [])
        except WeightsError as error:
            refusals.append(str(error))
        except BaseException as error:
            faults.setdefault(type(error), f"seed {seed}: {error}")
        else:
            loaded += 1
            assert {x.dtype.name for x in jax.tree.leaves(variables)} == {"float32"}
            check_variables("variables", model, flatten(variables))
    assert not faults
    assert len(refusals) > FUZZ_INPUTS / 2
    assert max(map(len, refusals)) < 20_000
    assert loaded > FUZZ_INPUTS / 50
