"""Reads and writes models with their weights, in any of the supported formats."""

import difflib
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from sam_jax.model.mae import MaskedAutoencoder
from sam_jax.model.sam import Sam
from sam_jax.weights import (
    convert,
    directory,
    download,
    huggingface,
    mae,
    safetensors_file,
    torch_file,
    vit,
)
from sam_jax.weights.compact import Storage
from sam_jax.weights.model_json import read_json
from sam_jax.weights.state_dict import take_tensors
from sam_jax.weights.tensors import WeightsError

# Weights directories that the package contains.
PACKAGED = {
    name: Path(__file__).with_name(name) for name in ("sam_tiny", "sam_nuclei", "sam_photo")
}
FORMATS = ("sam_jax", "official", "huggingface")
OFFICIAL_SUFFIXES = (".pth", ".pt", ".safetensors")

log = logging.getLogger("sam_jax")


@dataclass(frozen=True)
class Checkpoint:
    """A model's weights, as numpy arrays.

    Attributes:
      kind: A key of `KINDS`: "sam", or "mae" for a masked autoencoder; or "vit" for a plain vision
        transformer without a model of ours, such as a file of facebookresearch/mae.
      model: The model; None for a "vit".
      variables: {"params", "constants"} of the model; empty for a "vit".
      tensors: Arrays by the names of timm, which are also those of facebookresearch/mae; empty for
        a SAM.
      num_heads: Attention heads of the encoder's blocks; None for a SAM, or if nothing tells them.
      notes: Remarks about the file that a user should read.
    """

    kind: str
    model: Sam | MaskedAutoencoder | None
    variables: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    num_heads: int | None = None
    notes: list[str] = field(default_factory=list)


class Kind(NamedTuple):
    """The functions that read and write one kind of model.

    Attributes:
      model_class: The class of its models.
      marker: The file that tells a weights directory of this kind.
      read_directory: Reads a weights directory.
      write_directory: Writes a weights directory.
      to_torch: Returns the official state dict.
      write_huggingface: Writes a Hugging Face folder; None if there is no such format.
    """

    model_class: type
    marker: str
    read_directory: Callable[[Path], Checkpoint]
    write_directory: Callable[[Path, Any, dict[str, Any]], None]
    to_torch: Callable[[Any, dict[str, Any]], dict[str, np.ndarray]]
    write_huggingface: Callable[[Path, Any, dict[str, Any]], None] | None


def _read_sam_directory(path: Path) -> Checkpoint:
    model, variables = directory.read_sam(path)
    return Checkpoint("sam", model, variables)


def _read_mae_directory(path: Path) -> Checkpoint:
    model, tensors = directory.read_mae(path)
    return Checkpoint("mae", model, mae.from_torch(model, tensors), tensors, model.num_heads)


KINDS = {
    "sam": Kind(
        model_class=Sam,
        marker=directory.SAM_JSON,
        read_directory=_read_sam_directory,
        write_directory=directory.write_sam,
        to_torch=convert.to_torch,
        write_huggingface=huggingface.write,
    ),
    "mae": Kind(
        model_class=MaskedAutoencoder,
        marker=directory.MAE_JSON,
        read_directory=_read_mae_directory,
        write_directory=directory.write_mae,
        to_torch=mae.to_torch,
        write_huggingface=None,
    ),
}


def load(path: str | os.PathLike[str]) -> tuple[Sam, dict[str, Any]]:
    """Loads a `Sam` and its variables.

    >>> model, variables = sam_jax.load("sam_vit_b")

    Args:
      path: A weights directory, a Hugging Face folder, or a `.pth` or safetensors file with
        official or Hugging Face names; "sam_vit_b", "sam_vit_l" or "sam_vit_h" for an official
        file, which is downloaded once; or a model that the package contains: "sam_tiny", which was
        trained on generated scenes, "sam_nuclei", on microscopy images, or "sam_photo", on
        photographs. A plain vision transformer (MAE, DINOv2, timm, transformers' ViT), in a file or
        a Hugging Face folder, becomes the encoder of an untrained model.

    Returns:
      The model and its {"params", "constants"}, float32 arrays on the default device.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If the file is damaged, does not hold exactly the tensors of a SAM, or holds
        values that are NaN or infinite; `safetensors.numpy.load_file` shows these.
      DownloadError: If an official file cannot be downloaded.
    """
    checkpoint = read(path)
    if isinstance(checkpoint.model, Sam):
        model, variables = checkpoint.model, checkpoint.variables
    elif checkpoint.model is None:
        model, variables = _to_sam(checkpoint)
    else:
        raise WeightsError(
            f"{path} holds a masked autoencoder, not a SAM: read it with load_autoencoder, or "
            f"train a SAM from it with init_from={path}"
        )
    for note in checkpoint.notes:
        log.warning("%s: %s", path, note)
    return model, _to_device(variables)


def load_autoencoder(path: str | os.PathLike[str]) -> tuple[MaskedAutoencoder, dict[str, Any]]:
    """Loads a masked autoencoder and its variables.

    Args:
      path: Its weights directory.

    Returns:
      The model and its {"params", "constants"}, float32 arrays on the default device.

    Raises:
      FileNotFoundError: If there is no such directory.
      ValueError: If it is damaged, does not hold a masked autoencoder, or holds values that are
        NaN or infinite.
    """
    checkpoint = read(path)
    if not isinstance(checkpoint.model, MaskedAutoencoder):
        raise WeightsError(
            f"{path} must be the weights directory of a masked autoencoder, with its decoder"
        )
    return checkpoint.model, _to_device(checkpoint.variables)


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads weights of any kind and format.

    >>> checkpoint = read("weights")
    >>> checkpoint.kind
    'sam'

    Args:
      path: As for `load`; also the weights directory of a masked autoencoder.

    Returns:
      The weights.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If the file is damaged, does not hold exactly the tensors of a model, or holds
        values that are NaN or infinite.
      DownloadError: If an official file cannot be downloaded.
    """
    path = _find(path)
    try:
        for kind in KINDS.values():
            if (path / kind.marker).is_file():
                return kind.read_directory(path)
        return _read_tensors(path)
    except WeightsError as error:
        if re.match(rf"{re.escape(str(path))}\b", str(error)):
            raise
        raise WeightsError(f"{path}: {error}") from error


def _read_tensors(path: Path) -> Checkpoint:
    """Reads a file or a folder of PyTorch's tensors."""
    notes: list[str] = []
    tensors = take_tensors(_read_state(path), notes)
    if vit.is_plain_vit(tensors):
        tensors = vit.to_timm_names(tensors, notes)
        config = path / huggingface.CONFIG
        heads = vit.count_heads(tensors, read_json(config) if config.is_file() else {})
        return Checkpoint("vit", None, tensors=tensors, num_heads=heads, notes=notes)
    model, variables = convert.from_tensors(tensors, notes)
    return Checkpoint("sam", model, variables, notes=notes)


def save(
    path: str | os.PathLike[str],
    model: Sam | MaskedAutoencoder,
    variables: dict[str, Any],
    format: str | None = None,
    storage: Storage = "float32",
) -> None:
    """Saves a model and its variables atomically; `load` and `load_autoencoder` read them.

    >>> sam_jax.save("weights", model, variables)

    Args:
      path: A file for the official format, a directory for the others.
      model: The model. A masked autoencoder's official names are those of facebookresearch/mae.
      variables: Its {"params", "constants"}.
      format: "sam_jax" (a weights directory), "official" (official names, a safetensors file if
        the path ends in .safetensors and a PyTorch file otherwise) or "huggingface" (a folder for
        transformers). By default "official" if the path ends in .pth, .pt or .safetensors, and
        "sam_jax" otherwise.
      storage: "float32"; or "float16" or "int8", for the weights directory of a SAM that takes a
        half or a quarter of the space. `load` returns float32 arrays in any case.

    Raises:
      ValueError: If the format or the storage is unknown, if they do not go together, or if the
        variables are not those of the model or hold values that are NaN or infinite.
      FileExistsError: If something else than an older directory of the same format is at `path`.
    """
    path = _expand(path)
    kind = next(kind for kind in KINDS.values() if isinstance(model, kind.model_class))
    format = format or _default_format(path)
    if format == "sam_jax" and isinstance(model, Sam):
        directory.write_sam(path, model, variables, storage)
    elif storage != "float32":
        raise ValueError(
            f"storage must be float32 unless a SAM is saved as a weights directory; got {storage!r}"
        )
    elif format == "sam_jax":
        kind.write_directory(path, model, variables)
    elif format == "huggingface":
        if kind.write_huggingface is None:
            raise ValueError(
                "a masked autoencoder's format must be sam_jax or official; got 'huggingface'"
            )
        kind.write_huggingface(path, model, variables)
    elif format == "official":
        state = kind.to_torch(model, variables)
        path.parent.mkdir(parents=True, exist_ok=True)
        (safetensors_file if path.suffix == ".safetensors" else torch_file).write(path, state)
    else:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}; got {format!r}")


def convert_file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    format: str | None = None,
    storage: Storage = "float32",
) -> list[str]:
    """Converts weights to another format.

    Args:
      source: The weights to read, as for `read`. A plain vision transformer becomes the encoder of
        an untrained `Sam`.
      target: The path to write, as for `save`.
      format: The format to write, as for `save`.
      storage: The dtype of large arrays, as for `save`.

    Returns:
      Notes on the source and on the conversion that a user should read.
    """
    checkpoint = read(source)
    model, variables = checkpoint.model, checkpoint.variables
    if model is None:
        model, variables = _to_sam(checkpoint)
    save(target, model, variables, format, storage)
    notes = list(checkpoint.notes)
    has_share = isinstance(model, Sam) and model.object_share is not None
    if has_share and (format or _default_format(Path(target))) != "sam_jax":
        notes.append('object_share is not stored in this format: predict with tiles="auto"')
    return notes


def _default_format(path: Path) -> str:
    return "official" if path.suffix in OFFICIAL_SUFFIXES else "sam_jax"


def _to_sam(checkpoint: Checkpoint) -> tuple[Sam, dict[str, Any]]:
    return mae.to_sam(checkpoint.tensors, checkpoint.notes, checkpoint.num_heads)


def _find(path: str | os.PathLike[str]) -> Path:
    """Returns the path of weights that may be given by a name."""
    if str(path) in download.OFFICIAL and not Path(path).exists():
        return Path(download.fetch(str(path)))
    if str(path) in PACKAGED and not Path(path).exists():
        return PACKAGED[str(path)]
    return _expand(path)


def _expand(path: str | os.PathLike[str]) -> Path:
    """Returns a path in which ~ and ~user stand for a home folder, as in a shell."""
    # Unlike Path.expanduser, this does not raise for an unknown user.
    return Path(os.path.expanduser(path))


def _read_state(path: Path) -> dict[Any, Any]:
    """Reads a state dict or a checkpoint, from a file or a Hugging Face folder."""
    if path.is_dir():
        return huggingface.read(path)
    if path.is_file():
        return safetensors_file.read(path) if _is_safetensors(path) else torch_file.read(path)
    names = [*download.OFFICIAL, *PACKAGED]
    # The official names of files are known too, so that a missing one suggests its model.
    known = {name: name for name in names}
    known |= {file.name: name for name, file in download.OFFICIAL.items()}
    near = difflib.get_close_matches(path.name, known, n=1)
    hint = f" (did you mean {known[near[0]]}?)" if near else ""
    raise FileNotFoundError(
        f"no weights at {path}{hint}: pass a weights directory, a .pth or safetensors file, a "
        f"Hugging Face folder, or one of {', '.join(names)}"
    )


def _is_safetensors(path: Path) -> bool:
    """Recognizes safetensors: eight bytes of length, then a JSON object. A .pth starts with PK."""
    with open(path, "rb") as file:
        start = file.read(9)
    return path.suffix == ".safetensors" or start[8:] == b"{"


def _to_device(tree: dict[str, Any]) -> dict[str, Any]:
    """Moves a tree of arrays to the default device, and removes each from `tree` first."""
    moved = {}
    for key in list(tree):
        value = tree.pop(key)
        moved[key] = _to_device(value) if isinstance(value, dict) else jax.device_put(value)
    return moved
