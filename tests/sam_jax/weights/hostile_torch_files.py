"""Hostile and damaged `.pth` files, each with a part of the expected error message.

If the code of an attack ran, it would create a file named `canary` in the working folder or import
the module `antigravity`.
"""

import struct
import zipfile

from tests.sam_jax.weights.torch_pickles import (
    COMMAND,
    FLOAT,
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

TWO = archive(
    b"\x80\x02" + push({"value": tensor()}) + b".", **{"data/1": struct.pack("<2f", 3, 4)}
)


OF_TYPE = b"(ctorch._tensor\n_rebuild_from_type_v2\n"


def with_field(name: str, offset: int, layout: str, value: int, file: bytes = TWO) -> bytes:
    """Returns the file with one field of an entry in the zip directory changed."""
    start = file.rindex(f"a/{name}".encode()) - 46
    changed = bytearray(file)
    struct.pack_into(layout, changed, start + offset, value)
    return bytes(changed)


def with_size(name: str, size: int) -> bytes:
    """Returns a file whose zip directory claims another size of an entry."""
    return with_field(name, 24, "<I", size, with_field(name, 20, "<I", size))


def zip64(file: bytes, length: int, start: int | None = None) -> bytes:
    """Returns the file with a zip64 directory record that claims this length."""
    at = len(file) - 22
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, length, 0)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, at if start is None else start, 1)
    return file[:at] + record + locator + file[at:]


def overlapping() -> bytes:
    """Returns a file in which data/1 has the bytes of data/0."""
    first = TWO.rindex(b"a/data/0") - 46
    return with_field("data/1", 42, "<I", struct.unpack_from("<I", TWO, first + 42)[0])


def nested_lists(levels: int) -> bytes:
    """Returns opcodes of nested lists. Each list contains the list of the next level twice."""
    lists = b"]q\x00"
    for level in range(levels):
        lists = b"](" + lists + b"h" + bytes([level]) + b"eq" + bytes([level + 1])
    return lists


def shared_state() -> bytes:
    """Returns opcodes of a thousand namespaces with the same two thousand attributes."""
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
    "a lookalike of NumPy's": (checkpoint(b"cnumpy.core.multiarray.os\nscalar\n)R"), "refers to"),
    "a lookalike of PyTorch's": (checkpoint(b"ctorch.hub\nloadTensor.x\n)R"), "refers to"),
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
    "BUILD of a global": (checkpoint(FLOAT + push({"dtype": 1}) + b"b"), "of a Global"),
    "BUILD with a list": (checkpoint(NAMESPACE + push([("a", 1)]) + b"b"), "sets attributes"),
    "BUILD with slots": (checkpoint(NAMESPACE + push((None, {"a": 1})) + b"b"), "sets attributes"),
    # Persistent ids.
    "a persistent id that is a string": (checkpoint(push("storage") + b"Q"), "calls"),
    "a persistent id of another kind": (checkpoint(tensor(storage(word="module"))), "calls"),
    "a persistent id whose kind is a tensor": (checkpoint(storage(word=tensor())), "calls"),
    "a storage type that is a string": (checkpoint(storage(push("torch FloatStorage"))), "calls"),
    "2,000 nested tensors of a type": (
        checkpoint((OF_TYPE + b"N") * 2_000 + b")" + b"Nt" * 2_000 + b"R"),
        "calls",
    ),
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
    "an offset < 0": (checkpoint(tensor(offset=-1)), "impossible shape"),
    "a size < 0": (checkpoint(tensor(sizes=(-2,))), "impossible shape"),
    "two sizes < 0": (checkpoint(tensor(sizes=(-1, -2), strides=(1, 1))), "impossible shape"),
    "a stride < 0": (checkpoint(tensor(offset=1, strides=(-1,))), "impossible shape"),
    "a stride past the end": (checkpoint(tensor(strides=(2,))), "exceeds a storage"),
    "a size past the end": (checkpoint(tensor(sizes=(3,))), "exceeds a storage"),
    "a size of 2**40": (checkpoint(tensor(sizes=(1 << 40,))), "exceeds a storage"),
    "a size of 2**63": (checkpoint(tensor(sizes=(1 << 63,))), "impossible shape"),
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
    "a size that is a bool": (checkpoint(tensor(sizes=(True,))), "impossible shape"),
    "a size that is a float": (checkpoint(tensor(sizes=(2.0,))), "impossible shape"),
    "sizes without strides": (checkpoint(tensor(strides=())), "impossible shape"),
    "65 axes": (checkpoint(tensor(sizes=(1,) * 65, strides=(1,) * 65)), "impossible shape"),
    "a list of sizes": (checkpoint(tensor(sizes=[2])), "calls"),
    "a view of a string": (checkpoint(tensor(push("0"))), "calls"),
    "a negative view (metadata)": (
        checkpoint(tensor(storage(), 0, (2,), (1,), {"neg": True})),
        "calls",
    ),
    # Sizes in the pickle.
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
    "a cyclic list": (checkpoint(b"]q\x00h\x00a"), "32 levels"),
    "a cyclic namespace": (checkpoint(NAMESPACE + b"q\x00" + push({"a": b"h\x00"}) + b"b"),
                              "32 levels"),
    "2**25 references to lists": (checkpoint(nested_lists(25)), "500000 values"),
    "two million shared attributes": (checkpoint(shared_state()), "500000 values"),
    "40 nested lists": (checkpoint(b"]" + b"](" * 40 + b"e" * 40 + b"a"), "32 levels"),
    "20,000 nested tuples": (checkpoint(b")" + b"\x85" * 20_000), "32 levels"),
    "a list at the top": (archive(b"\x80\x02](N" + tensor() + b"e."), "holds a list"),
    "a tensor at the top": (archive(b"\x80\x02" + tensor() + b"."), "holds a ndarray"),
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
    "arguments below a mark": (archive(b"\x80\x02ccollections\nOrderedDict\n)(R."), "damaged"),
    "BINPUT of nothing": (archive(b"\x80\x02q\x00}."), "damaged"),
    "an unknown memo entry": (checkpoint(b"h\x07"), "damaged"),
    "a key without a value": (archive(b"\x80\x02}(Nu."), ""),
    "SETITEM of a list": (checkpoint(b"]NNs"), "adds items to a value that is not a dict"),
    "APPEND to a dict": (checkpoint(b"}Na"), "appends to a value that is not a list"),
    "APPENDS to a string": (checkpoint(push("a") + b"(Ne"), "appends to a value that is not"),
    # Archives.
    "compressed": (archive(b"\x80\x02}.", zipfile.ZIP_DEFLATED), "packed or encrypted"),
    "a zip bomb": (
        archive(b"\x80\x02}.", zipfile.ZIP_DEFLATED, **{"data/1": bytes(100 << 20)}),
        "packed or encrypted",
    ),
    "a compressed size that differs": (with_field("data/0", 20, "<I", 4), "packed or encrypted"),
    "encrypted": (with_field("data/0", 8, "<H", 1), "packed or encrypted"),
    "patched data": (with_field("data/0", 8, "<H", 32), "packed or encrypted"),
    "an unknown compression": (with_field("data/0", 10, "<H", 77), "packed or encrypted"),
    "zip version 25.5": (with_field("data/0", 6, "<H", 255), "zip file version"),
    "two entries with one range": (overlapping(), "overlaps"),
    "an entry that reaches into the next": (with_size("data/0", 20), "overlaps"),
    "an entry of 2 GB": (with_size("data/1", (1 << 31) - 1), "reaches past the end"),
    "an entry outside": (with_field("data/1", 42, "<I", 1 << 30), "overlaps"),
    "an entry in the directory": (with_field("data/1", 42, "<I", len(TWO) - 40), ""),
    "an entry with another name inside": (TWO.replace(b"a/data/0", b"b/data/0", 1), "damaged"),
    "two entries with one name": (TWO.replace(b"a/data/1", b"a/data/0"), "two entries"),
    "a changed tensor": (VALID.replace(struct.pack("<2f", 1, 2), bytes(8)), "CRC"),
    "a changed pickle": (VALID.replace(b"value", b"other"), "CRC"),
    "a changed checksum": (with_field("data/0", 16, "<I", 0), "CRC"),
    "a zip directory of 5 MiB": (VALID[:-10] + struct.pack("<I", 5 << 20) + VALID[-6:], "5242880"),
    "a zip64 directory of 2**62 bytes": (zip64(VALID, 1 << 62), "zip directory of"),
    "a zip64 directory elsewhere": (zip64(VALID, 46, 0), "misplaced"),
    "a zip64 directory of nothing": (zip64(VALID, 0), ""),
    "big-endian": (archive(b"\x80\x02}.", byteorder=b"big"), "not little-endian"),
    "no byte order": (archive(b"\x80\x02}.", byteorder=b"middle"), "not little-endian"),
    "no data.pkl": (VALID.replace(b"data.pkl", b"code.pkl"), "not a checkpoint"),
    "data.pkl in another folder": (VALID.replace(b"a/data.pkl", b"b/data.pkl"), ""),
    # Other files.
    "an empty file": (b"", "not as a zip file"),
    "a legacy pickle": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "torch.save("),
    "a legacy tar": (b"storages".ljust(257, b"\0") + b"ustar\x0000", "torch.save("),
    "safetensors": (struct.pack("<Q", 2) + b"{}", "not as a zip file"),
    "a web page": (b"<!DOCTYPE html><html></html>", "not as a zip file"),
    "only a zip's first bytes": (b"PK\x03\x04", "cut off"),
    "a zip without entries": (b"PK\x05\x06" + bytes(18), "not as a zip file"),
    "first bytes and an empty zip": (b"PK\x03\x04PK\x05\x06" + bytes(18), "not a checkpoint"),
    "bytes after the end": (VALID + b"more", "cut off"),
    "a comment": (VALID[:-2] + b"\x02\x00hi", "cut off"),
}  # fmt: skip
