"""Folders that transformers' `SamModel` and `SamProcessor` read and write.

Source: transformers `models/sam/configuration_sam.py`, `image_processing_sam.py`.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from sam_jax.io import atomic
from sam_jax.model.sam import PIXEL_MEAN, PIXEL_STD, Sam
from sam_jax.weights import safetensors_file
from sam_jax.weights.convert import to_huggingface
from sam_jax.weights.model_json import read_json
from sam_jax.weights.tensors import WeightsError, format_list

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def write(path: Path, model: Sam, variables: dict[str, Any]) -> None:
    """Writes a folder that `SamModel.from_pretrained` and `SamProcessor.from_pretrained` open.

    Args:
      path: The folder; an older one is replaced.
      model: The model.
      variables: Its {"params", "constants"}.

    Raises:
      WeightsError: If the variables are not those of the model, or if its images are not square,
        which Hugging Face's configuration cannot express.
      FileExistsError: If something else is at `path`.
    """
    if model.image_size[0] != model.image_size[1]:
        raise WeightsError(f"Hugging Face's SAM has square images only; got {model.image_size}")
    state = to_huggingface(model, variables)
    with atomic.atomic_directory(path, marker=CONFIG) as folder:
        safetensors_file.write(folder / WEIGHTS, state)
        atomic.write_json(folder / CONFIG, _config(model))
        atomic.write_json(folder / PREPROCESSOR, _preprocessor_config(model))


def read(path: Path) -> dict[str, np.ndarray]:
    """Reads the tensors of a folder, from one file or from several.

    Args:
      path: The folder.

    Returns:
      Arrays by Hugging Face's names.

    Raises:
      ValueError: If a file is missing or damaged, or if a tensor is in several of them.
      FileNotFoundError: If a file that the index names is missing.
    """
    if (path / WEIGHTS).is_file():
        return safetensors_file.read(path / WEIGHTS)
    if not (path / INDEX).is_file():
        raise WeightsError(
            f"{path} has neither model.json nor {WEIGHTS}; if it has pytorch_model.bin only, pass "
            "that file itself"
        )
    file_by_tensor = read_json(path / INDEX).get("weight_map")
    if not isinstance(file_by_tensor, dict) or not all(
        isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name)
        for name in file_by_tensor.values()
    ):
        raise WeightsError(f"{path / INDEX}: weight_map must name files in the same folder")
    tensors: dict[str, np.ndarray] = {}
    for name in sorted(set(file_by_tensor.values())):
        shard = safetensors_file.read(path / name)
        if repeated := sorted(tensors.keys() & shard.keys()):
            raise WeightsError(f"{path}: {format_list(repeated)} are in more than one file")
        tensors |= shard
    return tensors


def _config(model: Sam) -> dict[str, Any]:
    side, encoder, decoder = model.image_size[0], model.image_encoder, model.mask_decoder
    return {
        "architectures": ["SamModel"],
        "model_type": "sam",
        "vision_config": {
            "hidden_size": encoder.embed_dim,
            "num_hidden_layers": encoder.depth,
            "num_attention_heads": encoder.num_heads,
            "mlp_dim": encoder.mlp_ratio * encoder.embed_dim,
            "mlp_ratio": float(encoder.mlp_ratio),
            "image_size": side,
            "patch_size": encoder.patch_size,
            "output_channels": encoder.out_dim,
            "num_pos_feats": encoder.out_dim // 2,
            "window_size": encoder.window_size,
            "global_attn_indexes": list(encoder.global_blocks),
            "layer_norm_eps": 1e-6,
        },
        "prompt_encoder_config": {
            "hidden_size": model.prompt_encoder.dim,
            "image_size": side,
            "patch_size": encoder.patch_size,
            "image_embedding_size": encoder.grid[0],
            "mask_input_channels": model.prompt_encoder.mask_channels,
        },
        "mask_decoder_config": {
            "hidden_size": decoder.dim,
            "mlp_dim": decoder.mlp_dim,
            "num_hidden_layers": decoder.depth,
            "iou_head_hidden_dim": decoder.iou_hidden_dim,
            "layer_norm_eps": 1e-5,  # as in the released code; transformers' default is 1e-6
        },
    }


def _preprocessor_config(model: Sam) -> dict[str, Any]:
    side, mask_side = model.image_size[0], model.low_res[0]
    return {
        "image_processor_type": "SamImageProcessor",
        "processor_class": "SamProcessor",
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [mean / 255 for mean in PIXEL_MEAN],
        "image_std": [std / 255 for std in PIXEL_STD],
        "rescale_factor": 1 / 255,
        "resample": 2,
        "size": {"longest_edge": side},
        "pad_size": {"height": side, "width": side},
        "mask_size": {"longest_edge": mask_side},
        "mask_pad_size": {"height": mask_side, "width": mask_side},
    }
