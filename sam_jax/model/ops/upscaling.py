"""Masks of an image: two upscalings, a norm, GELUs, and the product with the hypernetworks.

Source: segment-anything `modeling/mask_decoder.py`, `output_upscaling` and `predict_masks`.

Differences: the transposed convolutions, whose 2x2 patches do not overlap, are matrix products. A
token becomes 2x2 pixels, and each of these 2x2 pixels again. The 16 pixels of a token are
independent of each other and stay grouped by token until the masks are made.

The TPU kernel reads the image and writes logits. The channels of the pixels never leave VMEM. Its
GELU approximates the error function with an absolute error below 3e-6.
"""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from sam_jax.model.layers import apply_layer_norm
from sam_jax.model.layers import gelu as exact_gelu
from sam_jax.model.ops.blocks import (
    Ref,
    dot,
    full_block,
    normalize,
    normalize_grad,
    num_steps,
    pixel_block,
    pixel_kernel_cost,
    struct_like,
    vmap_objects,
    zero_on_first_step,
)
from sam_jax.model.ops.kernel_cost import CostFunction

NORM_EPSILON = 1e-6
# erf(x) = tanh(x P(x^2)) with fitted coefficients of P: TPUs have an instruction for tanh.
ERF_COEFFICIENTS = (1.1283581690, 0.1029329244, -0.0004968150, -0.0004151420, 0.0000322448)
SUBPIXELS = ((0, 0), (0, 1), (1, 0), (1, 1))  # row and column of the 2x2 pixels of an upscaling

COSTS: Mapping[str, CostFunction] = {
    "upscaling_forward": pixel_kernel_cost(5217),
    "upscaling_backward": pixel_kernel_cost(12412),
}


class UpscalingWeights(NamedTuple):
    """The weights of both upscalings, with o channels after the first and e after the second.

    Attributes:
      kernel1: 'c 2 2 o'.
      bias1: 'o'.
      norm_scale: 'o'.
      norm_bias: 'o'.
      kernel2: 'o 2 2 e'.
      bias2: 'e'.
    """

    kernel1: Array
    bias1: Array
    norm_scale: Array
    norm_bias: Array
    kernel2: Array
    bias2: Array


def upscale_xla(
    image: Float[Array, "b n p c"],
    weights: UpscalingWeights,
    hypernetwork_out: Float[Array, "b n m e"],
) -> Float32[Array, "b n m 16 p"]:
    """Makes masks in plain JAX; see `dispatch.upscale_masks`."""
    x = deconvolve(image, weights.kernel1, weights.bias1)
    x = apply_layer_norm(x, weights.norm_scale, weights.norm_bias, NORM_EPSILON, image.dtype)
    x = exact_gelu(x)
    x = exact_gelu(deconvolve(x, weights.kernel2, weights.bias2))
    logits = jnp.einsum(
        "bnpijklc,bnmc->bnpijklm", x, hypernetwork_out, preferred_element_type=jnp.float32
    )
    return rearrange(logits, "b n p i j k l m -> b n m (i k j l) p")


def deconvolve(
    x: Float[Array, "*batch c"], kernel: Float[Array, "c 2 2 o"], bias: Float[Array, " o"]
) -> Float[Array, "*batch 2 2 o"]:
    """Applies a transposed convolution of stride 2 that keeps the 2x2 pixels apart."""
    return jnp.einsum("...c,cijo->...ijo", x, kernel.astype(x.dtype)) + bias.astype(x.dtype)


def upscale_pallas(
    image: Float[Array, "b n p c"],
    weights: UpscalingWeights,
    hypernetwork_out: Float[Array, "b n m e"],
) -> Float32[Array, "b n m 16 p"]:
    """Makes masks with the TPU kernel; see `dispatch.upscale_masks`."""

    def upscale_object(
        image: Float[Array, "p c"], hypernetwork_out: Float[Array, "m e"]
    ) -> Float32[Array, "m 16 p"]:
        return upscale(image, weights, hypernetwork_out)

    return vmap_objects(upscale_object, image, hypernetwork_out)


def arrange_xla(logits: Float32[Array, "b n m 16 p"], gh: int) -> Float32[Array, "b n m 4*{gh} lw"]:
    """Places pixels by a transposition; see `dispatch.arrange_pixels`."""
    return rearrange(logits, "b n m (i j) (gh gw) -> b n m (gh i) (gw j)", i=4, gh=gh)


def arrange_matmul(
    logits: Float32[Array, "b n m 16 p"], gh: int
) -> Float32[Array, "b n m 4*{gh} lw"]:
    """Places pixels by a product with a permutation matrix.

    TPUs are slow at moving numbers within a row. The product is faster, and exact.
    """
    logits = rearrange(logits, "b n m (i j) (gh gw) -> b n m (gh i) (j gw)", i=4, gh=gh)
    order = rearrange(np.arange(logits.shape[-1]), "(gw j) -> (j gw)", j=4)
    permutation = np.eye(len(order), dtype=np.float32)[order]
    return jnp.matmul(logits, permutation, precision=jax.lax.Precision.HIGHEST)


class KernelWeights(NamedTuple):
    """The weights as the kernel reads them; a 4 stands for (row column) of 2x2 pixels.

    Attributes:
      kernel1: '(4 o) c'.
      bias1: 'o 1' float32.
      norm_scale: 'o 1' float32.
      norm_bias: 'o 1' float32.
      kernel2: '(4 e) o'.
      bias2: '(4 e) 1' float32.
      masks: '(4 m) (4 e)', block-diagonal: the weights of the channels in each of m masks.
    """

    kernel1: Array
    bias1: Array
    norm_scale: Array
    norm_bias: Array
    kernel2: Array
    bias2: Array
    masks: Array


def upscale(
    image: Float[Array, "p c"], weights: UpscalingWeights, hypernetwork_out: Float[Array, "m e"]
) -> Float32[Array, "m 16 p"]:
    """Makes the masks of one object.

    Args:
      image: Pixels, a number that `blocks.pixels_per_step` can cut into steps.
      weights: Weights of the upscalings.
      hypernetwork_out: Weights of the last channels in each mask.

    Returns:
      Logits of the 4x4 pixels of each token.
    """
    masks = jnp.einsum("qr,me->qmre", jnp.eye(4, dtype=image.dtype), hypernetwork_out)
    kernel_weights = KernelWeights(
        kernel1=_rows(weights.kernel1, image.dtype),
        bias1=_column(weights.bias1),
        norm_scale=_column(weights.norm_scale),
        norm_bias=_column(weights.norm_bias),
        kernel2=_rows(weights.kernel2, image.dtype),
        bias2=_column(jnp.tile(weights.bias2, 4)),
        masks=masks.reshape(4 * len(hypernetwork_out), -1),
    )
    return upscale_columns(image.T, kernel_weights)


def _rows(kernel: Float[Array, "i 2 2 o"], dtype: DTypeLike) -> Float[Array, "4*o i"]:
    return kernel.reshape(len(kernel), -1).T.astype(dtype)


def _column(x: Float[Array, " c"]) -> Float32[Array, "c 1"]:
    return x.astype(jnp.float32)[:, None]


@jax.custom_vjp
def upscale_columns(image: Float[Array, "c p"], weights: KernelWeights) -> Float32[Array, "m 16 p"]:
    """Runs the kernel on an image with pixels in columns."""
    masks, p = len(weights.masks) // 4, image.shape[1]
    logits = jax.ShapeDtypeStruct((masks, 16, p), jnp.float32)
    return pl.pallas_call(
        forward_kernel,
        grid=(num_steps(p),),
        in_specs=[pixel_block(image), jax.tree.map(full_block, weights)],
        out_specs=pixel_block(logits),
        out_shape=logits,
        name="upscaling_forward",
    )(image, weights)


def upscale_forward(
    image: Float[Array, "c p"], weights: KernelWeights
) -> tuple[Float32[Array, "m 16 p"], tuple[Array, KernelWeights]]:
    """Returns the result of `upscale_columns`, and its arguments for the backward pass."""
    return upscale_columns(image, weights), (image, weights)


def upscale_backward(
    saved: tuple[Array, KernelWeights], d_logits: Float32[Array, "m 16 p"]
) -> tuple[Float[Array, "c p"], KernelWeights]:
    """Returns the gradients of the arguments of `upscale_columns`."""
    image, weights = saved
    d_image, d_weights = pl.pallas_call(
        backward_kernel,
        grid=(num_steps(image.shape[1]),),
        in_specs=[pixel_block(image), jax.tree.map(full_block, weights), pixel_block(d_logits)],
        out_specs=[pixel_block(image), jax.tree.map(full_block, weights)],
        out_shape=[
            struct_like(image),
            jax.tree.map(lambda x: struct_like(x, jnp.float32), weights),
        ],
        name="upscaling_backward",
    )(image, weights, d_logits)
    return d_image, jax.tree.map(lambda d, x: d.astype(x.dtype), d_weights, weights)


upscale_columns.defvjp(upscale_forward, upscale_backward)


def erf(x: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """Approximates the error function in fewer operations than `jax.lax.erf`."""
    square = x * x
    series: Array | float = ERF_COEFFICIENTS[-1]
    for coefficient in ERF_COEFFICIENTS[-2::-1]:
        series = series * square + coefficient
    return jnp.tanh(x * series)


def gelu(x: Float32[Array, "o p"]) -> tuple[Float32[Array, "o p"], Float32[Array, "o p"]]:
    """Returns the GELU of x and its derivative; the compiler drops the one that is not used."""
    probability = 0.5 * (1 + erf(x * math.sqrt(0.5)))
    slope = probability + x * jnp.exp(-0.5 * x * x) * (2 * math.pi) ** -0.5
    return x * probability, slope


class SubpixelActivations(NamedTuple):
    """The intermediate results of one pixel of the first 2x2, which both passes need.

    Attributes:
      normed: 'o p' float32, before scale and bias.
      inverse_deviation: '1 p' float32, before the norm.
      first: 'o p', after the first GELU.
      first_slope: 'o p' float32, the derivative of the first GELU.
      second: '(4 e) p', after the second GELU.
      second_slope: '(4 e) p' float32, the derivative of the second GELU.
    """

    normed: Array
    inverse_deviation: Array
    first: Array
    first_slope: Array
    second: Array
    second_slope: Array


def compute(
    image: Float[Array, "c p"], kernel1: Float[Array, "o c"], weights: KernelWeights
) -> SubpixelActivations:
    """Upscales to one of the first 2x2 pixels, whose rows of the kernel are `kernel1`."""
    x = dot(kernel1, image, (1, 0)) + weights.bias1[:]
    normed, inverse_deviation = normalize(x, NORM_EPSILON)
    first, first_slope = gelu(normed * weights.norm_scale[:] + weights.norm_bias[:])
    first = first.astype(image.dtype)
    x = dot(weights.kernel2[:], first, (1, 0)) + weights.bias2[:]
    second, second_slope = gelu(x)
    second = second.astype(image.dtype)
    return SubpixelActivations(normed, inverse_deviation, first, first_slope, second, second_slope)


def subpixels(weights: KernelWeights) -> Iterator[tuple[slice, list[int]]]:
    """Yields, for each of the first 2x2 pixels, its rows of `kernel1` and its four output pixels.

    Output pixels are numbered row by row in the 4x4 pixels of a token.
    """
    o = len(weights.bias1)
    for n, (row, column) in enumerate(SUBPIXELS):
        outputs = [8 * row + 4 * k + 2 * column + j for k, j in SUBPIXELS]
        yield slice(n * o, (n + 1) * o), outputs


def forward_kernel(image: Ref, weights: KernelWeights, logits: Ref) -> None:
    """Writes the logits of the pixels of a step."""
    masks = len(logits)
    for rows, outputs in subpixels(weights):
        second = compute(image[:], weights.kernel1[rows], weights).second
        products = dot(weights.masks[:], second, (1, 0))
        for n, s in enumerate(outputs):
            logits[:, s] = products[n * masks : (n + 1) * masks]


def backward_kernel(
    image: Ref, weights: KernelWeights, d_logits: Ref, d_image: Ref, d_weights: KernelWeights
) -> None:
    """Writes the gradient of the pixels of a step, and adds to the gradients of the weights."""
    zero_on_first_step(*d_weights)
    dtype, image_grads = image.dtype, []
    for rows, outputs in subpixels(weights):
        kernel1 = weights.kernel1[rows]
        forward = compute(image[:], kernel1, weights)
        d_products = jnp.concatenate([d_logits[:, s] for s in outputs]).astype(dtype)
        d_weights.masks[:] += dot(d_products, forward.second, (1, 1))
        d_second = dot(weights.masks[:], d_products, (0, 0)) * forward.second_slope
        d_weights.bias2[:] += _sum_pixels(d_second)
        d_second = d_second.astype(dtype)
        d_weights.kernel2[:] += dot(d_second, forward.first, (1, 1))
        d_first = dot(weights.kernel2[:], d_second, (0, 0)) * forward.first_slope
        d_weights.norm_scale[:] += _sum_pixels(d_first * forward.normed)
        d_weights.norm_bias[:] += _sum_pixels(d_first)
        d_first = normalize_grad(
            d_first * weights.norm_scale[:], forward.normed, forward.inverse_deviation
        )
        d_weights.bias1[:] += _sum_pixels(d_first)
        d_first = d_first.astype(dtype)
        d_weights.kernel1[rows] += dot(d_first, image[:], (1, 1))
        image_grads.append(dot(kernel1, d_first, (0, 0)))
    d_image[:] = sum(image_grads[1:], image_grads[0]).astype(d_image.dtype)


def _sum_pixels(x: Float32[Array, "o p"]) -> Float32[Array, "o 1"]:
    return jnp.sum(x, axis=1, keepdims=True)
