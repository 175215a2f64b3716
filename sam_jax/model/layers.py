"""Layers whose initial values or numerics differ from Flax's defaults.

Sources: PyTorch's default initializers, which the released segment-anything code relies on; Xavier
uniform initializers in the image encoder, as in MAE (`models_mae.py`), from which the paper's
encoder is initialized.

Differences: the paper's encoder code draws truncated normals of 0.02. Xavier's values suit encoders
of any width.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

Initializer = Callable[..., Array]
Activation = Callable[[Float[Array, "*shape"]], Float[Array, "*shape"]]


def matmul_precision(dtype: str) -> AbstractContextManager[Any]:
    """Sets the precision of matrix products while a model with this compute type is traced.

    By default, TPUs multiply float32 matrices in bfloat16, and GPUs in TF32.
    """
    return jax.default_matmul_precision("highest" if dtype == "float32" else "default")


def xavier_uniform(
    key: Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32
) -> Float[Array, "..."]:
    """Draws Xavier's initial values for a kernel '... i o', a matrix from all axes but the last."""
    bound = math.sqrt(6 / (math.prod(shape[:-1]) + shape[-1]))
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def fan_in_uniform(fan_in: int) -> Initializer:
    """Returns PyTorch's initializer of weights and biases: uniform within 1 / sqrt(fan_in)."""
    bound = fan_in**-0.5

    def init(key: Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def linear(in_features: int, features: int, dtype: DTypeLike, name: str | None = None) -> nn.Dense:
    """Returns a dense layer with PyTorch's initial values, for the prompt encoder and decoder."""
    init = fan_in_uniform(in_features)
    return nn.Dense(features, dtype=dtype, kernel_init=init, bias_init=init, name=name)


def layer_norm(epsilon: float, dtype: DTypeLike, name: str) -> Activation:
    """Returns a LayerNorm with statistics in float32 and PyTorch's two-pass variance.

    It processes '... c' as rows: on CPUs the gradients of arrays with many axes are slow.
    """
    norm = nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, dtype=dtype, name=name)

    def apply(x: Float[Array, "*batch c"]) -> Float[Array, "*batch c"]:
        return norm(x.reshape(-1, x.shape[-1])).reshape(x.shape)

    return apply


def apply_layer_norm(
    x: Float[Array, "*batch c"],
    scale: Float32[Array, " c"],
    bias: Float32[Array, " c"],
    epsilon: float,
    dtype: DTypeLike,
) -> Float[Array, "*batch c"]:
    """Applies the norm of `layer_norm` with the given weights, as `NormWeights` returns them."""
    norm = nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, dtype=dtype, parent=None)
    norm = norm.bind({"params": {"scale": scale, "bias": bias}})
    return norm(x.reshape(-1, x.shape[-1])).reshape(x.shape)


class NormWeights(nn.Module):
    """The scale and bias of a LayerNorm that is computed elsewhere.

    Attributes:
      channels: Channels of the norm.
    """

    channels: int

    @nn.compact
    def __call__(self) -> tuple[Float32[Array, " c"], Float32[Array, " c"]]:
        """Returns the scale and the bias."""
        scale = self.param("scale", nn.initializers.ones, (self.channels,))
        bias = self.param("bias", nn.initializers.zeros, (self.channels,))
        return jnp.asarray(scale), jnp.asarray(bias)


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Computes the exact GELU.

    `jax.nn.gelu(approximate=False)` calls erfc, which is slower than erf on CPUs.
    """
    return 0.5 * x * (1 + lax.erf(x * math.sqrt(0.5)))


class Mlp(nn.Module):
    """Dense layers `lin1`, `lin2`, ... with an activation between them.

    Attributes:
      features: Width of each layer.
      activation: Activation between layers.
      dtype: Compute type.
    """

    features: Sequence[int]
    activation: Activation
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "*batch i"]) -> Float[Array, "*batch o"]:
        """Applies the layers."""
        for i, features in enumerate(self.features, start=1):
            x = linear(x.shape[-1], features, self.dtype, f"lin{i}")(x)
            if i < len(self.features):
                x = self.activation(x)
        return x


class Projection(nn.Module):
    """The weights of a linear map, for callers that fold it into other arrays.

    Attributes:
      in_features: Input channels.
      features: Output channels.
      is_conv: Store the kernel as that of a convolution of single pixels, '1 1 i o'.
    """

    in_features: int
    features: int
    is_conv: bool = False

    @nn.compact
    def __call__(self) -> tuple[Float32[Array, "i o"], Float32[Array, " o"]]:
        """Returns the kernel and the bias."""
        init = fan_in_uniform(self.in_features)
        patch = (1, 1) if self.is_conv else ()
        kernel = self.param("kernel", init, (*patch, self.in_features, self.features))
        bias = self.param("bias", init, (self.features,))
        return jnp.asarray(kernel).reshape(self.in_features, self.features), jnp.asarray(bias)


class PatchConv(nn.Module):
    """A convolution whose stride is its size.

    Its patches do not overlap, so that it is a single matrix product in both passes. CPUs compute
    the gradient of a convolution's kernel far more slowly.

    Attributes:
      features: Output channels.
      size: Side of a patch in pixels.
      dtype: Compute type.
      kernel_init: Initializer of the kernel.
      bias_init: Initializer of the bias; None for no bias.
    """

    features: int
    size: int
    dtype: str
    kernel_init: Initializer
    bias_init: Initializer | None = nn.initializers.zeros

    @nn.compact
    def __call__(
        self, x: Float[Array | np.ndarray, "*batch h w c"]
    ) -> Float[Array, "*batch gh gw o"]:
        """Convolves images whose sides the patch divides."""
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape).astype(self.dtype)
        patches = "... (h i) (w j) c -> ... h w (i j c)"
        x = rearrange(jnp.asarray(x, self.dtype), patches, i=self.size, j=self.size)
        x = x @ rearrange(kernel, "i j c o -> (i j c) o")
        if self.bias_init is None:
            return x
        return x + self.param("bias", self.bias_init, (self.features,)).astype(self.dtype)
