"""The record in each checkpoint of a run: what it belongs to, what it holds, and checksums.

It is a JSON object: the step, the configuration, a description of the images, the versions of the
software, the type, shape and checksum of each array, and a digest of all of these.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax
import numpy as np

import sam_jax
from sam_jax.data.open import Subset
from sam_jax.io import storage
from sam_jax.io.settings_guard import differences
from sam_jax.model.fields import FLAX_FIELDS
from train.config import TrainConfig
from train.former_names import rename_saved
from train.overrides import to_dict

FORMAT = 1
FOLDER = "record"  # of a checkpoint
# Fields that may differ when a run is resumed, because no earlier step depends on them.
MAY_CHANGE = (
    "num_steps",
    "fsdp",
    "log_every",
    "checkpoint_every",
    "evaluate_every",
    "max_bad_steps",
    "profile",
    "data.workers",
    "feature_cache",
)
NAMES_IN_DIGEST = 1000  # names of images, so that describing millions of images takes no time
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore")


class RecordError(ValueError):
    """A record whose bytes are damaged."""


def make_record(
    step: int, config: TrainConfig, data: dict[str, Any], arrays: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Makes the record of a checkpoint.

    Args:
      step: The number of steps done.
      config: The run.
      data: The description of its images, see `describe_data`.
      arrays: By path, the dtype, shape and checksum of each array.

    Returns:
      The record, which JSON can hold.
    """
    record = {
        "format": FORMAT,
        "step": step,
        "config": to_dict(config),
        "data": data,
        "versions": versions(),
        "arrays": arrays,
    }
    return record | {"digest": _digest(record)}


def read_record(checkpoint: str) -> dict[str, Any] | None:
    """Reads the record of a checkpoint.

    Args:
      checkpoint: The folder of the checkpoint, a path or a URL.

    Returns:
      The record; None if the checkpoint was written by a version without records.

    Raises:
      RecordError: If the record is damaged.
      OSError: If it cannot be read.
    """
    if not storage.is_folder(f"{checkpoint}/{FOLDER}"):
        return None
    try:
        text = storage.read_range(f"{checkpoint}/{FOLDER}/metadata")
        record = json.loads(text)
        digest = record.pop("digest")
    except (FileNotFoundError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise RecordError(f"{FOLDER}/metadata is no record: {error}") from error
    if digest != _digest(record):
        raise RecordError(f"the digest of {FOLDER}/metadata is wrong")
    return record


def newest_config(checkpoints: str) -> dict[str, Any] | None:
    """Returns the configuration in the newest checkpoint with an intact record, or None."""
    names = storage.listdir(checkpoints) if storage.is_folder(checkpoints) else []
    for step in sorted((int(name) for name in names if name.isdigit()), reverse=True):
        try:
            record = read_record(f"{checkpoints}/{step}")
        except RecordError:
            continue
        if record is not None:
            return record["config"]
    return None


def config_changes(before: dict[str, Any], config: TrainConfig) -> list[str]:
    """Lists the fields of a saved configuration that have other values now.

    Args:
      before: The saved configuration, perhaps of an older version.
      config: The present one.

    Returns:
      One description for each field that may not change, see `differences`.
    """
    before = _add_missing(rename_saved(before), _default_values(config))
    pairs = zip(before["stages"], config.stages, strict=False)
    before["stages"][: len(config.stages)] = [
        _add_missing(saved, _default_values(stage)) for saved, stage in pairs
    ]
    return differences(before, to_dict(config), ignore=MAY_CHANGE)


def describe_data(train_split: Subset, eval_split: Subset) -> dict[str, Any]:
    """Returns the number of images and a digest of their names, to recognize them again.

    No image is opened. The digest is that of `NAMES_IN_DIGEST` evenly spaced names without their
    folders, so the images may be moved.

    Args:
      train_split: The images to train on.
      eval_split: The images to evaluate on.

    Returns:
      By split, the two values.
    """
    return {
        name: {"images": len(split), "names": _names_digest(split)}
        for name, split in (("train", train_split), ("evaluation", eval_split))
    }


def describe_arrays(tree: Any) -> dict[str, dict[str, Any]]:
    """Returns the dtype and shape of each array of a tree by its path, in the order of leaves."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): {
            "dtype": str(x.dtype),
            "shape": list(x.shape),
        }
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


@functools.cache
def versions() -> dict[str, str | None]:
    """Returns the versions of the software; "revision" is that of this repository, if known."""
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    own = {"sam_jax": sam_jax.__version__, "revision": _revision()}
    return own | {"python": platform.python_version()} | packages


def _revision() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    root = Path(__file__).resolve().parents[1]
    try:
        found = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=20)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _names_digest(split: Subset) -> str:
    count = min(len(split), NAMES_IN_DIGEST)
    indices = np.linspace(0, len(split) - 1, count).astype(int).tolist()
    names = [split.name(index).rsplit("/", 1)[-1] for index in indices]
    return hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _default_values(value: Any) -> dict[str, Any]:
    """Returns the default values of the fields of a config, as nested dicts."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        if dataclasses.is_dataclass(part := getattr(value, field.name)):
            values[field.name] = _default_values(part)
        elif field.default is not dataclasses.MISSING and field.name not in FLAX_FIELDS:
            values[field.name] = to_dict(field.default)
    return values


def _add_missing(saved: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Adds fields that did not exist when a config was saved. Their defaults change nothing."""
    added = {
        name: _add_missing(saved.get(name, {}), value) if isinstance(value, dict) else value
        for name, value in defaults.items()
        if isinstance(value, dict) or name not in saved
    }
    return saved | added
