"""Tests that safetensors files round-trip, and that damaged files are refused in little memory."""

import json
import os
import random
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from sam_jax.weights.formats import load
from sam_jax.weights.safetensors_file import SafetensorsFileError, read, write
from tests.sam_jax.weights.safetensors_bytes import FLOATS, HEADERS, mutated, pack

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}
FUZZ_INPUTS = 5_000


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Changes to an empty working folder, and returns it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_arrays_round_trip(tmp_path):
    path = tmp_path / "x.safetensors"
    write(path, TENSORS | {"t": TENSORS["a"].T})
    back = read(path)
    assert back.keys() == {"a", "b", "t"}
    assert np.array_equal(back["t"], TENSORS["a"].T)
    assert all(np.array_equal(back[k], TENSORS[k]) for k in TENSORS)
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_others_may_read_the_file_as_any_other(tmp_path):
    path, other = tmp_path / "x.safetensors", tmp_path / "other"
    write(path, TENSORS)
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.safetensors"
    write(path, TENSORS)
    before = path.read_bytes()
    with pytest.raises(Exception, match="object"):
        write(path, {"a": np.array([None])})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.safetensors"]


def header(**entries):
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BROKEN = {
    "empty": b"",
    "no header": b"\0" * 8,
    "a header longer than the file": (1 << 20).to_bytes(8, "little") + b"{}",
    "a header of 2**60 bytes": (1 << 60).to_bytes(8, "little") + b"{}",
    "no JSON": (4).to_bytes(8, "little") + b"abcd",
    "a list": (2).to_bytes(8, "little") + b"[]",
    "deeply nested": (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "offsets past the end": header(a=entry("F32", [2], 0, 8)) + b"\0" * 4,
    "a wrong number of bytes": header(a=entry("F32", [3], 0, 8)) + b"\0" * 8,
    "overlapping arrays": header(a=entry("F32", [2], 0, 8), b=entry("F32", [2], 4, 12))
    + b"\0" * 12,
    "a hole": header(a=entry("F32", [1], 4, 8)) + b"\0" * 8,
    "a huge shape": header(a=entry("F32", [1 << 40, 1 << 40], 0, 8)) + b"\0" * 8,
    "a negative shape": header(a=entry("F32", [-1, -2], 0, 8)) + b"\0" * 8,
    "reversed offsets": header(a=entry("F32", [2], 8, 0)) + b"\0" * 8,
    "an unknown type": header(a=entry("X9", [2], 0, 8)) + b"\0" * 8,
    "bytes left over": header(a=entry("F32", [1], 0, 4)) + b"\0" * 8,
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_errors_name_the_broken_file(content, tmp_path):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(SafetensorsFileError, match=r"broken\.safetensors is damaged"):
        read(path)


def test_thousands_of_mutations_are_refused_or_read(tmp_path):
    path = tmp_path / "x.safetensors"
    write(path, TENSORS)
    original = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    tracemalloc.start()
    for _ in range(3000):
        data = bytearray(original)
        for position in rng.integers(0, len(data), rng.integers(1, 5)):
            data[position] = rng.integers(256)
        path.write_bytes(data[: rng.integers(len(data) // 2, len(data) + 1)])
        try:
            read(path)
        except SafetensorsFileError:
            refused += 1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert refused > 1000
    assert peak < 16 << 20


@pytest.mark.parametrize("kind", HEADERS)
def test_bad_safetensors_are_refused(folder, kind):
    Path("bad.safetensors").write_bytes(HEADERS[kind])
    with pytest.raises(SafetensorsFileError, match=r"bad.safetensors"):
        read("bad.safetensors")
    with pytest.raises(ValueError, match=r"bad.safetensors"):
        load("bad.safetensors")


def test_safetensors_of_other_types_are_not_weights(folder):
    for dtype, size in {"I64": 1, "BOOL": 8, "U8": 8, "C64": 1}.items():
        Path("w.safetensors").write_bytes(pack({"a": FLOATS | {"dtype": dtype, "shape": [size]}}))
        with pytest.raises(ValueError, match=r"\ba\b"):
            load("w.safetensors")


def test_dtypes_and_shapes_round_trip(folder):
    rng = np.random.default_rng(0)
    tensors = {
        "a": rng.standard_normal((2, 3)).astype(np.float32),
        "transposed": rng.standard_normal((4, 5)).astype(np.float32).T,
        "half": rng.standard_normal(7).astype(np.float16),
        "brain": rng.standard_normal(7).astype(ml_dtypes.bfloat16),
        "scalar": np.float32(3).reshape(()),
        "empty": np.zeros((0, 3), np.float32),
    }
    write("w.safetensors", tensors)
    again = read("w.safetensors")
    assert again.keys() == tensors.keys()
    for name, array in again.items():
        assert array.dtype == tensors[name].dtype
        np.testing.assert_array_equal(array, tensors[name])
    assert os.listdir() == ["w.safetensors"]


@pytest.mark.slow
def test_mutated_safetensors_are_read_or_refused(folder):
    layout = {
        "a": FLOATS,
        "bc": FLOATS | {"dtype": "BF16", "shape": [2, 3], "data_offsets": [8, 20]},
    }
    layout["__metadata__"] = {"format": "pt"}
    file = pack(layout, bytes(range(20)))
    path = Path("w.safetensors")
    refused = 0
    tracemalloc.start()
    try:
        for seed in range(FUZZ_INPUTS):
            path.write_bytes(mutated(file, random.Random(seed)))
            try:
                tensors = read(path)
            except ValueError:
                refused += 1
            else:
                assert sum(x.nbytes for x in tensors.values()) <= path.stat().st_size
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert FUZZ_INPUTS / 2 < refused < FUZZ_INPUTS
    assert peak < 20e6
