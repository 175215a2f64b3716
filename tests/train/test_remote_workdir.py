"""Workdirs in an object store."""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import fsspec.core
import numpy as np
import pytest
from etils import epath

import sam_jax
from tests import object_store
from tests.train.running import CONFIG, losses
from train import __main__ as command
from train.checkpoints import Checkpoints
from train.config import ConfigError
from train.remote_workdir import RemoteWorkdir

RUN = "gs://bucket/runs/small"


@pytest.fixture
def outbox(bucket):
    with RemoteWorkdir(RUN) as outbox:
        yield outbox


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


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ImportError("Install gcsfs"), r"sam_jax\[gcs\]"),
        (RuntimeError("403"), "403"),
    ],
)
def test_a_store_that_cannot_be_read_is_said(outbox, monkeypatch, error, said):
    def fail(*_, **__):
        raise error

    if isinstance(error, ImportError):
        monkeypatch.setattr(fsspec.core, "url_to_fs", fail)
    else:
        monkeypatch.setattr(object_store.ObjectStore, "info", fail)
    with pytest.raises(ConfigError, match=f"--workdir {RUN} cannot be read.*{said}"):
        outbox.fetch()
    monkeypatch.undo()


def test_other_stores_are_refused():
    with pytest.raises(ConfigError, match="must be a folder or gs://BUCKET/PATH; got s3://b/run"):
        RemoteWorkdir("s3://b/run")


def test_a_folder_made_for_the_run_is_empty(bucket, outbox):
    """Consoles mark a folder with an object of its name, which stores list in it."""
    (bucket / "runs" / "small" / "x").write_text("")
    listed = object_store.ObjectStore.ls
    with pytest.MonkeyPatch.context() as patch:
        marker = lambda self, path, **kwargs: [path]
        patch.setattr(object_store.ObjectStore, "ls", marker)
        outbox.fetch()
    assert object_store.ObjectStore.ls is listed


def test_what_a_run_removes_is_removed_there(bucket, outbox):
    for name in ("config.json", "bad_samples.jsonl", "bad_samples_1.jsonl"):
        (bucket / "runs" / "small" / name).write_text("{}")
    outbox.fetch()
    (outbox.folder / "bad_samples.jsonl").unlink()
    outbox.send()
    names = {path.name for path in epath.Path(RUN).iterdir()}
    assert names == {"config.json", "bad_samples_1.jsonl"}


def test_what_cannot_be_sent_stays_here(bucket, monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError("503")

    def try_to_send(error):
        with RemoteWorkdir(RUN) as outbox:
            (outbox.folder / "weights").write_text("dear")
            monkeypatch.setattr(object_store.ObjectStore, "put_file", fail)
            if error:
                raise error
        return outbox

    for error, expected in ((None, OSError), (KeyError("of the run"), KeyError)):
        caplog.clear()
        with pytest.raises(expected):
            try_to_send(error)
        folder = Path(caplog.messages[-1].split(" could not be sent")[0])
        assert (folder / "weights").read_text() == "dear"
        shutil.rmtree(folder)


def test_a_folder_is_its_own(tmp_path):
    with RemoteWorkdir(tmp_path / "run") as outbox:
        outbox.fetch()
    assert outbox.folder == tmp_path / "run"
    assert not outbox.folder.exists()
    assert str(outbox.checkpoints) == str(tmp_path / "run" / "checkpoints")


def test_a_run_in_a_store_goes_on_and_leaves_everything_there(bucket, monkeypatch, tmp_path):
    """Its steps change nothing but their number, and the fourth fails once. Its checkpoints, which
    orbax writes, are on a disk: for it there is no stand-in."""
    failures = [RuntimeError("a broken chip")]
    config = tmp_path / "small.py"
    config.write_text(CONFIG)

    class StoredOnDisk(Checkpoints):
        def __init__(self, folder):
            assert str(folder) == f"{RUN}/checkpoints"
            super().__init__(tmp_path / "checkpoints")

    def next_step(state, batch):
        if state.step == 3 and failures:
            raise failures.pop()
        values = dict.fromkeys(("loss", "focal", "dice", "iou", "miou"), np.zeros(5))
        return state.replace(step=state.step + 1), values | {"total": 0.0, "gradient_norm": 0.0}

    def claimed(*_):
        assert (epath.Path(RUN) / "config.json").exists()  # before there is a checkpoint
        return next_step

    def conclude(config, task, folder, variables, held_out):
        sam_jax.save(folder / "weights", config.model, variables)
        (folder / "report").mkdir()
        (folder / "report" / "index.html").write_text("well")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("train.run.conclude", conclude)
    monkeypatch.setattr("train.run.make_step", claimed)
    monkeypatch.setattr("train.run.Checkpoints", StoredOnDisk)
    argv = ["train", str(config), "--workdir", RUN, "--set", "num_steps=5"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(RuntimeError, match="a broken chip"):
        command.main()
    assert command.main() == 0
    assert not list(tmp_path.glob("sam_jax_*"))
    copied = tmp_path / "copied"
    object_store.ObjectStore().get(RUN, str(copied), recursive=True)
    assert [step for step, _, _ in losses(copied)] == [1, 2, 3, 4, 5]
    assert json.loads((copied / "config.json").read_text())["num_steps"] == 5
    assert sam_jax.load(copied / "weights")[0].image_size == (48, 64)
    files = {path.relative_to(copied).as_posix() for path in copied.rglob("*") if path.is_file()}
    assert {path for path in files if not path.startswith("tensorboard/")} == {
        *("config.json", "metrics.jsonl", "report/index.html"),
        *("weights/model.json", "weights/weights.safetensors"),
    }
    assert any(path.startswith("tensorboard/") for path in files)
