"""Weights directories: ours (`model.json`, `weights.safetensors`), Hugging Face's, autoencoders'.

A directory is written under a temporary name beside its target and then renamed, so that one under
the target's name is whole. Ours holds a model's fields as JSON and its arrays flat by parameter
path; Hugging Face's opens with transformers' `SamModel.from_pretrained`. An autoencoder's holds its
fields (`mae.json`) and its tensors as facebookresearch/mae has them (`mae.safetensors`).
"""

import contextlib
import json
import math
import re
import shutil
import tempfile
import typing
from pathlib import Path

import flax.traverse_util
import numpy as np

from sam_jax.model.fields import module_fields, module_to_dict
from sam_jax.model.mae import MaskedAutoencoder
from sam_jax.model.sam import FLAT_FIELDS, PIXEL_MEAN, PIXEL_STD, Sam
from sam_jax.weights import mae, safetensors_file
from sam_jax.weights.convert import check_shapes, to_huggingface
from sam_jax.weights.tensors import WeightsError

MODEL, WEIGHTS = "model.json", "weights.safetensors"
MAE, MAE_WEIGHTS = "mae.json", "mae.safetensors"
HF_CONFIG, HF_WEIGHTS, HF_INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
HF_PREPROCESSOR = "preprocessor_config.json"
_JSON_LIMIT = 1 << 22  # bytes
VERSION = 2  # of model.json: the fields of a Sam's parts
MAX_SIDE, MAX_DEPTH = 1 << 14, 256  # that a file may ask for


def write(path, model, variables):
    """Writes a model and its variables as a weights directory, in place of an older one.

    Raises:
      WeightsError: if the variables are not those of the model.
      FileExistsError: if something else is there.
    """
    flat = flax.traverse_util.flatten_dict(variables, sep="/")
    flat = {name: np.asarray(value, np.float32) for name, value in flat.items()}
    check_shapes(model, flat, "variables")
    with _replaced(Path(path), marker=MODEL) as folder:
        safetensors_file.write(folder / WEIGHTS, flat)
        _write_json(folder / MODEL, sam_to_json(model))


def read(path):
    """Reads a weights directory -> (`Sam`, variables of numpy arrays).

    Raises:
      ValueError: if a file is missing or damaged, or the two do not belong together.
    """
    path = Path(path)
    model = sam_from_json(_read_json(path / MODEL), path / MODEL)
    if not (path / WEIGHTS).is_file():
        raise WeightsError(f"{path / WEIGHTS} is missing")
    flat = safetensors_file.read(path / WEIGHTS)
    if odd := sorted(name for name, value in flat.items() if value.dtype != np.float32):
        raise WeightsError(f"{path / WEIGHTS} must hold float32 arrays only; {odd[:12]} are not")
    check_shapes(model, flat, str(path / WEIGHTS))
    return model, flax.traverse_util.unflatten_dict(flat, sep="/")


def write_mae(path, model, variables):
    """Writes a masked autoencoder and its variables, in place of an older one.

    Raises:
      WeightsError: if the variables are not those of the model.
      FileExistsError: if something else is there.
    """
    state = mae.to_torch(model, variables)
    with _replaced(Path(path), marker=MAE) as folder:
        safetensors_file.write(folder / MAE_WEIGHTS, state)
        _write_json(folder / MAE, module_to_dict(model))


def read_mae(path):
    """Reads the directory of a masked autoencoder -> (`MaskedAutoencoder`, {MAE name: array}).

    Raises:
      ValueError: if a file is missing or damaged.
    """
    path = Path(path)
    model = mae_from_json(_read_json(path / MAE), path / MAE)
    if not (path / MAE_WEIGHTS).is_file():
        raise WeightsError(f"{path / MAE_WEIGHTS} is missing")
    return model, safetensors_file.read(path / MAE_WEIGHTS)


def write_huggingface(path, model, variables):
    """Writes what `transformers.SamModel.from_pretrained` and `SamProcessor` open.

    Raises:
      WeightsError: if the frame is not square, which Hugging Face's configuration cannot say.
    """
    if model.image_size[0] != model.image_size[1]:
        raise WeightsError(f"Hugging Face's SAM has square frames only; got {model.image_size}")
    state = to_huggingface(model, variables)
    with _replaced(Path(path), marker=HF_CONFIG) as folder:
        safetensors_file.write(folder / HF_WEIGHTS, state)
        _write_json(folder / HF_CONFIG, _huggingface_config(model))
        _write_json(folder / HF_PREPROCESSOR, _huggingface_preprocessor(model))


def read_huggingface(path):
    """Reads the tensors of a Hugging Face folder, sharded or not -> {name: array}."""
    path = Path(path)
    if (path / HF_WEIGHTS).is_file():
        return safetensors_file.read(path / HF_WEIGHTS)
    if not (path / HF_INDEX).is_file():
        raise WeightsError(
            f"{path} has neither {MODEL} nor {HF_WEIGHTS}; if it has pytorch_model.bin only, pass "
            "that file itself"
        )
    shards = _read_json(path / HF_INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(
        isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name)
        for name in shards.values()
    ):
        raise WeightsError(f"{path / HF_INDEX}: weight_map must name files in the same folder")
    tensors: dict[str, np.ndarray] = {}
    for name in sorted(set(shards.values())):
        shard = safetensors_file.read(path / name)
        if twice := sorted(tensors.keys() & shard.keys()):
            raise WeightsError(f"{path}: {twice[:12]} are in more than one file")
        tensors |= shard
    return tensors


def sam_to_json(model):
    """Returns what model.json holds of a model."""
    return {"version": VERSION, **module_to_dict(model)}


def sam_from_json(content, where):
    """Builds a `Sam` from what model.json holds; undoes `sam_to_json`.

    Args:
      content: The JSON object. Version 1, which had no "version", had flat fields.
      where: The file, for error messages.

    Returns:
      The model.

    Raises:
      WeightsError: If a field is unknown, has a wrong type or value, or if the version is newer.
    """
    content = dict(content)
    version = content.pop("version", 1)
    if version not in (1, VERSION):
        raise WeightsError(f"{where}: version must be at most {VERSION}; got {version!r}")
    if version == 1:
        content = _nested(content, where)
    parts = {field.name: field.default for field in module_fields(Sam)}
    _check_known(content, parts, where)
    model = Sam(**{
        name: _module_from_json(type(default), content.get(name, {}), where, f"{name}.")
        for name, default in parts.items()
    })  # fmt: skip
    depths = model.image_encoder.depth, model.mask_decoder.depth
    _check_limits(model.image_size, depths, where)
    return _validated(model, where)


def mae_from_json(fields, where):
    """Builds a `MaskedAutoencoder` from what mae.json holds; see `sam_from_json`."""
    model = _module_from_json(MaskedAutoencoder, fields, where)
    _check_limits(model.image_size, (model.depth, model.decoder_depth), where)
    return _validated(model, where)


def _nested(flat, where):
    """Converts the flat fields of version 1 to those of the model's parts."""
    _check_known(flat, FLAT_FIELDS, where)
    nested = {}
    for name, value in flat.items():
        for path in FLAT_FIELDS[name]:
            part, field = path.split(".")
            nested.setdefault(part, {})[field] = value
    return nested


def _module_from_json(kind, fields, where, prefix=""):
    """Builds a module of a kind; lists stand for tuples, and absent fields have default values."""
    if not isinstance(fields, dict):
        raise WeightsError(f"{where}: {prefix.removesuffix('.')} must be an object; got {fields!r}")
    defaults = {field.name: field.default for field in module_fields(kind)}
    _check_known(fields, defaults, where, prefix)
    hints = typing.get_type_hints(kind)
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    for name, value in values.items():
        default = defaults[name]
        if allowed := typing.get_args(hints[name]) if type(default) is str else ():
            if value not in allowed:
                raise WeightsError(
                    f"{where}: {prefix}{name} must be one of {allowed}; got {value!r}"
                )
        elif not _is_like(value, default):
            raise WeightsError(f"{where}: {prefix}{name} must be like {default!r}; got {value!r}")
    return kind(**values)


def _check_known(fields, known, where, prefix=""):
    if unknown := sorted(fields.keys() - known.keys()):
        names = [f"{prefix}{name}" for name in unknown]
        raise WeightsError(f"{where}: unknown fields {names}; allowed are {sorted(known)}")


def _check_limits(image_size, depths, where):
    """Raises WeightsError for a size that would exhaust the memory before any array is read."""
    if max(image_size) > MAX_SIDE:
        raise WeightsError(f"{where}: image_size must be at most {MAX_SIDE}; got {image_size}")
    if max(depths) > MAX_DEPTH:
        raise WeightsError(f"{where}: depths must be at most {MAX_DEPTH}; got {depths}")


def _validated(model, where):
    try:
        model.validate()
    except ValueError as error:
        raise WeightsError(f"{where}: {error}") from error
    return model


def _is_like(value, default):
    if isinstance(default, tuple):
        return isinstance(value, tuple) and all(type(item) is int and item >= 0 for item in value)
    if type(default) is float:
        if type(value) not in (int, float):
            return False
        return 0 < value < math.inf if default else 0 <= value < 1  # a scale, or a rate
    if type(default) is int:
        return type(value) is int and value > 0
    return type(value) is type(default)


@contextlib.contextmanager
def _replaced(path, marker):
    """A temporary directory that takes `path`'s name at the end, or is removed on an error.

    What was there before must be such a directory, known by the file `marker`.
    """
    if path.exists() and not (path / marker).is_file() and not _is_empty(path):
        raise FileExistsError(
            f"{path} exists and has no {marker}: choose another name or remove it"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        (temporary / "new").mkdir()
        yield temporary / "new"
        if path.exists():
            path.rename(temporary / "old")
        try:
            (temporary / "new").rename(path)
        except OSError:
            if (temporary / "old").exists():
                (temporary / "old").rename(path)
            raise
    finally:
        shutil.rmtree(temporary)


def _is_empty(path):
    return path.is_dir() and not any(path.iterdir())


def _write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _read_json(path):
    try:
        if path.stat().st_size > _JSON_LIMIT:
            raise WeightsError(f"{path} is larger than {_JSON_LIMIT} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path} must hold a JSON object; got {type(value).__name__}")
    return value


def _huggingface_config(model):
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
            "patch_size": model.patch_size,
            "output_channels": encoder.out_dim,
            "num_pos_feats": encoder.out_dim // 2,
            "window_size": encoder.window_size,
            "global_attn_indexes": list(encoder.global_blocks),
            "layer_norm_eps": 1e-6,
        },
        "prompt_encoder_config": {
            "hidden_size": encoder.out_dim,
            "image_size": side,
            "patch_size": model.patch_size,
            "image_embedding_size": side // model.patch_size,
            "mask_input_channels": model.prompt_encoder.mask_channels,
        },
        "mask_decoder_config": {
            "hidden_size": encoder.out_dim,
            "mlp_dim": decoder.mlp_dim,
            "num_hidden_layers": decoder.depth,
            "iou_head_hidden_dim": decoder.iou_hidden_dim,
            "layer_norm_eps": 1e-5,  # as in the released code; by default transformers has 1e-6
        },
    }


def _huggingface_preprocessor(model):
    side = model.image_size[0]
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
        "mask_size": {"longest_edge": 4 * side // model.patch_size},
        "mask_pad_size": {
            "height": 4 * side // model.patch_size,
            "width": 4 * side // model.patch_size,
        },
    }
