"""Plain vision transformers under several naming schemes, as image encoders."""

import json
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sam_jax
from sam_jax.model.image_encoder import ImageEncoder, resize_positions
from sam_jax.model.init import init_variables, variable_shapes
from sam_jax.model.sam import build_sam, normalize
from sam_jax.weights import mae, safetensors_file
from sam_jax.weights.formats import read
from sam_jax.weights.tensors import WeightsError
from sam_jax.weights.vit import is_plain_vit, read_plain_vit, to_timm_names
from tests.sam_jax.weights.official_state import assert_same_arrays, flatten, without

REAL = Path(__file__).parents[4] / "shared" / "realdata" / "dinov2_vits14"
ENCODER = ImageEncoder(
    image_size=(32, 32),
    patch_size=8,
    embed_dim=32,
    depth=2,
    num_heads=2,
    global_blocks=(0, 1),
    out_dim=16,
)


def timm_state(with_layer_scale=True, rows=17, patch=8, depth=2):
    """Returns a random state dict, of which no two tensors are equal."""
    rng = np.random.default_rng(0)
    layers = {"patch_embed.proj": (32, 3, patch, patch), "norm": (32,)}
    for i in range(depth):
        layers |= {f"blocks.{i}.norm1": (32,), f"blocks.{i}.norm2": (32,)}
        layers |= {f"blocks.{i}.attn.qkv": (96, 32), f"blocks.{i}.attn.proj": (32, 32)}
        layers |= {f"blocks.{i}.mlp.fc1": (128, 32), f"blocks.{i}.mlp.fc2": (32, 128)}
    shapes = {f"{name}.weight": shape for name, shape in layers.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    shapes |= {"cls_token": (1, 1, 32), "pos_embed": (1, rows, 32)}
    if with_layer_scale:
        shapes |= {f"blocks.{i}.ls{j}.gamma": (32,) for i in range(depth) for j in (1, 2)}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


STATE = timm_state()
WITHOUT_LAYER_SCALE = {name: x for name, x in STATE.items() if ".gamma" not in name}

DINOV2 = {
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "attn.proj": "attention.output.dense",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    "blocks.": "encoder.layer.",
    "norm.": "layernorm.",
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
}
VIT = DINOV2 | {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
IN_MEMORY = VIT | {  # the names of transformers 5 before it saves them
    "attn.proj": "attention.o_proj",
    "blocks.": "layers.",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def huggingface_state(state, table, thirds="attention.attention.{}", qkv=("query", "key", "value")):
    """Renames tensors from timm, and splits them into queries, keys and values."""
    renamed = {}
    for name, tensor in state.items():
        if ".attn.qkv." in name:
            parts = dict(zip(qkv, np.split(tensor, 3), strict=True))
            names = {p: name.replace("attn.qkv", thirds.format(p)) for p in qkv}
        else:
            parts, names = {"": tensor}, {"": name}
        for part, x in parts.items():
            new_name = names[part]
            for timm, other in table.items():
                if new_name.startswith(timm) or f".{timm}" in new_name:
                    new_name = new_name.replace(timm, other, 1)
            renamed[new_name] = x
    return renamed


def params_of(state, encoder=ENCODER, **kwargs):
    return read_plain_vit(encoder, state, [], **kwargs).params


SCHEMES = {
    "a prefix": ({f"model.backbone.{name}": x for name, x in STATE.items()}, STATE),
    "Dinov2Model": (huggingface_state(STATE, DINOV2), STATE),
    "ViTModel": (huggingface_state(WITHOUT_LAYER_SCALE, VIT), WITHOUT_LAYER_SCALE),
    "transformers 5": (
        huggingface_state(
            WITHOUT_LAYER_SCALE, IN_MEMORY, "attention.{}", ("q_proj", "k_proj", "v_proj")
        ),
        WITHOUT_LAYER_SCALE,
    ),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes_have_the_tensors_of_timm(scheme):
    state, expected = SCHEMES[scheme]
    assert state.keys().isdisjoint({"blocks.0.attn.qkv.weight"})
    assert is_plain_vit(state)
    notes = []
    assert_same_arrays(to_timm_names(state, notes), expected)
    assert notes == []


def test_the_names_are_those_of_transformers():
    assert {
        "encoder.layer.1.attention.attention.key.bias",
        "encoder.layer.0.attention.output.dense.weight",
        "encoder.layer.0.layer_scale2.lambda1",
        "encoder.layer.0.mlp.fc1.weight",
        "encoder.layer.0.norm1.weight",
        "layernorm.bias",
        "embeddings.position_embeddings",
    } < SCHEMES["Dinov2Model"][0].keys()
    assert {
        "encoder.layer.0.intermediate.dense.weight",
        "encoder.layer.0.output.dense.bias",
        "encoder.layer.0.layernorm_before.weight",
    } < SCHEMES["ViTModel"][0].keys()


def test_all_parameters_but_neck_and_relative_positions_are_set():
    vit = read_plain_vit(ENCODER, WITHOUT_LAYER_SCALE, [])
    shapes = variable_shapes(ENCODER)
    initial = flatten(jax.jit(lambda: init_variables(ENCODER, 0))())
    found = {f"params/{path}" for path in vit.params}
    missing = shapes.keys() - found
    assert found < shapes.keys()
    for path in found:
        assert vit.params[path.removeprefix("params/")].shape == shapes[path].shape
    relative = {path for path in missing if "rel_pos" in path}
    assert all(path.startswith("params/neck/") for path in missing - relative)
    assert len(relative) == 4
    assert not any(np.any(initial[path]) for path in relative)
    np.testing.assert_array_equal(
        vit.params["block_01/lin2/kernel"], STATE["blocks.1.mlp.fc2.weight"].T
    )
    np.testing.assert_array_equal(
        vit.params["pos_embed"], STATE["pos_embed"][:, 1:].reshape(1, 4, 4, 32)
    )


def test_the_last_norm_is_returned_apart():
    vit = read_plain_vit(ENCODER, STATE, [])
    np.testing.assert_array_equal(vit.norm_scale, STATE["norm.weight"])
    np.testing.assert_array_equal(vit.norm_bias, STATE["norm.bias"])
    vit = read_plain_vit(ENCODER, without(STATE, "norm."), [])
    assert (vit.norm_scale, vit.norm_bias) == (None, None)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_layer_scale_multiplies_the_layers_before_it(dtype):
    state = {name: x.astype(dtype) for name, x in STATE.items()}
    params = params_of(state)
    unscaled = params_of({name: x for name, x in state.items() if ".gamma" not in name})
    x = np.random.default_rng(1).standard_normal(128).astype(np.float32)
    for scale, path in (("ls1", "attention/proj"), ("ls2", "lin2")):
        kernel, bias = f"block_01/{path}/kernel", f"block_01/{path}/bias"
        inputs = x[: len(params[kernel])]
        gamma = state[f"blocks.1.{scale}.gamma"].astype(np.float32)
        expected = (inputs @ unscaled[kernel] + unscaled[bias]) * gamma
        np.testing.assert_allclose(inputs @ params[kernel] + params[bias], expected, atol=1e-4)
        assert params[kernel].dtype == np.float32
    changed = {path for path in params if not np.array_equal(params[path], unscaled[path])}
    assert changed == {
        f"block_0{i}/{layer}/{part}"
        for i in range(2)
        for layer in ("attention/proj", "lin2")
        for part in ("kernel", "bias")
    }


def test_positions_without_a_row_for_the_class_token():
    state = STATE | {"pos_embed": STATE["pos_embed"][:, 1:]}
    assert_same_arrays(params_of(state), params_of(STATE))
    assert_same_arrays(params_of(without(state, "cls_token")), params_of(STATE))


def test_positions_that_are_no_square():
    table = timm_state(rows=15)["pos_embed"]
    encoder = ENCODER.clone(image_size=(40, 24))
    expected = resize_positions(table.reshape(1, 3, 5, 32), (5, 3))
    state = STATE | {"pos_embed": table}
    np.testing.assert_array_equal(params_of(state, encoder, grid=(3, 5))["pos_embed"], expected)
    state = STATE | {"pos_embed": np.concatenate([table[:, :1], table], axis=1)}
    np.testing.assert_array_equal(params_of(state, encoder, grid=(3, 5))["pos_embed"], expected)


def test_what_was_changed_is_noted():
    state = {f"backbone.{name}": x for name, x in timm_state(rows=10, patch=7).items()}
    state |= {"backbone.mask_token": state["backbone.cls_token"], "head.weight": np.ones(3, "f4")}
    notes = []
    encoder = ENCODER.clone(global_blocks=(1,), window_size=3)
    read_plain_vit(encoder, state, notes)
    assert notes == [
        "dropped, since they are not part of backbone.*: head.weight",
        "dropped, since SAM has no such tensors: cls_token, mask_token",
        "positions were resized from (3, 3) to (4, 4) patches",
        "patches were resized from 7 to 8 pixels",
        "all blocks of the encoder attended globally; in the model only blocks [1] do",
    ]
    notes = []
    read_plain_vit(ENCODER, without(STATE, "cls_token"), notes)
    assert notes == []


X = np.ones(32, np.float32)
REJECTED = {
    "registers of DINOv2": ({"register_tokens": X}, r"has register tokens, \[register_tokens\]"),
    "registers of timm": ({"reg_token": X}, "has register tokens"),
    "a distilled DeiT": ({"dist_token": X}, "has a distillation token"),
    "SwiGLU of DINOv2": ({"blocks.0.mlp.w12.weight": X}, "has gated"),
    "SwiGLU of transformers": ({"encoder.layer.0.mlp.weights_in.weight": X}, "has gated"),
    "RoPE": ({"rope_embed.periods": X}, "has rotary positions"),
    "BEiT": ({"blocks.0.attn.relative_position_bias_table": X}, "has relative positions"),
    "CLIP": ({"norm_pre.weight": X}, "has a norm before its blocks"),
    "q and k norms": ({"blocks.0.attn.q_norm.weight": X}, "has norms of queries and keys"),
    "no positions": ({"pos_embed": None}, "has no absolute positions"),
    "no qkv bias": (
        {"blocks.0.attn.qkv.bias": None, "blocks.1.attn.qkv.bias": None},
        "has no blocks.0.attn.qkv.bias",
    ),
}


@pytest.mark.parametrize("kind", REJECTED)
def test_what_is_no_plain_encoder_is_rejected_with_the_reason(kind, tmp_path):
    changes, message = REJECTED[kind]
    state = {name: x for name, x in (STATE | changes).items() if x is not None}
    with pytest.raises(WeightsError, match=rf"{message}.*only plain vision transformers"):
        read_plain_vit(ENCODER, state, [])
    safetensors_file.write(tmp_path / "vit.safetensors", state)
    with pytest.raises(WeightsError, match=message):
        read(tmp_path / "vit.safetensors")


MISFITS = {
    "another MLP ratio": (
        {"blocks.0.mlp.fc1.weight": np.ones((64, 32), np.float32)},
        r"fc1.weight \(64, 32\) instead of \(128, 32\)",
    ),
    "an unknown tensor": ({"blocks.0.gate": X}, r"unknown \[blocks.0.gate\]"),
    "half of the scales": ({"blocks.1.ls2.gamma": None}, r"missing \[blocks.1.ls2.gamma\]"),
    "a misshapen scale": ({"blocks.1.ls2.gamma": X[:1]}, r"ls2.gamma \(1,\) instead of \(32,\)"),
    "a misshapen norm": ({"norm.bias": X[:5]}, r"norm.bias \(5,\) instead of \(32,\)"),
    "positions of no square": (
        {"pos_embed": np.ones((1, 13, 32), np.float32)},
        r"\(1, 1 \+ g \* g, 32\); got \(1, 13, 32\)",
    ),
    "a tensor under two names": (
        {"layernorm.weight": X},
        "norm.weight is there under two names",
    ),
    "keys of another shape": (
        {f"blocks.0.attn.{x}.weight": np.ones((32, 16 if x == "k" else 32), "f4") for x in "qkv"},
        "queries, keys and values must have one shape",
    ),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_tensors_of_another_model_are_rejected(kind):
    changes, message = MISFITS[kind]
    state = {name: x for name, x in (STATE | changes).items() if x is not None}
    with pytest.raises(WeightsError, match=message):
        read_plain_vit(ENCODER, state, [])


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (ENCODER.clone(embed_dim=64), "32 wide and 2 deep; the model's is 64 wide and 2 deep"),
        (ENCODER.clone(depth=3), "32 wide and 2 deep; the model's is 32 wide and 3 deep"),
    ],
)
def test_an_encoder_of_another_size_is_rejected(encoder, message):
    with pytest.raises(WeightsError, match=message):
        read_plain_vit(encoder, STATE, [])


def test_a_segment_anything_model_is_no_plain_encoder(tiny):
    assert not is_plain_vit(sam_jax.weights.convert.to_torch(*tiny))
    assert not is_plain_vit({f"other.{name}": x for name, x in STATE.items()})
    assert not is_plain_vit(STATE | {f"model.{name}": x for name, x in STATE.items()})


# Files.


def write_folder(path, state, **config):
    path.mkdir()
    safetensors_file.write(path / "model.safetensors", state)
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_a_folder_tells_the_heads(tmp_path):
    folder = write_folder(tmp_path / "hf", SCHEMES["Dinov2Model"][0], num_attention_heads=4)
    checkpoint = read(folder)
    assert (checkpoint.kind, checkpoint.model, checkpoint.num_heads) == ("vit", None, 4)
    assert_same_arrays(checkpoint.tensors, STATE)
    assert read(folder / "model.safetensors").num_heads is None
    with pytest.raises(WeightsError, match=r"config.json must be \[192, .*; got 32 wide"):
        sam_jax.load(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(num_attention_heads=5), "num_attention_heads .* divide the width of 32; got 5"),
        (dict(num_attention_heads="4"), "got '4'"),
        (dict(hidden_act="quick_gelu"), "hidden_act .* must be 'gelu'; got 'quick_gelu'"),
    ],
)
def test_a_folder_with_another_configuration_is_rejected(tmp_path, config, message):
    with pytest.raises(WeightsError, match=message):
        read(write_folder(tmp_path / "hf", STATE, **config))


def test_a_folder_becomes_an_untrained_sam(tmp_path, monkeypatch, caplog):
    def zeros(model, seed):
        flat = {path: jnp.zeros(x.shape) for path, x in variable_shapes(model).items()}
        return flax.traverse_util.unflatten_dict(flat, sep="/")

    expected = build_sam(embed_dim=32, depth=2, num_heads=4, global_blocks=(0, 1))
    variable_shapes(expected)  # cached before the patch
    monkeypatch.setattr(mae, "init_variables", zeros)
    state = SCHEMES["Dinov2Model"][0]
    folder = write_folder(tmp_path / "hf", state, num_attention_heads=4, hidden_act="gelu")
    model, variables = sam_jax.load(folder)
    assert model == expected
    encoder = variables["params"]["image_encoder"]
    np.testing.assert_array_equal(
        encoder["block_01"]["attention"]["qkv"]["kernel"], STATE["blocks.1.attn.qkv.weight"].T
    )
    assert encoder["pos_embed"].shape == (1, 64, 64, 32)
    assert not np.any(encoder["block_01"]["attention"]["rel_pos_h"])
    for text in ("cls_token", "from 8 to 16 pixels", "norm.weight", "untrained"):
        assert text in caplog.text


# Real weights.


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no DINOv2 weights at {REAL}")
def test_dinov2_without_its_class_token_is_close_to_dinov2():
    reference = np.load(REAL / "reference.npz")
    checkpoint = read(REAL)
    assert checkpoint.num_heads == 6
    encoder = ImageEncoder(
        image_size=(224, 224),
        patch_size=14,
        embed_dim=384,
        depth=12,
        num_heads=6,
        global_blocks=tuple(range(12)),
    )
    vit = read_plain_vit(encoder, checkpoint.tensors, [])
    zeros = {path: np.zeros(x.shape, "f4") for path, x in variable_shapes(encoder).items()}
    flat = zeros | {f"params/{path}": value for path, value in vit.params.items()}
    params = flax.traverse_util.unflatten_dict(flat, sep="/")["params"]
    image = normalize(reference["image224"][None], np.array([[224, 224]]))
    tokens = jax.jit(lambda p, x: encoder.apply({"params": p}, x, part="trunk"))(params, image)
    tokens = np.asarray(tokens).reshape(256, 384)
    tokens = (tokens - tokens.mean(-1, keepdims=True)) / tokens.std(-1, keepdims=True)
    found, expected = tokens * vit.norm_scale + vit.norm_bias, reference["last_hidden_state224"][1:]
    norms = np.linalg.norm(found, axis=-1) * np.linalg.norm(expected, axis=-1)
    cosines = (found * expected).sum(-1) / norms
    assert cosines.mean() > 0.97
    assert cosines.min() > 0.88
