"""Tests that writes are atomic and leave no temporary files."""

import json
import math
import os
import re
from pathlib import Path

import pytest

from sam_jax.io.atomic import (
    atomic_directory,
    atomic_path,
    write_bytes,
    write_json,
    write_json_lines,
)


def test_a_file_is_written_and_replaced(tmp_path):
    write_bytes(tmp_path / "a", b"old")
    write_bytes(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_keeps_the_former_content(tmp_path, error):
    write_bytes(tmp_path / "a", b"old")

    def fail():
        with atomic_path(tmp_path / "a") as temporary:
            temporary.write_bytes(b"half")
            raise error

    with pytest.raises(error):
        fail()
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    with atomic_path(tmp_path / "a") as one, atomic_path(tmp_path / "a") as other:
        assert one != other
        one.write_bytes(b"one")
        other.write_bytes(b"other")
    assert (tmp_path / "a").read_bytes() == b"one", "the outer block ends last"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("step", ["open", "write", "replace"])
def test_errors_name_the_file(tmp_path, monkeypatch, step):
    def fail(*args):
        raise OSError(28, "No space left on device", *args[:1], None, *args[1:])

    def write():
        with atomic_path(tmp_path / "a") as temporary:
            if step == "open":
                fail(str(temporary))
            temporary.write_bytes(b"half")
            if step == "write":
                fail()

    if step == "replace":
        monkeypatch.setattr(os, "replace", lambda a, b: fail(str(a), str(b)))
    with pytest.raises(OSError, match=rf"^\[Errno 28\] No space left on device: '{tmp_path}/a'$"):
        write()
    assert os.listdir(tmp_path) == []


def test_json_round_trips(tmp_path):
    write_json(tmp_path / "a.json", {"a": [1, 2.5]})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"a": [1, 2.5]}
    assert text.endswith("}\n")
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"a": math.nan})
    assert (tmp_path / "a.json").read_text() == text


def test_the_temporary_name_contains_the_writer(tmp_path):
    with atomic_path(tmp_path / "a", writer="process3") as temporary:
        temporary.write_bytes(b"")
        assert re.fullmatch(r"\.a\.process3\.[0-9a-f]+\.tmp", temporary.name)


def write_directory(path, name, content):
    with atomic_directory(path, marker="marker") as folder:
        assert list(folder.iterdir()) == []
        (folder / "marker").touch()
        (folder / name).write_text(content)


def test_a_directory_is_written_and_replaced(tmp_path):
    path = tmp_path / "parent" / "a"
    write_directory(path, "old", "old")
    assert sorted(os.listdir(path)) == ["marker", "old"]
    write_directory(path, "new", "new")
    assert sorted(os.listdir(path)) == ["marker", "new"], "nothing of the old one is left"
    assert os.listdir(tmp_path / "parent") == ["a"]


def test_an_empty_directory_is_replaced(tmp_path):
    (tmp_path / "a").mkdir()
    write_directory(tmp_path / "a", "new", "new")
    assert sorted(os.listdir(tmp_path / "a")) == ["marker", "new"]


def test_other_directories_and_files_are_kept(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name in ("photos", "file"):
        with pytest.raises(FileExistsError, match=f"{name} exists and has no marker"):
            write_directory(tmp_path / name, "new", "new")
    assert sorted(os.listdir(tmp_path)) == ["file", "photos"]
    assert os.listdir(tmp_path / "photos") == ["a.jpg"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_keeps_the_former_directory(tmp_path, error):
    write_directory(tmp_path / "a", "old", "old")

    def fail():
        with atomic_directory(tmp_path / "a", marker="marker") as folder:
            (folder / "half").touch()
            raise error

    with pytest.raises(error):
        fail()
    assert sorted(os.listdir(tmp_path / "a")) == ["marker", "old"]
    assert os.listdir(tmp_path) == ["a"]


def test_the_files_of_a_directory_are_on_the_disk_before_it_is_renamed(tmp_path, monkeypatch):
    flushed, renamed = set(), []
    rename, fsync = Path.rename, os.fsync

    def record_fsync(number):
        flushed.add(Path(os.readlink(f"/proc/self/fd/{number}")).name)
        fsync(number)

    def record_rename(path, target):
        renamed.append(set(flushed))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "rename", record_rename)
    with atomic_directory(tmp_path / "weights", "model.json") as folder:
        (folder / "model.json").write_text("{}")
        (folder / "parts").mkdir()
        (folder / "parts" / "a.bin").write_bytes(b"a")
    assert renamed == [{"model.json", "a.bin"}]


@pytest.mark.parametrize("failing_call", [1, 2])
def test_a_failed_rename_keeps_the_former_directory(tmp_path, monkeypatch, failing_call):
    write_directory(tmp_path / "a", "old", "old")
    rename, calls = Path.rename, []

    def fail_once(self, target):
        calls.append(target)
        if len(calls) == failing_call:
            raise OSError("disk full")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail_once)
        with pytest.raises(OSError, match="disk full"):
            write_directory(tmp_path / "a", "new", "new")
    assert sorted(os.listdir(tmp_path / "a")) == ["marker", "old"]
    assert os.listdir(tmp_path) == ["a"]


def test_json_lines_are_complete_or_absent(tmp_path):
    rows = [{"image": "a\nb", "iou": 0.5}, {"image": "é", "iou": None}]
    write_json_lines(tmp_path / "rows", rows)
    lines = (tmp_path / "rows").read_text().splitlines()
    assert list(map(json.loads, lines)) == rows
    with pytest.raises(ValueError, match="JSON"):
        write_json_lines(tmp_path / "rows", [{"iou": 1.0}, {"iou": math.nan}])
    assert (tmp_path / "rows").read_text().splitlines() == lines
    assert os.listdir(tmp_path) == ["rows"]
