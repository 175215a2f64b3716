"""What is asked of tensors by name, whatever they are of: counts, shapes, and errors that list."""

import re


class WeightsError(ValueError):
    """Weights that are not those of a Segment Anything model, or not whole."""


def count_blocks(tensors, pattern):
    """How many blocks there are, numbered from 0 without a gap where the pattern says.

    Raises:
      WeightsError: if there is none, or a gap.
    """
    found = {int(m[1]) for name in tensors if (m := re.match(pattern, name))}
    if not found:
        raise WeightsError(f"no tensor is named like {pattern}; got {listed(sorted(tensors))}")
    if found != set(range(len(found))):
        raise WeightsError(
            f"names like {pattern} must count from 0 without a gap; got {listed(sorted(found))}"
        )
    return len(found)


def shape_of(tensors, name, ndim):
    """The shape of a tensor, which must be there, have `ndim` axes, and none of them empty.

    Raises:
      WeightsError: if it is not so.
    """
    if name not in tensors:
        raise WeightsError(f"{name} is missing; got {listed(tensors)}")
    if tensors[name].ndim != ndim or 0 in tensors[name].shape:
        raise WeightsError(f"{name} must have {ndim} axes, none empty; got {tensors[name].shape}")
    return tensors[name].shape


def check_names(what, got, expected):
    """Raises WeightsError, listing the names, unless those of `what` are exactly the expected."""
    unknown, missing = sorted(set(got) - set(expected)), sorted(set(expected) - set(got))
    if unknown or missing:
        raise WeightsError(
            f"{what} does not hold exactly the tensors of this model: "
            f"unknown {listed(unknown)}; missing {listed(missing)}"
        )


def listed(items, limit=12):
    """Names some of the items and counts the others."""
    items = [str(item) for item in items]
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return f"[{', '.join(items[:limit])}{more}]" if items else "none"
