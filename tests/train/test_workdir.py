"""The files in the workdir of a run."""

import dataclasses
import json

import pytest

from configs.sam_tiny import config as tiny
from train.config import ConfigError
from train.overrides import to_dict
from train.run_record import make_record
from train.workdir import check_or_create, write_evaluation


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


@pytest.mark.parametrize("content", ["", '{"model": {"image_', "[]", "\0\0\0\0"])
def test_a_damaged_config_is_repaired_from_a_checkpoint(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config.json is damaged, and no checkpoint holds"):
        check_or_create(tmp_path, tiny, 0)
    assert (tmp_path / "config.json").read_text() == content
    for step in (2, 4, 10):
        folder = tmp_path / "checkpoints" / str(step) / "record"
        folder.mkdir(parents=True)
        config = tiny if step == 4 else dataclasses.replace(tiny, seed=step)
        record = json.dumps(make_record(step, config, {}, {}))
        (folder / "metadata").write_text(record if step < 10 else record[:99])
    with pytest.raises(ConfigError, match="seed was 0, is 3"):
        check_or_create(tmp_path, dataclasses.replace(tiny, seed=3), 0)
    check_or_create(tmp_path, tiny, 0)
    assert json.loads((tmp_path / "config.json").read_text()) == to_dict(tiny)
