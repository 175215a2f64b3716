"""The files in the workdir of a run."""

import dataclasses
import json

import pytest

from configs.sam_tiny import config as tiny
from sam_jax.data.loader import SkippedSample
from train.config import ConfigError
from train.overrides import to_dict
from train.workdir import BadSamples, check_or_create, write_evaluation


def test_a_config_saved_before_a_field_existed_has_its_default(tmp_path):
    saved = to_dict(tiny)
    del saved["stages"], saved["data"]["jitter"], saved["optimizer"]["cosine_start"]
    del saved["model"]["object_share"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    check_or_create(tmp_path, tiny, 0, is_writer=False)
    data = dataclasses.replace(tiny.data, jitter=(0.1, 2.0))
    with pytest.raises(ConfigError, match=r"data.jitter was \[\], is \[0.1, 2.0\]"):
        check_or_create(tmp_path, dataclasses.replace(tiny, data=data), 0, is_writer=False)


def test_values_that_are_not_finite_are_written_as_null(tmp_path):
    evaluation = {
        "loss": float("nan"),
        "clicks": {"1": {"chosen": 0.5, "oracle": float("inf")}},
        "images": 3,
        "index": ":",
    }
    write_evaluation(tmp_path, evaluation, [])
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]
    assert json.loads((tmp_path / "evaluation.json").read_text()) == {
        "loss": None,
        "clicks": {"1": {"chosen": 0.5, "oracle": None}},
        "images": 3,
        "index": ":",
    }


def test_images_used_in_part_are_listed_and_not_counted(tmp_path):
    bad_samples = BadSamples(tmp_path / "bad_samples.jsonl", 0.1, 10)
    partial = [
        SkippedSample(i, f"{i}.jpg", "empty mask", "mask 0", {"empty mask": 1}) for i in (0, 1)
    ]
    bad_samples.add([*partial, *partial])
    bad_samples.add([SkippedSample(3, "3.jpg", "broken image", "cut")])
    rows = [json.loads(row) for row in bad_samples.path.read_text().splitlines()]
    assert [row["name"] for row in rows] == ["0.jpg", "1.jpg", "3.jpg"]
    assert [row["skipped_masks"] for row in rows] == [{"empty mask": 1}, {"empty mask": 1}, {}]
    with pytest.raises(ConfigError, match="2 of 10 images are unusable"):
        bad_samples.add([SkippedSample(4, "4.jpg", "broken image", "cut")])
