"""Compares the two-way transformer with a NumPy reference in float64.

The reference computes every projection separately.
"""

import functools

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.model.ops import image_to_token
from sam_jax.model.ops.image_to_token import FoldedTokens
from sam_jax.model.two_way_transformer import (
    ImageToToken,
    SelfAttention,
    TokenToImage,
    TwoWayTransformer,
    should_fold_projections,
)

HEADS = 8
TOLERANCE = 1e-5  # of the largest magnitude


def assert_close(actual, expected, tolerance=TOLERANCE):
    assert np.shape(actual) == np.shape(expected)
    scale = float(np.abs(expected).max())
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


def random_like(module, *args, **kwargs):
    """Returns random parameters of a module, all of them nonzero."""
    init = functools.partial(module.init, jax.random.key(0), **kwargs)
    shapes = jax.eval_shape(init, *args)["params"]
    rng = np.random.default_rng(0)

    def draw(path, x):
        normal = rng.standard_normal(x.shape).astype(np.float32)
        if path[-1] == "kernel":
            return 2 * normal * x.shape[0] ** -0.5
        return 1 + 0.2 * normal if path[-1] == "scale" else 0.5 * normal

    flat = flax.traverse_util.flatten_dict(shapes)
    return flax.traverse_util.unflatten_dict({path: draw(path, x) for path, x in flat.items()})


def to_float64(tree):
    return jax.tree.map(lambda x: x if x.dtype == bool else x.astype(np.float64), tree)


def dense(params, x):
    return x @ params["kernel"] + params["bias"]


def norm(params, x, epsilon=1e-5):
    x = x - x.mean(axis=-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon)
    return x * params["scale"] + params["bias"]


def attention(params, queries, keys, values, token_mask=None, heads=HEADS):
    """Computes multi-head attention: projects queries, keys and values, attends, and projects."""

    def split(x):
        return x.reshape(*x.shape[:-1], heads, -1).swapaxes(-2, -3)

    q, k = split(dense(params["q"], queries)), split(dense(params["k"], keys))
    v = split(dense(params["v"], values))
    logits = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    if token_mask is not None:
        logits = np.where(token_mask[..., None, None, :], logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    out = (weights @ v).swapaxes(-2, -3)
    return dense(params["out"], out.reshape(*out.shape[:-2], -1))


def transformer(params, tokens, token_mask, image, image_pe, depth, epsilon=1e-5):
    """Computes segment-anything's `TwoWayTransformer` on tokens 'b n t c' and images 'b n p c'."""
    token_pe = tokens
    for i in range(depth):
        p = params[f"layer_{i}"]
        if i == 0:  # without a residual connection and without positions
            tokens = attention(p["self_attention"], tokens, tokens, tokens, token_mask)
        else:
            q = tokens + token_pe
            tokens = tokens + attention(p["self_attention"], q, q, tokens, token_mask)
        tokens = norm(p["norm1"], tokens, epsilon)
        q, k = tokens + token_pe, image + image_pe
        tokens = norm(p["norm2"], tokens + attention(p["token_to_image"], q, k, image), epsilon)
        hidden = np.maximum(dense(p["mlp"]["lin1"], tokens), 0)
        tokens = norm(p["norm3"], tokens + dense(p["mlp"]["lin2"], hidden), epsilon)
        q, k = image + image_pe, tokens + token_pe
        attended = attention(p["image_to_token"], q, k, tokens, token_mask)
        image = norm(p["norm4"], image + attended, epsilon)
    attended = attention(params["final_attention"], tokens + token_pe, image + image_pe, image)
    return norm(params["final_norm"], tokens + attended, epsilon), image


@pytest.fixture(scope="module")
def inputs():
    """Returns inputs for two images and three objects.

    Each object has seven tokens, of which some are absent. There are twelve pixels and 16 channels.
    """
    rng = np.random.default_rng(1)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    token_mask = np.ones((2, 3, 7), bool)
    token_mask[0, 0, 5:] = token_mask[1, 1, 6] = token_mask[1, 2, 5] = False
    return normal(2, 3, 7, 16), token_mask, normal(2, 3, 12, 16), normal(12, 16)


def run(jit, module, params, *args, **kwargs):
    with jax.default_matmul_precision("highest"):
        return jit(lambda p, a: module.apply({"params": p}, *a, **kwargs))(params, args)


def test_self_attention_masks_absent_keys(jit, inputs):
    tokens, token_mask, *_ = inputs
    values = tokens[:, :, ::-1]
    module = SelfAttention(HEADS, "float32")
    params = random_like(module, tokens, values, token_mask)
    actual = run(jit, module, params, tokens, values, token_mask)
    p = to_float64(params)
    assert_close(actual, attention(p, tokens, tokens, values, token_mask))


# With 16 channels, the projections are folded for one head and computed for eight.
@pytest.mark.parametrize("heads", [1, 8])
@pytest.mark.parametrize("n", [1, 3])
def test_token_to_image_attention(jit, inputs, n, heads):
    tokens, _, image, pe = inputs
    module = TokenToImage(heads, "float32")
    assert should_fold_projections(*tokens.shape[-2:], heads) is (heads == 1)
    params = random_like(module, tokens, image, pe)
    image = image[:, :n]
    actual, same = run(jit, module, params, tokens, image, pe)
    np.testing.assert_array_equal(same, image)
    assert_close(actual, attention(to_float64(params), tokens, image + pe, image, heads=heads))


@pytest.mark.parametrize("is_folded", [True, False])
@pytest.mark.parametrize("heads", [1, 8])
@pytest.mark.parametrize("n", [1, 3])
def test_image_to_token_attention(jit, inputs, n, heads, is_folded):
    tokens, token_mask, image, _ = inputs
    values = tokens[:, :, ::-1]
    module = ImageToToken(16, heads, "float32")
    params = random_like(module, image, tokens, values, token_mask)
    image = image[:, :n]
    if is_folded:

        def attend(params, image, *tokens):
            folded = module.apply({"params": params}, *tokens, method="fold")
            folded = FoldedTokens(*folded, norm_scale=None, norm_bias=None)
            return image_to_token.attend_xla(image, folded, heads)

        with jax.default_matmul_precision("highest"):
            actual = jit(attend)(params, image, tokens, values, token_mask)
    else:
        actual = run(jit, module, params, image, tokens, values, token_mask)
    assert actual.shape == (2, 3, 12, 16)
    assert_close(actual, attention(to_float64(params), image, tokens, values, token_mask, heads))


def transformer_of(inputs, depth, **kwargs):
    module = TwoWayTransformer(depth, HEADS, 24, 0.0, "float32")
    return module, random_like(module, *inputs, num_outputs=5, train=False)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 3])
def test_the_transformer_equals_the_reference(jit, inputs, depth, n):
    tokens, token_mask, image, pe = inputs
    module, params = transformer_of(inputs, depth)
    inputs = (tokens, token_mask, image[:, :n], pe)
    actual = run(jit, module, params, *inputs, num_outputs=5, train=False)
    expected = transformer(to_float64(params), *to_float64(inputs), depth)
    assert_close(actual[0], expected[0][:, :, :5])
    assert_close(actual[1], expected[1])


def test_norms_have_epsilon_1e_5(jit, inputs):
    """Uses inputs so small that epsilon affects the result."""
    module, params = transformer_of(inputs, 2)
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    small = ("scale", "norm1/bias", "norm2/bias", "norm3/bias", "norm4/bias", "out/kernel")
    small += ("out/bias", "lin2/kernel", "lin2/bias")
    flat = {path: 0.003 * x if path.endswith(small) else x for path, x in flat.items()}
    params = flax.traverse_util.unflatten_dict(flat, sep="/")
    tokens, token_mask, image, pe = inputs
    inputs = (0.003 * tokens, token_mask, 0.003 * image, pe)
    tokens, image = run(jit, module, params, *inputs, num_outputs=5, train=False)
    expected = transformer(to_float64(params), *to_float64(inputs), 2)
    assert_close(tokens, expected[0][:, :, :5])
    assert_close(image, expected[1])
    other_epsilon = transformer(to_float64(params), *to_float64(inputs), 2, epsilon=1e-6)
    assert np.abs(image - other_epsilon[1]).max() > 0.05 * np.abs(image).max()


def test_absent_tokens_have_no_effect(jit, inputs):
    tokens, token_mask, image, pe = inputs
    module, params = transformer_of(inputs, 2)
    variables = {"params": jax.tree.map(jnp.asarray, params)}
    apply = jit(lambda *x: module.apply(variables, *x, num_outputs=5, train=False))
    expected = apply(tokens, token_mask, image, pe)
    rng = np.random.default_rng(2)
    garbage = rng.uniform(-1e4, 1e4, tokens.shape).astype(np.float32)
    garbled = np.where(token_mask[..., None], tokens, garbage)
    # Append more absent tokens.
    more = np.concatenate([garbled, garbage[:, :, :4]], axis=2)
    longer_mask = np.concatenate([token_mask, np.zeros((2, 3, 4), bool)], axis=2)
    for t, mask in [(garbled, token_mask), (more, longer_mask)]:
        actual = apply(t, mask, image, pe)
        jax.tree.map(assert_close, actual, expected)
    # The same values change the result once they are present.
    all_tokens = apply(garbled, np.ones_like(token_mask), image, pe)
    assert np.abs(all_tokens[1] - expected[1]).max() > 0.1


def test_a_shared_image_equals_a_copy_for_each_object(jit, inputs):
    tokens, token_mask, image, pe = inputs
    module, params = transformer_of(inputs, 2)
    shared_image = image[:, :1]
    shared = run(
        jit, module, params, tokens, token_mask, shared_image, pe, num_outputs=5, train=False
    )
    copies = np.repeat(shared_image, 3, axis=1)
    expected = run(jit, module, params, tokens, token_mask, copies, pe, num_outputs=5, train=False)
    jax.tree.map(assert_close, shared, expected)


def test_dropout_follows_every_attention_and_mlp(inputs, monkeypatch):
    module, _ = transformer_of(inputs, 2)
    dropped = []

    keep_mask = image_to_token.keep_mask

    def record_image(words, rate):
        assert rate == 0.1
        keep = keep_mask(words, rate)
        dropped.append(keep.shape)
        return keep

    def record_tokens(call, args, kwargs, context):
        if isinstance(context.module, nn.Dropout):
            assert context.module.rate == 0.1
            dropped.append(args[0].shape)
        return call(*args, **kwargs)

    monkeypatch.setattr(image_to_token, "keep_mask", record_image)
    with nn.intercept_methods(record_tokens):
        init = module.clone(dropout=0.1).init
        keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
        jax.eval_shape(lambda *x: init(keys, *x, num_outputs=5, train=True), *inputs)
    # The order in a layer is self-attention, tokens to image, MLP, image to tokens. The final
    # attention follows.
    token, image = (2, 3, 7, 16), (2, 3, 12, 16)
    assert dropped == 2 * [token, token, token, image] + [(2, 3, 5, 16)]
