"""The tensors of a PyTorch state dict, which may be inside a training checkpoint."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from sam_jax.model.sam import PIXEL_MEAN, PIXEL_STD
from sam_jax.weights.tensors import WeightsError, format_list

# Keys of state dicts in checkpoints. Of several models in a checkpoint, the first of these is read.
WRAPPERS = ("model", "state_dict", "model_state_dict", "model_state", "net", "module")
MAX_LEVELS = 8  # of dicts in dicts
PIXEL_STATISTICS = {"pixel_mean": PIXEL_MEAN, "pixel_std": PIXEL_STD}
# Names that every model has: those of a SAM, or else of a plain vision transformer.
_MARKERS = (
    re.compile(r"(.*\.)?(?=(image|vision)_encoder\.pos_embed$)"),
    re.compile(r"(.*\.)?(?=patch_embed\.proj\.weight$)"),
    re.compile(r"(.*\.)?(?=embeddings\.patch_embeddings\.(projection\.)?weight$)"),
)


def take_tensors(state: dict[Any, Any], notes: list[str]) -> dict[str, np.ndarray]:
    """Takes the tensors out of a state dict or a training checkpoint, which is emptied.

    The state dict is found at any level of the checkpoint by the names in it. A prefix that all
    names share, such as "module." or "model.sam.", is removed.

    Args:
      state: The state dict or checkpoint. Since it is emptied, a tensor that the caller drops is
        freed.
      notes: A note is appended if the checkpoint has other content.

    Returns:
      Floating-point tensors by name, without common prefixes and pixel statistics.

    Raises:
      WeightsError: If there is no tensor, if several state dicts are equally likely, or if the
        pixel statistics differ from the model's.
    """
    values = _unwrap(state, notes)
    tensors = {k: x for k, x in values.items() if isinstance(k, str) and _is_float(x)}
    if others := [name for name in values if name not in tensors]:
        if not tensors:
            raise WeightsError(
                f"weights must be floating-point tensors by name; got others: {format_list(others)}"
            )
        notes.append(f"skipped, since they are not floating-point tensors: {format_list(others)}")
    prefix = _common_prefix(tensors)
    tensors = {name.removeprefix(prefix): x for name, x in tensors.items()}
    for name, expected in PIXEL_STATISTICS.items():
        if name in tensors and not _is_close(np.ravel(tensors[name]), expected):
            raise WeightsError(f"{name} must be {expected}; got {np.ravel(tensors[name])}")
    tensors = {name: x for name, x in tensors.items() if name not in PIXEL_STATISTICS}
    state.clear()
    return tensors


def _unwrap(state: dict[Any, Any], notes: list[str]) -> dict[Any, Any]:
    """Returns the state dict of a training checkpoint."""
    paths = list(_find_models(state))
    if not paths:  # the errors then name what is in the likely place
        paths = [(key,) for key in WRAPPERS if isinstance(state.get(key), dict)][:1] or [()]
    known = [path for key in WRAPPERS for path in paths if path[:1] == (key,)]
    if len(paths) > 1 and not known:
        raise WeightsError(
            "the checkpoint has several models: save the state dict of one of "
            f"{format_list(_join(path) for path in paths)}"
        )
    path = (known or paths)[0]
    others: list[str] = []
    for key in path:
        others += sorted(str(name) for name in state if name != key)
        state = state[key]
    if others:
        notes.append(f"of the checkpoint only {_join(path)!r} was read, not {', '.join(others)}")
    return state


def _find_models(state: dict[Any, Any], path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yields the keys that lead to each state dict of a model."""
    if _prefixes(state):
        yield path
    elif len(path) < MAX_LEVELS:
        for key, value in state.items():
            if isinstance(value, dict):
                yield from _find_models(value, (*path, key))


def _prefixes(state: dict[Any, Any]) -> set[str]:
    """Returns what precedes the names that every model has."""
    for marker in _MARKERS:
        matches = (marker.match(k) for k, x in state.items() if isinstance(k, str) and _is_float(x))
        if prefixes := {match[0] for match in matches if match}:
            return prefixes
    return set()


def _common_prefix(tensors: dict[str, np.ndarray]) -> str:
    """Returns the prefix of the model's names as far as all names have it, e.g. "module."."""
    prefix = min(_prefixes(tensors), default="")
    while prefix and not all(name.startswith(prefix) for name in tensors):
        prefix = prefix[: prefix.rfind(".", 0, -1) + 1]
    return prefix


def _join(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


def _is_float(value: Any) -> bool:
    return isinstance(value, np.ndarray) and jnp.issubdtype(value.dtype, jnp.floating)


def _is_close(values: np.ndarray, expected: Sequence[float]) -> bool:
    return len(values) == len(expected) and np.allclose(values, expected, atol=1e-3)
