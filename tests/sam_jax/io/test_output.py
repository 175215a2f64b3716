"""Tests that places that cannot be written to are named before anything is written."""

import os
from pathlib import Path

import pytest

from sam_jax.io.output import check_file, check_folder


def test_folders_that_exist_or_can_be_created_are_returned(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    for folder in (tmp_path, tmp_path / "a" / "b", tmp_path / "link", tmp_path / "link" / "c"):
        assert check_folder(str(folder), "--out") == folder
    assert check_folder("new", "--out") == Path("new")
    assert os.listdir(tmp_path) == ["link"]


def test_other_folders_are_errors(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "file/below"):
        with pytest.raises(ValueError, match=rf"^--out .*{name}: .*/file is not a folder$"):
            check_folder(str(tmp_path / name), "--out")
    for name in ("link", "link/below"):
        message = rf"^--out .*{name}: .*/link is a link to nowhere, which does not exist$"
        with pytest.raises(ValueError, match=message):
            check_folder(str(tmp_path / name), "--out")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match=rf"^--out .*/new: {tmp_path} cannot be written to$"):
        check_folder(str(tmp_path / "new"), "--out")


def test_files_need_a_folder(tmp_path):
    file = tmp_path / "scores.json"
    assert check_file(str(file), "--json") == file
    assert check_file("scores.json", "--json") == Path("scores.json")
    with pytest.raises(ValueError, match="is a folder; it must be a file"):
        check_file(str(tmp_path), "--json")
    with pytest.raises(ValueError, match=r"--json .*: there is no folder .*/missing"):
        check_file(str(tmp_path / "missing" / "x.json"), "--json")
