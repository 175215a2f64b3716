"""Compares the masks and IoUs of the mask decoder with a NumPy reference in float64."""

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax import lax

from sam_jax.model.mask_decoder import (
    Deconvolution,
    MaskDecoder,
    Masks,
    Upscaling,
    choose_masks,
)
from sam_jax.model.ops.upscaling import deconvolve
from sam_jax.model.prompt_encoder import PromptFeatures
from sam_jax.model.two_way_transformer import TwoWayTransformer
from sam_jax.weights.names import DECONV

TOLERANCE = 1e-5  # of the largest magnitude


def assert_close(actual, expected, tolerance=TOLERANCE):
    assert np.shape(actual) == np.shape(expected)
    scale = float(np.abs(expected).max())
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


def random_like(module, *args):
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *args))["params"]
    rng = np.random.default_rng(0)
    flat = flax.traverse_util.flatten_dict(shapes)
    flat = {p: rng.standard_normal(x.shape).astype(np.float32) / 2 for p, x in flat.items()}
    return flax.traverse_util.unflatten_dict(flat)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def with_highest_precision(function, *args):
    with jax.default_matmul_precision("highest"):
        return function(*args)


# Transposed convolutions.


def as_image(pixels, gw):
    """Arranges patches 'p 2 2 o' of a grid with rows of gw tokens as '(2 gh) (2 gw) o'."""
    p, _, _, o = pixels.shape
    rows = pixels.reshape(p // gw, gw, 2, 2, o)
    return rows.transpose(0, 2, 1, 3, 4).reshape(2 * p // gw, 2 * gw, o)


def conv_transpose(image, official):
    """Computes PyTorch's ConvTranspose2d of size and stride 2 on 'h w i', weights 'i o h w'."""
    kernel = official.transpose(2, 3, 1, 0)  # 'h w o i'
    return with_highest_precision(
        lambda: lax.conv_transpose(
            image[None],
            kernel,
            (2, 2),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            transpose_kernel=True,
        )[0]
    )


def test_deconvolution_is_a_transposed_convolution_with_official_weights():
    image = normal(1, 4, 5, 6)
    params = random_like(Deconvolution(6, 3))
    kernel, bias = jnp.asarray(params["kernel"]), jnp.asarray(params["bias"])
    pixels = with_highest_precision(deconvolve, jnp.asarray(image.reshape(20, 6)), kernel, bias)
    official = DECONV.to_torch(params["kernel"])
    assert official.shape == (6, 3, 2, 2)
    expected = conv_transpose(image, official) + params["bias"]
    assert_close(as_image(np.asarray(pixels), 5), expected)

    # The definition is out[2i+a, 2j+b, o] = sum of in[i, j, c] W[c, o, a, b] over c.
    expected_pixel = image[3, 2] @ official[:, 1, 0, 1] + params["bias"][1]
    np.testing.assert_allclose(expected[2 * 3 + 0, 2 * 2 + 1, 1], expected_pixel, rtol=1e-4)
    # Without the flip of the kernel, lax.conv_transpose computes another function.
    unflipped = with_highest_precision(
        lambda: lax.conv_transpose(image[None], official.transpose(2, 3, 0, 1), (2, 2), "VALID")[0]
    )
    assert np.abs(unflipped + params["bias"] - expected).max() > 0.5


def gelu(x):
    return x * scipy.special.ndtr(x)


def layer_norm(params, x, epsilon=1e-6):
    x = x - x.mean(axis=-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon)
    return x * params["scale"] + params["bias"]


def upscaled(params, image):
    """Upscales 'h w c' to '(4 h) (4 w) c/8' in float64: conv, norm, GELU, conv, GELU."""
    for conv in ("conv1", "conv2"):
        official = DECONV.to_torch(params[conv]["kernel"]).astype(np.float64)
        h, w, _ = image.shape
        out = np.zeros((2 * h, 2 * w, official.shape[1]))
        for a in (0, 1):
            for b in (0, 1):
                out[a::2, b::2] = image @ official[:, :, a, b] + params[conv]["bias"]
        image = gelu(layer_norm(params["norm"], out) if conv == "conv1" else out)
    return image


@pytest.mark.parametrize("scale", [1, 1e-3])
def test_upscaling_equals_the_definition(scale):
    """Compares with NumPy. The result depends on the epsilon of the norm for small values."""
    module = Upscaling("float32")
    image = scale * normal(2, 4, 5, 16)
    channels = np.eye(2, dtype=np.float32)[None, None]  # mask i is channel i
    args = image.reshape(1, 1, 20, 16), channels
    params = random_like(module, *args)
    params["conv1"]["bias"] *= scale
    pixels = np.asarray(with_highest_precision(module.apply, {"params": params}, *args))
    assert pixels.shape == (1, 1, 2, 16, 20)
    rows = pixels.reshape(2, 4, 4, 4, 5).transpose(3, 1, 4, 2, 0).reshape(16, 20, 2)
    assert_close(rows, upscaled(params, image.astype(np.float64)))


# Tokens and masks.

DECODER = MaskDecoder(
    dim=16, depth=1, num_heads=8, mlp_dim=12, iou_hidden_dim=10, dropout=0.0, dtype="float32"
)


@pytest.fixture(scope="module")
def inputs():
    """Returns embeddings and features of two images, three objects and two prompt tokens."""
    features = PromptFeatures(
        sparse=normal(3, 2, 3, 2, 16),
        token_mask=np.ones((2, 3, 2), bool),
        dense=normal(4, 2, 3, 20, 16),
    )
    return normal(5, 2, 4, 5, 16), features, normal(6, 20, 16)


@pytest.fixture(scope="module")
def params(inputs):
    return random_like(DECODER, *inputs)


def run(params, inputs, inspect=None):
    """Decodes with an identity in place of the transformer. `inspect` receives its inputs."""

    def skip(call, args, kwargs, context):
        if not isinstance(context.module, TwoWayTransformer):
            return call(*args, **kwargs)
        tokens, token_mask, image, pe = args
        if inspect:
            inspect(tokens, token_mask, image, pe, **kwargs)
        return tokens[:, :, : kwargs["num_outputs"]], image

    with nn.intercept_methods(skip):
        return with_highest_precision(DECODER.apply, {"params": params}, *inputs)


def test_prompt_tokens_follow_the_iou_and_mask_tokens(params, inputs):
    embedding, features, pe = inputs
    seen = []

    def inspect(tokens, token_mask, image, image_pe, *, num_outputs, train):
        assert num_outputs == 5
        assert not train
        assert tokens.shape == (2, 3, 7, 16)
        for b in range(2):
            for n in range(3):
                np.testing.assert_array_equal(tokens[b, n, :1], params["iou_token"])
                np.testing.assert_array_equal(tokens[b, n, 1:5], params["mask_tokens"])
        np.testing.assert_array_equal(tokens[:, :, 5:], features.sparse)
        np.testing.assert_array_equal(image, embedding.reshape(2, 1, 20, 16) + features.dense)
        np.testing.assert_array_equal(image_pe, pe)
        np.testing.assert_array_equal(token_mask[:, :, :5], True)
        np.testing.assert_array_equal(token_mask[:, :, 5:], features.token_mask)
        seen.append(True)

    token_mask = np.array([[[True, False], [False, False], [True, True]]] * 2)
    features = features.replace(token_mask=token_mask)
    run(params, (embedding, features, pe), inspect)
    assert seen == [True]


def mlp(params, x):
    for name in ("lin1", "lin2", "lin3"):
        x = x @ params[name]["kernel"].astype(np.float64) + params[name]["bias"]
        x = np.maximum(x, 0) if name != "lin3" else x
    return x


def test_masks_are_products_of_hypernetwork_outputs_and_pixels(params, inputs):
    embedding, features, _ = inputs
    masks = run(params, inputs)
    assert masks.logits.shape == (2, 3, 4, 16, 20)
    tokens = params["mask_tokens"].astype(np.float64)
    for b in range(2):
        for n in range(3):
            image = embedding[b].astype(np.float64) + features.dense[b, n].reshape(4, 5, 16)
            pixels = upscaled(params["upscaling"], image)
            for m in range(4):
                expected = pixels @ mlp(params[f"hypernetwork_{m}"], tokens[m])
                assert_close(masks.logits[b, n, m], expected)
    # The first token gives the predicted IoUs. No sigmoid limits them to 0..1.
    iou = mlp(params["iou_head"], params["iou_token"][0].astype(np.float64))
    assert_close(masks.iou, np.broadcast_to(iou, (2, 3, 4)))
    large = jax.tree.map(lambda x: 4 * x, params["iou_head"])
    unbounded = run(params | {"iou_head": large}, inputs).iou
    assert unbounded.max() > 1
    assert unbounded.min() < 0


def test_objects_may_share_dense_features(jit, params, inputs):
    embedding, features, pe = inputs
    shared = features.replace(dense=features.dense[:1, :1, :1])
    repeated = features.replace(dense=np.broadcast_to(shared.dense, (2, 3, 20, 16)))
    apply = jit(lambda f: DECODER.apply({"params": params}, embedding, f, pe))
    actual = with_highest_precision(apply, shared)
    expected = with_highest_precision(apply, repeated)
    assert_close(actual.logits, expected.logits)
    assert_close(actual.iou, expected.iou)


def test_choose_masks_returns_three_masks_or_one():
    masks = Masks(
        logits=jnp.arange(8.0).reshape(1, 2, 4, 1, 1), iou=10 + jnp.arange(8.0).reshape(1, 2, 4)
    )
    three, one = choose_masks(masks, True), choose_masks(masks, False)
    np.testing.assert_array_equal(three.logits[..., 0, 0], [[[1, 2, 3], [5, 6, 7]]])
    np.testing.assert_array_equal(three.iou, [[[11, 12, 13], [15, 16, 17]]])
    np.testing.assert_array_equal(one.logits[..., 0, 0], [[[0], [4]]])
    np.testing.assert_array_equal(one.iou, [[[10], [14]]])
