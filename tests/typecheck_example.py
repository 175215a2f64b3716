"""Examples of annotated code for `test_typecheck`."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import flax.linen as nn
import flax.struct
import jax
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int


def outer(x: Float[Array, " a"], y: Float[Array, " b"]) -> Float[Array, "a b"]:
    """Returns the outer product."""
    return x[:, None] * y[None, :]


def returns_wrong_shape(x: Float[Array, "a b"]) -> Float[Array, "a b"]:
    """Returns the transpose, which contradicts the annotation."""
    return x.T


def scale(x: Float[Array, "*shape"], factor: float) -> Float[Array, "*shape"]:
    """Returns the product of an array and a factor."""
    return factor * x


def count(mask: Bool[np.ndarray, "h w"]) -> int:
    """Returns the number of pixels."""
    return int(mask.sum())


def indices(stop: int) -> Iterator[Int[np.ndarray, " n"]]:
    """Yields arrays of growing length."""
    for n in range(stop):
        yield np.arange(n)


@contextlib.contextmanager
def opened(name: str) -> Iterator[str]:
    """Yields the name."""
    yield name


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def power(exponent: int, x: Float[Array, " a"]) -> Float[Array, " a"]:
    """Returns a power. Its custom gradient is one."""
    return x**exponent


def power_forward(exponent: int, x: Float[Array, " a"]) -> tuple[Float[Array, " a"], None]:
    """Returns the power and no residuals."""
    return power(exponent, x), None


def power_backward(exponent: int, _: None, g: Float[Array, " a"]) -> tuple[Float[Array, " a"]]:
    """Returns the gradient unchanged."""
    return (g,)


power.defvjp(power_forward, power_backward)


class Pair(NamedTuple):
    """Two arrays."""

    first: Float[Array, " a"]
    second: Float[Array, " a"]


@flax.struct.dataclass
class Points:
    """A pytree."""

    xy: Float[Array, "n 2"]
    label: Int[Array, " n"]

    def moved(self, by: Float[Array, " 2"]) -> "Points":
        """Returns shifted points."""
        return self.replace(xy=self.xy + by)


@dataclasses.dataclass(frozen=True)
class Settings:
    """A dataclass that is not a pytree."""

    rate: float
    name: str = ""


class Plain:
    """A class with an explicit constructor."""

    def __init__(self, size: int) -> None:
        self.size = size


class Head(nn.Module):
    """A module with `setup`."""

    dim: int
    dtype: str = "float32"

    def setup(self) -> None:
        self.proj = nn.Dense(self.dim, dtype=self.dtype)

    def __call__(self, x: Float[Array, "b c"]) -> Float[Array, "b {self.dim}"]:
        return self.proj(x)


class Stack(nn.Module):
    """A compact module with a submodule."""

    head: Head

    @nn.compact
    def __call__(self, x: Float[Array, "b c"], train: bool = False) -> Float[Array, "b d"]:
        """Applies two heads, the second one rematerialized."""
        x = self.head(x)
        x = nn.remat(Head)(self.head.dim, name="second")(x)
        return nn.Dropout(0.5, deterministic=not train)(x)


def double_kernel(x_ref, out_ref) -> None:
    """Doubles a block."""
    out_ref[...] = 2 * x_ref[...]


def double(x: Float[Array, "a b"]) -> Float[Array, "a b"]:
    """Doubles an array with a Pallas kernel."""
    return pl.pallas_call(
        double_kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True
    )(x)
