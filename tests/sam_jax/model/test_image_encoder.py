"""Tests the image encoder: interpolated positions, loops over blocks, and drop path."""

import functools
import math
import re

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.model.image_encoder import Block, resize_positions
from sam_jax.model.sam import replace_fields, sam_tiny
from tests.sam_jax.model.sam_cases import OBJECTS, assert_close, pack, primitives


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return rng.standard_normal((2, 48, 72, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def embedding(tiny, encode, images):
    return encode(*tiny, images)


# Positions.


def test_positions_of_the_stored_size_are_untouched():
    table = jnp.arange(5 * 7 * 2, dtype=jnp.float32).reshape(1, 5, 7, 2)
    assert resize_positions(table, (5, 7)) is table


def bicubic(size, new_size):
    """Returns PyTorch's matrix 'new_size size': A = -0.75, half-pixel centers, clamped indices."""
    matrix = np.zeros((new_size, size))
    for i in range(new_size):
        position = (i + 0.5) * size / new_size - 0.5
        below = math.floor(position)
        for j in range(below - 1, below + 3):
            d, a = abs(position - j), -0.75
            near = (a + 2) * d**3 - (a + 3) * d**2 + 1
            far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            matrix[i, min(max(j, 0), size - 1)] += near if d <= 1 else far
    return matrix


@pytest.mark.parametrize("grid", [(9, 4), (3, 11), (5, 8), (6, 7)])
def test_positions_of_other_sizes_are_interpolated_like_pytorch(grid):
    table = np.random.default_rng(0).standard_normal((1, 5, 7, 3))
    expected = np.einsum("ah,bw,nhwc->nabc", bicubic(5, grid[0]), bicubic(7, grid[1]), table)
    actual = resize_positions(jnp.asarray(table, jnp.float32), grid)
    np.testing.assert_allclose(actual, expected, atol=5e-6)


# Recomputation and loops.


@pytest.mark.parametrize(
    ("remat", "scan_blocks"), [("none", True), ("products", False), ("blocks", True)]
)
def test_remat_and_loops_change_neither_values_nor_gradients(tiny, jit, images, remat, scan_blocks):
    model, variables = tiny
    params, constants = variables["params"], variables["constants"]

    def loss(model, params, image):
        embedding = model.apply({"params": params, "constants": constants}, image, method="encode")
        return jnp.sum(embedding**3), embedding

    gradient = functools.partial(jit, static_argnums=0)(
        jax.value_and_grad(loss, argnums=(1, 2), has_aux=True)
    )
    other = replace_fields(model, remat=remat, scan_blocks=scan_blocks)
    (_, expected), gradients = gradient(model, params, images)
    (_, embedding), actual = gradient(other, params, images)
    assert_close(embedding, expected)

    def encoder_leaves(gradients):
        return jax.tree.leaves((gradients[0]["image_encoder"], gradients[1]))

    for a, b in zip(encoder_leaves(actual), encoder_leaves(gradients), strict=True):
        assert_close(a, b)

    def count_remats(model):
        names = primitives(jax.make_jaxpr(lambda p: loss(model, p, images))(params))
        return sum(name in ("checkpoint", "remat2") for name in names)  # depends on the JAX version

    if not scan_blocks:
        assert count_remats(other) == count_remats(model) + model.image_encoder.depth


@pytest.mark.parametrize("ends", [(), (0,), (0, 3), (1, 2), (0, 1, 3)])
def test_loops_need_equal_super_blocks(ends, images):
    model = sam_tiny(depth=4, global_blocks=ends, scan_blocks=True)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, method="encode"))
    with pytest.raises(
        ValueError, match=rf"equal distances.*got {re.escape(str(list(ends)))} of 4"
    ):
        jax.eval_shape(lambda v: model.apply(v, images, method="encode"), shapes)


# Trunk and neck.


def test_trunk_and_neck_make_the_embedding(tiny, jit, images, embedding):
    model, variables = tiny
    tokens = jit(lambda v, x: model.apply(v, x, method="encode_trunk"))(variables, images)
    assert tokens.shape == (*embedding.shape[:3], model.image_encoder.embed_dim)
    again = jit(lambda v, x: model.apply(v, x, method="apply_neck"))(variables, tokens)
    assert_close(again, embedding)
    without_neck = {k: v for k, v in variables["params"]["image_encoder"].items() if k != "neck"}
    params = {"image_encoder": without_neck}
    assert_close(model.apply({"params": params}, images, method="encode_trunk"), tokens)


def test_tokens_of_another_shape_are_rejected(tiny):
    model, variables = tiny
    for shape in ((2, 24), (1, 2, 2, 25)):
        message = rf"tokens must have shape \(b, gh, gw, 24\); got {re.escape(str(shape))}"
        with pytest.raises(ValueError, match=message):
            model.apply(variables, np.ones(shape, np.float32), method="apply_neck")
    with pytest.raises(ValueError, match=r"image must have shape .*; got \(1, 9, 8, 3\)"):
        model.apply(variables, np.ones((1, 9, 8, 3), np.float32), method="encode_trunk")


# Drop path and dropout.


def test_dropout_and_drop_path_are_off_unless_training(tiny, encode, decode, embedding, images):
    model, variables = tiny
    dropping = replace_fields(model, drop_path=0.5, dropout=0.5)
    prompts = pack([OBJECTS["points"]], 32, np.random.default_rng(0))
    assert_close(encode(dropping, variables, images), embedding)
    expected = decode(model, variables, embedding[:1], prompts).logits
    assert_close(decode(dropping, variables, embedding[:1], prompts).logits, expected)
    # If the rates are zero, training is deterministic and needs no keys.
    assert_close(encode(model, variables, images, train=True), embedding)
    assert_close(decode(model, variables, embedding[:1], prompts, train=True).logits, expected)


def test_drop_path_is_determined_by_its_key(tiny, encode, embedding, images):
    model, variables = tiny
    dropping = replace_fields(model, drop_path=0.5)

    def run(seed):
        return encode(
            dropping, variables, images, train=True, rngs={"drop_path": jax.random.key(seed)}
        )

    first = run(0)
    np.testing.assert_array_equal(run(0), first)
    assert np.abs(run(1) - first).max() > 0.1
    assert np.abs(first - embedding).max() > 0.1


def test_dropout_is_determined_by_its_key_and_differs_between_objects(tiny, decode, embedding):
    model, variables = tiny
    dropping = replace_fields(model, dropout=0.5)
    prompts = pack([OBJECTS["points"]] * 2, 32, np.random.default_rng(0))

    def run(seed):
        masks = decode(
            dropping,
            variables,
            embedding[:1],
            prompts,
            train=True,
            rngs={"dropout": jax.random.key(seed)},
        )
        return masks.logits

    first = run(0)
    np.testing.assert_array_equal(run(0), first)
    assert np.abs(run(1) - first).max() > 0.1
    assert np.abs(first[:, 0] - first[:, 1]).max() > 0.1


@pytest.mark.parametrize(
    ("zeroed", "other", "branch"), [("lin2", "attention/proj", 0), ("attention/proj", "lin2", 1)]
)
def test_a_block_scales_each_residual_branch_of_an_image_by_its_factor(jit, zeroed, other, branch):
    block = Block(num_heads=2, table_size=(3, 3), window=3, mlp_dim=16, dtype="float32")
    rng = np.random.default_rng(0)
    x = np.repeat(rng.standard_normal((1, 4, 5, 8)).astype(np.float32), 3, axis=0)
    shapes = jax.eval_shape(lambda: block.init(jax.random.key(0), jnp.asarray(x[:1])))
    flat = flax.traverse_util.flatten_dict(shapes, sep="/")
    flat = {path: rng.standard_normal(v.shape).astype(np.float32) for path, v in flat.items()}
    flat = {path: 0 * v if zeroed in path else v for path, v in flat.items()}
    assert any(other in path for path in flat)
    variables = flax.traverse_util.unflatten_dict(flat, sep="/")
    run = jit(block.apply)
    added = run(variables, x) - x
    factors = np.full((2, 3), 7.0, np.float32)  # the factors of the zeroed branch have no effect
    factors[branch] = 0, 1, 2.5
    np.testing.assert_allclose(
        run(variables, x, factors) - x,
        added * factors[branch][:, None, None, None],
        rtol=1e-4,
        atol=1e-4,
    )


def test_branches_are_dropped_more_often_with_depth_and_keep_the_mean(tiny, jit):
    model, b = replace_fields(tiny[0], depth=4, drop_path=0.6), 2000
    keep = model.apply(
        {},
        rngs={"drop_path": jax.random.key(1)},
        method=lambda model: model.image_encoder.sample_drop_path(b),
    )
    assert keep.shape == (4, 2, b)
    for factors, rate in zip(keep, (0, 0.2, 0.4, 0.6), strict=True):
        dropped = factors == 0
        np.testing.assert_allclose(factors[~dropped], 1 / (1 - rate), rtol=1e-6)
        # Four standard deviations of a binomial, for each of the two branches.
        spread = 4 * (rate * (1 - rate) / b) ** 0.5
        assert np.abs(dropped.mean(axis=1) - rate).max() <= spread
        both = np.all(dropped, axis=0).mean()
        assert abs(both - rate**2) <= 4 * (rate**2 * (1 - rate**2) / b) ** 0.5
