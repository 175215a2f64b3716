"""Split over devices, a batch has the gradients that it has on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.data.loader import Batch
from train.sharding import gradients_over, make_mesh, replicate, split_batch


def objective(params, constants, batch, key):
    """A mean over the valid masks, in which every argument counts; 0 where there is none."""
    noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i)))(batch.image_id)
    error = (batch.image @ params["w"] + constants + noise) ** 2
    weight = batch.valid / jnp.maximum(1, jnp.sum(batch.valid))
    loss = jnp.sum(error[:, None] * weight)
    return loss, {"first": loss * jnp.arange(3.0)}


@pytest.mark.parametrize("counts", [(3, 3, 3, 3), (3, 1, 0, 2), (0, 0, 0, 1), (0, 0, 0, 0)])
def test_devices_do_not_change_gradients(counts):
    rng = np.random.default_rng(0)
    batch = Batch(
        image=rng.standard_normal((4, 5)).astype(np.float32),
        size=np.zeros((4, 2), np.int32),
        image_id=np.arange(4, dtype=np.int32),
        masks=np.zeros((4, 3, 1, 1), np.uint8),
        mask_id=np.zeros((4, 3), np.int32),
        valid=np.arange(3) < np.array(counts)[:, None],
    )
    params = {"w": rng.standard_normal(5).astype(np.float32)}
    constants, key = np.float32(0.3), jax.random.key(1)
    expected = jax.value_and_grad(objective, has_aux=True)(params, constants, batch, key)

    mesh = make_mesh(4)
    assert mesh.devices.size == 4
    found = jax.jit(gradients_over(mesh, objective))(
        *replicate(mesh, (params, constants)), split_batch(mesh, batch), replicate(mesh, key)
    )
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(found))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), found, expected)


@pytest.mark.parametrize(
    ("batch_size", "count"), [(1, 1), (3, 3), (7, 7), (12, 6), (16, 8), (11, 1)]
)
def test_the_mesh_has_as_many_devices_as_divide_the_batch(batch_size, count):
    assert jax.device_count() == 8
    assert make_mesh(batch_size).devices.size == count
