"""Compares attention on grids with a reference that computes the position bias explicitly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.model.attention import Attention
from sam_jax.model.ops.global_attention import QUERIES_PER_STEP
from sam_jax.model.ops.platform import traced_for

TOLERANCE = 1e-5  # of the largest magnitude


def assert_close(actual, expected, tolerance=TOLERANCE):
    scale = float(np.abs(expected).max())
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


def interpolate_table(table, rows, xp):
    """Resizes a table linearly, with pixel centers at +0.5 and repeated ends."""
    position = np.clip((np.arange(rows) + 0.5) * len(table) / rows - 0.5, 0, len(table) - 1)
    below = np.minimum(position.astype(int), len(table) - 2)
    share = (position - below)[:, None]
    return xp.asarray((1 - share) * table[below] + share * table[below + 1])


def attend_one_window(params, x, heads, xp, mask=None):
    """Attends among all tokens of 'h w c', by the definition."""
    height, width, c = x.shape
    qkv = x.reshape(height * width, c) @ params["qkv"]["kernel"] + params["qkv"]["bias"]
    q, k, v = (part.reshape(-1, heads, c // heads) for part in xp.split(qkv, 3, axis=-1))
    rel_h = interpolate_table(params["rel_pos_h"], 2 * height - 1, xp)
    rel_w = interpolate_table(params["rel_pos_w"], 2 * width - 1, xp)
    row, column = np.divmod(np.arange(height * width), width)
    dy = row[:, None] - row + height - 1
    dx = column[:, None] - column + width - 1
    logits = xp.einsum("qad,kad->aqk", q, k) * (c // heads) ** -0.5
    logits += xp.einsum("qad,qkd->aqk", q, rel_h[dy])  # of unscaled queries
    logits += xp.einsum("qad,qkd->aqk", q, rel_w[dx])
    if mask is not None:
        logits = xp.where(mask.reshape(-1), logits, -1e30)
    weights = xp.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    out = xp.einsum("aqk,kad->qad", weights, v).reshape(height, width, c)
    return out @ params["proj"]["kernel"] + params["proj"]["bias"]


def reference(params, x, heads, window, xp=np, masked=False):
    """Computes attention on 'b gh gw c'. Windows are padded with zeros, which are attended to."""
    gh, gw = x.shape[1:3]
    side = (window, window) if window else (gh, gw)
    inside = np.pad(np.ones((gh, gw), bool), [(0, -gh % side[0]), (0, -gw % side[1])])
    x = xp.pad(x, [(0, 0), (0, -gh % side[0]), (0, -gw % side[1]), (0, 0)])
    rows = []
    for top in range(0, x.shape[1], side[0]):
        row = []
        for left in range(0, x.shape[2], side[1]):
            here = np.s_[top : top + side[0], left : left + side[1]]
            mask = inside[here] if masked else None
            outs = [attend_one_window(params, image[here], heads, xp, mask) for image in x]
            row.append(xp.stack(outs))
        rows.append(xp.concatenate(row, axis=2))
    return xp.concatenate(rows, axis=1)[:, :gh, :gw]


def make(grid, window, table_size=None, heads=2, c=8, b=2, seed=0):
    """Returns a module, random parameters that all affect the output, and an input."""
    table_size = table_size or ((window, window) if window else grid)
    module = Attention(heads, table_size, window)
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    params = {
        "qkv": {"kernel": normal(c, 3 * c) / 2, "bias": normal(3 * c)},
        "proj": {"kernel": normal(c, c) / 3, "bias": normal(c)},
        "rel_pos_h": normal(2 * table_size[0] - 1, c // heads) / 2,
        "rel_pos_w": normal(2 * table_size[1] - 1, c // heads) / 2,
    }
    return module, params, normal(b, *grid, c)


def to_float64(params):
    return jax.tree.map(lambda x: x.astype(np.float64), params)


def run(module, params, x):
    with jax.default_matmul_precision("highest"):
        return module.apply({"params": params}, x)


@pytest.mark.parametrize(
    ("grid", "window"),
    [((6, 9), 3), ((5, 7), 3), ((7, 5), 3), ((4, 7), 4), ((2, 2), 3), ((3, 8), 5)],
    ids=str,
)
@pytest.mark.parametrize("device", ["cpu", "tpu"])
def test_window_attention_equals_the_reference(jit, grid, window, device):
    module, params, x = make(grid, window)
    with traced_for(device):
        actual = jit(lambda p, x: run(module, p, x))(params, x)
    assert actual.shape == x.shape
    assert_close(actual, reference(to_float64(params), x.astype(float), 2, window))


@pytest.mark.parametrize(
    "grid", [(3, 5), (5, 3), (1, 6), (6, 1), (20, 17), (19, 15), (2, 300)], ids=str
)
def test_global_attention_equals_the_reference(jit, grid):
    """Uses grids that need one step, several steps, single rows, and rows longer than a step."""
    module, params, x = make(grid, 0, b=1)
    assert_close(
        jit(lambda p, x: run(module, p, x))(params, x),
        reference(to_float64(params), x.astype(float), 2, 0),
    )


def test_the_tested_grids_need_one_step_and_several():
    assert 3 * 5 < QUERIES_PER_STEP < 19 * 15 < 2 * 300


@pytest.mark.parametrize("grid", [(3, 9), (6, 4), (11, 2)], ids=str)
def test_tables_of_other_grids_are_interpolated(jit, grid):
    module, params, x = make(grid, 0, table_size=(5, 4))
    assert_close(
        jit(lambda p, x: run(module, p, x))(params, x),
        reference(to_float64(params), x.astype(float), 2, 0),
    )


@pytest.mark.parametrize(
    ("grid", "window", "device"),
    [((5, 7), 3, "cpu"), ((5, 7), 3, "tpu"), ((4, 5), 0, "cpu"), ((20, 17), 0, "cpu")],
    ids=str,
)
def test_gradients_equal_the_reference(jit, grid, window, device):
    module, params, x = make(grid, window, b=1)
    weights = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)

    def loss(params, x):
        return jnp.sum(weights * run(module, params, x))

    def reference_loss(params, x):
        return jnp.sum(weights * reference(params, x, 2, window, jnp))

    with traced_for(device):
        actual = jit(jax.grad(loss, argnums=(0, 1)))(params, x)
    with jax.enable_x64(True):
        expected = jit(jax.grad(reference_loss, argnums=(0, 1)))(
            to_float64(params), x.astype(float)
        )
    jax.tree.map(assert_close, actual, expected)


def test_padding_is_attended_to(jit):
    """Checks that the result differs from a reference that masks padding."""
    module, params, x = make((4, 5), 3)
    masked = reference(to_float64(params), x.astype(float), 2, 3, masked=True)
    actual = jit(lambda p, x: run(module, p, x))(params, x)
    assert np.abs(actual - masked).max() > 0.1
    # If windows divide the grid, there is no padding.
    module, params, x = make((3, 6), 3)
    masked = reference(to_float64(params), x.astype(float), 2, 3, masked=True)
    assert_close(jit(lambda p, x: run(module, p, x))(params, x), masked)


def test_bfloat16_is_supported():
    module, params, x = make((4, 5), 3)
    half = module.clone(dtype="bfloat16")
    out = half.apply({"params": jax.tree.map(jnp.asarray, params)}, jnp.asarray(x, jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    assert_close(out.astype(np.float32), reference(to_float64(params), x.astype(float), 2, 3), 0.02)
