"""The files in the workdir of a run."""

import dataclasses
import json
import os
from types import SimpleNamespace

import pytest

from configs.sam_tiny import config as tiny
from train.config import ConfigError, TrainConfig
from train.overrides import to_dict
from train.run_record import make_record
from train.workdir import check_or_create, lock, write_evaluation


def test_a_config_saved_before_a_field_existed_has_its_default(tmp_path):
    config = TrainConfig(model=tiny.model, data=tiny.data)
    saved = to_dict(config)
    del saved["stages"], saved["data"]["jitter"], saved["optimizer"]["cosine_start"]
    del saved["model"]["object_share"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    check_or_create(tmp_path, config, 0, is_writer=False)
    data = dataclasses.replace(tiny.data, jitter=(0.1, 2.0))
    with pytest.raises(ConfigError, match=r"data.jitter was \[\], is \[0.1, 2.0\]"):
        check_or_create(tmp_path, dataclasses.replace(config, data=data), 0, is_writer=False)


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


def hold(workdir, config=tiny, num_bytes=0):
    return lock(workdir, config, num_bytes, str(workdir))


def test_one_run_at_a_time_holds_a_workdir(tmp_path):
    workdir = tmp_path / "run"
    message = f"{workdir} is in use by process {os.getpid()} on .+ since .+; choose another"
    with hold(workdir):
        check_or_create(workdir, tiny, 0)
        before = sorted((path.name, path.read_bytes()) for path in workdir.iterdir())
        with pytest.raises(ConfigError, match=message), hold(workdir):
            pytest.fail("two runs hold one workdir")
        assert sorted((path.name, path.read_bytes()) for path in workdir.iterdir()) == before
    with hold(workdir):
        pass
    assert [path.name for path in workdir.iterdir()] == ["config.json"]


def test_nothing_is_written_to_a_folder_that_is_rejected(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="is not empty and holds no run"), hold(tmp_path):
        pytest.fail("the folder is not free")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ConfigError, match="MiB of disk space"), hold(tmp_path / "run", tiny, 2**60):
        pytest.fail("the disk is too small")
    assert not (tmp_path / "run").exists()


def test_the_other_hosts_of_a_run_accept_what_the_lead_host_has_begun(tmp_path):
    workdir = tmp_path / "run"
    with hold(workdir):
        (workdir / ".config.json.0123abcd.tmp").write_text("{")
        check_or_create(workdir, tiny, 0, is_writer=False)
        (workdir / ".config.json").touch()  # some other program's
        with pytest.raises(ConfigError, match="is not empty and holds no run"):
            check_or_create(workdir, tiny, 0, is_writer=False)


@pytest.mark.parametrize("folder", ["weights", "checkpoints"])
def test_a_file_in_the_place_of_a_folder_is_rejected_at_the_start(tmp_path, folder):
    check_or_create(tmp_path, tiny, 0)
    (tmp_path / folder).touch()
    with pytest.raises(ConfigError, match=f"{tmp_path}/{folder} is a file, .* rename it"):
        check_or_create(tmp_path, tiny, 0)


def test_a_resumed_run_needs_no_space_for_what_it_has_written(tmp_path, monkeypatch):
    check_or_create(tmp_path, tiny, 0)
    (tmp_path / "checkpoints" / "7").mkdir(parents=True)
    (tmp_path / "checkpoints" / "7" / "data").write_bytes(bytes(3 * 2**20))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2 * 2**20))
    check_or_create(tmp_path, tiny, 5 * 2**20)
    with pytest.raises(ConfigError, match="needs 3 MiB of disk space; 2 MiB are free"):
        check_or_create(tmp_path, tiny, 6 * 2**20)
