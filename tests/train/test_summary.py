"""The facts of a run that the console and the report show."""

import dataclasses

import jax
import numpy as np
import pytest

from configs.sam_tiny import config as tiny
from sam_jax.data.open import open_source, select
from train.config import Stage
from train.sharding import make_mesh
from train.summary import (
    describe_run,
    format_duration,
    format_summary,
    read_summary,
    training_seconds,
    write_summary,
)

PARAMS = {
    "image_encoder": {"kernel": np.zeros((30, 50))},
    "mask_decoder": {"kernel": np.zeros((4, 5)), "bias": np.zeros(5)},
}


def describe(config, mesh=None):
    images = open_source("scenes")
    splits = select(images, ":1500"), select(images, "7")
    return describe_run(config, mesh or make_mesh(8), PARAMS, *splits, "gs://bucket/run")


def test_summary_has_five_lines():
    config = dataclasses.replace(tiny, num_steps=90_000, batch_size=256, stages=())
    assert format_summary(describe(config, make_mesh(8, devices=jax.devices()[:2]))) == (
        "model    Sam, 64 x 64 pixels, 1,525 parameters\n"
        "devices  2 x cpu\n"
        "images   1,500 of scenes, and 1 held out for the evaluation\n"
        "steps    90,000, each of 256 images\n"
        "workdir  gs://bucket/run"
    )


def test_summary_of_frozen_parts():
    summary = describe(dataclasses.replace(tiny, trainable=("mask_decoder",)))
    assert summary["model"].endswith("1,525 parameters, of which 25 are trained")


@pytest.mark.parametrize(
    ("num_steps", "batch_size", "expected"),
    [
        (5000, 4, "5,000 in 2 stages, each of 4 or 8 images"),
        (5000, 8, "5,000 in 2 stages, each of 8 images"),
        (600, 4, "600 in 1 of 2 stages, each of 4 images"),
    ],
)
def test_summary_of_stages(num_steps, batch_size, expected):
    config = dataclasses.replace(
        tiny,
        num_steps=num_steps,
        batch_size=batch_size,
        stages=(Stage(start=1000, batch_size=8),),
    )
    assert describe(config)["steps"] == expected


def test_summary_is_read_with_the_versions(tmp_path):
    write_summary(tmp_path, {"model": "Sam"})
    summary = read_summary(tmp_path)
    assert summary["model"] == "Sam"
    assert summary["versions"]["jax"] == jax.__version__


def test_training_time_counts_all_logged_steps():
    rows = [{"step": 10, "step_seconds": 2.0}, {"step": 15, "step_seconds": 1.0}]
    assert training_seconds(rows) == 25
    assert training_seconds([]) == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (90, "2 min"), (3599, "1 h 0 min"), (3660, "1 h 1 min")],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text
