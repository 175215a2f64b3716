"""Reads configurations from files, replaces fields by `--set`, and writes them as JSON.

A config file assigns a `TrainConfig` to the name `config`. `--set a.b=c` replaces single fields.
"""

import ast
import dataclasses
import difflib
import importlib.util
import json
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

from sam_jax.model.fields import FLAX_FIELDS
from train.config import ConfigError, Stage, TrainConfig
from train.former_names import present_paths, present_value


def load_config(path: str) -> TrainConfig:
    """Runs a config file.

    Args:
      path: A Python file.

    Returns:
      The `TrainConfig` that the file assigns to `config`.

    Raises:
      ConfigError: If there is no such file, it fails, or it assigns no `TrainConfig`.
    """
    if not Path(path).is_file():
        known = sorted(str(p) for p in Path("configs").glob("*.py") if p.name != "__init__.py")
        raise ConfigError(f"there is no config {path}; in configs/ there are {', '.join(known)}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"a config is a Python file, config.py; got {path}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    config = getattr(module, "config", None)
    if not isinstance(config, TrainConfig):
        raise ConfigError(f"{path} must assign a TrainConfig to `config`; got {config!r}")
    return config


def override(config: TrainConfig, settings: Sequence[str]) -> TrainConfig:
    """Replaces fields of a configuration, in all of its stages.

    >>> override(config, ["optimizer.peak_lr=1e-4", "num_steps=60"])

    Args:
      config: The configuration.
      settings: 'a.b=c' each. Values are written as in Python; text needs no quotes. If a field is
        set twice, the last setting is used. The rules of the fields are checked once all are set.

    Returns:
      The configuration with the new values.

    Raises:
      ConfigError: If a field is unknown or a value has the wrong type. The message lists the
        fields.
    """
    changes: dict[str, Any] = {}
    for setting in settings:
        given_path, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set takes FIELD=VALUE; got {setting!r}")
        if text in ("True", "False"):
            text = str(present_value(given_path, text == "True"))
        for path in present_paths(given_path, _fields(config.model)):
            names = path.split(".")
            value = _parse(text, _type_of(config, names, path), path)
            inner = changes
            for name in names[:-1]:
                inner = inner.setdefault(name, {})
            inner[names[-1]] = value
    if config.stages and "stages" not in changes:
        changes["stages"] = tuple(_replace_in_stage(stage, changes) for stage in config.stages)
    return _replace(config, changes)


def to_dict(value: Any) -> Any:
    """Converts a configuration or a model to nested dicts of values that JSON can hold."""
    fields = _fields(value)
    if fields:
        return {name: to_dict(getattr(value, name)) for name in fields}
    return [to_dict(item) for item in value] if isinstance(value, tuple) else value


def to_json(config: TrainConfig) -> str:
    """Converts a configuration to JSON that is easy to read."""
    return json.dumps(to_dict(config), indent=2) + "\n"


def _type_of(value: Any, names: list[str], path: str) -> Any:
    """Returns the type of a field of a field of ... a dataclass."""
    field_type = None
    for i, name in enumerate(names):
        fields, owner = _fields(value), type(value).__name__
        if not fields:
            raise ConfigError(f"{path}: {names[i - 1]} is a {owner}, which has no fields")
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise ConfigError(f"there is no field {path}{hint} {owner} has {', '.join(fields)}")
        field_type, value = fields[name], getattr(value, name)
    if _fields(value):
        raise ConfigError(f"{path} has fields itself: {', '.join(_fields(value))}")
    return field_type


def _replace(value: Any, changes: dict[str, Any]) -> Any:
    """Replaces fields; a dict stands for changes of a field's fields."""
    new = {
        name: _replace(getattr(value, name), change) if isinstance(change, dict) else change
        for name, change in changes.items()
    }
    return dataclasses.replace(value, **new)


def _replace_in_stage(stage: Stage, changes: dict[str, Any]) -> Stage:
    """Replaces the fields that a stage would otherwise keep for itself."""
    own = {name for name in _fields(stage) if getattr(stage, name) is not None}
    return cast(Stage, _replace(stage, {k: v for k, v in changes.items() if k in own}))


def _fields(value: Any) -> dict[str, Any]:
    """Returns the fields of a dataclass or a Flax module and their types; empty for others."""
    if not dataclasses.is_dataclass(value):
        return {}
    types = typing.get_type_hints(type(value))
    names = (field.name for field in dataclasses.fields(value))
    return {name: types[name] for name in names if name not in FLAX_FIELDS}


def _parse(text: str, field_type: Any, path: str) -> Any:
    """Parses a value of a field's type."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(field_type, types.UnionType):  # a type or None
        if value is None:
            return None
        (field_type,) = (kind for kind in typing.get_args(field_type) if kind is not type(None))
    if field_type is str:
        value = text
    if field_type is float and type(value) is int:
        value = float(value)
    if typing.get_origin(field_type) is tuple and isinstance(value, str):
        value = tuple(part.strip() for part in value.split(",") if part.strip())
    elif typing.get_origin(field_type) is tuple and not isinstance(value, tuple):
        value = (value,)
    if typing.get_origin(field_type) is tuple and typing.get_args(field_type)[0] is float:
        value = tuple(float(item) if type(item) is int else item for item in value)
    if not _is_instance(value, field_type):
        is_plain = isinstance(field_type, type) and not typing.get_args(field_type)
        name = field_type.__name__ if is_plain else str(field_type)
        raise ConfigError(f"{path} must be of type {name}; got {text!r}")
    return value


def _is_instance(value: Any, field_type: Any) -> bool:
    origin, args = typing.get_origin(field_type), typing.get_args(field_type)
    if origin is Literal:
        return value in args
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(args) == 2 and args[1] is Ellipsis:
            return all(_is_instance(v, args[0]) for v in value)
        return len(value) == len(args) and all(map(_is_instance, value, args))
    return type(value) is field_type
