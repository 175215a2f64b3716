"""Workdirs in an object store."""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import fsspec.core
import jax
import jax.numpy as jnp
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
def remote(bucket):
    with RemoteWorkdir(RUN) as remote:
        yield remote


@pytest.fixture
def bucket(monkeypatch):
    return object_store.install(monkeypatch)


def test_files_are_uploaded_once_and_again_when_they_change(remote):
    remote.pull()
    file = remote.folder / "report" / "index.html"
    file.parent.mkdir()
    file.write_text("one")
    (remote.folder / ".half").write_text("stays")
    remote.push()
    copy = epath.Path(RUN) / "report" / "index.html"
    assert copy.read_text() == "one"
    assert [path.name for path in epath.Path(RUN).iterdir()] == ["report"]
    copy.write_text("not uploaded again")
    remote.push()
    assert copy.read_text() == "not uploaded again"
    file.write_text("two, longer")
    remote.push()
    assert copy.read_text() == "two, longer"


def test_files_that_a_resumed_run_needs_are_downloaded(bucket, remote):
    (bucket / "runs" / "small" / "config.json").write_text("{}")
    (bucket / "runs" / "small" / "metrics.jsonl").write_text('{"step": 1}\n')
    (bucket / "runs" / "small" / "evaluation.json").write_text("{}")
    remote.pull()
    assert {path.name for path in remote.folder.iterdir()} == {"config.json", "metrics.jsonl"}
    assert (remote.folder / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_folder_with_other_files_is_an_error(bucket, remote):
    (bucket / "runs" / "small" / "thesis.pdf").write_bytes(b"%PDF")
    with pytest.raises(ConfigError, match="gs://bucket/runs/small is not empty and holds no run"):
        remote.pull()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ImportError("Install gcsfs"), r"sam_jax\[gcs\]"),
        (RuntimeError("403"), "403"),
    ],
)
def test_a_store_that_cannot_be_read_is_an_error(remote, monkeypatch, error, message):
    def fail(*_, **__):
        raise error

    if isinstance(error, ImportError):
        monkeypatch.setattr(fsspec.core, "url_to_fs", fail)
    else:
        monkeypatch.setattr(object_store.ObjectStore, "info", fail)
    with pytest.raises(ConfigError, match=f"--workdir {RUN} cannot be read.*{message}"):
        remote.pull()
    monkeypatch.undo()


def test_other_kinds_of_stores_are_errors():
    with pytest.raises(ConfigError, match="must be a folder or gs://BUCKET/PATH; got s3://b/run"):
        RemoteWorkdir("s3://b/run")


def test_a_folder_created_in_a_web_console_is_empty(bucket, remote):
    """A console creates an object with the name of the folder, and the store lists this object."""
    (bucket / "runs" / "small" / "x").write_text("")
    listed = object_store.ObjectStore.ls
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(object_store.ObjectStore, "ls", lambda self, path, **kwargs: [path])
        remote.pull()
    assert object_store.ObjectStore.ls is listed


def test_files_that_a_run_removes_are_removed_from_the_store(bucket, remote):
    for name in ("config.json", "bad_samples.jsonl", "bad_samples_1.jsonl"):
        (bucket / "runs" / "small" / name).write_text("{}")
    remote.pull()
    (remote.folder / "bad_samples.jsonl").unlink()
    remote.push()
    names = {path.name for path in epath.Path(RUN).iterdir()}
    assert names == {"config.json", "bad_samples_1.jsonl"}


def test_files_that_cannot_be_uploaded_are_kept(bucket, monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError("503")

    def try_to_upload(error):
        with RemoteWorkdir(RUN) as remote:
            (remote.folder / "weights").write_text("content")
            monkeypatch.setattr(object_store.ObjectStore, "put_file", fail)
            if error:
                raise error
        return remote

    for error, expected in ((None, OSError), (KeyError("of the run"), KeyError)):
        caplog.clear()
        with pytest.raises(expected):
            try_to_upload(error)
        folder = Path(caplog.messages[-1].split(" could not be uploaded")[0])
        assert (folder / "weights").read_text() == "content"
        shutil.rmtree(folder)


def test_a_local_workdir_is_used_directly(tmp_path):
    with RemoteWorkdir(tmp_path / "run") as remote:
        remote.pull()
    assert remote.folder == tmp_path / "run"
    assert not remote.folder.exists()
    assert str(remote.checkpoints) == str(tmp_path / "run" / "checkpoints")


def test_a_run_in_a_store_resumes_and_uploads_everything(bucket, monkeypatch, tmp_path):
    """The steps are replaced by a counter, and the fourth step fails once.

    The checkpoints are on a disk, because orbax cannot write to the store of the tests.
    """
    failures = [RuntimeError("device failure")]
    config = tmp_path / "small.py"
    config.write_text(CONFIG)

    class StoredOnDisk(Checkpoints):
        def __init__(self, folder, *args):
            assert str(folder) == f"{RUN}/checkpoints"
            super().__init__(tmp_path / "checkpoints", *args)

    @jax.jit
    def count(state):
        values = dict.fromkeys(("round_loss", "focal", "dice", "iou", "miou"), np.zeros(5))
        values |= {"loss": 0.0, "gradient_norm": 0.0, "is_finite": True}
        return state.replace(step=state.step + 1), jax.tree.map(jnp.asarray, values)

    def next_step(state, batch):
        if int(jax.device_get(state.step)) == 3 and failures:
            raise failures.pop()
        return count(state)

    def make_fake_step(*_):
        assert (epath.Path(RUN) / "config.json").exists()  # before there is a checkpoint
        return next_step

    def finalize(config, task, folder, variables, eval_split):
        sam_jax.save(folder / "weights", config.model, variables)
        (folder / "report").mkdir()
        (folder / "report" / "index.html").write_text("a report")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("train.run.finalize", finalize)
    monkeypatch.setattr("train.stage.make_step", make_fake_step)
    monkeypatch.setattr("train.run.Checkpoints", StoredOnDisk)
    argv = ["train", str(config), "--workdir", RUN, "--set", "num_steps=5"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(RuntimeError, match="device failure"):
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
        *("config.json", "summary.json", "metrics.jsonl", "report/index.html"),
        *("weights/SHA256SUMS", "weights/model.json", "weights/weights.safetensors"),
    }
    assert any(path.startswith("tensorboard/") for path in files)
