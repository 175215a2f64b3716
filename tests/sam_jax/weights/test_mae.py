"""Masked autoencoders on disk, as facebookresearch/mae has them, and their encoders in a SAM."""

import json

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sam_jax
from sam_jax.model.init import init_variables
from sam_jax.model.mae import encode_positions, mae_tiny
from sam_jax.model.sam import replace_fields, sam_tiny
from sam_jax.weights import mae, safetensors_file, store
from sam_jax.weights.formats import read_autoencoder
from sam_jax.weights.tensors import WeightsError

MODEL = mae_tiny(image_size=(32, 48), decoder_dim=32, decoder_depth=3)


def random_variables(model, seed=0):
    """In which no two arrays are alike, nor any like its transpose."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_variables(model, 0))
    draw = lambda x: rng.standard_normal(x.shape).astype(np.float32)
    return jax.tree.map(draw, shapes)


@pytest.fixture(scope="module")
def variables():
    return random_variables(MODEL)


@pytest.fixture
def saved(tmp_path, variables):
    sam_jax.save(tmp_path / "mae", MODEL, variables)
    return tmp_path / "mae"


def assert_same(actual, expected):
    actual, expected = (flax.traverse_util.flatten_dict(x, sep="/") for x in (actual, expected))
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(actual[name], x)


def test_a_directory_and_back(saved, variables):
    model, tensors = read_autoencoder(saved)
    assert model == MODEL
    assert_same(mae.from_torch(model, tensors), variables)


def test_names_and_layouts_are_those_of_pytorch(variables):
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
def test_single_files(tmp_path, variables, name):
    sam_jax.save(tmp_path / name, MODEL, variables)
    model, tensors = read_autoencoder(tmp_path / name)
    assert model is None
    assert_same(mae.from_torch(MODEL, tensors), variables)


def test_transformers_has_no_format_for_it(tmp_path, variables):
    with pytest.raises(ValueError, match="a masked autoencoder is saved as sam_jax or official"):
        sam_jax.save(tmp_path / "x", MODEL, variables, format="huggingface")
    assert not (tmp_path / "x").exists()


def test_a_sam_is_no_autoencoder(tmp_path, tiny):
    sam_jax.save(tmp_path / "sam", *tiny)
    assert read_autoencoder(tmp_path / "sam") is None


DAMAGED = {
    "a missing tensor": (lambda s: s.pop("norm.weight"), r"missing \[norm.weight\]"),
    "an unknown one": (lambda s: s.update(gate=s["norm.weight"]), r"unknown \[gate\]"),
    "a misshapen one": (
        lambda s: s.update({"norm.weight": s["norm.weight"][1:]}),
        r"norm.weight must have shape \(64,\); got \(63,\)",
    ),
    "learnt positions": (
        lambda s: s.update(pos_embed=s["pos_embed"] + 1),
        "pos_embed must be the sines and cosines",
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_tensors_that_are_not_the_models(variables, kind):
    damage, said = DAMAGED[kind]
    state = mae.to_torch(MODEL, variables)
    damage(state)
    with pytest.raises(WeightsError, match=said):
        mae.from_torch(MODEL, state)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("decoder_heads", 5, "decoder_dim must be a multiple of decoder_heads"),
        ("image_size", [32, 47], "image_size must be two multiples of patch_size 8"),
        ("window_size", 3, r"unknown fields \['window_size'\]"),
        ("mask_ratio", "most", "mask_ratio must be like 0.75"),
    ],
)
def test_fields_that_cannot_be(saved, field, value, said):
    fields = json.loads((saved / store.MAE).read_text()) | {field: value}
    (saved / store.MAE).write_text(json.dumps(fields))
    with pytest.raises(WeightsError, match=said):
        read_autoencoder(saved)


def test_a_directory_without_its_tensors(saved):
    (saved / store.MAE_WEIGHTS).unlink()
    with pytest.raises(WeightsError, match=r"mae\.safetensors is missing"):
        read_autoencoder(saved)


# Its encoder in a SAM.

SAM = sam_tiny(image_size=(64, 80), window_size=4, global_blocks=(1,))


def test_every_layer_of_the_encoder_is_there():
    """On the grid that it was trained on."""
    model = mae_tiny(image_size=(64, 64))
    sam = sam_tiny(image_size=(64, 64))
    variables = random_variables(model)
    state = mae.to_torch(model, variables)
    found = mae.encoder_for(sam, state, [])
    flat = flax.traverse_util.flatten_dict(sam_variables(sam), sep="/") | found
    given = flax.traverse_util.unflatten_dict(flat, sep="/")
    patches = given["params"]["image_encoder"]["patch_embed"]["kernel"]
    np.testing.assert_array_equal(patches, variables["params"]["patch_embed"]["kernel"])
    np.testing.assert_allclose(
        given["params"]["image_encoder"]["pos_embed"].reshape(64, 64),
        encode_positions(8, 8, 64),
        atol=1e-6,
    )
    for i in range(2):
        block = given["params"]["image_encoder"][f"block_{i:02d}"]
        theirs = variables["params"][f"block_{i:02d}"]
        assert not block["attention"].pop("rel_pos_h").any()
        assert not block["attention"].pop("rel_pos_w").any()
        assert_same(block, theirs)


def sam_variables(sam):
    shapes = jax.eval_shape(lambda: init_variables(sam, 0))
    return jax.tree.map(lambda x: jnp.zeros(x.shape), shapes)


def test_positions_and_patches_are_resized_to_the_sams():
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
    "no square": (SAM, None, r"pos_embed must have shape \(1, 1 \+ g \* g, 64\); got \(1, 25, 64"),
    "another grid": (SAM, (5, 6), r"pos_embed must have shape \(1, 1 \+ 5 \* 6, 64\)"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_encoders_that_are_not_the_sams(variables, kind):
    sam, grid, said = REFUSED[kind]
    with pytest.raises(WeightsError, match=said):
        mae.encoder_for(sam, mae.to_torch(MODEL, variables), [], grid)


def test_tensors_are_read_back_by_their_names(saved):
    state = safetensors_file.read(saved / store.MAE_WEIGHTS)
    assert {"cls_token", "pos_embed", "blocks.1.attn.qkv.bias", "decoder_embed.weight"} <= {*state}
