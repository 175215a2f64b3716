"""Tests files of masked autoencoders, and their encoders in a SAM."""

import json

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sam_jax
from sam_jax.model.init import variable_shapes
from sam_jax.model.mae import encode_positions, mae_tiny
from sam_jax.model.sam import replace_fields, sam_tiny, sam_vit_b
from sam_jax.weights import directory, mae, safetensors_file
from sam_jax.weights.convert import from_torch, to_torch
from sam_jax.weights.formats import load_autoencoder, read
from sam_jax.weights.tensors import WeightsError
from tests.sam_jax.weights.official_state import (
    ZEROS,
    assert_same_arrays,
    flatten,
    mae_state,
    official_shapes,
    without,
)

MODEL = mae_tiny(image_size=(32, 48), decoder_dim=32, decoder_depth=3)


def random_variables(model, seed=0):
    """Returns random variables. No two arrays are equal, and none equals its transpose."""
    rng = np.random.default_rng(seed)
    shapes = {path: x.shape for path, x in variable_shapes(model).items()}
    flat = {path: rng.standard_normal(shape).astype(np.float32) for path, shape in shapes.items()}
    return flax.traverse_util.unflatten_dict(flat, sep="/") | {"constants": {}}


@pytest.fixture(scope="module")
def variables():
    return random_variables(MODEL)


@pytest.fixture
def saved(tmp_path, variables):
    sam_jax.save(tmp_path / "mae", MODEL, variables)
    return tmp_path / "mae"


def test_directories_round_trip(saved, variables):
    model, loaded = load_autoencoder(saved)
    assert model == MODEL
    assert loaded["constants"] == {}
    assert_same_arrays(flatten(loaded), flatten(variables))
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(loaded))


def test_a_checkpoint_has_the_variables_and_the_tensors(saved, variables):
    checkpoint = read(saved)
    assert (checkpoint.kind, checkpoint.model, checkpoint.notes) == ("mae", MODEL, [])
    assert_same_arrays(flatten(checkpoint.variables), flatten(variables))
    assert_same_arrays(checkpoint.tensors, mae.to_torch(MODEL, variables))


def test_names_and_layouts_equal_those_of_pytorch(variables):
    state, params = mae.to_torch(MODEL, variables), variables["params"]
    np.testing.assert_array_equal(
        state["patch_embed.proj.weight"], params["patch_embed"]["kernel"].transpose(3, 2, 0, 1)
    )
    np.testing.assert_array_equal(state["cls_token"], params["class_token"][None, None])
    np.testing.assert_array_equal(state["mask_token"], params["mask_token"][None, None])
    block = params["decoder_block_02"]
    np.testing.assert_array_equal(
        state["decoder_blocks.2.mlp.fc1.weight"], block["lin1"]["kernel"].T
    )
    np.testing.assert_array_equal(state["decoder_pred.weight"], params["decoder_pred"]["kernel"].T)
    assert state["pos_embed"].shape == (1, 1 + 4 * 6, 64)
    assert not state["pos_embed"][:, 0].any()
    np.testing.assert_array_equal(state["decoder_pos_embed"][0, 1:], encode_positions(4, 6, 32))
    assert len(state) == 10 + 5 * 12 + 2 + 2


@pytest.mark.parametrize("name", ["mae.safetensors", "mae.pth"])
def test_single_files_have_no_model(tmp_path, variables, name):
    sam_jax.save(tmp_path / name, MODEL, variables)
    checkpoint = read(tmp_path / name)
    model, tensors = checkpoint.model, checkpoint.tensors
    assert model is None
    assert_same_arrays(flatten(mae.from_torch(MODEL, tensors)), flatten(variables))
    with pytest.raises(WeightsError, match=rf"{name} must be the weights directory of a masked"):
        load_autoencoder(tmp_path / name)


def test_the_huggingface_format_is_refused(tmp_path, variables):
    message = "a masked autoencoder's format must be sam_jax or official; got 'huggingface'"
    with pytest.raises(ValueError, match=message):
        sam_jax.save(tmp_path / "x", MODEL, variables, format="huggingface")
    assert not (tmp_path / "x").exists()


def test_a_sam_is_not_an_autoencoder(tmp_path, tiny):
    sam_jax.save(tmp_path / "sam", *tiny)
    assert read(tmp_path / "sam").kind == "sam"
    with pytest.raises(WeightsError, match="sam must be the weights directory of a masked"):
        load_autoencoder(tmp_path / "sam")


def test_an_autoencoder_is_not_a_sam(saved):
    with pytest.raises(WeightsError, match=r"mae holds a masked autoencoder.*load_autoencoder"):
        sam_jax.load(saved)


DAMAGED = {
    "a missing tensor": (lambda s: s.pop("norm.weight"), r"missing \[norm.weight\]"),
    "an unknown tensor": (lambda s: s.update(gate=s["norm.weight"]), r"unknown \[gate\]"),
    "a tensor of another shape": (
        lambda s: s.update({"norm.weight": s["norm.weight"][1:]}),
        r"norm.weight \(63,\) instead of \(64,\)",
    ),
    "learned positions": (
        lambda s: s.update(pos_embed=s["pos_embed"] + 1),
        "pos_embed must be the sines and cosines",
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_tensors_of_another_model_are_refused(variables, kind):
    damage, message = DAMAGED[kind]
    state = mae.to_torch(MODEL, variables)
    damage(state)
    with pytest.raises(WeightsError, match=message):
        mae.from_torch(MODEL, state)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "decoder_heads",
            5,
            "decoder_dim must be a positive multiple of decoder_heads = 5; got 32",
        ),
        (
            "image_size",
            [32, 47],
            r"image_size must be two multiples of patch_size = 8; got \(32, 47\)",
        ),
        ("window_size", 3, r"unknown fields \['window_size'\]"),
        ("mask_ratio", "most", "mask_ratio must be a positive number; got 'most'"),
    ],
)
def test_invalid_fields_are_named(saved, field, value, message):
    (saved / directory.SUMS).unlink()
    fields = json.loads((saved / directory.MAE_JSON).read_text()) | {field: value}
    (saved / directory.MAE_JSON).write_text(json.dumps(fields))
    with pytest.raises(WeightsError, match=message):
        read(saved)


def test_a_directory_without_tensors_is_an_error(saved):
    (saved / directory.MAE_WEIGHTS).unlink()
    with pytest.raises(WeightsError, match=r"mae\.safetensors is missing"):
        read(saved)


# The encoder as the image encoder of a SAM.

SAM = sam_tiny(image_size=(64, 80), window_size=4, global_blocks=(1,))


def test_every_layer_of_the_encoder_is_used():
    """Uses the grid of the training images."""
    model = mae_tiny(image_size=(64, 64))
    sam = sam_tiny(image_size=(64, 64))
    variables = random_variables(model)
    state = mae.to_torch(model, variables)
    found = mae.encoder_for(sam, state, [])
    assert found.keys() < variable_shapes(sam).keys()
    given = flax.traverse_util.unflatten_dict(found, sep="/")
    patches = given["params"]["image_encoder"]["patch_embed"]["kernel"]
    np.testing.assert_array_equal(patches, variables["params"]["patch_embed"]["kernel"])
    np.testing.assert_allclose(
        given["params"]["image_encoder"]["pos_embed"].reshape(64, 64),
        encode_positions(8, 8, 64),
        atol=1e-6,
    )
    for i in range(2):
        block = given["params"]["image_encoder"][f"block_{i:02d}"]
        expected = variables["params"][f"block_{i:02d}"]
        assert_same_arrays(flatten(block), flatten(expected))


def test_positions_and_patches_are_resized():
    sam = replace_fields(SAM, patch_size=16, image_size=(64, 80))
    state = mae.to_torch(MODEL, random_variables(MODEL))
    notes = []
    found = mae.encoder_for(sam, state, notes, grid=(4, 6))
    assert found["params/image_encoder/pos_embed"].shape == (1, 4, 5, 64)
    kernel = found["params/image_encoder/patch_embed/kernel"]
    assert kernel.shape == (16, 16, 3, 64)
    np.testing.assert_allclose(
        kernel.sum((0, 1)), state["patch_embed.proj.weight"].sum((2, 3)).T, rtol=0, atol=2
    )
    assert "cls_token" in notes[0]
    assert "decoder_pred.bias" in notes[0]


REFUSED = {
    "another width": (
        replace_fields(SAM, embed_dim=32),
        (4, 6),
        "64 wide and 2 deep; the model.s is 32 wide",
    ),
    "another depth": (
        replace_fields(SAM, depth=3),
        (4, 6),
        "2 deep; the model.s is 64 wide and 3 deep",
    ),
    "another mlp": (
        replace_fields(SAM, mlp_ratio=2),
        (4, 6),
        r"fc1.weight \(256, 64\) instead of \(128, 64",
    ),
    "not square": (SAM, None, r"pos_embed must have shape \(1, 1 \+ g \* g, 64\); got \(1, 25, 64"),
    "another grid": (SAM, (5, 6), r"pos_embed must have shape \(1, 1 \+ 5 \* 6, 64\)"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_encoders_of_another_size_are_refused(variables, kind):
    sam, grid, message = REFUSED[kind]
    with pytest.raises(WeightsError, match=message):
        mae.encoder_for(sam, mae.to_torch(MODEL, variables), [], grid)


def test_tensors_are_read_back_by_their_names(saved):
    state = safetensors_file.read(saved / directory.MAE_WEIGHTS)
    assert {"cls_token", "pos_embed", "blocks.1.attn.qkv.bias", "decoder_embed.weight"} <= {*state}


# An MAE checkpoint as an untrained SAM.


def load_sam(state):
    """Returns (model, variables, notes), and leaves `state` unchanged."""
    notes = []
    return *from_torch(dict(state), notes), notes


@pytest.fixture(scope="module")
def state():
    return mae_state()


@pytest.fixture
def zero_init(monkeypatch):
    """Initializes the parts that are not in an MAE checkpoint with zeros, which is faster."""

    def zeros(model, seed):
        flat = {path: jnp.zeros(x.shape) for path, x in variable_shapes(model).items()}
        return flax.traverse_util.unflatten_dict(flat, sep="/")

    variable_shapes(sam_vit_b(depth=4, global_blocks=(0, 1, 2, 3)))  # cached before the patch
    monkeypatch.setattr(mae, "init_variables", zeros)


def test_mae_encoders_initialize_a_sam(state, zero_init):
    extra = {
        "mask_token": ZEROS,
        "decoder_embed.weight": ZEROS,
        "decoder_blocks.0.norm1.bias": ZEROS,
    }
    extra |= {"head.weight": ZEROS, "fc_norm.bias": ZEROS, "decoder_pos_embed": ZEROS}
    model, variables, notes = load_sam({"model": state | extra, "epoch": 1600})
    assert model == sam_vit_b(depth=4, global_blocks=(0, 1, 2, 3))
    encoder = variables["params"]["image_encoder"]
    block = encoder["block_02"]
    np.testing.assert_array_equal(
        block["attention"]["qkv"]["kernel"], state["blocks.2.attn.qkv.weight"].T
    )
    np.testing.assert_array_equal(block["lin1"]["kernel"], state["blocks.2.mlp.fc1.weight"].T)
    np.testing.assert_array_equal(block["lin2"]["bias"], state["blocks.2.mlp.fc2.bias"])
    np.testing.assert_array_equal(block["norm2"]["scale"], state["blocks.2.norm2.weight"])
    kernel = state["patch_embed.proj.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(encoder["patch_embed"]["kernel"], kernel)
    np.testing.assert_array_equal(block["attention"]["rel_pos_h"], np.zeros((127, 64)))
    # The positions of the 3x3 grid, without the class token, are resized to 64x64 in row order.
    row, column = encoder["pos_embed"][0, :, :, 0], encoder["pos_embed"][0, :, :, 1]
    assert encoder["pos_embed"].shape == (1, 64, 64, 768)
    np.testing.assert_allclose(row, np.broadcast_to(row[:, :1], (64, 64)), atol=1e-5)
    np.testing.assert_allclose(column, row.T, atol=1e-5)
    assert np.all(np.diff(row[8:-8, 0]) > 0)
    assert row[31:33, 0].mean() == pytest.approx(1, abs=1e-4)  # around the center of the middle row
    assert row[10:12, 0].mean() == pytest.approx(0, abs=0.03)  # around the center of the first row
    text = " ".join(notes)
    for name in ("epoch", "cls_token", "norm.weight", *extra):
        assert name in text


def test_mae_patches_of_14_are_resized_to_16_and_keep_their_response_to_a_constant(
    state, zero_init
):
    kernel = np.random.default_rng(1).standard_normal((768, 3, 14, 14)).astype(np.float32)
    _, variables, _ = load_sam(
        state | {"patch_embed.proj.weight": 0 * kernel + kernel[:, :, :1, :1]}
    )
    resized = variables["params"]["image_encoder"]["patch_embed"]["kernel"]
    assert resized.shape == (16, 16, 3, 768)
    expected = np.broadcast_to(kernel[:, :, 0, 0].T, (16, 16, 3, 768)) * (14 / 16) ** 2
    np.testing.assert_allclose(resized, expected, rtol=1e-5, atol=1e-6)


def test_missing_parts_are_initialized_with_seed_0(state, jit, monkeypatch):
    monkeypatch.setattr(jax, "jit", jit)
    model, variables, notes = load_sam(state)
    assert any("untrained" in note for note in notes)
    params = variables["params"]
    assert not np.any(params["image_encoder"]["block_00"]["attention"]["rel_pos_w"])
    assert params["prompt_encoder"]["foreground"].std() > 0.5
    bound = params["mask_decoder"]["iou_head"]["lin1"]["kernel"]
    assert 0.9 / 16 < np.abs(bound).max() <= 1 / 16
    assert (
        0.9 / 16
        < np.abs(params["image_encoder"]["neck"]["conv2"]["kernel"]).max() * 3
        <= 1 / 16 * 1.01
    )
    assert to_torch(model, variables).keys() == official_shapes(768, 64, 4, ()).keys()


MAE_REFUSED = {
    "an unknown tensor": ({"gate.weight": ZEROS}, r"unknown \[gate.weight\]"),
    "positions that are not square": (
        {"pos_embed": np.zeros((1, 7, 768), "f4")},
        r"pos_embed.*got.*7",
    ),
    "positions of the class alone": ({"pos_embed": np.zeros((1, 1, 768), "f4")}, r"pos_embed"),
    "positions of two": ({"pos_embed": np.zeros((2, 10, 768), "f4")}, r"pos_embed"),
    "positions as a matrix": (
        {"pos_embed": np.zeros((10, 768), "f4")},
        r"pos_embed must have 3 axes",
    ),
    "another width": ({"pos_embed": np.zeros((1, 10, 770), "f4")}, r"768.*got 770 wide"),
    "a kernel as a matrix": (
        {"patch_embed.proj.weight": np.zeros((768, 768), "f4")},
        r"patch_embed",
    ),
    "an empty kernel": (
        {"patch_embed.proj.weight": np.zeros((768, 3, 0, 0), "f4")},
        r"patch_embed",
    ),
    "a kernel that is not square": (
        {"patch_embed.proj.weight": np.zeros((768, 3, 14, 7), "f4")},
        r"patch_embed",
    ),
    "a layer of another shape": (
        {"blocks.0.attn.qkv.weight": np.zeros((768, 2304), "f4")},
        r"blocks.0.attn.qkv.weight \(768, 2304\) instead of \(2304, 768\)",
    ),
}


@pytest.mark.parametrize("kind", MAE_REFUSED)
def test_other_mae_state_dicts_are_refused(state, zero_init, kind):
    changes, message = MAE_REFUSED[kind]
    with pytest.raises(WeightsError, match=message):
        load_sam(state | changes)


def test_mae_depth_must_be_a_multiple_of_four(state):
    with pytest.raises(WeightsError, match=r"depth a multiple of 4; got 768 wide and 3 deep"):
        load_sam(without(state, "blocks.3."))
    with pytest.raises(WeightsError, match=r"count from 0 without a gap; got \[0, 1, 3\]"):
        load_sam(without(state, "blocks.2."))
