"""Builds pickles and zip archives of `.pth` files from single opcodes."""

import io
import struct
import zipfile

COMMAND = "touch canary"  # an attack


def push(value) -> bytes:
    """Returns opcodes that push a value; bytes are already opcodes."""
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
    """Returns opcodes that push a storage."""
    return push((word, kind, key, "cpu", numel)) + b"Q"


def tensor(flat=None, offset=0, sizes=(2,), strides=(1,), *more) -> bytes:
    """Returns opcodes that push a view of a storage, the storage '0' by default."""
    arguments = (flat or storage(), offset, sizes, strides, False, ORDERED_DICT, *more)
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + push(arguments) + b"R"


def parameter(data) -> bytes:
    """Returns opcodes that push a parameter."""
    return b"ctorch._utils\n_rebuild_parameter\n" + push((data, True, ORDERED_DICT)) + b"R"


def checkpoint(value) -> bytes:
    """Returns a file that holds one value, and the storage '0' with the floats 1 and 2."""
    return archive(b"\x80\x02" + push({"value": value}) + b".")


def archive(pickle: bytes, compression=zipfile.ZIP_STORED, **entries) -> bytes:
    """Returns a zip file with a pickle, the storage '0', and more entries."""
    entries = {"byteorder": b"little", "data/0": struct.pack("<2f", 1, 2)} | entries
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as zipped:
        zipped.writestr("a/data.pkl", pickle)
        for name, data in entries.items():
            zipped.writestr(f"a/{name}", data)
    return file.getvalue()


VALID = checkpoint(tensor())
