"""Widens the layers of a SAM after its encoder without changing what they compute.

A wide mask decoder can start from a narrow one, which already knows what prompts mean.

Source: Chen, Goodfellow and Shlens 2016, "Net2Net: Accelerating Learning via Knowledge Transfer"
(Net2WiderNet).

Differences: Every channel has the same number of copies, which are neighbors, so that norms see
the same mean and variance, and heads keep their channels. The copies share the weights of their
outputs unequally: they would have equal gradients, and stay equal, if they shared them equally.
"""

import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import ArrayLike, Float

from sam_jax.model.sam import Sam

# Numbers of channels that can be multiplied, by module.
CHANNELS = {
    "image_encoder": ("out_dim",),
    "prompt_encoder": ("dim", "mask_channels"),
    "mask_decoder": ("dim", "mlp_dim", "iou_hidden_dim"),
}
SHARE_NOISE = 0.4  # of a copy's share of the output weights, relative to an equal share


def widened_fields(narrow: Sam, wide: Sam) -> list[str]:
    """Returns the fields, such as "mask_decoder.dim", that are multiples in the wider model.

    Args:
      narrow: The model to start from.
      wide: The model to train.
    """
    return [
        f"{module}.{name}"
        for module, names in CHANNELS.items()
        for name in names
        if getattr(getattr(wide, module), name) % getattr(getattr(narrow, module), name) == 0
    ]


def widen(
    variables: Mapping[str, ArrayLike], shapes: Mapping[str, tuple[int, ...]], seed: int
) -> dict[str, Float[np.ndarray, "..."]]:
    """Widens variables to shapes whose sides are multiples of theirs.

    Args:
      variables: Variables of a SAM by path, such as "params/mask_decoder/iou_token". Those of one
        shape already are not changed.
      shapes: The shape of each of them in the wider model.
      seed: Determines the shares of copies.

    Returns:
      The variables of the wider model.
    """
    return {
        name: _widen_one(name, np.asarray(value), shapes[name], np.random.default_rng([seed, i]))
        for i, (name, value) in enumerate(sorted(variables.items()))
    }


def _widen_one(
    name: str, value: Float[np.ndarray, "..."], shape: tuple[int, ...], rng: np.random.Generator
) -> Float[np.ndarray, "..."]:
    """Widens a variable; see `widen`."""
    if value.shape == shape:
        return value
    dtype, input_axis = value.dtype, _input_axis(name, value.ndim)
    factors = [size // old for size, old in zip(shape, value.shape, strict=True)]
    output_factor = factors[-1]
    for axis, factor in enumerate(factors):
        value = np.repeat(value, factor, axis)
    if input_axis is not None:
        # Drawn for each copy of an output, too: copies of queries and keys, which are only
        # multiplied with each other, would otherwise stay equal.
        value = value * _shares(shape, input_axis, factors[input_axis], rng)
    if "/q/" in name:
        # The product with as many copies of the keys is divided by the root of the channels.
        value = value / math.sqrt(output_factor)
    if "/hypernetwork_" in name and "/lin3/" in name:
        # Its product with the upscaled image adds up the copies.
        value = value / output_factor
    return value.astype(dtype)


def _input_axis(name: str, ndim: int) -> int | None:
    """Returns the axis of a variable over which its layer sums; None if it does not."""
    if not name.endswith("/kernel"):
        return None
    return 0 if "/upscaling/" in name else ndim - 2


def _shares(
    shape: tuple[int, ...], axis: int, factor: int, rng: np.random.Generator
) -> Float[np.ndarray, "..."]:
    """Returns shares that sum to 1 over the copies, neighbors along an axis, of each channel."""
    split = (*shape[:axis], shape[axis] // factor, factor, *shape[axis + 1 :])
    noise = rng.standard_normal(split)
    noise -= noise.mean(axis=axis + 1, keepdims=True)
    return ((1 + SHARE_NOISE * noise) / factor).reshape(shape)
