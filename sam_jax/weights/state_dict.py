"""The tensors of a PyTorch state dict, which may be inside a training checkpoint."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from sam_jax.model.sam import PIXEL_MEAN, PIXEL_STD
from sam_jax.weights.tensors import WeightsError, format_list

WRAPPERS = ("model", "state_dict", "model_state_dict")  # keys of state dicts in checkpoints
PREFIXES = ("module.", "sam.", "sam_model.", "_orig_mod.")  # of all names of a state dict
PIXEL_STATISTICS = {"pixel_mean": PIXEL_MEAN, "pixel_std": PIXEL_STD}


def take_tensors(state: dict[Any, Any], notes: list[str]) -> dict[str, np.ndarray]:
    """Takes the tensors out of a state dict or a training checkpoint, which is emptied.

    Args:
      state: The state dict or checkpoint. Since it is emptied, a tensor that the caller drops is
        freed.
      notes: A note is appended if the checkpoint has other content.

    Returns:
      Floating-point tensors by name, without common prefixes and pixel statistics.

    Raises:
      WeightsError: If another value is among the tensors, or if the pixel statistics differ from
        the model's.
    """
    tensors = _without_prefixes(_unwrap(state, notes))
    others = [name for name, x in tensors.items() if not (isinstance(name, str) and _is_float(x))]
    if others:
        raise WeightsError(
            f"weights must be floating-point tensors by name; got others: {format_list(others)}"
        )
    for name, expected in PIXEL_STATISTICS.items():
        if name in tensors and not _is_close(np.ravel(tensors[name]), expected):
            raise WeightsError(f"{name} must be {expected}; got {np.ravel(tensors[name])}")
    tensors = {name: x for name, x in tensors.items() if name not in PIXEL_STATISTICS}
    state.clear()
    return tensors


def _unwrap(state: dict[Any, Any], notes: list[str]) -> dict[Any, Any]:
    """Returns the state dict of a training checkpoint."""
    for key in WRAPPERS:
        if isinstance(state.get(key), dict):
            if others := sorted(str(name) for name in state if name != key):
                notes.append(f"of the checkpoint only {key!r} was read, not {', '.join(others)}")
            wrapped: dict[Any, Any] = state[key]
            return wrapped
    return state


def _without_prefixes(state: dict[Any, Any]) -> dict[Any, Any]:
    """Removes prefixes that all names have, e.g. "module." of a distributed model."""
    while state:
        common = [p for p in PREFIXES if all(str(name).startswith(p) for name in state)]
        if not common:
            break
        state = {name.removeprefix(common[0]): value for name, value in state.items()}
    return state


def _is_float(value: Any) -> bool:
    return isinstance(value, np.ndarray) and jnp.issubdtype(value.dtype, jnp.floating)


def _is_close(values: np.ndarray, expected: Sequence[float]) -> bool:
    return len(values) == len(expected) and np.allclose(values, expected, atol=1e-3)
