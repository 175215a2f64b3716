"""The safetensors reader refuses what is damaged, in bounded memory."""

import json
import os
import tracemalloc

import numpy as np
import pytest

from sam_jax.weights import safetensors_file

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}


def test_round_trip(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors_file.write(path, TENSORS | {"t": TENSORS["a"].T})
    back = safetensors_file.read(path)
    assert back.keys() == {"a", "b", "t"}
    assert np.array_equal(back["t"], TENSORS["a"].T)
    assert all(np.array_equal(back[k], TENSORS[k]) for k in TENSORS)
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors_file.write(path, TENSORS)
    before = path.read_bytes()
    with pytest.raises(Exception, match="object"):
        safetensors_file.write(path, {"a": np.array([None])})
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
def test_broken_files_are_refused_by_name(content, tmp_path):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(
        safetensors_file.SafetensorsFileError, match=r"broken\.safetensors is damaged"
    ):
        safetensors_file.read(path)


def test_thousands_of_mutations_are_refused_or_read(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors_file.write(path, TENSORS)
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
            safetensors_file.read(path)
        except safetensors_file.SafetensorsFileError:
            refused += 1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert refused > 1000
    assert peak < 16 << 20
