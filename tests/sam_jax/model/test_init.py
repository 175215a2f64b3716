"""Tests the paths, types and values of initial variables."""

import re

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.model import image_encoder
from sam_jax.model.init import init_variables, variable_shapes
from sam_jax.model.mae import mae_tiny
from sam_jax.model.sam import sam_tiny, sam_vit_b

ENCODER = "params/image_encoder"
DECODER = "params/mask_decoder"
PROMPTS = "params/prompt_encoder"
INITIAL = {  # a value, or ("within", bound) for uniform ones, or ("std", s) for normal ones
    f"{ENCODER}/pos_embed": ("std", 0.02),
    f"{ENCODER}/patch_embed/kernel": ("within", (6 / (8 * 8 * 3 + 64)) ** 0.5),
    f"{ENCODER}/patch_embed/bias": 0,
    f"{ENCODER}/block_00/norm1/scale": 1,
    f"{ENCODER}/block_00/norm1/bias": 0,
    f"{ENCODER}/block_00/attention/qkv/kernel": ("within", (6 / (64 + 192)) ** 0.5),
    f"{ENCODER}/block_00/attention/qkv/bias": 0,
    f"{ENCODER}/block_00/attention/rel_pos_h": 0,
    f"{ENCODER}/block_00/attention/rel_pos_w": 0,
    f"{ENCODER}/neck/conv1/kernel": ("within", 64**-0.5),
    f"{ENCODER}/neck/conv2/kernel": ("within", (9 * 64) ** -0.5),
    f"{PROMPTS}/foreground": ("std", 1),
    f"{PROMPTS}/mask_downscaling/conv2/kernel": ("within", (4 * 4) ** -0.5),
    f"{PROMPTS}/mask_downscaling/conv3/bias": ("within", 16**-0.5),
    "constants/prompt_encoder/gaussian": ("std", 0.35),
    f"{DECODER}/mask_tokens": ("std", 1),
    f"{DECODER}/transformer/layer_0/self_attention/q/kernel": ("within", 64**-0.5),
    f"{DECODER}/transformer/layer_0/token_to_image/out/kernel": ("within", 32**-0.5),
    f"{DECODER}/transformer/layer_0/image_to_token/q/bias": ("within", 64**-0.5),
    f"{DECODER}/transformer/layer_0/mlp/lin2/kernel": ("within", 256**-0.5),
    # For transposed convolutions, PyTorch computes the fan-in from the number of outputs.
    f"{DECODER}/upscaling/conv1/kernel": ("within", (4 * 16) ** -0.5),
    f"{DECODER}/upscaling/conv1/bias": ("within", (4 * 16) ** -0.5),
}


def test_initial_values(jit):
    """Compares initial values with those of PyTorch, and with those of MAE in the image encoder."""
    model = sam_tiny(depth=1, decoder_depth=1, global_blocks=(0,))

    @jit
    def init():
        flat = flax.traverse_util.flatten_dict(init_variables(model, 0), sep="/")
        return {path: flat[path] for path in INITIAL}

    for path, x in init().items():
        match INITIAL[path]:
            case "within", bound:
                assert 0.8 * bound < np.abs(x).max() <= bound, path
                assert abs(x.mean()) < 4 * bound / (3 * x.size) ** 0.5, path
            case "std", std:
                assert 0.75 * std < x.std() < 1.25 * std, path
                assert abs(x.mean()) < 4 * std / x.size**0.5, path
            case value:
                np.testing.assert_array_equal(x, value, path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_variables_are_float32_for_any_compute_dtype(dtype):
    assert {x.dtype for x in variable_shapes(sam_tiny(dtype=dtype)).values()} == {
        np.dtype("float32")
    }


def test_the_fourier_matrix_is_the_only_constant():
    constants = {p: x.shape for p, x in variable_shapes(sam_vit_b()).items() if "params/" not in p}
    assert constants == {"constants/prompt_encoder/gaussian": (2, 128)}


def test_paths_are_snake_case_and_blocks_zero_padded():
    paths = variable_shapes(sam_tiny(depth=11, decoder_depth=2))
    assert "params/image_encoder/block_07/attention/qkv/kernel" in paths
    assert "params/image_encoder/block_10/lin2/bias" in paths
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", part) for p in paths for part in p.split("/"))


@pytest.mark.parametrize(
    "model", [sam_tiny(depth=1, global_blocks=(0,)), mae_tiny()], ids=["sam", "mae"]
)
def test_shapes_are_those_of_the_variables(model):
    variables = jax.eval_shape(lambda: init_variables(model, 0))
    assert variables.keys() == {"params", "constants"}
    flat = flax.traverse_util.flatten_dict(variables, sep="/")
    shapes = variable_shapes(model)
    assert {path: x.shape for path, x in shapes.items()} == {k: x.shape for k, x in flat.items()}


def test_the_seed_determines_the_initial_values(jit):
    model = mae_tiny(depth=1)
    first, again, other = (jit(lambda s=s: init_variables(model, s))() for s in (0, 0, 1))

    def equal(a, b):
        return jax.tree.map(lambda x, y: bool(jnp.array_equal(x, y)), a, b)

    assert all(jax.tree.leaves(equal(first, again)))
    assert not equal(first, other)["params"]["mask_token"]


SHAPED = {
    "windows and global blocks": sam_tiny(depth=4, global_blocks=(1, 3), window_size=3),
    "no global block": sam_tiny(depth=3, global_blocks=(), window_size=3, decoder_depth=3),
    "no windows": sam_tiny(scan_blocks=True, remat="blocks", drop_path=0.1, decoder_depth=1),
    "an encoder": sam_tiny(depth=3, window_size=3).image_encoder,
    "an autoencoder": mae_tiny(depth=3, decoder_depth=2, mask_ratio=0.9),
}


@pytest.mark.parametrize("model", SHAPED.values(), ids=SHAPED.keys())
def test_shapes_are_those_of_the_initial_variables(model):
    traced = jax.eval_shape(lambda: init_variables(model, 0))
    flat = flax.traverse_util.flatten_dict(traced, sep="/")
    assert list(variable_shapes(model).items()) == list(flat.items())


def test_the_number_of_blocks_does_not_change_other_initial_values(jit):
    def init(**fields):
        flat = flax.traverse_util.flatten_dict(init_variables(sam_tiny(**fields), 3), sep="/")
        names = ("pos_embed", "neck/conv2/kernel", "gaussian", "iou_head/lin1/kernel")
        return {path: x for path, x in flat.items() if path.endswith(names)}

    one, two = jit(lambda: init(depth=1, global_blocks=(0,)))(), jit(init)()
    assert len(one) == len(two) == 4
    for path, x in one.items():
        np.testing.assert_array_equal(x, two[path], err_msg=path)


def test_shapes_of_many_blocks_are_found_without_tracing_each(monkeypatch):
    calls = []
    block = image_encoder.Block.__call__
    monkeypatch.setattr(
        image_encoder.Block, "__call__", lambda *args: calls.append(args) or block(*args)
    )
    model = sam_tiny(depth=256, decoder_depth=256, iou_hidden_dim=13)
    assert len(variable_shapes(model)) > 256 * (13 + 20)
    assert len(calls) <= 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depth": 257}, "image_encoder.depth must be at most 256; got 257"),
        ({"decoder_depth": 10**9}, "mask_decoder.depth must be at most 256; got 1000000000"),
        (
            {"embed_dim": 1 << 40},
            "image_encoder.embed_dim must be at most 16384; got 1099511627776",
        ),
        ({"window_size": 1 << 15}, "image_encoder.window_size must be at most 16384; got 32768"),
        (
            {"image_size": (64, 1 << 15)},
            r"image_encoder.image_size must be at most 16384; got \(64, ",
        ),
        ({"position_scale": 1e308}, "prompt_encoder.position_scale must be at most 16384; got 1e"),
        ({"mask_channels": 1 << 20}, "prompt_encoder.mask_channels must be at most 16384"),
        (
            {"global_blocks": (0, 2)},
            r"image_encoder.global_blocks must be indices .*2; got \(0, 2\)",
        ),
        ({"global_blocks": (0, 0, 0)}, r"image_encoder.global_blocks must be .*got \(0, 0, 0\)"),
        ({"global_blocks": (7,) * 300_000}, r"image_encoder.global_blocks .*got \(7.*\.\.\.\)$"),
    ],
)
def test_fields_that_ask_for_too_much_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        sam_tiny(**fields).validate()
