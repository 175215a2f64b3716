"""Validates images of any size and encodes them in batches of a fixed size."""

import functools
from collections.abc import Sequence
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from sam_jax.images.resize import resize_and_pad
from sam_jax.model.sam import Sam, normalize
from sam_jax.predict.fork import warn_if_forked


def unbind(model: Sam, variables: dict[str, Any] | None) -> tuple[Sam, dict[str, Any]]:
    """Returns a model that is bound to no variables, and its variables.

    Args:
      model: The model, which may be bound to variables.
      variables: Its variables; None for those that it is bound to.

    Raises:
      ValueError: If there are none.
    """
    if variables is not None:
        return model, variables
    if model.scope is None:
        raise ValueError(
            "variables must be given, as sam_jax.load returns them: (model, variables); or the "
            "model must be bound to them: model.bind(variables)"
        )
    unbound, bound_variables = model.unbind()
    return unbound, dict(bound_variables)


def check_image(image: object, image_format: str = "RGB") -> UInt8[np.ndarray, "h w 3"]:
    """Validates an image and returns it with its channels in the order RGB.

    Args:
      image: The image to check.
      image_format: The order of its channels, "RGB" or "BGR".

    Raises:
      ValueError: If the image is not an 'h w 3' uint8 array, or the order is unknown.
    """
    if image_format not in ("RGB", "BGR"):
        raise ValueError(f'image_format must be "RGB" or "BGR"; got {image_format!r}')
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        got = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"image must be a numpy array of uint8, values 0 to 255; got {got}")
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"image must have shape (height, width, 3); got {image.shape}")
    return image if image_format == "RGB" else image[..., ::-1]


def device_of(variables: dict[str, Any]) -> jax.Device:
    """Returns a device that holds variables, or the default device if they are numpy arrays.

    `jax.default_device(device_of(variables))` makes the implementations of operations suit the
    device that a program with these variables runs on.
    """
    leaf = jax.tree.leaves(variables)[0]
    return next(iter(leaf.devices())) if isinstance(leaf, jax.Array) else jnp.zeros(()).device


@functools.partial(jax.jit, static_argnames=("model", "method"))
def encode_images(
    model: Sam,
    variables: dict[str, Any],
    images: UInt8[Array, "b h w 3"],
    sizes: Int[Array, "b 2"],
    method: Literal["encode", "encode_trunk"] = "encode",
) -> Float[Array, "b gh gw c"]:
    """Normalizes and encodes padded images in one program.

    Args:
      model: The model.
      variables: Its variables.
      images: RGB images, padded at the bottom and on the right.
      sizes: (height, width) of each image without its padding.
      method: The method of the model to apply.

    Returns:
      The embeddings, or the tokens before the neck, in the model's `dtype`.
    """
    return cast(Array, model.apply(variables, normalize(images, sizes), method=method))


def resize_and_encode(
    model: Sam,
    variables: dict[str, Any],
    images: Sequence[UInt8[np.ndarray, "_ _ 3"]],
    batch_size: int,
) -> tuple[Float[Array, "b gh gw c"], list[tuple[int, int]]]:
    """Resizes, pads and encodes up to `batch_size` images in one program.

    If there are fewer images, copies of the last one fill the batch, so that every call with the
    same `batch_size` runs the same program.

    Args:
      model: The model.
      variables: Its variables.
      images: RGB images of any sizes, at least one and at most `batch_size`.
      batch_size: The number of embeddings that are computed, b.

    Returns:
      The embeddings, those of `images` first, and the (height, width) of each resized image
      without its padding.
    """
    warn_if_forked()
    padded, sizes = [], []
    for image in images:
        canvas, size = resize_and_pad(image, model.image_size)
        padded.append(canvas)
        sizes.append(size)
    missing = batch_size - len(images)
    image_batch = np.stack(padded + padded[-1:] * missing)
    size_batch = np.array(sizes + sizes[-1:] * missing, np.int32)
    with jax.default_device(device_of(variables)):
        return encode_images(model, variables, image_batch, size_batch), sizes
