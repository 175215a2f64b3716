"""Arrays in fewer bytes, for weights that are downloaded or packaged.

"float16" halves the size. "int8" quarters it: an array is stored as integers with one scale per
channel, its last axis, and the scale as a second array named NAME:scale. Small arrays stay float32,
because norms, biases and frequencies matter more than they weigh.
"""

from collections.abc import Mapping
from typing import Literal, get_args

import numpy as np

from sam_jax.weights.tensors import WeightsError, format_list

Storage = Literal["float32", "float16", "int8"]
STORAGES: tuple[Storage, ...] = get_args(Storage)
MIN_SIZE = 4096  # elements of an array that is stored in fewer bytes
SCALE = ":scale"


def pack(arrays: Mapping[str, np.ndarray], storage: Storage) -> dict[str, np.ndarray]:
    """Converts float32 arrays for storage.

    Args:
      arrays: Arrays by name.
      storage: The type to store large arrays as.

    Returns:
      Arrays by name, which `unpack` converts back.

    Raises:
      ValueError: If the storage is unknown.
      WeightsError: If a value is too large for float16, or is not finite.
    """
    if storage not in STORAGES:
        raise ValueError(f"storage must be one of {', '.join(STORAGES)}; got {storage!r}")
    if storage == "float32":
        return dict(arrays)
    packed: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        limit = np.finfo(np.float16).max if storage == "float16" else np.inf
        if array.size < MIN_SIZE or array.ndim < 2:
            packed[name] = array
        elif not np.all(np.abs(array) < limit):  # also true for NaN
            raise WeightsError(f"{name} has values that {storage} cannot store")
        elif storage == "float16":
            packed[name] = array.astype(np.float16)
        else:
            packed[name], packed[name + SCALE] = quantize(array)
    return packed


def unpack(stored: Mapping[str, np.ndarray], path: str) -> dict[str, np.ndarray]:
    """Converts stored arrays to float32.

    Args:
      stored: A result of `pack`.
      path: The file, for errors.

    Returns:
      The arrays.

    Raises:
      WeightsError: If an array has another dtype, or a scale is missing or left over.
    """
    arrays, used = {}, set()
    for name, array in stored.items():
        scale = stored.get(name + SCALE)
        if array.dtype == np.int8 and scale is not None and scale.shape == array.shape[-1:]:
            with np.errstate(over="ignore", invalid="ignore"):  # checked by the caller
                arrays[name] = array.astype(np.float32) * scale
            used.add(name + SCALE)
        elif array.dtype in (np.float32, np.float16):
            arrays[name] = array.astype(np.float32, copy=False)
    arrays = {name: array for name, array in arrays.items() if name not in used}
    scales = {name for name in stored if name.endswith(SCALE)}
    if others := sorted(stored.keys() - arrays.keys() - used | scales - used):
        raise WeightsError(
            f"{path} must hold float32 and float16 arrays, and int8 arrays with their scales; not "
            f"{format_list(others)}"
        )
    return arrays


def quantize(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rounds an array to 255 levels per channel.

    Args:
      array: '... c' float32.

    Returns:
      '... c' int8, and 'c' float32: the scale of each channel. The largest error is half a scale.
    """
    axes = tuple(range(array.ndim - 1))
    largest = np.abs(array).max(axis=axes)
    scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    return np.round(array / scale).astype(np.int8), scale
