"""Checks of the names and shapes of tensors, with errors that list the faults."""

import re
from collections.abc import Collection, Iterable, Mapping

import jax
import numpy as np

from sam_jax.model.init import variable_shapes
from sam_jax.model.mae import MaskedAutoencoder
from sam_jax.model.sam import Sam


class WeightsError(ValueError):
    """Weights that are incomplete, or not those of a Segment Anything model."""


def count_blocks(names: Iterable[str], pattern: str) -> int:
    """Counts blocks, which must be numbered from 0 without a gap.

    Args:
      names: Names of tensors.
      pattern: Regular expression whose first group is a block's number.

    Returns:
      The number of blocks.

    Raises:
      WeightsError: If there is no block, or if a number is missing.
    """
    names = list(names)
    numbers = {int(match[1]) for name in names if (match := re.match(pattern, name))}
    if not numbers:
        raise WeightsError(f"no tensor has a name like {pattern}; got {format_list(sorted(names))}")
    if numbers != set(range(len(numbers))):
        raise WeightsError(
            f"names like {pattern} must count from 0 without a gap; "
            f"got {format_list(sorted(numbers))}"
        )
    return len(numbers)


def shape_of(tensors: Mapping[str, np.ndarray], name: str, ndim: int) -> tuple[int, ...]:
    """Returns a tensor's shape.

    Args:
      tensors: Tensors by name.
      name: Name of the tensor.
      ndim: Number of axes that it must have.

    Returns:
      The shape, without an axis of size 0.

    Raises:
      WeightsError: If the tensor is missing, has another number of axes, or is empty.
    """
    if name not in tensors:
        raise WeightsError(f"{name} is missing; got {format_list(tensors)}")
    shape = tensors[name].shape
    if len(shape) != ndim or 0 in shape:
        raise WeightsError(f"{name} must have {ndim} axes, none empty; got {shape}")
    return shape


def check_names(source: str, names: Collection[str], expected: Collection[str]) -> None:
    """Checks that names are exactly the expected ones.

    Args:
      source: The file or object that has these names, for the error message.
      names: The names.
      expected: The expected names.

    Raises:
      WeightsError: If a name is unknown or missing.
    """
    unknown, missing = sorted(set(names) - set(expected)), sorted(set(expected) - set(names))
    if unknown or missing:
        raise WeightsError(
            f"{source} does not hold exactly the tensors of this model: "
            f"unknown {format_list(unknown)}; missing {format_list(missing)}"
        )


def check_variables(
    source: str, model: Sam | MaskedAutoencoder, flat: Mapping[str, jax.Array | np.ndarray]
) -> None:
    """Checks that arrays are finite and have the paths and shapes of a model's variables.

    Args:
      source: Where the arrays are from, for the error message.
      model: The model.
      flat: Arrays by path.

    Raises:
      WeightsError: If a path is unknown or missing, or if an array has another shape or a value
        that is not finite.
    """
    expected = variable_shapes(model)
    check_names(source, flat, expected)
    check_shapes(
        f"{source} holds arrays of wrong shapes",
        {path: (array.shape, expected[path].shape) for path, array in flat.items()},
    )
    check_finite(source, flat)


def check_finite(source: str, arrays: Mapping[str, jax.Array | np.ndarray]) -> None:
    """Checks that no value is NaN or infinite.

    Args:
      source: Where the arrays are from, for the error message.
      arrays: Floating-point arrays by name.

    Raises:
      WeightsError: If a value is. The message lists the arrays, and how many of their values are.
    """
    counts = {name: x.size - np.count_nonzero(np.isfinite(x)) for name, x in arrays.items()}
    faults = [f"{name} ({count} of {arrays[name].size})" for name, count in counts.items() if count]
    if faults:
        raise WeightsError(
            f"{source} has values that are NaN or infinite in {len(faults)} of {len(arrays)} "
            f"arrays: {format_list(faults, 3)}"
        )


def check_shapes(fault: str, shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    """Checks that shapes are the expected ones.

    Args:
      fault: The fault if they are not, for the error message.
      shapes: By name, the shape and the expected shape.

    Raises:
      WeightsError: If a shape is not the expected one.
    """
    faults = [
        f"{name} {shape} instead of {expected}"
        for name, (shape, expected) in shapes.items()
        if shape != expected
    ]
    if faults:
        raise WeightsError(f"{fault}: {format_list(faults)}")


def format_list(items: Iterable[object], limit: int = 12) -> str:
    """Formats the first items of a list for an error message, and counts the others."""
    texts = [str(item) for item in items]
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return f"[{', '.join(texts[:limit])}{more}]" if texts else "none"
