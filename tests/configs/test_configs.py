"""Every config loads, and its training step traces: shapes alone, nothing is computed."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from sam_jax.data.loader import Batch
from sam_jax.data.source import KINDS
from sam_jax.weights.convert import initialize
from train.config import Interactive, load_config
from train.interactive import make_interactive
from train.optimizer import make_optimizer
from train.sharding import make_mesh
from train.state import init_state
from train.step import make_step

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def config_of(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    return load_config(f"configs/{name}.py")


def batch_of(config):
    """The shapes of a batch."""
    b, n, (h, w) = config.batch_size, config.objective.masks_per_image, config.model.image_size
    shape = jax.ShapeDtypeStruct
    return Batch(
        image=shape((b, h, w, 3), jnp.uint8),
        size=shape((b, 2), jnp.int32),
        image_id=shape((b,), jnp.int32),
        masks=shape((b, n, h, w // 8), jnp.uint8),
        mask_id=shape((b, n), jnp.int32),
        valid=shape((b, n), jnp.bool_),
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_the_step_traces(name, monkeypatch):
    config = config_of(name, monkeypatch)
    optimizer = make_optimizer(config.optimizer, config.model.depth, config.train_only)
    variables = jax.eval_shape(functools.partial(initialize, config.model, 0))
    state = jax.eval_shape(lambda v: init_state(v, optimizer), variables)
    mesh = make_mesh(config.batch_size, config.fsdp)
    objective = make_interactive(config.model, config.objective)
    step = make_step(objective, optimizer, config.seed, mesh, state, config.model.dtype)
    after, values = jax.eval_shape(step, state, batch_of(config))
    same = jax.tree.map(lambda x, y: x.shape == y.shape and x.dtype == y.dtype, state, after)
    assert all(jax.tree.leaves(same))
    assert values["total"].shape == ()
    assert values["miou"].shape == (11,)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_docstring_has_the_command(name, monkeypatch):
    config = config_of(name, monkeypatch)
    text = (ROOT / "configs" / f"{name}.py").read_text()
    assert f"python -m train configs/{name}.py --workdir runs/" in text
    assert config.data.source.split(":")[0] in KINDS


@pytest.mark.parametrize(
    ("name", "rate", "decay", "drop_path", "steps", "drops", "batch"),
    [
        ("sam_vit_h", 8e-4, 0.8, 0.4, 90_000, (60_000, 86_666), 256),
        ("sam_vit_l", 4e-4, 0.8, 0.4, 180_000, (120_000, 173_333), 128),
        ("sam_vit_b", 8e-4, 0.6, 0.6, 180_000, (120_000, 173_333), 128),
    ],
)
def test_the_papers_recipe(monkeypatch, name, rate, decay, drop_path, steps, drops, batch):
    config = config_of(name, monkeypatch)
    optimizer = config.optimizer
    assert (optimizer.peak_lr, optimizer.layer_decay) == (rate, decay)
    assert (optimizer.drop_at, optimizer.drop_by, optimizer.warmup_steps) == (drops, 0.1, 250)
    assert (optimizer.weight_decay, optimizer.b1, optimizer.b2) == (0.1, 0.9, 0.999)
    assert (config.num_steps, config.batch_size) == (steps, batch)
    assert (config.model.drop_path, config.model.dropout) == (drop_path, 0.1)
    assert config.model.image_size == (1024, 1024)
    assert config.objective == Interactive()
    assert (config.data.flips, config.data.turns, config.train_only) == (False, False, ())
