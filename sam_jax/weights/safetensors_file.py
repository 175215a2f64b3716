"""Reads and writes safetensors files, with errors that name the file.

The format and its checks (header size, offsets inside the file, no overlaps) are the library's.
"""

import os
import tempfile
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy


class SafetensorsFileError(ValueError):
    """A file that is not safetensors, or is damaged."""


def read(path):
    """Reads all arrays -> {name: array}."""
    try:
        return safetensors.numpy.load_file(path)
    # An AttributeError is the library's, about a type of number that numpy has not.
    except (safetensors.SafetensorError, AttributeError, KeyError, ValueError) as error:
        raise SafetensorsFileError(
            f"{path} is damaged, or not a safetensors file of float arrays: {error}"
        ) from error


def write(path, tensors):
    """Writes {name: array}; the file appears whole or not at all."""
    path = Path(path)
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        safetensors.numpy.save_file(tensors, temporary, metadata={"format": "pt"})
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
