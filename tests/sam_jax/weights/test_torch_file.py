"""Tests hostile, damaged and valid `.pth` files. They are built without torch."""

import contextlib
import os
import struct
import sys
import tracemalloc
import zipfile
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import pytest

from sam_jax.weights import torch_file
from tests.sam_jax.weights.hostile_torch_files import REFUSED
from tests.sam_jax.weights.torch_pickles import (
    COMMAND,
    NAMESPACE,
    ORDERED_DICT,
    SYSTEM,
    VALID,
    archive,
    checkpoint,
    parameter,
    push,
    storage,
    tensor,
)

DTYPES = ["f4", "f8", "f2", ml_dtypes.bfloat16, "i8", "i4", "i2", "i1", "u1", "?"]


@contextlib.contextmanager
def memory_below(limit: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < limit


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Yields the working folder, and checks that only `file.pth` was created in it."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert {path.name for path in tmp_path.iterdir()} <= {"file.pth"}
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("name", REFUSED)
def test_hostile_and_damaged_files_are_refused(folder, name):
    content, message = REFUSED[name]
    path = folder / "file.pth"
    path.write_bytes(content)
    # Files with too many opcodes or values are not measured: tracing takes ten times longer.
    measure = contextlib.nullcontext() if "500000" in message else memory_below(32 << 20)
    with pytest.raises(torch_file.TorchFileError) as refusal, measure:
        torch_file.read(path)
    assert str(refusal.value).startswith(f"{path}: ")
    assert message in str(refusal.value)
    assert len(str(refusal.value)) < 1000


def test_truncated_files_are_refused(folder):
    path = folder / "file.pth"
    for length in range(len(VALID)):
        path.write_bytes(VALID[:length])
        with pytest.raises(torch_file.TorchFileError):
            torch_file.read(path)


def test_a_folder_is_an_error(folder):
    with pytest.raises(torch_file.TorchFileError, match="not a regular file"):
        torch_file.read(folder)


def test_a_missing_file_is_an_error(folder):
    with pytest.raises(FileNotFoundError):
        torch_file.read(folder / "file.pth")


# Fuzzing.

SEED_PICKLE = (
    b"\x80\x02"
    + push(
        {
            "model": ORDERED_DICT
            + b"("
            + push("weight")
            + tensor(sizes=(1, 2), strides=(2, 1))
            + push("bias")
            + parameter(tensor(offset=1, sizes=(1,)))
            + b"u"
            + push({"_metadata": ORDERED_DICT})
            + b"b",
            "command": push(COMMAND) + b"q\x00",
            "args": NAMESPACE + push({"lr": 0.1, "names": ["os", "system", None, True]}) + b"b",
            "epoch": (1, 1 << 40),
        }
    )
    + b"."
)
SPLICES = [
    *[bytes([code]) for code in b"(.012FGIJKLMNPQRSTUVX])abcdefghijlopqrstu}"],
    *[bytes([code]) for code in range(0x80, 0x99)],
    *[b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80", bytes(8), b"\xff" * 8],
    SYSTEM,
    SYSTEM + b"h\x00\x85R",
    b"(h\x00ios\nsystem\n",
    b"\x8c\x02os\x8c\x06system\x93h\x00\x85R",
]


def mutations(content: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Yields copies of the content with one to four random changes."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        mutant = bytearray(content)
        for _ in range(random.integers(1, 5)):
            at, end = sorted(random.integers(0, len(mutant) + 1, 2))
            match random.integers(6):
                case 0 | 1:
                    mutant[at : at + 1] = random.bytes(1)
                case 2:
                    mutant[at : at + 1] = bytes([mutant[at - 1] ^ 1 << random.integers(8)])
                case 3:
                    piece = SPLICES[random.integers(len(SPLICES))]
                    mutant[at : at + len(piece) * random.integers(2)] = piece
                case 4:
                    del mutant[at : min(end, at + 8)]
                case 5:
                    mutant[at:at] = mutant[at : min(end, at + 32)]
        yield bytes(mutant)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["archive", "pickle"])
def test_mutated_files_are_read_or_refused(folder, what):
    count = 500  # `tests.fuzz` reads more
    path = folder / "file.pth"
    path.write_bytes(archive(SEED_PICKLE))
    assert torch_file.read(path)["args"]["names"] == ["os", "system", None, True]
    if what == "archive":
        files = list(mutations(archive(SEED_PICKLE), count, seed=0))
    else:
        files = [archive(mutant) for mutant in mutations(SEED_PICKLE, count, seed=1)]
    read = 0
    with memory_below(8 << 20):
        for file in files:
            path.write_bytes(file)
            with contextlib.suppress(torch_file.TorchFileError):
                read += isinstance(torch_file.read(path), dict)
    assert 0 < read < count  # some are read and some are refused


# Reading.


def test_reads_a_checkpoint(folder):
    floats = np.arange(6, dtype="<f4")
    memo = storage(numel=6) + b"q\x05"
    model = (
        ORDERED_DICT
        + b"("
        + push("plain")
        + tensor(memo, 0, (2, 3), (3, 1))
        + push("transposed")
        + tensor(b"h\x05", 0, (3, 2), (1, 3))
        + push("sliced")
        + tensor(b"h\x05", 1, (2, 2), (3, 1))
        + push("scalar")
        + tensor(b"h\x05", 5, (), ())
        + push("empty")
        + tensor(b"h\x05", 6, (0, 3), (3, 1))
        + push("parameter")
        + parameter(tensor(b"h\x05", 2, (1,), (1 << 40,)))
        + b"u"
        + push({"_metadata": {"": {"version": 1}}})
        + b"b"
    )
    content = {
        "model": model,
        "optimizer": {"state": {0: {"step": 1.5}}, "betas": [(0.9, 0.999), None]},
        "args": NAMESPACE + push({"lr": 1e-3, "resume": "", "amp": True}) + b"b",
        "epoch": 1 << 62,
    }
    path = folder / "file.pth"
    path.write_bytes(archive(b"\x80\x02" + push(content) + b".", **{"data/0": floats.tobytes()}))
    read = torch_file.read(path)
    model = read.pop("model")
    assert read == {
        "optimizer": {"state": {0: {"step": 1.5}}, "betas": [(0.9, 0.999), None]},
        "args": {"lr": 1e-3, "resume": "", "amp": True},
        "epoch": 1 << 62,
    }
    assert type(read["args"]) is dict
    assert type(model) is dict
    matrix = floats.reshape(2, 3)
    expected = {
        "plain": matrix,
        "transposed": matrix.T,
        "sliced": matrix[:, 1:],
        "scalar": matrix[1, 2],
        "empty": matrix[2:],
        "parameter": floats[2:3],
    }
    assert list(model) == list(expected)
    for name, array in expected.items():
        assert model[name].shape == array.shape
        np.testing.assert_array_equal(model[name], array)
        assert not model[name].flags.writeable
    assert np.shares_memory(model["plain"], model["transposed"])


SKIPPED = {
    "collections Counter": b"ccollections\nCounter\n" + push(({"a": 1},)) + b"R",
    "torch Size": b"ctorch\nSize\n" + push(((1, 2),)) + b"R",
    "torch device": b"ctorch\ndevice\n" + push(("cuda", 0)) + b"R",
    "torch bfloat16": b"ctorch\nbfloat16\n",
    "torch FloatStorage": b"ctorch\nFloatStorage\n",
    "__builtin__ set": b"c__builtin__\nset\n" + push(([1, 2],)) + b"R",
    "__builtin__ bytearray": b"c__builtin__\nbytearray\n" + push(("a", "latin-1")) + b"R",
    "__builtin__ complex": b"c__builtin__\ncomplex\n" + push((0.0, 1.0)) + b"R",
    "_codecs encode": b"c_codecs\nencode\n" + push(("abc", "latin1")) + b"R",
    "torch.serialization _get_layout": b"ctorch.serialization\n_get_layout\n)R",
    "torch ComplexFloatStorage": tensor(storage(b"ctorch\nComplexFloatStorage\n")),
    "torch.storage UntypedStorage": storage(b"ctorch.storage\nUntypedStorage\n"),
    "torch._utils _rebuild_qtensor": b"ctorch._utils\n_rebuild_qtensor\n" + push((1, 2)) + b"R",
    "numpy.core.multiarray scalar": b"cnumpy.core.multiarray\nscalar\n"
    + push((b"cnumpy\ndtype\n" + push(("f8",)) + b"R" + push((3, None)) + b"b", "bytes"))
    + b"R",
    "builtins int": b"\x8a\xff" + b"\x7f" * 255,
}  # fmt: skip


@pytest.mark.parametrize("name", SKIPPED)
def test_other_values_beside_the_weights_are_skipped(folder, name):
    path = folder / "file.pth"
    pickle = b"\x80\x02" + push({"value": SKIPPED[name], "weight": tensor()}) + b"."
    path.write_bytes(archive(pickle))
    read = torch_file.read(path)
    assert read["value"] == torch_file.Global(name)
    np.testing.assert_array_equal(read["weight"], [1, 2])


def test_keys_that_are_not_plain_values_are_dropped(folder):
    path = folder / "file.pth"
    huge = b"\x8a\x0b" + ((2**61 - 1) << 20).to_bytes(11, "little")  # of the same hash as others
    keys = [push(key) for key in (1.5, None, True, 7, "a")] + [huge, push((1, 2)), b"]"]
    path.write_bytes(checkpoint(b"}(" + b"".join(key + push(0) for key in keys) + b"u"))
    assert torch_file.read(path)["value"] == dict.fromkeys((1.5, None, True, 7, "a"), 0)


@pytest.mark.parametrize("function", ["tensor", "parameter", "parameter with state"])
def test_tensors_with_attributes_are_read(folder, function):
    path = folder / "file.pth"
    state = push({"note": "x"})
    value = {
        "tensor": b"ctorch._tensor\n_rebuild_from_type_v2\n"
        + push((
            b"ctorch._utils\n_rebuild_tensor_v2\n",
            b"ctorch\nTensor\n",
            (storage(), 0, (2,), (1,), False, ORDERED_DICT),
            state,
        ))
        + b"R",
        "parameter": parameter(tensor()),
        "parameter with state": b"ctorch._utils\n_rebuild_parameter_with_state\n"
        + push((tensor(), True, ORDERED_DICT, state))
        + b"R",
    }[function]  # fmt: skip
    path.write_bytes(checkpoint(value))
    np.testing.assert_array_equal(torch_file.read(path)["value"], [1, 2])


def test_large_memo_indices_take_no_memory(folder):
    path = folder / "file.pth"
    path.write_bytes(archive(b"\x80\x02}r\xff\xff\xff\xff."))
    with memory_below(1 << 20):
        assert torch_file.read(path) == {}


def test_reading_takes_little_more_memory_than_the_file(folder):
    path = folder / "file.pth"
    tensors = {str(i): np.ones((1 << 20,), np.float32) for i in range(8)}
    with memory_below(1 << 20):
        torch_file.write(path, tensors)
    with memory_below((32 << 20) + (1 << 20)):
        assert len(torch_file.read(path)) == 8


# Writing.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (7,), (2, 3, 5)], ids=str)
def test_arrays_round_trip(folder, dtype, shape):
    dtype = np.dtype(dtype)
    data = np.random.default_rng(0).bytes(int(np.prod(shape)) * dtype.itemsize)
    if dtype.kind == "b":
        data = bytes(byte & 1 for byte in data)
    array = np.frombuffer(data, dtype).reshape(shape)
    torch_file.write(folder / "file.pth", {"name": array})
    read = torch_file.read(folder / "file.pth")["name"]
    assert (read.dtype, read.shape, read.tobytes()) == (dtype, shape, data)


def test_views_round_trip(folder):
    base = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    tensors = {
        "transposed": base.T,
        "reversed": base[::-1, :, ::-2],
        "expanded": np.broadcast_to(base[0, 0], (5, 4)),
        "a name that is no identifier: é \ud800": base,
    }
    torch_file.write(folder / "file.pth", tensors)
    read = torch_file.read(folder / "file.pth")
    assert list(read) == list(tensors)
    for name, array in tensors.items():
        np.testing.assert_array_equal(read[name], array)


def test_an_empty_state_dict_round_trips(folder):
    torch_file.write(folder / "file.pth", {})
    assert torch_file.read(folder / "file.pth") == {}


def test_data_is_aligned_and_files_are_reproducible(folder):
    path = folder / "file.pth"
    tensors = {str(i): np.full((i,), i, np.uint8) for i in range(130)}
    torch_file.write(path, tensors)
    content = path.read_bytes()
    torch_file.write(path, tensors)
    assert path.read_bytes() == content
    for entry in zipfile.ZipFile(path).infolist():
        lengths = struct.unpack_from("<2H", content, entry.header_offset + 26)
        assert (entry.header_offset + 30 + sum(lengths)) % 64 == 0


@pytest.mark.parametrize(
    "tensors",
    [
        {"good": np.zeros(2), "bad": [1.0, 2.0]},
        {"bad": 1.0},
        {"bad": np.float32(1)},
        {"bad": None},
        {"bad": np.zeros(2, np.complex64)},
        {"bad": np.zeros(2, np.uint16)},
        {"bad": np.zeros(2, ">f4")},
        {"bad": np.zeros(2, ml_dtypes.float8_e4m3fn)},
        {"bad": np.array(["text"])},
        {"bad": np.array([None])},
        {"bad": np.zeros(2, [("x", "f4")])},
    ],
    ids=lambda tensors: repr(tensors["bad"]),
)
@pytest.mark.usefixtures("without_type_checks")
def test_unsupported_values_are_refused(folder, tensors):
    with pytest.raises(ValueError, match=r"'bad': got .* must be"):
        torch_file.write(folder / "file.pth", tensors)
    assert not list(folder.iterdir())


@pytest.mark.usefixtures("without_type_checks")
def test_unsupported_names_are_refused(folder):
    with pytest.raises(ValueError, match="7: names must be strings"):
        torch_file.write(folder / "file.pth", {7: np.zeros(2)})
    assert not list(folder.iterdir())


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_keeps_the_old_file(folder, monkeypatch, step):
    def fail(*_):
        raise OSError("disk full")

    path = folder / "file.pth"
    for old in (None, VALID):
        if old:
            path.write_bytes(old)
        with monkeypatch.context() as patch:
            patch.setattr(os, step, fail)
            with pytest.raises(OSError, match="disk full"):
                torch_file.write(path, {"name": np.zeros(2)})
        assert [file.read_bytes() for file in folder.iterdir()] == ([old] if old else [])
