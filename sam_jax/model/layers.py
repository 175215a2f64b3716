"""The few layers whose initial values or numerics differ from Flax's defaults.

Sources: PyTorch's default initial values, which the released segment-anything code relies on;
Xavier's uniform ones in the image encoder, as in MAE, from which the paper's encoder comes
(`models_mae.py`): unlike truncated normals of 0.02 they suit encoders of any width.
"""

import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax


def xavier_uniform(key, shape, dtype=jnp.float32):
    """Xavier's initial values for a kernel '... i o', one matrix product from all but the last."""
    bound = math.sqrt(6 / (math.prod(shape[:-1]) + shape[-1]))
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def fan_in_uniform(fan_in):
    """PyTorch's initial values for weights and biases alike: uniform within 1 / sqrt(fan_in)."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


def linear(in_features, features, dtype, name=None):
    """A dense layer with PyTorch's initial values, as in the prompt encoder and mask decoder."""
    init = fan_in_uniform(in_features)
    return nn.Dense(features, dtype=dtype, kernel_init=init, bias_init=init, name=name)


def layer_norm(epsilon, dtype, name):
    """A LayerNorm with statistics in float32 and PyTorch's two-pass variance.

    It sees '... c' as rows, as gradients of arrays of many axes are slow on CPUs.
    """
    norm = nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, dtype=dtype, name=name)
    return lambda x: norm(x.reshape(-1, x.shape[-1])).reshape(x.shape)


class NormWeights(nn.Module):
    """The scale and bias 'c' of a LayerNorm, for callers that normalise elsewhere."""

    channels: int

    @nn.compact
    def __call__(self):
        scale = self.param("scale", nn.initializers.ones, (self.channels,))
        return scale, self.param("bias", nn.initializers.zeros, (self.channels,))


def gelu(x):
    """The exact GELU. `jax.nn.gelu(approximate=False)` calls erfc, which CPUs compute slower."""
    return 0.5 * x * (1 + lax.erf(x * math.sqrt(0.5)))


class Mlp(nn.Module):
    """Dense layers `lin1`, `lin2`, ... of the given widths, with an activation between them."""

    features: Sequence[int]
    activation: Callable
    dtype: str

    @nn.compact
    def __call__(self, x):
        for i, features in enumerate(self.features, start=1):
            x = linear(x.shape[-1], features, self.dtype, f"lin{i}")(x)
            if i < len(self.features):
                x = self.activation(x)
        return x


class Projection(nn.Module):
    """The weights of a linear map (kernel 'i o', bias 'o'), for callers that fold it elsewhere.

    With `is_conv` it is a convolution of single pixels, whose kernel is stored as '1 1 i o'.
    """

    in_features: int
    features: int
    is_conv: bool = False

    @nn.compact
    def __call__(self):
        init = fan_in_uniform(self.in_features)
        patch = (1, 1) if self.is_conv else ()
        kernel = self.param("kernel", init, (*patch, self.in_features, self.features))
        kernel = kernel.reshape(self.in_features, self.features)
        return kernel, self.param("bias", init, (self.features,))


class PatchConv(nn.Module):
    """A convolution whose stride is its size: '... (h size) (w size) c' -> '... h w features'.

    Its patches do not overlap, so that it is one matrix product, forwards and backwards; CPUs
    take the gradient of a convolution's kernel far more slowly.
    """

    features: int
    size: int
    dtype: str
    kernel_init: Callable
    bias_init: Callable | None = nn.initializers.zeros  # None: no bias

    @nn.compact
    def __call__(self, x):
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape).astype(self.dtype)
        patches = "... (h i) (w j) c -> ... h w (i j c)"
        x = rearrange(x.astype(self.dtype), patches, i=self.size, j=self.size)
        x = x @ rearrange(kernel, "i j c o -> (i j c) o")
        if self.bias_init is None:
            return x
        return x + self.param("bias", self.bias_init, (self.features,)).astype(self.dtype)
