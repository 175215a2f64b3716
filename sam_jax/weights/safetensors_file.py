"""Reads and writes safetensors files, with errors that name the file.

The library checks the format: the header's size, offsets inside the file, and no overlaps.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from sam_jax.io.atomic import atomic_path


class SafetensorsFileError(ValueError):
    """A file that is not safetensors, or is damaged."""


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads all arrays by name.

    Args:
      path: The file.

    Returns:
      The arrays.

    Raises:
      SafetensorsFileError: If the file is damaged, is not a regular file, or has a type of number
        that numpy lacks.
      FileNotFoundError: If there is no such file.
    """
    if Path(path).exists() and not Path(path).is_file():  # opening a pipe would hang
        raise SafetensorsFileError(f"{path} is not a regular file")
    try:
        return safetensors.numpy.load_file(path)
    # The library raises AttributeError for a type of number that numpy lacks.
    except (safetensors.SafetensorError, AttributeError, KeyError, ValueError) as error:
        raise SafetensorsFileError(
            f"{path} is damaged, or not a safetensors file of float arrays: {error}"
        ) from error


def write(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray]) -> None:
    """Writes arrays by name, atomically."""
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        safetensors.numpy.save_file(contiguous, temporary, metadata={"format": "pt"})
        temporary.chmod(mode)  # the library lets nobody else read the file
