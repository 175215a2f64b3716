"""Compares the TPU kernels of the decoder, in interpret mode, with plain JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from sam_jax.model.mask_decoder import MaskDecoder
from sam_jax.model.ops import image_to_token, token_to_image, upscaling
from sam_jax.model.ops.blocks import num_steps, pixels_per_step, vmap_objects
from sam_jax.model.ops.platform import traced_for
from sam_jax.model.prompt_encoder import PromptFeatures

PIXELS, CHANNELS, HEADS, TOKENS = 1024, 16, 2, 5  # four grid steps
OBJECTS = 2
RATE = 0.1


@pytest.fixture
def draw():
    rng = np.random.default_rng(0)
    return lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)


def values_and_gradients(jit, f, args):
    """Returns the results of f for objects 'b n ...', and the gradients of a weighted sum."""

    def total(args):
        results = vmap_objects(f, *args)
        leaves = jax.tree.leaves(results)
        return sum(
            jnp.sum(x * jnp.cos(jnp.arange(x.size)).reshape(x.shape)) for x in leaves
        ), results

    return jit(jax.value_and_grad(total, has_aux=True))(args)


def assert_same(jit, kernel, plain, args):
    with pltpu.force_tpu_interpret_mode():
        found = values_and_gradients(jit, kernel, args)
    expected = values_and_gradients(jit, plain, args)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("images", [1, OBJECTS])
def test_attention_of_tokens_to_the_image(jit, draw, images):
    def plain(queries, image, positions):
        weights = jax.nn.softmax(queries @ (image + positions).T, axis=-1)
        return weights @ image, (image if images > 1 else 0.0)

    def kernel(*args):
        attended, image = token_to_image.attend(*args)
        return attended, (image if images > 1 else 0.0)

    image = draw(1, images, PIXELS, CHANNELS)
    args = draw(1, OBJECTS, HEADS * TOKENS, CHANNELS), image, draw(1, 1, PIXELS, CHANNELS)
    assert_same(jit, kernel, plain, args)


@pytest.mark.parametrize("is_dropped", [False, True])
def test_update_of_the_image(jit, draw, is_dropped):
    words = jax.random.bits(jax.random.key(0), (OBJECTS, PIXELS // 4, CHANNELS))
    rate = round(256 * RATE) / 256

    def plain(image, positions, tokens, index):
        logits = tokens.keys @ (image + positions).T + tokens.offsets[:, None]
        weights = jax.nn.softmax(logits.reshape(HEADS, TOKENS, PIXELS), axis=1)
        attended = weights.reshape(-1, PIXELS).T @ tokens.values + tokens.bias
        if is_dropped:
            keep = image_to_token.keep_mask(words[index.astype(int)], RATE)
            attended = jnp.where(keep, attended / (1 - rate), 0)
        x = image + attended
        x = x - jnp.mean(x, axis=1, keepdims=True)
        x = x / jnp.sqrt(jnp.mean(x**2, axis=1, keepdims=True) + 1e-5)
        return x * tokens.norm_scale + tokens.norm_bias

    def kernel(image, positions, tokens, index):
        object_words = words[index.astype(int)] if is_dropped else None
        return image_to_token.update(image, positions, tokens, object_words, HEADS, RATE)

    rows, vectors = (1, OBJECTS, HEADS * TOKENS, CHANNELS), (1, 1, CHANNELS)
    tokens = image_to_token.FoldedTokens(
        draw(*rows), draw(*rows[:3]), draw(*rows), draw(*vectors), draw(*vectors), draw(*vectors)
    )
    image = draw(1, OBJECTS, PIXELS, CHANNELS)
    index = jnp.arange(OBJECTS, dtype=jnp.float32)[None]
    assert_same(jit, kernel, plain, (image, draw(1, 1, PIXELS, CHANNELS), tokens, index))


def test_upscaling(jit, draw):
    o, e, masks = 8, 4, 3

    def plain(image, kernel1, bias1, norm_scale, norm_bias, kernel2, bias2, hypernetwork_out):
        gelu = functools.partial(jax.nn.gelu, approximate=False)
        x = jnp.einsum("pc,cijo->pijo", image, kernel1) + bias1
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
        x = gelu(x * norm_scale + norm_bias)
        x = gelu(jnp.einsum("pijo,okle->pijkle", x, kernel2) + bias2)
        return jnp.einsum("pijkle,me->mikjlp", x, hypernetwork_out).reshape(masks, 16, PIXELS)

    shapes = [(CHANNELS, 2, 2, o), (o,), (o,), (o,), (o, 2, 2, e), (e,)]
    image, hypernetwork_out = draw(1, OBJECTS, PIXELS, CHANNELS), draw(1, OBJECTS, masks, e)
    weights = [draw(1, 1, *shape) for shape in shapes]

    def kernel(image, *weights):
        *weights, hypernetwork_out = weights
        return upscaling.upscale(image, upscaling.UpscalingWeights(*weights), hypernetwork_out)

    assert_same(jit, kernel, plain, (image, *weights, hypernetwork_out))


def test_fitted_error_function_is_accurate():
    x = jnp.linspace(-12, 12, 10001, dtype=jnp.float32)
    np.testing.assert_allclose(upscaling.erf(x), jax.lax.erf(x), rtol=0, atol=5e-6)


@pytest.mark.slow
def test_bfloat16_decoder_is_as_accurate_with_kernels_as_without(jit, draw):
    """Compares bfloat16, for which dispatch chooses the kernels, with float32.

    Dropout drops the same entries in both. All objects share one image until the first block
    updates it.
    """
    c, gh, gw = 64, 16, 32
    decoder = MaskDecoder(
        dim=c,
        depth=1,
        num_heads=HEADS,
        mlp_dim=32,
        iou_hidden_dim=32,
        dropout=RATE,
        dtype="float32",
    )
    present = jnp.asarray(np.arange(4) < [[[4], [2]]])
    embedding, pe = draw(1, gh, gw, c), draw(gh * gw, c)
    sparse, dense = draw(1, OBJECTS, 4, c), draw(1, 1, gh * gw, c)
    inputs = embedding, PromptFeatures(sparse, present, dense), pe
    variables = jit(decoder.init)(jax.random.key(0), *inputs)

    def run(dtype):
        """Returns logits, and the gradients with respect to embedding and dense features."""

        def logits(embedding, dense):
            features = PromptFeatures(sparse.astype(dtype), present, dense.astype(dtype))
            return (
                decoder.clone(dtype=dtype)
                .apply(
                    variables,
                    *(embedding, features, pe.astype(dtype)),
                    train=True,
                    rngs={"dropout": jax.random.key(1)},
                )
                .logits
            )

        @jit
        def both(*args):
            found, pull = jax.vjp(logits, *args)
            return found, *pull(jnp.cos(jnp.arange(found.size)).reshape(found.shape))

        return both(embedding, dense)

    truth, plain = run("float32"), run("bfloat16")
    with traced_for("tpu"), pltpu.force_tpu_interpret_mode():
        kernels = run("bfloat16")
    for exact, a, b in zip(truth, kernels, plain, strict=True):
        assert 0 < jnp.linalg.norm(a - exact) < 1.25 * jnp.linalg.norm(b - exact)


def test_dropout_uses_one_byte_for_each_entry():
    words = jax.random.bits(jax.random.key(0), (5, 64, 32))
    keep = np.asarray(image_to_token.keep_mask(words, RATE))
    assert keep.shape == (5, 256, 32)
    np.testing.assert_allclose(np.mean(keep), 1 - 26 / 256, atol=0.005)
    assert image_to_token.inverse_keep_prob(RATE) == 256 / 230
    # Quarters are independent, although they share random words.
    by_quarter = keep.reshape(5, 4, -1).astype(float)
    assert np.abs(np.corrcoef(by_quarter[0]) - np.eye(4)).max() < 0.1


def test_steps_divide_a_quarter_of_the_pixels():
    assert [pixels_per_step(p) for p in (4096, 1024, 2560, 4900)] == [1024, 256, 128, None]
    assert num_steps(2560) == 20
    with pytest.raises(ValueError, match="multiple of 512; got 4900"):
        num_steps(4900)
