"""Prompts, comparisons and inspection of traced functions for tests of the model."""

import math

import flax.traverse_util
import jax
import numpy as np

from sam_jax.model.prompt_encoder import ABSENT, Prompts

TOLERANCE = 1e-5  # of the largest magnitude

# Labels 1 and 0 are points, 2 and 3 are the corners of a box, and -1 is the padding point.
OBJECTS = {
    "one point": [(30, 20, 1), (0, 0, -1)],
    "box": [(5, 6, 2), (50, 33, 3)],
    "points": [(30, 20, 1), (60, 40, 0), (3, 44, 0), (0, 0, -1)],
    "box and points": [(30, 20, 1), (60, 40, 0), (5, 6, 2), (50, 33, 3)],
    "nothing": [],
}


def assert_close(actual, expected, tolerance=TOLERANCE):
    """Compares with a tolerance relative to the largest magnitude."""
    assert np.shape(actual) == np.shape(expected)
    scale = float(np.abs(expected).max())
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


def count_values(flat, part=""):
    """Counts the values of arrays whose path contains `part`."""
    return sum(math.prod(x.shape) for path, x in flat.items() if part in path)


def transpose_variables(variables):
    """Returns variables with which a transposed image gives the transposed results."""
    flat = flax.traverse_util.flatten_dict(variables, sep="/")
    swapped = {}
    for path, x in flat.items():
        swap = {"rel_pos_h": "rel_pos_w", "rel_pos_w": "rel_pos_h"}
        *parents, name = path.split("/")
        if name in swap:
            swapped["/".join([*parents, swap[name]])] = x
        elif "upscaling" in parents or name == "pos_embed":
            swapped[path] = x.swapaxes(1, 2) if x.ndim == 4 else x
        elif name == "kernel" and x.ndim == 4:
            swapped[path] = x.swapaxes(0, 1)
        elif name == "gaussian":
            swapped[path] = x[::-1]
        else:
            swapped[path] = x
    return flax.traverse_util.unflatten_dict(swapped, sep="/")


def pack(objects, slots, rng, garbage=1e6):
    """Puts the tokens of each object into random slots, in order, and garbage into the others."""
    n = len(objects)
    points = rng.uniform(-garbage, garbage, (1, n, slots, 2)).astype(np.float32)
    labels = np.full((1, n, slots), ABSENT, np.int32)
    for i, tokens in enumerate(objects):
        for slot, (x, y, label) in zip(
            np.sort(rng.permutation(slots)[: len(tokens)]), tokens, strict=True
        ):
            points[0, i, slot] = x, y
            labels[0, i, slot] = label
    return Prompts(points=points, labels=labels)


def with_masks(prompts, mask, has_mask, rng):
    """Adds a mask prompt to some objects, and garbage to the others."""
    n = prompts.points.shape[1]
    masks = rng.uniform(-1e3, 1e3, (1, n, *mask.shape)).astype(np.float32)
    has = np.zeros((1, n), bool)
    for i in has_mask:
        masks[0, i], has[0, i] = mask, True
    return prompts.replace(mask=masks, has_mask=has)


def two_images(prompts, other):
    """Returns the prompts of one image and those of another, in one batch."""
    return jax.tree.map(lambda a, b: np.concatenate([a, b]), prompts, other)


def prompts_of(points, labels, mask=None, has_mask=None):
    """Returns prompts of zeros with these shapes."""
    return Prompts(
        np.zeros(points, np.float32),
        np.zeros(labels, np.int32),
        None if mask is None else np.zeros(mask, np.float32),
        None if has_mask is None else np.zeros(has_mask, bool),
    )


def equations(jaxpr):
    """Yields the equations of a jaxpr, also inside loops, calls and custom derivatives."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from equations(inner)


def primitives(jaxpr):
    """Returns the names of the primitives of a jaxpr."""
    return [equation.primitive.name for equation in equations(jaxpr)]


def products(function, *args):
    """Yields (precision, dtype of the operands) of the matrix products and convolutions."""
    for equation in equations(jax.make_jaxpr(function)(*args)):
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield equation.params["precision"], equation.invars[0].aval.dtype.name
