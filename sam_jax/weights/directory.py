"""Weights directories: a model's fields as JSON, and its arrays in a safetensors file.

A directory is written under a temporary name next to its target and then renamed, so that it is
always complete under its final name. The directory of a `Sam` (`model.json`, `weights.safetensors`)
holds arrays by parameter path. The directory of a `MaskedAutoencoder` (`mae.json`,
`mae.safetensors`) holds arrays under the names of facebookresearch/mae.

`SHA256SUMS` holds the digests of both files, as the command `sha256sum` writes and checks them.
They are verified before the files are used. Directories without it are read unverified, such as
those of older versions.
"""

import hashlib
from pathlib import Path
from typing import Any

import flax.traverse_util
import numpy as np

from sam_jax.io import atomic
from sam_jax.model.fields import module_to_dict
from sam_jax.model.mae import MaskedAutoencoder
from sam_jax.model.sam import Sam
from sam_jax.weights import mae, safetensors_file
from sam_jax.weights.compact import Storage, pack, unpack
from sam_jax.weights.model_json import mae_from_json, read_json, sam_from_json, sam_to_json
from sam_jax.weights.tensors import WeightsError, check_variables

SAM_JSON, SAM_WEIGHTS = "model.json", "weights.safetensors"
MAE_JSON, MAE_WEIGHTS = "mae.json", "mae.safetensors"
SUMS = "SHA256SUMS"
MAX_SUMS_SIZE = 1 << 12  # bytes


def write_sam(
    path: Path, model: Sam, variables: dict[str, Any], storage: Storage = "float32"
) -> None:
    """Writes a model and its variables, and replaces an older weights directory.

    Args:
      path: The directory.
      model: The model.
      variables: Its {"params", "constants"}.
      storage: The dtype of large arrays in the file, see `compact`.

    Raises:
      WeightsError: If the variables are not those of the model.
      FileExistsError: If something else is at `path`.
    """
    flat = flax.traverse_util.flatten_dict(variables, sep="/")
    flat = {name: np.asarray(value, np.float32) for name, value in flat.items()}
    check_variables("variables", model, flat)
    with atomic.atomic_directory(path, marker=SAM_JSON) as folder:
        safetensors_file.write(folder / SAM_WEIGHTS, pack(flat, storage))
        atomic.write_json(folder / SAM_JSON, sam_to_json(model))
        _write_sums(folder, SAM_JSON, SAM_WEIGHTS)


def read_sam(path: Path) -> tuple[Sam, dict[str, Any]]:
    """Reads the weights directory of a `Sam`.

    Args:
      path: The directory.

    Returns:
      The model, and its {"params", "constants"} as numpy arrays.

    Raises:
      ValueError: If a file is missing or damaged, if the two files do not match, or if a value is
        not finite.
    """
    _check_sums(path, SAM_JSON, SAM_WEIGHTS)
    model = sam_from_json(read_json(path / SAM_JSON), path / SAM_JSON)
    flat = _read_arrays(path / SAM_WEIGHTS)
    check_variables(str(path / SAM_WEIGHTS), model, flat)
    return model, flax.traverse_util.unflatten_dict(flat, sep="/")


def write_mae(path: Path, model: MaskedAutoencoder, variables: dict[str, Any]) -> None:
    """Writes a masked autoencoder and its variables, and replaces an older directory.

    Args:
      path: The directory.
      model: The model.
      variables: Its {"params", "constants"}.

    Raises:
      WeightsError: If the variables are not those of the model.
      FileExistsError: If something else is at `path`.
    """
    state = mae.to_torch(model, variables)
    with atomic.atomic_directory(path, marker=MAE_JSON) as folder:
        safetensors_file.write(folder / MAE_WEIGHTS, state)
        atomic.write_json(folder / MAE_JSON, module_to_dict(model))
        _write_sums(folder, MAE_JSON, MAE_WEIGHTS)


def read_mae(path: Path) -> tuple[MaskedAutoencoder, dict[str, np.ndarray]]:
    """Reads the weights directory of a `MaskedAutoencoder`.

    Args:
      path: The directory.

    Returns:
      The model, and its arrays under the names of facebookresearch/mae; see `mae.from_torch`.

    Raises:
      ValueError: If a file is missing or damaged.
    """
    _check_sums(path, MAE_JSON, MAE_WEIGHTS)
    model = mae_from_json(read_json(path / MAE_JSON), path / MAE_JSON)
    return model, _read_arrays(path / MAE_WEIGHTS)


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise WeightsError(f"{path} is missing")
    return unpack(safetensors_file.read(path), str(path))


def _write_sums(folder: Path, *names: str) -> None:
    text = "".join(f"{_digest(folder / name)}  {name}\n" for name in names)
    atomic.write_bytes(folder / SUMS, text.encode())


def _check_sums(folder: Path, *names: str) -> None:
    """Raises WeightsError if a file differs from its digest, if there are digests."""
    path = folder / SUMS
    if not path.exists():
        return
    if not path.is_file() or path.stat().st_size > MAX_SUMS_SIZE:
        raise WeightsError(f"{path} is not a small regular file")
    lines = path.read_text(errors="replace").splitlines()
    for name in names:
        if not (folder / name).is_file():
            raise WeightsError(f"{folder / name} is missing")
        if f"{_digest(folder / name)}  {name}" not in lines:
            raise WeightsError(
                f"{folder / name} is damaged: its SHA-256 is not the one in {path}. Copy both "
                f"again; or delete {SUMS} if you changed the file yourself"
            )


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
