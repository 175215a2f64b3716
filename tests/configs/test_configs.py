"""Tests that every config loads, and that its training step can be traced."""

from pathlib import Path

import jax
import pytest

from sam_jax.data.open import SOURCES
from sam_jax.weights.formats import load
from train.config import Interactive
from train.optimizer import make_optimizer
from train.overrides import load_config
from train.sharding import make_mesh
from train.state import init_state
from train.step import make_step
from train.tasks.base import make_task

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
# These configs differ from others only in sizes, or have several stages to trace.
SLOW = (
    "mae_vit_b",
    "mae_vit_h",
    "mae_vit_l",
    "sam_nuclei",
    "sam_photo",
    "sam_photo_64",
    "sam_tiny",
    "sam_vit_b",
    "sam_vit_l",
)


def config_of(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    return load_config(f"configs/{name}.py")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in CONFIGS]
)
def test_the_training_step_can_be_traced(name, monkeypatch):
    rounds = set()
    for _, _, config in config_of(name, monkeypatch).parts():
        task = make_task(config)
        optimizer = make_optimizer(config.optimizer, task.encoder_depth, config.trainable)
        state = jax.eval_shape(lambda task=task, opt=optimizer: init_state(task.init_fn(), opt))
        mesh = make_mesh(config.batch_size, config.fsdp)
        step = make_step(task.objective, optimizer, config.seed, mesh, state, config.model.dtype)
        after, values = jax.eval_shape(step, state, task.batch_spec())
        same = jax.tree.map(lambda x, y: x.shape == y.shape and x.dtype == y.dtype, state, after)
        assert all(jax.tree.leaves(same))
        assert values["loss"].shape == ()
        rounds |= {values["miou"].shape} if isinstance(config.objective, Interactive) else set()
    assert not rounds or max(rounds) == (11,)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_docstring_contains_the_command(name, monkeypatch):
    config = config_of(name, monkeypatch)
    text = (ROOT / "configs" / f"{name}.py").read_text()
    assert f"python -m train configs/{name}.py --workdir runs/" in text
    assert config.data.source.split(":")[0] in SOURCES


@pytest.mark.parametrize(
    ("name", "share"), [("sam_tiny", None), ("sam_nuclei", (0.25, 0.75)), ("sam_photo", (0.4, 1.0))]
)
def test_a_packaged_model_is_that_of_its_config(name, share, monkeypatch):
    model, _ = load(name)
    assert model == make_task(config_of(name, monkeypatch)).trained_model
    assert model.object_share == share


@pytest.mark.parametrize("size", ["b", "l", "h"])
def test_the_published_recipe_of_masked_autoencoders(monkeypatch, size):
    config = config_of(f"mae_vit_{size}", monkeypatch)
    optimizer, epoch = config.optimizer, 1_281_167 / config.batch_size
    assert optimizer.peak_lr == pytest.approx(1.5e-4 * config.batch_size / 256)
    assert optimizer.warmup_steps / epoch == pytest.approx(40, rel=2e-3)
    assert config.num_steps / epoch == pytest.approx(1600, rel=2e-3)
    assert optimizer.cosine_steps == config.num_steps
    assert (optimizer.lr_boundaries, optimizer.layer_decay, optimizer.weight_decay) == (
        (),
        1.0,
        0.05,
    )
    assert (optimizer.b1, optimizer.b2, config.batch_size) == (0.9, 0.95, 4096)
    assert (config.model.image_size, config.model.mask_ratio) == ((224, 224), 0.75)
    assert (config.data.min_area, config.data.flips, config.data.rot90) == (0.2, True, False)
    assert config.objective.normalized
    sam = config_of(f"sam_vit_{size}", monkeypatch).model
    for name in ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio"):
        assert getattr(config.model, name) == getattr(sam.image_encoder, name)


@pytest.mark.parametrize(
    ("name", "rate", "decay", "drop_path", "steps", "drops", "batch"),
    [
        ("sam_vit_h", 8e-4, 0.8, 0.4, 90_000, (60_000, 86_666), 256),
        ("sam_vit_l", 4e-4, 0.8, 0.4, 180_000, (120_000, 173_333), 128),
        ("sam_vit_b", 8e-4, 0.6, 0.6, 180_000, (120_000, 173_333), 128),
    ],
)
def test_the_recipe_of_the_paper(monkeypatch, name, rate, decay, drop_path, steps, drops, batch):
    config = config_of(name, monkeypatch)
    optimizer = config.optimizer
    assert (optimizer.peak_lr, optimizer.layer_decay) == (rate, decay)
    assert (optimizer.lr_boundaries, optimizer.lr_decay_factor, optimizer.warmup_steps) == (
        drops,
        0.1,
        250,
    )
    assert (optimizer.weight_decay, optimizer.b1, optimizer.b2) == (0.1, 0.9, 0.999)
    assert (config.num_steps, config.batch_size) == (steps, batch)
    assert (config.model.image_encoder.drop_path, config.model.mask_decoder.dropout) == (
        drop_path,
        0.1,
    )
    assert config.model.image_size == (1024, 1024)
    assert config.objective == Interactive()
    assert (config.data.flips, config.data.rot90, config.trainable) == (False, False, ())
