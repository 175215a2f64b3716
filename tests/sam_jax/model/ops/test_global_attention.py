"""Compares fused attention for accelerators with plain matrix products."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.model.ops import global_attention
from sam_jax.model.ops.relative_positions import attend_plain


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)

    def draw(channels):
        return rng.standard_normal((2, 384, channels)).astype(np.float32)

    return draw(20) / 2, draw(20), draw(12)


def values_and_gradients(attend, inputs):
    """Returns the result, and the gradients of its sum with random weights."""
    weights = np.random.default_rng(1).standard_normal((2, 384, 12)).astype(np.float32)

    def total(*inputs):
        out = attend(*inputs)
        return jnp.sum(out * weights), out

    (_, out), gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*inputs)
    return out, *gradients


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def test_splash_attention_has_the_values_and_gradients_of_plain_products(inputs):
    kernel = functools.partial(global_attention.splash_attention, interpret=True)
    assert_same(
        values_and_gradients(kernel, inputs),
        values_and_gradients(attend_plain, inputs),
    )


def test_cudnn_attention_has_the_values_and_gradients_of_plain_products(inputs, monkeypatch):
    """Replaces cuDNN, which needs a GPU, by plain JAX."""
    calls = []

    def attend(q, k, v, *, implementation, scale):
        calls.append((implementation, q.shape, k.shape, v.shape))
        logits = scale * jnp.einsum("qhd,khd->hqk", q, k)
        return jnp.einsum("hqk,khd->qhd", jax.nn.softmax(logits, axis=-1), v)

    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    actual = values_and_gradients(global_attention.cudnn_attention, inputs)
    assert_same(actual, values_and_gradients(attend_plain, inputs))
    assert set(calls) == {("cudnn", *[(384, 2, 24)] * 3)}


@pytest.mark.parametrize(
    ("version", "capability", "widest"),
    [
        ("cuda 12090", "7.5", 0),
        ("cuda 12090", "8.0", 128),
        ("cuda 12090", "8.9", 128),
        ("cuda 12090", "9.0", 256),
        ("cuda 12090", "10.0", 256),
        ("rocm 60300", "gfx942", 0),
    ],
)
def test_cudnn_is_not_used_where_it_would_reject_the_heads(
    monkeypatch, version, capability, widest
):
    client = types.SimpleNamespace(platform_version=version)
    device = types.SimpleNamespace(client=client, compute_capability=capability)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda backend: [device])
    for channels in (0, 64, 80, 128, 192):
        fits = channels + 32 + 32 <= widest
        assert global_attention.cudnn_supports((1, 32, 32, 4, channels)) == fits
