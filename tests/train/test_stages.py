"""Runs in stages: each stage has its objective, batch size and trained parts."""

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sam_jax
from sam_jax.model.sam import sam_tiny
from tests.train.running import CONFIG, finish, losses, start_run
from train.config import ConfigError, Data, Interactive, Optimizer, Stage, TrainConfig
from train.optimizer import keep_schedule, make_optimizer
from train.rows import read_rows

STAGES = """
import dataclasses
from train.config import Stage

rounds = dataclasses.replace(config.objective, num_clicks=0, num_extra_rounds=0)
data = dataclasses.replace(config.data, jitter=(0.3, 0.7), jitter_unit="object", views=2)
config = dataclasses.replace(
    config,
    objective=rounds,
    data=data,
    trainable=("image_encoder/neck", "mask_decoder"),
    feature_cache="CACHE",
    evaluate_every=9,
    stages=(
        Stage(start=4, objective=config.objective, batch_size=4),
        Stage(start=6, trainable=("image_encoder", "mask_decoder")),
        Stage(start=8, data=dataclasses.replace(data, jitter=(), views=0), trainable=()),
    ),
)
"""


def make_config(**changes):
    config = TrainConfig(model=sam_tiny(), data=Data(source="scenes"))
    return dataclasses.replace(config, **changes)


def test_stages_begin_where_they_say_and_end_where_the_next_one_begins():
    three = Interactive(num_clicks=2)
    stages = (Stage(start=5, objective=three), Stage(start=9, batch_size=2), Stage(start=50))
    config = make_config(num_steps=12, stages=stages, batch_size=8)
    parts = config.parts()
    assert [part[:2] for part in parts] == [(0, 5), (5, 9), (9, 12)]
    assert [part.objective for *_, part in parts] == [Interactive(), three, Interactive()]
    assert [part.batch_size for *_, part in parts] == [8, 8, 2]
    assert all(not part.stages for *_, part in parts)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((Stage(start=5), Stage(start=5)), "stages must be in the order of their starts"),
        ((Stage(start=0),), "all above 0"),
        ((Stage(start=1, batch_size=0),), "batch_size must be at least 1"),
        (
            (Stage(start=1, data=Data(source="coco:x")),),
            r"stages\[0\].data.source must be that of the run, 'scenes'; got 'coco:x'",
        ),
    ],
)
def test_bad_stages_are_errors(stages, message):
    with pytest.raises(ConfigError, match=message):
        make_config(stages=stages)


def test_the_learning_rate_continues_when_other_parts_are_trained():
    params = {
        part: {"kernel": jnp.full((2, 2), float(i))}
        for i, part in enumerate(("image_encoder", "mask_decoder"))
    }
    gradients = jax.tree.map(jnp.ones_like, params)
    config = Optimizer(warmup_steps=100, weight_decay=0.0, layer_decay=1.0, peak_lr=1.0)
    decoder, both = (
        make_optimizer(config, 1, trainable)
        for trainable in (("mask_decoder",), ("mask_decoder", "image_encoder"))
    )
    state = decoder.init(params)
    for _ in range(10):
        _, state = decoder.update(gradients, state, params)
    kept = keep_schedule(state, both.init(params))
    updates, _ = both.update(gradients, kept, params)
    # The rate of the eleventh step of the warm-up, and a first step of Adam for every part.
    for update in jax.tree.leaves(updates):
        np.testing.assert_allclose(update, -0.11, rtol=1e-5)


@pytest.mark.slow
def test_a_run_resumes_exactly_inside_and_between_stages(tmp_path):
    config = tmp_path / "config.py"
    config.write_text(CONFIG + STAGES.replace("CACHE", str(tmp_path / "cache")))
    once, resumed = tmp_path / "once", tmp_path / "resumed"
    finish(start_run(config, once))
    for steps in (4, 7, 12):
        finish(start_run(config, resumed, f"num_steps={steps}"))
    assert losses(resumed) == losses(once)
    # All evaluations are those of the run, whose windows were around objects.
    (evaluation,) = read_rows(once / "evaluations.jsonl")
    assert (evaluation["step"], evaluation["tiles"]["size"]) == (9, "auto")
    assert sam_jax.load(once / "weights")[0].object_share == (0.3, 0.7)
    digests = [
        hashlib.sha256((workdir / "weights" / "weights.safetensors").read_bytes()).hexdigest()
        for workdir in (once, resumed)
    ]
    assert digests[0] == digests[1]
