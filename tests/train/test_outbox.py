"""Workdirs in an object store."""

import json
import sys

import numpy as np
import pytest
from etils import epath

import sam_jax
from tests import object_store
from tests.train.running import CONFIG, losses
from train import __main__ as command
from train.checkpoints import Checkpoints
from train.config import ConfigError
from train.outbox import Outbox

RUN = "gs://bucket/runs/small"


@pytest.fixture
def outbox(bucket):
    outbox = Outbox(RUN)
    yield outbox
    outbox.close()


@pytest.fixture
def bucket(monkeypatch):
    return object_store.install(monkeypatch)


def test_whole_files_are_sent_once_and_again_when_they_change(outbox):
    outbox.fetch()
    file, cache = outbox.folder / "report" / "index.html", outbox.folder / "embeddings_1.npy"
    file.parent.mkdir()
    file.write_text("one")
    cache.write_text("stays")
    (outbox.folder / ".half").write_text("stays")
    outbox.send()
    copy = epath.Path(RUN) / "report" / "index.html"
    assert copy.read_text() == "one"
    assert [path.name for path in epath.Path(RUN).iterdir()] == ["report"]
    copy.write_text("not sent again")
    outbox.send()
    assert copy.read_text() == "not sent again"
    file.write_text("two, longer")
    outbox.send()
    assert copy.read_text() == "two, longer"


def test_what_a_run_goes_on_from_is_fetched(bucket, outbox):
    (bucket / "runs" / "small" / "config.json").write_text("{}")
    (bucket / "runs" / "small" / "metrics.jsonl").write_text('{"step": 1}\n')
    (bucket / "runs" / "small" / "evaluation.json").write_text("{}")
    outbox.fetch()
    assert {path.name for path in outbox.folder.iterdir()} == {"config.json", "metrics.jsonl"}
    assert (outbox.folder / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_what_is_no_run_is_refused(bucket, outbox):
    (bucket / "runs" / "small" / "thesis.pdf").write_bytes(b"%PDF")
    with pytest.raises(ConfigError, match="gs://bucket/runs/small is neither empty nor a run's"):
        outbox.fetch()


def test_without_the_extra_it_is_named(outbox, monkeypatch):
    def missing(*args):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(epath.backend.fsspec_backend, "_get_filesystem", missing)
    with pytest.raises(ConfigError, match=r"sam_jax\[gcs\]"):
        outbox.fetch()


def test_a_folder_is_its_own(tmp_path):
    outbox = Outbox(tmp_path / "run")
    outbox.fetch()
    outbox.send()
    assert outbox.folder == tmp_path / "run"
    assert not outbox.folder.exists()
    assert str(outbox.checkpoints) == str(tmp_path / "run" / "checkpoints")


def test_a_run_in_a_store_goes_on_and_leaves_all_that_one_on_a_disk_leaves(
    bucket, monkeypatch, tmp_path
):
    """Its steps change nothing but their number. Its checkpoints, which orbax writes, are on a
    disk: for it there is no stand-in."""
    config = tmp_path / "small.py"
    config.write_text(CONFIG)

    def train(steps):
        argv = ["train", str(config), "--workdir", RUN, "--set", f"num_steps={steps}"]
        monkeypatch.setattr(sys, "argv", argv)
        assert command.main() == 0

    class StoredOnDisk(Checkpoints):
        def __init__(self, folder):
            assert str(folder) == f"{RUN}/checkpoints"
            super().__init__(tmp_path / "checkpoints")

    def next_step(state, batch):
        values = dict.fromkeys(("loss", "focal", "dice", "iou", "miou"), np.zeros(5))
        return state.replace(step=state.step + 1), values | {"total": 0.0, "gradient_norm": 0.0}

    monkeypatch.setattr("train.run.make_step", lambda *_: next_step)
    monkeypatch.setattr("train.run.Checkpoints", StoredOnDisk)
    train(3)
    train(4)
    copied = tmp_path / "copied"
    object_store.ObjectStore().get(RUN, str(copied), recursive=True)
    assert [step for step, _, _ in losses(copied)] == [1, 2, 3, 4]
    assert json.loads((copied / "config.json").read_text())["num_steps"] == 4
    assert sam_jax.load(copied / "weights")[0].image_size == (48, 64)
    files = {path.relative_to(copied).as_posix() for path in copied.rglob("*") if path.is_file()}
    assert {path for path in files if not path.startswith("tensorboard/")} == {
        *("config.json", "metrics.jsonl", "evaluation.json"),
        *("weights/model.json", "weights/weights.safetensors"),
        *(f"report/{name}" for name in ("index.html", "curves.png", "clicks.png", "examples.png")),
    }
    assert any(path.startswith("tensorboard/") for path in files)
