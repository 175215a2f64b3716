"""Tests the table of operations, and how an implementation is chosen."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.model.ops import dispatch, global_attention
from sam_jax.model.ops.dispatch import TABLE, choose
from sam_jax.model.ops.platform import platform, traced_for


@pytest.mark.parametrize(
    ("operation", "name", "dtype", "shape", "expected"),
    [
        ("attend_globally", "tpu", "bfloat16", (1, 64, 64, 2, 4), "splash"),
        ("attend_globally", "tpu", "float32", (1, 64, 64, 2, 4), "splash"),
        ("attend_globally", "tpu", "float32", (1, 10, 10, 2, 4), "xla"),
        ("attend_globally", "gpu", "bfloat16", (1, 64, 64, 2, 4), "cudnn"),
        ("attend_globally", "gpu", "bfloat16", (1, 64, 64, 2, 129), "xla"),
        ("attend_globally", "gpu", "float32", (1, 64, 64, 2, 4), "xla"),
        ("attend_globally", "cpu", "bfloat16", (1, 64, 64, 2, 4), "xla"),
        ("attend_among_tokens", "tpu", "bfloat16", (1, 50, 24), "pallas"),
        ("attend_among_tokens", "tpu", "bfloat16", (1, 512, 24), "pallas"),
        ("attend_among_tokens", "tpu", "bfloat16", (1, 513, 24), "xla"),
        ("attend_among_tokens", "tpu", "float32", (1, 50, 24), "xla"),
        ("attend_among_tokens", "gpu", "bfloat16", (1, 50, 24), "xla"),
        ("attend_among_tokens", "cpu", "bfloat16", (1, 50, 24), "xla"),
        ("attend_in_windows", "tpu", "bfloat16", (4, 14, 14, 24), "pallas"),
        ("attend_in_windows", "tpu", "float32", (4, 14, 14, 24), "xla"),
        ("attend_in_windows", "gpu", "bfloat16", (4, 14, 14, 24), "xla"),
        ("attend_in_windows", "cpu", "bfloat16", (4, 14, 14, 24), "sequential"),
        ("project_windows", "tpu", "float32", (1, 64, 64, 8), "after_split"),
        ("project_windows", "gpu", "bfloat16", (1, 64, 64, 8), "xla"),
        *(
            (operation, name, dtype, (1, 1, p, 256), expected)
            for operation in ("attend_to_image", "update_image", "upscale_masks")
            for name, dtype, p, expected in [
                ("tpu", "bfloat16", 4096, "pallas"),
                ("tpu", "bfloat16", 4900, "xla"),
                ("tpu", "float32", 4096, "xla"),
                ("gpu", "bfloat16", 4096, "xla"),
                ("cpu", "bfloat16", 4096, "xla"),
            ]
        ),
        ("arrange_pixels", "tpu", "bfloat16", (4096, 16), "matmul"),
        ("arrange_pixels", "tpu", "float32", (4096, 16), "xla"),
        ("arrange_pixels", "cpu", "bfloat16", (4096, 16), "xla"),
    ],
)
def test_platform_dtype_and_shape_determine_the_implementation(
    operation, name, dtype, shape, expected
):
    with traced_for(name):
        assert choose(operation, shape, jnp.dtype(dtype)).name == expected


@pytest.mark.parametrize("operation", TABLE)
def test_every_operation_has_a_plain_implementation_for_all_inputs(operation):
    *_, last = TABLE[operation]
    assert last.name == "xla"
    assert (last.platform, last.dtype, last.supports) == (None, None, None)


@pytest.mark.parametrize("operation", TABLE)
def test_implementations_have_names_and_one_signature(operation):
    rows = TABLE[operation]
    assert len({row.name for row in rows}) == len(rows)
    row_parameters = [list(inspect.signature(row.function).parameters) for row in rows]
    assert row_parameters == [row_parameters[0]] * len(rows)
    parameters = inspect.signature(getattr(dispatch, operation)).parameters
    assert parameters["implementation"].default is None


def test_an_implementation_can_be_asked_for_by_name():
    assert choose("attend_globally", (1, 16, 16, 2, 4), "float32", "splash").function is (
        global_attention.attend_splash
    )
    rng = np.random.default_rng(0)
    qkv = jnp.asarray(rng.standard_normal((2, 3, 3, 24)), jnp.float32)
    rel = jnp.asarray(rng.standard_normal((3, 3, 4)), jnp.float32)
    chosen = dispatch.attend_in_windows(qkv, rel, rel, 2)
    plain = dispatch.attend_in_windows(qkv, rel, rel, 2, implementation="xla")
    np.testing.assert_allclose(chosen, plain, rtol=1e-5, atol=1e-5)


def test_unknown_and_unsuitable_implementations_are_errors():
    with pytest.raises(ValueError, match="None or one of 'pallas', 'xla'; got 'flash'"):
        choose("attend_to_image", (1, 1, 4096, 256), "bfloat16", "flash")
    with pytest.raises(ValueError, match=r"'pallas' of attend_to_image does not accept shape \(1"):
        choose("attend_to_image", (1, 1, 4900, 256), "bfloat16", "pallas")


def test_kernels_have_costs_under_their_own_names():
    names = dispatch.kernel_costs()
    assert {f"{kernel}_{direction}" for direction in ("forward", "backward") for kernel in (
        "image_to_token", "token_attention", "token_to_image", "upscaling", "window_attention",
    )} | {"splash_mha_fwd", "splash_mha_dkv"} == set(names)  # fmt: skip
    assert not [(a, b) for a in names for b in names if a != b and a in b]


def test_programs_are_traced_for_the_default_device_unless_stated_otherwise():
    assert platform() == "cpu"
    with traced_for("tpu"):
        with traced_for("gpu"):
            assert platform() == "gpu"
        assert platform() == "tpu"
    with jax.default_device(jax.devices("cpu")[1]):
        assert platform() == "cpu"
