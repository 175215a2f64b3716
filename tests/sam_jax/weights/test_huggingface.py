"""Tests Hugging Face folders: shards, damaged indices, and the configuration."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from sam_jax.weights import safetensors_file
from sam_jax.weights.convert import to_huggingface
from sam_jax.weights.formats import load, save
from sam_jax.weights.tensors import WeightsError
from tests.sam_jax.weights.official_state import assert_same_variables


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """Changes to an empty working folder, and returns it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_shards(square, weight_map=None, shards=None):
    tensors = to_huggingface(*square)
    order = sorted(tensors)
    parts = {"m-1.safetensors": order[:90], "m-2.safetensors": order[90:]}
    os.makedirs("hf", exist_ok=True)
    for file, part in parts.items():
        safetensors_file.write(Path("hf") / file, {k: tensors[k] for k in part} | (shards or {}))
    if weight_map is None:
        weight_map = {k: file for file, part in parts.items() for k in part}
    index = {"metadata": {"total_size": 3}, "weight_map": weight_map}
    Path("hf/model.safetensors.index.json").write_text(json.dumps(index))


def test_a_sharded_folder_is_loaded(square):
    write_shards(square)
    model, variables = load("hf")
    assert model == square[0]
    assert_same_variables(variables, square[1])


@pytest.mark.parametrize(
    "name",
    [
        "../w.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        ".",
        "",
        3,
        None,
        ["m-1.safetensors"],
    ],
    ids=repr,
)
def test_shards_outside_the_folder_are_refused(square, name):
    safetensors_file.write("w.safetensors", to_huggingface(*square))
    write_shards(square, {"vision_encoder.pos_embed": name})
    with pytest.raises(WeightsError, match=r"hf/model.safetensors.index.json.*weight_map"):
        load("hf")


@pytest.mark.parametrize("index", ["", "{}", "[]", '{"weight_map": []}', '{"weight_map": "m"}'])
def test_a_bad_index_is_named(index):
    os.mkdir("hf")
    Path("hf/model.safetensors.index.json").write_text(index)
    with pytest.raises(WeightsError, match=r"hf/model.safetensors.index.json"):
        load("hf")


def test_a_missing_shard_is_named(square):
    write_shards(square)
    os.remove("hf/m-2.safetensors")
    with pytest.raises((OSError, ValueError), match=r"hf/m-2.safetensors"):
        load("hf")


def test_a_tensor_in_two_shards_is_named(square):
    """Checks that a tensor in two shards is an error, since one copy would be dropped silently."""
    name = "mask_decoder.iou_token.weight"
    write_shards(square, shards={name: np.ones((1, 32), np.float32)})
    with pytest.raises(WeightsError, match=name):
        load("hf")


def test_configurations_have_the_fields_of_the_model(square):
    save("hf", *square, format="huggingface")
    config = json.loads(Path("hf/config.json").read_text())
    vision = config["vision_config"]
    assert config["model_type"] == "sam"
    assert vision["image_size"] == 64
    assert vision["patch_size"] == 8
    assert vision["num_hidden_layers"] == 2
    assert vision["global_attn_indexes"] == [1]
    assert config["prompt_encoder_config"]["image_embedding_size"] == 8
    assert config["mask_decoder_config"]["mlp_dim"] == 40
    preprocessor = json.loads(Path("hf/preprocessor_config.json").read_text())
    np.testing.assert_allclose(
        preprocessor["image_mean"], np.divide((123.675, 116.28, 103.53), 255)
    )
    assert preprocessor["size"] == {"longest_edge": 64}
