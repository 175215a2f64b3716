"""The readers of weights, each with a valid file."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sam_jax.model.mae import mae_tiny
from sam_jax.model.sam import build_sam
from sam_jax.weights import directory, formats, huggingface, safetensors_file, torch_file, vit
from sam_jax.weights.convert import to_torch
from tests.conftest import random_variables
from tests.fuzz.harness import Target
from tests.fuzz.mutators import mutate_json, mutate_safetensors, mutate_torch
from tests.sam_jax.weights.test_torch_file import SEED_PICKLE
from tests.sam_jax.weights.torch_pickles import archive

ERRORS = (ValueError, FileNotFoundError)
SMALL = build_sam(
    image_size=(16, 16),
    patch_size=8,
    embed_dim=4,
    depth=1,
    num_heads=1,
    global_blocks=(0,),
    mlp_ratio=1,
    prompt_dim=16,
    mask_channels=4,
    decoder_depth=1,
    decoder_mlp_dim=4,
    iou_hidden_dim=4,
)
CONFIG = {"num_attention_heads": 1, "hidden_act": "gelu", "model_type": "vit_mae"}


def targets(folder: Path) -> list[Target]:
    """Writes valid weights of all formats into a folder, and returns their readers.

    Args:
      folder: An empty folder, in which the mutated files are written too.
    """
    variables = random_variables(SMALL)
    for name in ("sam", "official.pth", "official.safetensors"):
        formats.save(folder / name, SMALL, variables)
    formats.save(folder / "packed", SMALL, variables, storage="int8")
    formats.save(folder / "hf", SMALL, variables, format="huggingface")
    mae = mae_tiny(image_size=(16, 16), embed_dim=16, depth=1, decoder_dim=16)
    formats.save(folder / "mae", mae, random_variables(mae) | {"constants": {}})
    for name in ("sam", "packed", "mae"):
        (folder / name / directory.SUMS).unlink()
    encoder = safetensors_file.read(folder / "mae" / directory.MAE_WEIGHTS)
    dino = {f"{name}.ls{i}.gamma": np.ones(16, np.float32) for name in ["blocks.0"] for i in (1, 2)}
    torch_file.write(folder / "dino.pth", encoder | dino)
    (folder / "timm").mkdir()
    safetensors_file.write(folder / "timm" / huggingface.WEIGHTS, encoder)
    (folder / "timm" / huggingface.CONFIG).write_text(json.dumps(CONFIG))
    (folder / "shards").mkdir()
    state = safetensors_file.read(folder / "hf" / huggingface.WEIGHTS)
    safetensors_file.write(folder / "shards" / "1.safetensors", state)
    index = {"weight_map": dict.fromkeys(list(state)[:3], "1.safetensors")}
    (folder / "shards" / huggingface.INDEX).write_text(json.dumps(index))
    wrapped = {"net": {f"model.{k}": x for k, x in to_torch(SMALL, variables).items()}, "epoch": 3}
    assert formats.convert.from_torch(wrapped, [])[0] == SMALL
    (folder / "checkpoint.pth").write_bytes(archive(SEED_PICKLE))

    def target(name: str, mutate: Callable[..., bytes], read: Callable[[Path], object]) -> Target:
        path = folder / name
        seed = path.read_bytes()

        def read_bytes(data: bytes) -> object:
            path.write_bytes(data)
            try:
                return read(path)
            finally:
                path.write_bytes(seed)  # other readers need it

        return Target(name, seed, read_bytes, ERRORS, mutate)

    def read_folder(path: Path) -> object:
        return formats.read(path.parent)

    def read_encoder(path: Path) -> object:
        checkpoint = formats.read(path.parent if path.parent != folder else path)
        return vit.read_plain_vit(ENCODER, checkpoint.tensors, [])

    return [
        target("sam/model.json", mutate_json, read_folder),
        target("sam/weights.safetensors", mutate_safetensors, read_folder),
        target("packed/weights.safetensors", mutate_safetensors, read_folder),
        target("mae/mae.json", mutate_json, read_folder),
        target("mae/mae.safetensors", mutate_safetensors, read_folder),
        target("hf/model.safetensors", mutate_safetensors, read_folder),
        target("shards/model.safetensors.index.json", mutate_json, read_folder),
        target("timm/config.json", mutate_json, read_encoder),
        target("timm/model.safetensors", mutate_safetensors, read_encoder),
        target("dino.pth", mutate_torch, read_encoder),
        target("official.safetensors", mutate_safetensors, formats.read),
        target("official.pth", mutate_torch, formats.read),
        target("checkpoint.pth", mutate_torch, torch_file.read),
    ]


ENCODER = build_sam(
    image_size=(16, 16), patch_size=8, embed_dim=16, depth=1, num_heads=1, global_blocks=(0,)
).image_encoder
