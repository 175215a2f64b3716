"""Tests that unusable images are counted, and that none is lost from the list."""

import json

import pytest

from sam_jax.data.loader import SkippedSample
from train.bad_samples import BadSamples
from train.config import ConfigError


def read_names(path):
    return [json.loads(row)["name"] for row in path.read_text().splitlines()]


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


def test_a_resumed_run_adds_to_the_list(tmp_path):
    path = tmp_path / "bad_samples.jsonl"
    first, second, third = (SkippedSample(i, f"{i}.jpg", "broken image", "cut") for i in range(3))
    BadSamples(path, 0.1, 10).add([first])
    with open(path, "a") as file:
        file.write('{"index": 1, "na')  # the process was killed
    resumed = BadSamples(path, 0.1, 10)
    assert read_names(path) == ["0.jpg"]
    resumed.add([second, second])
    assert read_names(path) == ["0.jpg", "1.jpg"]
    with pytest.raises(ConfigError, match=r"2 of 10 images are unusable.*the last was 0.jpg"):
        resumed.add([first])  # still unusable
    with pytest.raises(ConfigError, match="3 of 10"):
        resumed.add([third])
    assert read_names(path) == ["0.jpg", "1.jpg", "2.jpg"]


def test_a_list_of_bad_samples_that_cannot_be_written_does_not_end_a_run(tmp_path, caplog):
    samples = BadSamples(tmp_path / "removed" / "bad_samples.jsonl", limit=0.5, count=4)
    samples.add([SkippedSample(1, "one.jpg", "broken image", "truncated")])
    assert "one.jpg is unusable, and cannot be listed: [Errno 2]" in caplog.text
    with pytest.raises(ConfigError, match="3 of 4 images are unusable"):
        samples.add([SkippedSample(i, f"{i}.jpg", "broken image", "") for i in (2, 3)])
