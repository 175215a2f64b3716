"""Hostile, damaged and ordinary `.pth` files, made by hand: torch is not needed.

An attack whose code ran would leave a file named `canary` in the working folder, or the imported
module `antigravity`.
"""

import contextlib
import io
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

COMMAND = "touch canary"
DTYPES = ["f4", "f8", "f2", ml_dtypes.bfloat16, "i8", "i4", "i2", "i1", "u1", "?"]


# Pieces of pickles. A value is pushed by `push`; bytes are opcodes already.


def push(value) -> bytes:
    match value:
        case bytes():
            return value
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case int() if abs(value) < 1 << 31:
            return b"J" + struct.pack("<i", value)
        case int():
            size = value.bit_length() // 8 + 1
            return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)
        case float():
            return b"G" + struct.pack(">d", value)
        case tuple():
            return b"(" + b"".join(map(push, value)) + b"t"
        case list():
            return b"](" + b"".join(map(push, value)) + b"e"
        case dict():
            items = b"".join(push(key) + push(item) for key, item in value.items())
            return b"}(" + items + b"u"
    raise TypeError(type(value))


ORDERED_DICT = b"ccollections\nOrderedDict\n)R"
NAMESPACE = b"cargparse\nNamespace\n)\x81"
FLOAT = b"ctorch\nFloatStorage\n"
SYSTEM = b"cos\nsystem\n"


def storage(kind=FLOAT, key="0", numel=2, word="storage") -> bytes:
    return push((word, kind, key, "cpu", numel)) + b"Q"


def tensor(flat=None, offset=0, sizes=(2,), strides=(1,), *more) -> bytes:
    arguments = (flat or storage(), offset, sizes, strides, False, ORDERED_DICT, *more)
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + push(arguments) + b"R"


def parameter(data) -> bytes:
    return b"ctorch._utils\n_rebuild_parameter\n" + push((data, True, ORDERED_DICT)) + b"R"


def checkpoint(value) -> bytes:
    """A file that holds one value, and the storage '0' with the floats 1 and 2."""
    return archive(b"\x80\x02" + push({"value": value}) + b".")


# Pieces of archives.


def archive(pickle: bytes, compression=zipfile.ZIP_STORED, **entries) -> bytes:
    entries = {"byteorder": b"little", "data/0": struct.pack("<2f", 1, 2)} | entries
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as zipped:
        zipped.writestr("a/data.pkl", pickle)
        for name, data in entries.items():
            zipped.writestr(f"a/{name}", data)
    return file.getvalue()


VALID = checkpoint(tensor())
TWO = archive(
    b"\x80\x02" + push({"value": tensor()}) + b".", **{"data/1": struct.pack("<2f", 3, 4)}
)


def listed(name: str, offset: int, layout: str, value: int, file: bytes = TWO) -> bytes:
    """The file with one field of an entry in the zip directory changed."""
    start = file.rindex(f"a/{name}".encode()) - 46
    changed = bytearray(file)
    struct.pack_into(layout, changed, start + offset, value)
    return bytes(changed)


def sized(name: str, size: int) -> bytes:
    return listed(name, 24, "<I", size, listed(name, 20, "<I", size))


def zip64(file: bytes, length: int, start: int | None = None) -> bytes:
    """The file with a zip64 directory record that claims this length."""
    at = len(file) - 22
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, length, 0)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, at if start is None else start, 1)
    return file[:at] + record + locator + file[at:]


def overlapping() -> bytes:
    """data/1 is data/0 again, under the name that the directory gives it."""
    first = TWO.rindex(b"a/data/0") - 46
    return listed("data/1", 42, "<I", struct.unpack_from("<I", TWO, first + 42)[0])


def laughs(levels: int) -> bytes:
    """A list that holds a list twice, which holds a list twice, and so on."""
    lists = b"]q\x00"
    for level in range(levels):
        lists = b"](" + lists + b"h" + bytes([level]) + b"eq" + bytes([level + 1])
    return lists


def shared_state() -> bytes:
    """A thousand namespaces, each with the same two thousand attributes."""
    state = push({f"name{i}": i for i in range(2000)}) + b"q\x00"
    return b"](" + state + (NAMESPACE + b"h\x00b") * 1000 + b"e"


REFUSED = {
    # Calls.
    "os.system, REDUCE": (checkpoint(SYSTEM + push((COMMAND,)) + b"R"), "'os system'"),
    "posix.system, REDUCE": (checkpoint(b"cposix\nsystem\n" + push((COMMAND,)) + b"R"), "posix"),
    "eval": (checkpoint(b"cbuiltins\neval\n" + push(("1",)) + b"R"), "'builtins eval'"),
    "exec": (checkpoint(b"c__builtin__\nexec\n" + push(("1",)) + b"R"), "'__builtin__ exec'"),
    "getattr": (checkpoint(b"c__builtin__\ngetattr\n"), "'__builtin__ getattr'"),
    "a module with effects": (checkpoint(b"cantigravity\ngeohash\n"), "antigravity"),
    "os.system, NEWOBJ": (checkpoint(SYSTEM + push((COMMAND,)) + b"\x81"), "'os system'"),
    "Popen, NEWOBJ": (
        checkpoint(b"csubprocess\nPopen\n" + push((COMMAND,)) + b"\x81"),
        "'subprocess Popen'",
    ),
    "NEWOBJ_EX": (checkpoint(NAMESPACE[:-2] + b")}\x92"), "NEWOBJ_EX"),
    "STACK_GLOBAL": (checkpoint(push("os") + push("system") + b"\x93" + push((COMMAND,)) + b"R"),
                     "STACK_GLOBAL"),
    "INST": (checkpoint(b"(" + push(COMMAND) + b"ios\nsystem\n"), "INST"),
    "OBJ": (checkpoint(b"(" + SYSTEM + push(COMMAND) + b"o"), "'os system'"),
    "OBJ of an allowed name": (checkpoint(b"(cargparse\nNamespace\no"), "OBJ"),
    "EXT1": (checkpoint(b"\x82\x01)R"), "EXT1"),
    "EXT2": (checkpoint(b"\x83\x01\x01)R"), "EXT2"),
    "EXT4": (checkpoint(b"\x84\x01\x01\x01\x01)R"), "EXT4"),
    "PERSID": (checkpoint(b"Pstorage\n"), "PERSID"),
    "a hook": (checkpoint(tensor().replace(ORDERED_DICT, SYSTEM)), "'os system'"),
    "an attribute of an OrderedDict": (
        checkpoint(ORDERED_DICT + push({"__reduce__": SYSTEM}) + b"b"),
        "'os system'",
    ),
    "a name across the line": (checkpoint(b"ccollections OrderedDict\n\n)R"), "refers to"),
    "a name with a tail": (checkpoint(b"ccollections\nOrderedDict.pop\n)R"), "refers to"),
    "a name with an odd escape": (checkpoint(b"ccollections\\z\nOrderedDict\n)R"), ""),
    "a name that is not ASCII": (checkpoint("cös\nsystem\n)R".encode()), ""),
    "a string with an odd escape": (checkpoint(b"S'\\z'\n"), ""),
    "torch.hub.load": (checkpoint(b"ctorch.hub\nload\n)R"), "'torch.hub load'"),
    "torch.load": (checkpoint(b"ctorch\nload\n)R"), "'torch load'"),
    "_rebuild_tensor_v3": (checkpoint(b"ctorch._utils\n_rebuild_tensor_v3\n)R"), "_v3"),
    "a NumPy scalar": (checkpoint(b"cnumpy.core.multiarray\nscalar\n)R"), "multiarray scalar"),
    "calling a string": (checkpoint(push("os.system") + push((COMMAND,)) + b"R"), "calls"),
    "calling a storage type": (checkpoint(FLOAT + push((1 << 40,)) + b"R"), "calls"),
    "calling a tensor": (checkpoint(tensor() + b")R"), "calls"),
    "OrderedDict of something": (
        checkpoint(b"ccollections\nOrderedDict\n" + push(([],)) + b"R"),
        "calls",
    ),
    "Namespace of something": (checkpoint(b"cargparse\nNamespace\nN\x85\x81"), "calls"),
    "arguments that are not a tuple": (checkpoint(b"ccollections\nOrderedDict\nNR"), "calls"),
    "a parameter of a string": (checkpoint(parameter("data")), "calls"),
    # BUILD.
    "BUILD of a dict": (checkpoint(b"}" + push({"a": 1}) + b"b"), "sets attributes of a dict"),
    "BUILD of a tensor": (checkpoint(tensor() + push({"data": 1}) + b"b"), "of a ndarray"),
    "BUILD of a global": (checkpoint(FLOAT + push({"dtype": 1}) + b"b"), "of a _Global"),
    "BUILD with a list": (checkpoint(NAMESPACE + push([("a", 1)]) + b"b"), "sets attributes"),
    "BUILD with slots": (checkpoint(NAMESPACE + push((None, {"a": 1})) + b"b"), "sets attributes"),
    # Persistent ids.
    "a persistent id that is a string": (checkpoint(push("storage") + b"Q"), "calls"),
    "a persistent id of another kind": (checkpoint(tensor(storage(word="module"))), "calls"),
    "a persistent id with a tensor for its kind": (checkpoint(storage(word=tensor())), "calls"),
    "a storage of another type": (checkpoint(storage(b"ccollections\nOrderedDict\n")), ""),
    "a storage type that is a string": (checkpoint(storage(push("torch FloatStorage"))), "calls"),
    "a complex storage": (checkpoint(storage(b"ctorch\nComplexFloatStorage\n")), "ComplexFloat"),
    "a key that is a number": (checkpoint(storage(key=0)), "calls"),
    "a key with a path": (checkpoint(storage(key="../data.pkl")), "is missing"),
    "a key of a megabyte": (checkpoint(storage(key="0" * (1 << 20))), "is missing"),
    "a missing storage": (checkpoint(storage(key="7")), "'a/data/7' is missing"),
    "too few bytes": (checkpoint(tensor(storage(numel=3))), "has 8 bytes, must have 12"),
    "too many bytes": (checkpoint(tensor(storage(numel=1), sizes=(1,))), "8 bytes, must have 4"),
    "bytes of another type": (checkpoint(storage(b"ctorch\nLongStorage\n")), "must have 16"),
    "numel < 0": (checkpoint(storage(numel=-2)), "must have -8"),
    "numel of 2**62": (checkpoint(storage(numel=1 << 62)), "must have"),
    "numel that is a string": (checkpoint(storage(numel="2")), "calls"),
    # Views.
    "an offset past the end": (checkpoint(tensor(offset=2)), "exceeds a storage of 2"),
    "an offset < 0": (checkpoint(tensor(offset=-1)), "no real shape"),
    "a size < 0": (checkpoint(tensor(sizes=(-2,))), "no real shape"),
    "two sizes < 0": (checkpoint(tensor(sizes=(-1, -2), strides=(1, 1))), "no real shape"),
    "a stride < 0": (checkpoint(tensor(offset=1, strides=(-1,))), "no real shape"),
    "a stride past the end": (checkpoint(tensor(strides=(2,))), "exceeds a storage"),
    "a size past the end": (checkpoint(tensor(sizes=(3,))), "exceeds a storage"),
    "a size of 2**40": (checkpoint(tensor(sizes=(1 << 40,))), "exceeds a storage"),
    "a size of 2**63": (checkpoint(tensor(sizes=(1 << 63,))), "no real shape"),
    "sizes whose product overflows": (
        checkpoint(tensor(sizes=(1 << 32, 1 << 32), strides=(0, 0))),
        "exceeds a storage",
    ),
    "2**30 elements by stride 0": (checkpoint(tensor(sizes=(1 << 30,), strides=(0,))), "exceeds"),
    "3 elements by stride 0": (checkpoint(tensor(sizes=(3,), strides=(0,))), "exceeds"),
    "no elements in a huge shape": (
        checkpoint(tensor(sizes=(0, 1 << 40, 1 << 40), strides=(1, 1, 1))),
        "too big",
    ),
    "a size that is a bool": (checkpoint(tensor(sizes=(True,))), "no real shape"),
    "a size that is a float": (checkpoint(tensor(sizes=(2.0,))), "no real shape"),
    "sizes without strides": (checkpoint(tensor(strides=())), "no real shape"),
    "65 axes": (checkpoint(tensor(sizes=(1,) * 65, strides=(1,) * 65)), "no real shape"),
    "a list of sizes": (checkpoint(tensor(sizes=[2])), "calls"),
    "a view of no storage": (checkpoint(tensor(push("0"))), "calls"),
    "a negative view (metadata)": (
        checkpoint(tensor(storage(), 0, (2,), (1,), {"neg": True})),
        "calls",
    ),
    # Sizes in the pickle.
    "an integer of 255 bytes": (checkpoint(b"\x8a\xff" + b"\x7f" * 255), "integer over 64 bits"),
    "LONG4": (checkpoint(b"\x8b\x04\0\0\0abcd"), "LONG4"),
    "LONG4 of 2 GB": (checkpoint(b"\x8b\xff\xff\xff\x7f"), ""),
    "LONG of 5,000 digits": (checkpoint(b"L" + b"9" * 5000 + b"L\n"), ""),
    "a string of 4 GB": (checkpoint(b"X\xff\xff\xff\xff"), "4294967295 bytes"),
    "BINUNICODE8 of 2**62 bytes": (checkpoint(b"\x8d" + struct.pack("<Q", 1 << 62)), ""),
    "BINBYTES8 of 2**62 bytes": (checkpoint(b"\x8e" + struct.pack("<Q", 1 << 62)), ""),
    "BYTEARRAY8 of 2**62 bytes": (checkpoint(b"\x96" + struct.pack("<Q", 1 << 62)), ""),
    "a FRAME": (checkpoint(b"\x95" + struct.pack("<Q", 1 << 62)), "FRAME"),
    "a string that is not UTF-8": (checkpoint(b"X\x01\0\0\0\xff"), "utf-8"),
    "600,000 opcodes": (checkpoint(b"(" + b"N" * 600_000 + b"t"), "500000 opcodes"),
    "a pickle of 17 MiB": (checkpoint(push("a" * (17 << 20))), "at most 16777216 bytes"),
    # Shapes of the result.
    "a list in itself": (checkpoint(b"]q\x00h\x00a"), "32 levels"),
    "a namespace in itself": (checkpoint(NAMESPACE + b"q\x00" + push({"a": b"h\x00"}) + b"b"),
                              "32 levels"),
    "2**25 lists in 26": (checkpoint(laughs(25)), "500000 values"),
    "two million shared attributes": (checkpoint(shared_state()), "500000 values"),
    "40 lists in lists": (checkpoint(b"]" + b"](" * 40 + b"e" * 40 + b"a"), "32 levels"),
    "20,000 tuples in tuples": (checkpoint(b")" + b"\x85" * 20_000), "32 levels"),
    "a global for a value": (checkpoint(FLOAT), "'torch FloatStorage' itself"),
    "a list at the top": (archive(b"\x80\x02](N" + tensor() + b"e."), "holds a list"),
    "a tensor at the top": (archive(b"\x80\x02" + tensor() + b"."), "holds a ndarray"),
    "a key that is a list": (checkpoint(b"}]Ns"), "dict key"),
    "a key that is a tuple": (checkpoint(b"})Ns"), "dict key"),
    "a key that is a float": (checkpoint({1.5: None}), "dict key"),
    "a key that is None": (checkpoint({None: None}), "dict key"),
    "keys that collide": (checkpoint({(2**61 - 1) << 5: None}), "integer over 64 bits"),
    # Damaged pickles.
    "an empty pickle": (archive(b""), "STOP"),
    "no STOP": (archive(b"\x80\x02}"), "STOP"),
    "STOP alone": (archive(b"."), "leaves values over"),
    "values left over": (archive(b"\x80\x02}}."), "leaves values over"),
    "a mark left over": (archive(b"\x80\x02(}."), "leaves values over"),
    "protocol 4": (archive(b"\x80\x04}."), "protocol 4"),
    "an unknown opcode": (checkpoint(b"\xff"), "unknown"),
    "POP": (checkpoint(b"NN0"), "opcode POP"),
    "DUP": (checkpoint(b"N2"), "opcode DUP"),
    "TUPLE without a mark": (archive(b"\x80\x02tttt."), "damaged"),
    "REDUCE of nothing": (archive(b"\x80\x02R."), "damaged"),
    "taking from below a mark": (archive(b"\x80\x02ccollections\nOrderedDict\n)(R."), "damaged"),
    "BINPUT of nothing": (archive(b"\x80\x02q\x00}."), "damaged"),
    "an unknown memo entry": (checkpoint(b"h\x07"), "damaged"),
    "a key without a value": (archive(b"\x80\x02}(Nu."), ""),
    "SETITEM of a list": (checkpoint(b"]NNs"), "adds items to no dict"),
    "APPEND to a dict": (checkpoint(b"}Na"), "appends to no list"),
    "APPENDS to a string": (checkpoint(push("a") + b"(Ne"), "appends to no list"),
    # Archives.
    "compressed": (archive(b"\x80\x02}.", zipfile.ZIP_DEFLATED), "packed or encrypted"),
    "a zip bomb": (
        archive(b"\x80\x02}.", zipfile.ZIP_DEFLATED, **{"data/1": bytes(100 << 20)}),
        "packed or encrypted",
    ),
    "a compressed size of its own": (listed("data/0", 20, "<I", 4), "packed or encrypted"),
    "encrypted": (listed("data/0", 8, "<H", 1), "packed or encrypted"),
    "patched data": (listed("data/0", 8, "<H", 32), "packed or encrypted"),
    "an unknown compression": (listed("data/0", 10, "<H", 77), "packed or encrypted"),
    "zip version 25.5": (listed("data/0", 6, "<H", 255), "zip file version"),
    "two entries with one range": (overlapping(), "overlaps"),
    "an entry that reaches into the next": (sized("data/0", 20), "overlaps"),
    "an entry of 2 GB": (sized("data/1", (1 << 31) - 1), "reaches past the end"),
    "an entry outside": (listed("data/1", 42, "<I", 1 << 30), "overlaps"),
    "an entry in the directory": (listed("data/1", 42, "<I", len(TWO) - 40), ""),
    "an entry with another name inside": (TWO.replace(b"a/data/0", b"b/data/0", 1), "damaged"),
    "two entries with one name": (TWO.replace(b"a/data/1", b"a/data/0"), "two entries"),
    "a changed tensor": (VALID.replace(struct.pack("<2f", 1, 2), bytes(8)), "CRC"),
    "a changed pickle": (VALID.replace(b"value", b"other"), "CRC"),
    "a changed checksum": (listed("data/0", 16, "<I", 0), "CRC"),
    "a zip directory of 5 MiB": (VALID[:-10] + struct.pack("<I", 5 << 20) + VALID[-6:], "5242880"),
    "a zip64 directory of 2**62 bytes": (zip64(VALID, 1 << 62), "zip directory of"),
    "a zip64 directory elsewhere": (zip64(VALID, 46, 0), "misplaced"),
    "a zip64 directory of nothing": (zip64(VALID, 0), ""),
    "big-endian": (archive(b"\x80\x02}.", byteorder=b"big"), "not little-endian"),
    "no byte order": (archive(b"\x80\x02}.", byteorder=b"middle"), "not little-endian"),
    "no data.pkl": (VALID.replace(b"data.pkl", b"code.pkl"), "no checkpoint"),
    "data.pkl in another folder": (VALID.replace(b"a/data.pkl", b"b/data.pkl"), ""),
    # Other files.
    "an empty file": (b"", "not as a zip file"),
    "a legacy pickle": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "torch.save("),
    "a legacy tar": (b"storages".ljust(257, b"\0") + b"ustar\x0000", "torch.save("),
    "safetensors": (struct.pack("<Q", 2) + b"{}", "not as a zip file"),
    "a web page": (b"<!DOCTYPE html><html></html>", "not as a zip file"),
    "only a zip's first bytes": (b"PK\x03\x04", "cut off"),
    "a zip without entries": (b"PK\x05\x06" + bytes(18), "not as a zip file"),
    "first bytes and an empty zip": (b"PK\x03\x04PK\x05\x06" + bytes(18), "no checkpoint"),
    "something after the end": (VALID + b"more", "cut off"),
    "a comment": (VALID[:-2] + b"\x02\x00hi", "cut off"),
}  # fmt: skip


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
    """The working folder, in which nothing but `file.pth` may appear."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert {path.name for path in tmp_path.iterdir()} <= {"file.pth"}
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("name", REFUSED)
def test_refused(folder, name):
    content, message = REFUSED[name]
    path = folder / "file.pth"
    path.write_bytes(content)
    # Those that are stopped by their count are not measured: tracing would take ten times longer.
    measure = contextlib.nullcontext() if "500000" in message else memory_below(32 << 20)
    with pytest.raises(torch_file.TorchFileError) as refusal, measure:
        torch_file.read(path)
    assert str(refusal.value).startswith(f"{path}: ")
    assert message in str(refusal.value)
    assert len(str(refusal.value)) < 1000


def test_cut_off_anywhere(folder):
    path = folder / "file.pth"
    for length in range(len(VALID)):
        path.write_bytes(VALID[:length])
        with pytest.raises(torch_file.TorchFileError):
            torch_file.read(path)


def test_folder_instead_of_file(folder):
    with pytest.raises(torch_file.TorchFileError, match="not a regular file"):
        torch_file.read(folder)


def test_missing_file(folder):
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
    """Copies of the content with one to four bytes or pieces changed."""
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


@pytest.mark.parametrize("what", ["archive", "pickle"])
def test_mutations(folder, what):
    count = 2000
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
    assert count // 100 < read < count - count // 100  # both happen


# What is read.


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


def test_memo_index_asks_for_no_memory(folder):
    path = folder / "file.pth"
    path.write_bytes(archive(b"\x80\x02}r\xff\xff\xff\xff."))
    with memory_below(1 << 20):
        assert torch_file.read(path) == {}


def test_memory_is_the_size_of_the_file(folder):
    path = folder / "file.pth"
    tensors = {str(i): np.ones((1 << 20,), np.float32) for i in range(8)}
    with memory_below(1 << 20):
        torch_file.write(path, tensors)
    with memory_below((32 << 20) + (1 << 20)):
        assert len(torch_file.read(path)) == 8


# What is written.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (7,), (2, 3, 5)], ids=str)
def test_round_trip(folder, dtype, shape):
    dtype = np.dtype(dtype)
    data = np.random.default_rng(0).bytes(int(np.prod(shape)) * dtype.itemsize)
    if dtype.kind == "b":
        data = bytes(byte & 1 for byte in data)
    array = np.frombuffer(data, dtype).reshape(shape)
    torch_file.write(folder / "file.pth", {"name": array})
    read = torch_file.read(folder / "file.pth")["name"]
    assert (read.dtype, read.shape, read.tobytes()) == (dtype, shape, data)


def test_round_trip_of_views(folder):
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


def test_empty_state_dict(folder):
    torch_file.write(folder / "file.pth", {})
    assert torch_file.read(folder / "file.pth") == {}


def test_data_is_aligned_and_bytes_repeat(folder):
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
def test_values_that_cannot_be_written(folder, tensors):
    with pytest.raises(ValueError, match=r"'bad': got .* must be"):
        torch_file.write(folder / "file.pth", tensors)
    assert not list(folder.iterdir())


def test_names_that_cannot_be_written(folder):
    with pytest.raises(ValueError, match="7: names must be strings"):
        torch_file.write(folder / "file.pth", {7: np.zeros(2)})
    assert not list(folder.iterdir())


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failed_write_leaves_the_old_file(folder, monkeypatch, step):
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
