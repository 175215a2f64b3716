"""Checks the mesh, and that steps on several devices have the results of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sam_jax.data.loader import Loader
from sam_jax.data.open import open_source
from sam_jax.data.segmentation_batch import Batch, SegmentationTransform
from sam_jax.model.init import init_variables
from sam_jax.model.sam import sam_tiny
from train.config import ConfigError, Interactive, Optimizer
from train.objectives.interactive import InteractiveObjective
from train.objectives.sums import Sums
from train.optimizer import make_optimizer
from train.sharding import (
    infer_sharding,
    init_sharded,
    make_mesh,
    make_sharded_grad_fn,
    shard_batch,
)
from train.state import init_state
from train.step import make_step


def objective(params, constants, batch, key):
    """Returns sums over the valid masks, to which every argument contributes."""
    noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i)))(batch.image_id)
    error = (batch.image @ params["w"] + constants + noise) ** 2
    loss = jnp.sum(error[:, None] * batch.valid)
    return Sums(loss, {"first": loss * jnp.arange(3.0)}, jnp.sum(batch.valid))


def mean_objective(params, constants, batch, key):
    return objective(params, constants, batch, key).mean()


@pytest.mark.parametrize("counts", [(3, 3, 3, 3), (3, 1, 0, 2), (0, 0, 0, 1), (0, 0, 0, 0)])
def test_sharded_gradients_match_those_of_one_device(counts):
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
    value_and_grad = jax.value_and_grad(mean_objective, has_aux=True)
    expected = value_and_grad(params, constants, batch, key)

    mesh = make_mesh(4)
    assert mesh.devices.size == 4
    actual = jax.jit(make_sharded_grad_fn(mesh, objective, params))(
        *init_sharded(mesh, lambda x: x, (params, constants)), shard_batch(mesh, batch), key
    )
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(actual))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), actual, expected)


@pytest.mark.parametrize(
    ("batch_size", "fsdp", "shape"),
    [
        (1, 1, (1, 1)),
        (3, 1, (3, 1)),
        (7, 1, (7, 1)),
        (12, 1, (6, 1)),
        (16, 1, (8, 1)),
        (11, 1, (1, 1)),
        (16, 4, (2, 4)),
        (4, 4, (1, 4)),
        (12, 2, (3, 2)),
    ],
)
def test_mesh_has_the_most_devices_that_divide_the_batch(batch_size, fsdp, shape):
    assert jax.device_count() == 8
    assert make_mesh(batch_size, fsdp).devices.shape == shape


@pytest.mark.parametrize(("batch_size", "fsdp"), [(3, 2), (8, 16), (4, 3)])
def test_invalid_meshes_are_errors(batch_size, fsdp):
    with pytest.raises(ConfigError, match=rf"{batch_size} images, 8 devices and fsdp={fsdp}"):
        make_mesh(batch_size, fsdp)


def test_large_arrays_are_sharded_in_multiples_of_eight_rows():
    mesh = make_mesh(8, 4)
    shapes = {
        "kernel": (1280, 3840),
        "positions": (1, 64, 64, 1280),
        "uneven": (1004, 2048),
        "vector": (2**21,),
        "small": (512, 512),
    }
    state = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    specs = {name: x.spec for name, x in infer_sharding(mesh, state).items()}
    assert specs == {
        "kernel": P("fsdp"),
        "positions": P(None, "fsdp"),
        "uneven": P(),
        "vector": P(),
        "small": P(),
    }
    assert {x.spec for x in infer_sharding(make_mesh(8), state).values()} == {P()}


MODEL = sam_tiny(image_size=(32, 32), depth=2, embed_dim=16, prompt_dim=16, global_blocks=(1,),
                 window_size=2, decoder_depth=1, decoder_mlp_dim=16, drop_path=0.2, dropout=0.1,
                 scan_blocks=True)  # fmt: skip


def run_five_steps(mesh):
    """Runs five steps with batches of eight scenes.

    Returns:
      The values of each step, and the final state.
    """
    config = Interactive(masks_per_image=2, masks_per_chunk=1, num_clicks=2)
    loader = Loader(
        open_source("scenes"), np.arange(64), SegmentationTransform(MODEL.image_size, 2), 8, seed=0
    )
    optimizer = make_optimizer(Optimizer(peak_lr=1e-3, warmup_steps=2), MODEL.image_encoder.depth)
    variables = jax.jit(init_variables, static_argnums=(0, 1))(MODEL, 0)
    state = init_sharded(mesh, lambda x: init_state(x, optimizer), variables)
    step = make_step(InteractiveObjective(MODEL, config), optimizer, 0, mesh, state)
    all_values = []
    for i in range(5):
        state, values = step(state, shard_batch(mesh, loader.batch(i)[0]))
        all_values.append(jax.device_get(values))
    return all_values, state


@pytest.fixture(scope="module")
def one_device_values():
    """The values of five steps on one device."""
    return run_five_steps(make_mesh(8, devices=jax.devices()[:1]))[0]


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 4])
def test_values_of_a_mesh_match_those_of_one_device(fsdp, one_device_values, monkeypatch):
    monkeypatch.setattr("train.sharding.MIN_SHARD_SIZE", 1)
    monkeypatch.setattr("train.sharding.ROW_MULTIPLE", 1)
    actual, state = run_five_steps(make_mesh(8, fsdp))
    assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(assert_close, actual, one_device_values)
    kernel = state.opt_state[0].mu["image_encoder"]["block_01"]["lin1"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape)[0] == kernel.shape[0] // fsdp
