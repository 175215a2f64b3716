"""The fields of a model as JSON, and models from JSON that may hold anything."""

import json
import math
import reprlib
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar

import flax.linen as nn

from sam_jax.model.fields import module_fields, module_to_dict
from sam_jax.model.mae import MaskedAutoencoder
from sam_jax.model.sam import FLAT_FIELDS, Sam
from sam_jax.weights.tensors import WeightsError

VERSION = 2  # of a Sam's JSON: the fields of its parts. Version 1, without a number, was flat.
MAX_JSON_SIZE = 1 << 22  # bytes

Module = TypeVar("Module", bound=nn.Module)
Validated = TypeVar("Validated", Sam, MaskedAutoencoder)


def sam_to_json(model: Sam) -> dict[str, Any]:
    """Returns a model's fields, part by part, as a JSON object, without `object_share` if None."""
    fields = {"version": VERSION, **module_to_dict(model)}
    if model.object_share is None:
        del fields["object_share"]
    return fields


def sam_from_json(content: dict[str, Any], source: Path) -> Sam:
    """Builds a `Sam` from a JSON object; undoes `sam_to_json`.

    Args:
      content: The JSON object, of `VERSION` or of version 1, which has the fields of `build_sam`.
        Absent fields have their default values.
      source: The file, for error messages.

    Returns:
      The model.

    Raises:
      WeightsError: If a field is unknown or has a wrong type or value, or if the version is
        unknown.
    """
    fields = dict(content)
    version = fields.pop("version", 1)
    if type(version) is not int or not 1 <= version <= VERSION:
        got = reprlib.repr(version)
        raise WeightsError(f"{source}: version must be 1 to {VERSION}; got {got}")
    if version == 1:
        fields = _nest(fields, source)
    defaults = {field.name: field.default for field in module_fields(Sam)}
    _check_known(fields, defaults, source)
    object_share = _object_share_from_json(fields.get("object_share"), source)
    part_types: dict[str, Any] = {
        name: type(part) for name, part in defaults.items() if isinstance(part, nn.Module)
    }
    parts: dict[str, Any] = {
        name: _module_from_json(part_type, fields.get(name, {}), source, f"{name}.")
        for name, part_type in part_types.items()
    }
    model = Sam(**parts, object_share=object_share)
    return validated(model, str(source))


def mae_from_json(content: dict[str, Any], source: Path) -> MaskedAutoencoder:
    """Builds a `MaskedAutoencoder` from its fields; see `sam_from_json`."""
    model = _module_from_json(MaskedAutoencoder, content, source)
    return validated(model, str(source))


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Args:
      path: The file.

    Returns:
      The object.

    Raises:
      WeightsError: If the file cannot be read, is large, or holds something else.
    """
    try:
        if not path.is_file():
            raise WeightsError(f"{path} is missing, or not a regular file")
        if path.stat().st_size > MAX_JSON_SIZE:
            raise WeightsError(f"{path} is larger than {MAX_JSON_SIZE} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path} must hold a JSON object; got {type(value).__name__}")
    return value


def _nest(flat: dict[str, Any], source: Path) -> dict[str, Any]:
    """Converts the flat fields of version 1 to those of the model's parts."""
    _check_known(flat, FLAT_FIELDS, source)
    nested: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        for path in FLAT_FIELDS[name]:
            part, field = path.split(".")
            nested.setdefault(part, {})[field] = value
    return nested


def _object_share_from_json(value: Any, source: Path) -> tuple[float, float] | None:
    if value is None:
        return None
    is_pair = isinstance(value, list) and len(value) == 2
    if not is_pair or any(type(share) not in (int, float) for share in value):
        got = reprlib.repr(value)
        raise WeightsError(f"{source}: object_share must be a list of 2 numbers; got {got}")
    return value[0], value[1]


def _module_from_json(
    module: type[Module], fields: object, source: Path, prefix: str = ""
) -> Module:
    """Builds a module from its fields, in which lists stand for tuples."""
    if not isinstance(fields, dict):
        name = prefix.removesuffix(".")
        raise WeightsError(f"{source}: {name} must be an object; got {reprlib.repr(fields)}")
    defaults = {field.name: field.default for field in module_fields(module)}
    _check_known(fields, defaults, source, prefix)
    types = typing.get_type_hints(module)
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    for name, value in values.items():
        is_allowed, allowed = _check_value(value, defaults[name], types[name])
        if not is_allowed:
            got = reprlib.repr(value)
            raise WeightsError(f"{source}: {prefix}{name} must be {allowed}; got {got}")
    return module(**values)


def _check_value(value: Any, default: Any, annotation: Any) -> tuple[bool, str]:
    """Checks the value of a field.

    Args:
      value: The value.
      default: The field's default value, whose type the value must have.
      annotation: The field's annotation, which tells the length of a list and the allowed strings.

    Returns:
      Whether the value is allowed, and the allowed values in words.
    """
    if isinstance(default, tuple):
        is_allowed = isinstance(value, tuple) and all(type(x) is int and x >= 0 for x in value)
        if Ellipsis in (items := typing.get_args(annotation)):
            return is_allowed, "a list of integers, none negative"
        is_allowed = is_allowed and len(value) == len(items)
        return is_allowed, f"a list of {len(items)} integers, none negative"
    if type(default) is bool:
        return type(value) is bool, "true or false"
    if type(default) is int:
        return type(value) is int and value > 0, "a positive integer"
    if type(default) is float:
        is_number = type(value) in (int, float)
        if default:
            return is_number and 0 < value < math.inf, "a positive number"
        return is_number and 0 <= value < 1, "a number of at least 0 and below 1"
    strings = typing.get_args(annotation)
    return value in strings, f"one of {', '.join(strings)}"


def _check_known(
    fields: Collection[str], known: Collection[str], source: Path, prefix: str = ""
) -> None:
    if unknown := sorted(set(fields) - set(known)):
        names = reprlib.repr([f"{prefix}{name}" for name in unknown])
        raise WeightsError(f"{source}: unknown fields {names}; allowed are {sorted(known)}")


def validated(model: Validated, source: str) -> Validated:
    """Returns a model whose fields fit together.

    Args:
      model: The model.
      source: The file or object that has the fields, for the error message.

    Raises:
      WeightsError: If they do not. The message names the field.
    """
    try:
        model.validate()
    except ValueError as error:
        raise WeightsError(f"{source}: {error}") from error
    return model
