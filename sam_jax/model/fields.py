"""The fields of a module as plain values, and the rules that they must obey."""

import dataclasses
import reprlib
import typing
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn

FLAX_FIELDS = ("parent", "name")  # Flax adds these two to every module
# Limits of a model, so that a damaged file costs no time or memory.
MAX_SIZE, MAX_DEPTH = 1 << 14, 256


class Rule(NamedTuple):
    """A condition on a field.

    Attributes:
      field: The field's name, which an error message begins with.
      value: The field's value.
      holds: Whether the value is allowed.
      allowed: The values that are allowed, for the error message.
    """

    field: str
    value: Any
    holds: bool
    allowed: str


def check_rules(rules: Iterable[Rule], prefix: str = "") -> None:
    """Checks rules.

    Args:
      rules: The rules to check.
      prefix: Text before each field's name in the error message, e.g. "image_encoder.".

    Raises:
      ValueError: If a rule does not hold. The message describes the first such rule.
    """
    for rule in rules:
        if not rule.holds:
            got = reprlib.repr(rule.value)
            raise ValueError(f"{prefix}{rule.field} must be {rule.allowed}; got {got}")


def multiple_of(field: str, value: int, divisor: int, allowed: str) -> Iterator[Rule]:
    """Yields the rules that a field is a multiple of a divisor, both of them positive.

    Args:
      field: The field's name.
      value: The field's value.
      divisor: The number that must divide it.
      allowed: The divisor in words, for the error message, e.g. "num_heads".
    """
    yield Rule(allowed, divisor, divisor >= 1, "at least 1")
    text = f"a positive multiple of {allowed} = {divisor}"
    yield Rule(field, value, value > 0 and value % divisor == 0, text)


def field_rules(module: nn.Module) -> Iterator[Rule]:
    """Yields the rules for single fields of a module.

    A string must be one of those in the field's annotation. An integer must be positive, and no
    number may be huge.
    """
    annotations = typing.get_type_hints(type(module))
    for field in module_fields(module):
        value = getattr(module, field.name)
        limit = MAX_DEPTH if field.name.endswith("depth") else MAX_SIZE
        if type(field.default) is str:
            strings = typing.get_args(annotations[field.name])
            is_allowed = isinstance(value, str) and value in strings
            yield Rule(field.name, value, is_allowed, f"one of {', '.join(map(repr, strings))}")
        elif type(field.default) is int:
            yield Rule(field.name, value, value >= 1, "at least 1")
            yield Rule(field.name, value, value <= limit, f"at most {limit}")
        elif type(field.default) is float:
            yield Rule(field.name, value, value >= 0, "at least 0")
            yield Rule(field.name, value, value <= limit, f"at most {limit}")


def module_fields(module: nn.Module | type[nn.Module]) -> list[dataclasses.Field[Any]]:
    """Returns the fields of a module or of its class, without those that Flax adds."""
    return [field for field in dataclasses.fields(module) if field.name not in FLAX_FIELDS]


def module_to_dict(module: nn.Module) -> dict[str, Any]:
    """Returns a module's fields by name; a submodule becomes a dict of its own fields."""
    values = {field.name: getattr(module, field.name) for field in module_fields(module)}
    return {
        name: module_to_dict(value) if isinstance(value, nn.Module) else value
        for name, value in values.items()
    }
