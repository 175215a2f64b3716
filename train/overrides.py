"""Configs from files and from the command line, and back into text.

A config file assigns a `TrainConfig` to the name `config`; `--set a.b=c` replaces single fields.
"""

import ast
import dataclasses
import difflib
import importlib.util
import json
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from flax.traverse_util import flatten_dict

from train.config import ConfigError, TrainConfig


def load_config(path: str) -> TrainConfig:
    """Runs a config file -> the value of its `config`.

    Raises:
      ConfigError: if there is no such file, it fails, or no TrainConfig is in it.
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
    """Replaces fields by 'a.b=c', values written as in Python (text needs no quotes).

    Of several settings of one field the last holds. Rules are checked once all are made.

    Raises:
      ConfigError: naming the fields there are, for an unknown one or a value of a wrong type.
    """
    changes: dict[str, Any] = {}
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set takes FIELD=VALUE; got {setting!r}")
        names = path.split(".")
        value = _parse(text, _type_of(config, names, path), path)
        at = changes
        for name in names[:-1]:
            at = at.setdefault(name, {})
        at[names[-1]] = value
    return _replace(config, changes)


def _type_of(value: Any, names: list[str], path: str) -> Any:
    """The type of a field of a field of ... a dataclass."""
    kind = None
    for i, name in enumerate(names):
        fields, owner = _fields(value), type(value).__name__
        if not fields:
            raise ConfigError(f"{path}: {names[i - 1]} is a {owner}, which has no fields")
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise ConfigError(f"there is no field {path}{hint} {owner} has {', '.join(fields)}")
        kind, value = fields[name], getattr(value, name)
    if _fields(value):
        raise ConfigError(f"{path} has fields of its own: {', '.join(_fields(value))}")
    return kind


def _replace(value: Any, changes: dict[str, Any]) -> Any:
    """Replaces fields; a dict stands for fields of a field."""
    new = {
        name: _replace(getattr(value, name), change) if isinstance(change, dict) else change
        for name, change in changes.items()
    }
    return dataclasses.replace(value, **new)


def _fields(value: Any) -> dict[str, Any]:
    """The fields of a dataclass (of a module, without Flax's own) and their types."""
    if not dataclasses.is_dataclass(value):
        return {}
    types_of = typing.get_type_hints(type(value))
    return {f.name: types_of[f.name] for f in dataclasses.fields(value) if f.name not in FLAX}


FLAX = ("name", "parent")


def _parse(text: str, kind: Any, path: str) -> Any:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if kind is str:
        value = text
    if kind is float and type(value) is int:
        value = float(value)
    if typing.get_origin(kind) is tuple and isinstance(value, str):
        value = tuple(part.strip() for part in value.split(",") if part.strip())
    elif typing.get_origin(kind) is tuple and not isinstance(value, tuple):
        value = (value,)
    if not _is_a(value, kind):
        name = kind.__name__ if isinstance(kind, type) else str(kind)
        name = getattr(kind, "__name__", name) if not typing.get_args(kind) else str(kind)
        raise ConfigError(f"{path} must be of type {name}; got {text!r}")
    return value


def _is_a(value: Any, kind: Any) -> bool:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return value in args
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(args) == 2 and args[1] is Ellipsis:
            return all(_is_a(v, args[0]) for v in value)
        return len(value) == len(args) and all(map(_is_a, value, args))
    return type(value) is kind


def to_dict(value: Any) -> Any:
    """A configuration, or a model, as a dict of what JSON can hold."""
    fields = _fields(value)
    if fields:
        return {name: to_dict(getattr(value, name)) for name in fields}
    return list(value) if isinstance(value, tuple) else value


def to_json(config: TrainConfig) -> str:
    """The whole configuration as JSON, to be read."""
    return json.dumps(to_dict(config), indent=2) + "\n"


def differences(before: dict, now: dict, ignore: Sequence[str] = ()) -> list[str]:
    """Fields 'a.b' in which two results of `to_dict` differ, as 'a.b was 1, is 2'."""
    before, now = (flatten_dict(x, sep=".") for x in (before, now))
    names = [name for name in {**before, **now} if name not in ignore]
    return [
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in names
        if before.get(name) != now.get(name)
    ]
