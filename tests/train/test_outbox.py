"""Workdirs in an object store, of which a stand-in can neither append, nor lock, nor rename."""

import json
import sys

import fsspec
import jax
import numpy as np
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

import sam_jax
from tests.train.running import CONFIG, losses
from train import __main__ as command
from train.checkpoints import Checkpoints
from train.config import ConfigError
from train.outbox import Outbox

RUN = "gs://bucket/runs/small"


class ObjectStore(MemoryFileSystem):
    """Whole objects are put and got; all else is refused."""

    protocol = ("gs", "gcs")

    def __init__(self, *args, finalize_on_close=True, **kwargs):
        super().__init__(*args, **kwargs)

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.removeprefix("gs://"))

    def open(self, path, mode="rb", **kwargs):
        assert mode in ("r", "rb", "w", "wb"), f"an object store cannot {mode}"
        return super().open(path, mode, **kwargs)

    def mv(self, *args, **kwargs):
        raise AssertionError("an object store cannot rename")

    mv_file = rename = move = touch = created = mv


@pytest.fixture
def outbox(bucket):
    outbox = Outbox(RUN)
    yield outbox
    outbox.close()


@pytest.fixture
def bucket(monkeypatch):
    for name in ObjectStore.protocol:
        fsspec.register_implementation(name, ObjectStore, clobber=True)
    epath.backend.fsspec_backend._get_filesystem.cache_clear()
    ObjectStore.clear_instance_cache()
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    return epath.Path("gs://bucket")


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


def test_a_run_in_a_store_goes_on_and_leaves_what_one_on_a_disk_leaves(
    bucket, monkeypatch, tmp_path
):
    """Its checkpoints, which orbax writes, are on a disk here: it has no stand-in for a store."""
    config = tmp_path / "small.py"
    config.write_text(CONFIG)
    on_disk = tmp_path / "checkpoints"

    def train(workdir, steps):
        argv = ["train", str(config), "--workdir", str(workdir), "--set", f"num_steps={steps}"]
        monkeypatch.setattr(sys, "argv", argv)
        assert command.main() == 0

    class StoredOnDisk(Checkpoints):
        def __init__(self, folder):
            super().__init__(on_disk if str(folder).startswith("gs://") else folder)

    monkeypatch.setattr("train.run.Checkpoints", StoredOnDisk)
    train(RUN, 3)
    train(RUN, 4)
    train(tmp_path / "run", 4)
    copied = tmp_path / "copied"
    ObjectStore().get(RUN, str(copied), recursive=True)
    assert [step for step, _, _ in losses(copied)] == [1, 2, 3, 4]
    assert losses(copied)[-1] == losses(tmp_path / "run")[-1]
    assert json.loads((copied / "config.json").read_text())["num_steps"] == 4
    names = lambda folder: {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and "checkpoints" not in path.parts and "events" not in path.name
    }
    assert names(copied) == names(tmp_path / "run")
    stored, local = (sam_jax.load(folder / "weights")[1] for folder in (copied, tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, stored, local)
