"""One way in and one way out for weights, whatever their format."""

import logging
import os
from pathlib import Path
from typing import Any

import jax

from sam_jax.model.mae import MaskedAutoencoder
from sam_jax.model.sam import Sam
from sam_jax.weights import download, mae, safetensors_file, store, torch_file
from sam_jax.weights.convert import from_torch, take_tensors, to_torch
from sam_jax.weights.tensors import WeightsError

TINY = Path(__file__).with_name("sam_tiny")  # comes with the package: a weights directory
FORMATS = ("sam_jax", "official", "huggingface")

log = logging.getLogger("sam_jax")


def load(path: str | os.PathLike[str]) -> tuple[Sam, dict[str, Any]]:
    """Loads a model and its variables.

    Args:
      path: a weights directory, a Hugging Face folder, a `.pth` or safetensors file with official,
        Hugging Face or MAE names; "sam_vit_b", "sam_vit_l" or "sam_vit_h" for an official file,
        which is downloaded once; or "sam_tiny", which comes with the package and is trained on
        generated scenes.
    Returns:
      (`Sam`, {"params", "constants"} of float32 arrays on the default device).
    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is damaged, or holds other than exactly the tensors of a SAM.
      DownloadError: if an official file could not be fetched.
    """
    model, variables, notes = read(path)
    for note in notes:
        log.warning("%s: %s", path, note)
    return model, _to_device(variables)


def _to_device(tree: dict[str, Any]) -> dict[str, Any]:
    """Moves a tree of arrays, forgetting each on the host before the next one is moved."""
    moved = {}
    for key in list(tree):
        value = tree.pop(key)
        moved[key] = _to_device(value) if isinstance(value, dict) else jax.device_put(value)
    return moved


def read(path: str | os.PathLike[str]) -> tuple[Sam, dict[str, Any], list[str]]:
    """Like `load`, but with numpy arrays, and a third result: what is notable about the file."""
    notes: list[str] = []
    path = _find(path)
    if (path / store.MODEL).is_file():
        return *store.read(path), notes
    if (path / store.MAE).is_file():
        raise WeightsError(
            f"{path} holds a masked autoencoder, no SAM: one can begin with it, by init_from={path}"
        )
    return *from_torch(_read_state(path), notes), notes


def read_autoencoder(
    path: str | os.PathLike[str],
) -> tuple[MaskedAutoencoder | None, dict[str, Any]] | None:
    """Reads a masked autoencoder's tensors, if that is what there is.

    Args:
      path: as for `load`.
    Returns:
      The `MaskedAutoencoder`, or None where the file does not say more than its tensors; and
      {name: array}, as facebookresearch/mae has them. None if the weights are no autoencoder's.
    Raises:
      ValueError, FileNotFoundError: if the file is damaged or missing.
    """
    path = _find(path)
    if (path / store.MAE).is_file():
        return store.read_mae(path)
    if (path / store.MODEL).is_file():
        return None
    tensors = take_tensors(_read_state(path), [])
    return (None, tensors) if mae.is_mae(tensors) else None


def _find(path: str | os.PathLike[str]) -> Path:
    """The path of weights that may be known by a name."""
    if str(path) in download.OFFICIAL and not Path(path).exists():
        return Path(download.fetch(str(path)))
    if str(path) == "sam_tiny" and not Path(path).exists():
        return TINY
    return Path(path)


def _read_state(path: Path) -> dict[str, Any]:
    """What a file or folder in other formats than ours holds, by name."""
    if path.is_dir():
        state = store.read_huggingface(path)
    elif path.is_file():
        state = safetensors_file.read(path) if _is_safetensors(path) else torch_file.read(path)
    else:
        raise FileNotFoundError(
            f"no weights at {path}: pass a weights directory, a .pth or safetensors file, a "
            f"Hugging Face folder, or one of {', '.join(download.OFFICIAL)}, sam_tiny"
        )
    if not isinstance(state, dict):
        raise WeightsError(f"{path} must hold a dict of tensors; got {type(state).__name__}")
    return state


def save(
    path: str | os.PathLike[str],
    model: Sam | MaskedAutoencoder,
    variables: dict[str, Any],
    format: str | None = None,
) -> None:
    """Saves a model and its variables; nothing half-written is left behind.

    Args:
      path: of a file for the official format, of a directory for the others.
      model: `Sam`, or `MaskedAutoencoder`, whose official names are facebookresearch/mae's;
        variables: its {"params", "constants"}.
      format: "sam_jax" (a weights directory), "official" (official names, a `.safetensors` file or
        else a PyTorch one) or "huggingface" (a folder for transformers). By default official for
        paths that end in .pth, .pt or .safetensors, otherwise sam_jax.
    Raises:
      ValueError: if the format is unknown or the variables are not those of the model.
    """
    path = Path(path)
    if format is None:
        is_file = path.suffix in (".pth", ".pt", ".safetensors")
        format = "official" if is_file else "sam_jax"
    is_sam = isinstance(model, Sam)
    if format == "sam_jax":
        (store.write if is_sam else store.write_mae)(path, model, variables)
    elif format == "huggingface":
        if not is_sam:
            raise ValueError("a masked autoencoder is saved as sam_jax or official")
        store.write_huggingface(path, model, variables)
    elif format == "official":
        state = (to_torch if is_sam else mae.to_torch)(model, variables)
        path.parent.mkdir(parents=True, exist_ok=True)
        (safetensors_file if path.suffix == ".safetensors" else torch_file).write(path, state)
    else:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}; got {format!r}")


def _is_safetensors(path: Path) -> bool:
    """By content: eight bytes of length, then a JSON object. (A .pth starts as a zip, PK.)"""
    with open(path, "rb") as file:
        start = file.read(9)
    return path.suffix == ".safetensors" or start[8:] == b"{"
