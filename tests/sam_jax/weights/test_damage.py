"""Tests that damaged weights and values that are not finite are never loaded silently."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from sam_jax.model.mae import mae_tiny
from sam_jax.weights import formats
from sam_jax.weights.formats import load, load_autoencoder, read, save
from sam_jax.weights.tensors import WeightsError
from tests.conftest import random_variables

SUMS = "SHA256SUMS"


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """Changes to an empty working folder, and returns it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


# Digests.


def test_digests_are_those_of_sha256sum(tiny):
    save("w", *tiny)
    command = ["sha256sum", "--check", "--strict", SUMS]
    output = subprocess.run(command, cwd="w", capture_output=True, text=True, check=True).stdout
    assert output == "model.json: OK\nweights.safetensors: OK\n"


@pytest.mark.parametrize("name", formats.PACKAGED)
def test_packaged_models_have_digests(name):
    assert (formats.PACKAGED[name] / SUMS).is_file()
    assert read(name).kind == "sam"


@pytest.mark.parametrize("name", ["model.json", "weights.safetensors", SUMS])
def test_a_flipped_bit_is_noticed(tiny, name):
    save("w", *tiny)
    flip(Path("w", name), 8 * (Path("w", name).stat().st_size // 2))
    with pytest.raises(
        WeightsError, match=r"w/\S+ is damaged: its SHA-256 .* w/SHA256SUMS"
    ) as error:
        load("w")
    assert "\n" not in str(error.value)


def test_a_truncated_file_is_noticed(tiny):
    save("w", *tiny)
    os.truncate("w/weights.safetensors", 1000)
    with pytest.raises(WeightsError, match=r"w/weights.safetensors is damaged"):
        load("w")
    os.remove("w/weights.safetensors")
    with pytest.raises(WeightsError, match=r"w/weights.safetensors is missing"):
        load("w")


def test_directories_without_digests_are_read(tiny):
    save("w", *tiny)
    os.remove(f"w/{SUMS}")
    assert load("w")[0] == tiny[0]


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, bytes(1 << 13)])
def test_damaged_digests_are_refused(tiny, content):
    save("w", *tiny)
    Path("w", SUMS).write_bytes(content)
    with pytest.raises(WeightsError, match=SUMS):
        load("w")


def test_the_digests_of_an_autoencoder_are_verified():
    model = mae_tiny(depth=1)
    save("w", model, random_variables(model) | {"constants": {}})
    assert load_autoencoder("w")[0] == model
    flip(Path("w/mae.safetensors"), 100_000)
    with pytest.raises(WeightsError, match=r"w/mae.safetensors is damaged: its SHA-256"):
        load_autoencoder("w")


@pytest.mark.slow
def test_no_flipped_bit_is_loaded_silently(tiny):
    save("w", *tiny)
    rng = random.Random(0)
    for name in ("weights.safetensors", "model.json", SUMS):
        for _ in range(200):
            shutil.copytree("w", "copy", dirs_exist_ok=True)
            flip(Path("copy", name), rng.randrange(8 * Path("w", name).stat().st_size))
            with pytest.raises(
                WeightsError, match=r"copy/(model\.json|weights\.safetensors) is dam"
            ):
                read("copy")


# Values that are not finite.


def with_value(variables, value):
    """Returns a copy in which three arrays have such values."""
    changed = jax.tree.map(np.array, variables)
    neck = changed["params"]["image_encoder"]["neck"]
    neck["conv1"]["kernel"][0, 0, :5, 0] = value
    neck["conv2"]["kernel"][:] = value
    changed["params"]["mask_decoder"]["iou_token"][0, 1] = value
    return changed


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["w", "w.pth", "w.safetensors"])
def test_values_that_are_not_finite_are_not_saved(tiny, name, value):
    message = (
        r"variables has values that are NaN or infinite in 3 of \d+ arrays: "
        r"\[params/image_encoder/neck/conv1/kernel \(5 of 768\), .*, .*iou_token \(1 of 32\)\]"
    )
    with pytest.raises(WeightsError, match=message):
        save(name, tiny[0], with_value(tiny[1], value))
    assert os.listdir() == []


@pytest.mark.parametrize("storage", ["float16", "int8"])
def test_values_that_are_not_finite_are_not_quantized(tiny, storage):
    with pytest.raises(WeightsError, match="NaN or infinite in 3 of"):
        save("w", tiny[0], with_value(tiny[1], np.nan), storage=storage)


@pytest.mark.parametrize("name", ["w", "w.pth", "w.safetensors", "hf"])
def test_values_that_are_not_finite_are_not_loaded(square, name, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("sam_jax.weights.tensors.check_finite", lambda *args: None)
        format = "huggingface" if name == "hf" else None
        save(name, square[0], with_value(square[1], np.nan), format=format)
    with pytest.raises(WeightsError, match=r"NaN or infinite in 3 of \d+ arrays: \[params/.*neck"):
        load(name)


def test_values_beyond_float32_are_not_loaded(tiny):
    state = formats.convert.to_torch(*tiny)
    name = "mask_decoder.iou_token.weight"
    state[name] = np.full_like(state[name], 1e300, np.float64)
    formats.torch_file.write("w.pth", state)
    with pytest.raises(WeightsError, match=r"infinite in 1 of .*iou_token \(32 of 32\)"):
        load("w.pth")


# Sizes that a file declares, and files that are none.


def test_an_autoencoder_that_asks_for_memory_is_refused():
    model = mae_tiny(depth=1)
    save("w", model, random_variables(model) | {"constants": {}})
    os.remove(f"w/{SUMS}")
    content = json.loads(Path("w/mae.json").read_text())
    content |= {"image_size": [16384, 16384], "patch_size": 1, "embed_dim": 1024}
    Path("w/mae.json").write_text(json.dumps(content))
    with pytest.raises(
        WeightsError, match=r"^w: .*patch_embed.proj.weight \(64, 3, 8, 8\) instead of"
    ):
        load_autoencoder("w")


def test_a_model_of_many_blocks_is_refused_without_tracing_each(tiny):
    save("w", *tiny)
    os.remove(f"w/{SUMS}")
    content = json.loads(Path("w/model.json").read_text())
    content["image_encoder"]["depth"] = content["mask_decoder"]["depth"] = 256
    Path("w/model.json").write_text(json.dumps(content))
    with pytest.raises(WeightsError, match=r"missing \[params/image_encoder/block_02/.*\d more\]"):
        load("w")
    content["image_encoder"]["global_blocks"] = list(range(300_000))
    Path("w/model.json").write_text(json.dumps(content))
    with pytest.raises(
        WeightsError, match=r"image_encoder.global_blocks must be .*\.\.\.\)"
    ) as error:
        load("w")
    assert len(str(error.value)) < 300


@pytest.mark.skipif(sys.platform == "win32", reason="needs named pipes")
@pytest.mark.parametrize(
    "name",
    ["w/model.json", "w/weights.safetensors", f"w/{SUMS}", "hf/model.safetensors", "w.pth"],
)
def test_pipes_are_not_opened(square, name):
    save("w", *square)
    save("hf", *square, format="huggingface")
    save("w.pth", *square)
    os.remove(name)
    os.mkfifo(name)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(name.split("/")[0])):
        load(name.split("/")[0])


@pytest.mark.skipif(sys.platform == "win32", reason="needs named pipes")
def test_a_shard_that_is_a_pipe_is_not_opened(square):
    save("hf", *square, format="huggingface")
    index = {"weight_map": {"a": "1.safetensors"}}
    Path("hf/model.safetensors.index.json").write_text(json.dumps(index))
    os.remove("hf/model.safetensors")
    os.mkfifo("hf/1.safetensors")
    with pytest.raises(ValueError, match=r"hf/1.safetensors is not a regular file"):
        load("hf")
