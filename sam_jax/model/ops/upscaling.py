"""A kernel for what makes masks of an image: two upscalings, a norm, GELUs, and the last product.

A token becomes 2 x 2 pixels, each of them 2 x 2 again; the 16 never meet, so that none of their
channels leaves VMEM: what is read is the image, what is written are logits.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from sam_jax.model.ops.blocks import (
    like,
    norm_gradient,
    normalize,
    pixels_at_once,
    product,
    step_of,
    whole,
    zero_at_first,
)

EPSILON = 1e-6  # of the norm
# erf(x) = tanh(x P(x^2)), P's coefficients fitted to it: wrong by 3e-6 at most. Devices have an
# instruction for tanh.
ERF = (1.1283581690, 0.1029329244, -0.0004968150, -0.0004151420, 0.0000322448)
HALVES = ((0, 0), (0, 1), (1, 0), (1, 1))  # rows and columns of 2 x 2


class Weights(NamedTuple):
    """Of the upscalings: o channels of a half, e of a quarter; 4 is (row column) of 2 x 2.

    Attributes:
      kernel1: '(4 o) c', bias1: 'o 1'; norm_scale, norm_bias: 'o 1'.
      kernel2: '(4 e) o', bias2: '(4 e) 1'.
      masks: '(4 m) (4 e)', what channels count in each of m masks, at each quarter alone.
    """

    kernel1: jax.Array
    bias1: jax.Array
    norm_scale: jax.Array
    norm_bias: jax.Array
    kernel2: jax.Array
    bias2: jax.Array
    masks: jax.Array


def paint(image, kernel1, bias1, norm_scale, norm_bias, kernel2, bias2, hyper):
    """Logits of masks.

    Args:
      image: 'p c', p a multiple of 512.
      kernel1: 'c 2 2 o', bias1, norm_scale, norm_bias: 'o'.
      kernel2: 'o 2 2 e', bias2: 'e'.
      hyper: 'm e', of the masks.

    Returns:
      'm s p' float32, the 4 x 4 pixels s of each token.
    """
    rows = lambda kernel: kernel.reshape(len(kernel), -1).T.astype(image.dtype)
    column = lambda x: x.astype(jnp.float32)[:, None]
    masks = jnp.einsum("qr,me->qmre", jnp.eye(4, dtype=image.dtype), hyper)
    weights = Weights(
        kernel1=rows(kernel1),
        bias1=column(bias1),
        norm_scale=column(norm_scale),
        norm_bias=column(norm_bias),
        kernel2=rows(kernel2),
        bias2=column(jnp.tile(bias2, 4)),
        masks=masks.reshape(4 * len(hyper), -1),
    )
    return paint_columns(image.T, weights)


@jax.custom_vjp
def paint_columns(image, weights):
    """The same of an image 'c p' and `Weights`."""
    masks, p = len(weights.masks) // 4, image.shape[1]
    logits = jax.ShapeDtypeStruct((masks, 16, p), jnp.float32)
    return pl.pallas_call(
        forward_kernel,
        grid=(p // pixels_at_once(p),),
        in_specs=[step_of(image), jax.tree.map(whole, weights)],
        out_specs=step_of(logits),
        out_shape=logits,
        name="upscaling_forward",
    )(image, weights)


def paint_forward(image, weights):
    """`paint_columns`, and what its gradients need: its arguments."""
    return paint_columns(image, weights), (image, weights)


def paint_backward(saved, d_logits):
    """Gradients of an image and `Weights`, from those of the logits 'm s p'."""
    image, weights = saved
    d_image, d_weights = pl.pallas_call(
        backward_kernel,
        grid=(image.shape[1] // pixels_at_once(image.shape[1]),),
        in_specs=[step_of(image), jax.tree.map(whole, weights), step_of(d_logits)],
        out_specs=[step_of(image), jax.tree.map(whole, weights)],
        out_shape=[like(image), jax.tree.map(lambda x: like(x, jnp.float32), weights)],
        name="upscaling_backward",
    )(image, weights, d_logits)
    return d_image, jax.tree.map(lambda d, x: d.astype(x.dtype), d_weights, weights)


paint_columns.defvjp(paint_forward, paint_backward)


def erf(x):
    """The error function, in fewer operations than `jax.lax.erf`."""
    square, series = x * x, ERF[-1]
    for coefficient in ERF[-2::-1]:
        series = series * square + coefficient
    return jnp.tanh(x * series)


def gelu(x):
    """GELU of x, and its derivative; what is not used is not computed."""
    below = 0.5 * (1 + erf(x * math.sqrt(0.5)))
    return x * below, below + x * jnp.exp(-0.5 * x * x) * (2 * math.pi) ** -0.5


class Half(NamedTuple):
    """What one pixel of the first upscaling's 2 x 2 goes through, 'o p' and '(4 e) p'."""

    normed: jax.Array
    inverse_deviation: jax.Array
    first: jax.Array
    first_slope: jax.Array
    second: jax.Array
    second_slope: jax.Array


def compute(image, kernel1, weights):
    """Upscales to one of the first 2 x 2 pixels, with its '(o) c' of the kernel -> `Half`."""
    x = product(kernel1, image, (1, 0)) + weights.bias1[:]
    normed, inverse_deviation = normalize(x, EPSILON)
    first, first_slope = gelu(normed * weights.norm_scale[:] + weights.norm_bias[:])
    first = first.astype(image.dtype)
    x = product(weights.kernel2[:], first, (1, 0)) + weights.bias2[:]
    second, second_slope = gelu(x)
    second = second.astype(image.dtype)
    return Half(normed, inverse_deviation, first, first_slope, second, second_slope)


def halves(weights):
    """Each of the first 2 x 2 pixels: rows of `kernel1`, and the four s of its 2 x 2."""
    o = len(weights.bias1)
    for n, (row, column) in enumerate(HALVES):
        yield slice(n * o, (n + 1) * o), [8 * row + 4 * k + 2 * column + j for k, j in HALVES]


def forward_kernel(image, weights, logits):
    """Writes the logits of a step's pixels."""
    for rows, places in halves(weights):
        second = compute(image[:], weights.kernel1[rows], weights).second
        found = product(weights.masks[:], second, (1, 0))
        for n, s in enumerate(places):
            masks = len(logits)
            logits[:, s] = found[n * masks : (n + 1) * masks]


def backward_kernel(image, weights, d_logits, d_image, d_weights):
    """Writes the gradient of a step's pixels, and adds to those of the weights."""
    zero_at_first(*d_weights)
    dtype, of_halves = image.dtype, []
    summed = lambda x: jnp.sum(x, axis=1, keepdims=True)
    for rows, places in halves(weights):
        kernel1 = weights.kernel1[rows]
        half = compute(image[:], kernel1, weights)
        d_found = jnp.concatenate([d_logits[:, s] for s in places]).astype(dtype)
        d_weights.masks[:] += product(d_found, half.second, (1, 1))
        d_second = product(weights.masks[:], d_found, (0, 0)) * half.second_slope
        d_weights.bias2[:] += summed(d_second)
        d_second = d_second.astype(dtype)
        d_weights.kernel2[:] += product(d_second, half.first, (1, 1))
        d_first = product(weights.kernel2[:], d_second, (0, 0)) * half.first_slope
        d_weights.norm_scale[:] += summed(d_first * half.normed)
        d_weights.norm_bias[:] += summed(d_first)
        d_first = norm_gradient(
            d_first * weights.norm_scale[:], half.normed, half.inverse_deviation
        )
        d_weights.bias1[:] += summed(d_first)
        d_first = d_first.astype(dtype)
        d_weights.kernel1[rows] += product(d_first, image[:], (1, 1))
        of_halves.append(product(kernel1, d_first, (0, 0)))
    d_image[:] = sum(of_halves[1:], of_halves[0]).astype(d_image.dtype)
