"""Kernels against the products that they are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.model.attention import attend_plainly
from sam_jax.model.ops import flash_attention
from sam_jax.model.ops.platform import platform, traced_for


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    draw = lambda channels: rng.standard_normal((2, 384, channels)).astype(np.float32)
    return draw(20) / 2, draw(20), draw(12)


def values_and_gradients(attend, inputs):
    """The result, and the gradients of a sum in which every entry has a weight of its own."""
    weights = np.random.default_rng(1).standard_normal((2, 384, 12)).astype(np.float32)

    def total(*inputs):
        out = attend(*inputs)
        return jnp.sum(out * weights), out

    (_, out), gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*inputs)
    return out, *gradients


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def test_the_tpu_kernel_has_the_values_and_gradients_of_plain_products(inputs):
    kernel = functools.partial(flash_attention.attend_on_tpu, interpret=True)
    assert_same(
        values_and_gradients(kernel, inputs),
        values_and_gradients(attend_plainly, inputs),
    )


def test_the_gpu_kernel_is_given_what_makes_plain_products(inputs, monkeypatch):
    """cuDNN itself is not here: XLA does what it is asked to."""
    asked = []

    def attend(q, k, v, *, implementation, scale):
        asked.append((implementation, q.shape, k.shape, v.shape))
        logits = scale * jnp.einsum("qhd,khd->hqk", q, k)
        return jnp.einsum("hqk,khd->qhd", jax.nn.softmax(logits, axis=-1), v)

    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    found = values_and_gradients(flash_attention.attend_on_gpu, inputs)
    assert_same(found, values_and_gradients(attend_plainly, inputs))
    assert set(asked) == {("cudnn", *[(384, 2, 24)] * 3)}


@pytest.mark.parametrize(
    ("name", "tokens", "dtype", "kernel"),
    [
        ("tpu", 4096, "bfloat16", "attend_on_tpu"),
        ("tpu", 4096, "float32", "attend_on_tpu"),
        ("tpu", 100, "float32", None),
        ("gpu", 4096, "bfloat16", "attend_on_gpu"),
        ("gpu", 4096, "float32", None),
        ("cpu", 4096, "bfloat16", None),
    ],
)
def test_where_there_is_a_kernel(name, tokens, dtype, kernel):
    expected = getattr(flash_attention, kernel) if kernel else None
    with traced_for(name):
        assert flash_attention.choose(tokens, jnp.dtype(dtype)) is expected


def test_programs_are_traced_for_the_default_device_unless_it_is_said():
    assert platform() == "cpu"
    with traced_for("tpu"):
        with traced_for("gpu"):
            assert platform() == "gpu"
        assert platform() == "tpu"
    with jax.default_device(jax.devices("cpu")[1]):
        assert platform() == "cpu"
