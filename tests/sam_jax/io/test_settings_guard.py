"""Tests that a folder can only be continued with the same settings."""

import json
import re

import pytest

from sam_jax.io.settings_guard import SettingsError, check_settings, differences


def test_differences_of_nested_settings():
    before = {"optimizer": {"lr": 0.1, "decay": 0.8}, "steps": 10, "model": None}
    now = {"optimizer": {"lr": 0.2, "decay": 0.8}, "steps": 20, "model": {"depth": 2}, "new": None}
    assert differences(before, now, ignore=("steps",)) == [
        "optimizer.lr was 0.1, is 0.2",
        "model.depth was None, is 2",
    ]
    assert differences(before, before) == []


def test_differences_of_lists_of_settings():
    def stages(*starts):
        return {"stages": [{"start": start, "data": {"flips": True}} for start in starts]}

    assert differences(stages(5, 9), stages(5, 8)) == ["stages[1].start was 9, is 8"]
    assert differences(stages(5), stages(5, 8)) == ["number of stages was 1, is 2"]
    assert differences(stages(), stages(5)) == ["number of stages was 0, is 1"]
    assert differences(stages(5), stages(5)) == []
    assert differences({"lr": []}, {"lr": [3]}) == ["lr was [], is [3]"]


def test_a_missing_or_empty_folder_is_new(tmp_path):
    assert not check_settings(tmp_path / "missing" / "settings.json", {"a": 1})
    (tmp_path / ".hidden").write_text("")
    assert not check_settings(tmp_path / "settings.json", {"a": 1})
    assert [path.name for path in tmp_path.iterdir()] == [".hidden"]


def test_the_same_settings_continue(tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps({"size": [48, 64], "workers": 2}))
    settings = {"size": (48, 64), "workers": 8}
    assert check_settings(tmp_path / "settings.json", settings, ignore=("workers",))


def test_other_settings_are_refused(tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps({"lr": 0.1}))
    message = "gs://bucket/run was started with other settings: lr was 0.1, is 0.2. Choose another"
    with pytest.raises(SettingsError, match=f"{message} --out"):
        check_settings(
            tmp_path / "settings.json", {"lr": 0.2}, folder="gs://bucket/run", option="--out"
        )


def test_other_folders_are_refused(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"")
    message = re.escape(f"{tmp_path} is not empty and has no settings.json")
    with pytest.raises(SettingsError, match=f"{message}.*choose another --workdir"):
        check_settings(tmp_path / "settings.json", {})
    (tmp_path / "settings.json").write_text("[1]")
    with pytest.raises(SettingsError, match="is not a settings file"):
        check_settings(tmp_path / "settings.json", {})
