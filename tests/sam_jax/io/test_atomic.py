"""Atomic files: the old content or the new one, and nothing else in the folder."""

import json
import math
import os
import re

import pytest

from sam_jax.io.atomic import atomic_path, write_bytes, write_json


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


def test_json(tmp_path):
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
