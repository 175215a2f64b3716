"""Runs the readers of data on mutated files; `data_readers.py` describes them."""

import re
import subprocess
import sys

import pytest

from tests.fuzz import data_readers


@pytest.fixture(scope="module")
def readers():
    return data_readers.readers()


NAMES = ("image", "image for training", "mask", "labels", "run lengths", "SA-1B json")
NAMES += ("COCO json", "label index", "tar", "index of a tar")


@pytest.mark.filterwarnings("ignore:::PIL")
@pytest.mark.parametrize("name", NAMES)
def test_intact_files_are_read_and_mutated_ones_raise_known_errors(readers, tmp_path, name):
    assert set(readers) == set(NAMES)
    for data in readers[name].samples:
        readers[name].read(data, tmp_path)
    assert not list(data_readers.fuzz(readers[name], 40, 0, tmp_path))


@pytest.mark.slow
def test_thousands_of_mutated_files_with_a_limit_of_memory():
    result = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.data_readers", "--count", "1500", "--seed", "1"],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search("0 failures, peak memory [0-9]{2,3} MB", result.stdout), result.stdout
