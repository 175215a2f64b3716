"""Tests the dtypes and precisions of the matrix products in the model."""

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from sam_jax.model.prompt_encoder import Prompts
from sam_jax.model.sam import replace_fields
from tests.sam_jax.model.sam_cases import OBJECTS, pack, products

HIGHEST = (lax.Precision.HIGHEST, lax.Precision.HIGHEST)


@pytest.mark.parametrize("image_size", [(48, 72), (64, 40)], ids=["stored", "interpolated"])
def test_float32_multiplies_in_float32(tiny, image_size):
    """Checks the precision of products. By default, TPUs round to bfloat16 and GPUs to TF32."""
    model, variables = tiny
    image = np.zeros((1, *image_size, 3), np.float32)
    prompts = pack([OBJECTS["points"]], 5, np.random.default_rng(0))
    mask = np.zeros((1, 1, image_size[0] // 2, image_size[1] // 2), np.float32)
    prompts = prompts.replace(mask=mask, has_mask=np.ones((1, 1), bool))

    def sum_logits(variables, image):
        return model.apply(variables, image, prompts).logits.sum()

    forward = list(products(sum_logits, variables, image))
    assert len(forward) > 60
    assert set(forward) == {(HIGHEST, "float32")}
    backward = list(products(jax.grad(sum_logits, argnums=(0, 1)), variables, image))
    assert len(backward) > 2 * len(forward)
    assert set(backward) == {(HIGHEST, "float32")}


def test_bfloat16_multiplies_in_bfloat16_except_for_positions(tiny):
    model, variables = tiny
    model = replace_fields(model, dtype="bfloat16")
    image = np.zeros((1, 48, 72, 3), np.float32)
    prompts = pack([OBJECTS["points"]], 5, np.random.default_rng(0))
    encoded = list(products(lambda v: model.apply(v, image, method="encode"), variables))
    assert {dtype for _, dtype in encoded} == {"bfloat16"}
    assert not {precision for precision, _ in encoded} & {HIGHEST}
    embedding = np.zeros((1, 6, 9, 32), jnp.bfloat16)
    decoded = list(
        products(lambda v: model.apply(v, embedding, prompts, method="decode"), variables)
    )
    exact = [dtype for precision, dtype in decoded if precision == HIGHEST]
    assert 1 <= len(exact) <= 2  # positions of the points and of the grid
    assert set(exact) == {"float32"}
    assert {dtype for precision, dtype in decoded if precision != HIGHEST} == {"bfloat16"}


def test_bfloat16_stays_close_to_float32(tiny, jit):
    """Checks a tolerance of 2 %. The kernels are small, so that layers do not amplify rounding."""
    model, variables = tiny
    images = np.random.default_rng(0).standard_normal((2, 48, 72, 3)).astype(np.float32)
    rng = np.random.default_rng(0)
    prompts = Prompts(
        points=rng.uniform(0, 48, (2, 8, 2, 2)).astype(np.float32),
        labels=np.tile(np.array([1, 0], np.int32), (2, 8, 1)),
        mask=rng.standard_normal((2, 8, 24, 36)).astype(np.float32),
        has_mask=rng.random((2, 8)) < 0.5,
    )
    flat = flax.traverse_util.flatten_dict(variables, sep="/")
    flat = {path: 0.3 * x if path.endswith("kernel") else x for path, x in flat.items()}
    variables = flax.traverse_util.unflatten_dict(flat, sep="/")

    def run(model):
        return jit(model.apply)(variables, images, prompts)

    bfloat16_masks, masks = run(replace_fields(model, dtype="bfloat16")), run(model)
    for bfloat16_x, x in zip(jax.tree.leaves(bfloat16_masks), jax.tree.leaves(masks), strict=True):
        assert bfloat16_x.dtype == jnp.float32
        assert 0 < np.linalg.norm(bfloat16_x - x) / np.linalg.norm(x) < 0.02
