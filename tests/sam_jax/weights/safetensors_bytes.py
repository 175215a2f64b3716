"""Bytes of safetensors files: valid, damaged and mutated ones."""

import json
import struct

FLOATS = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def pack(header, data=bytes(8), length=None):
    """Returns a file with a header and data. `length` replaces the stored header length."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


HEADERS = {
    "no header": b"",
    "a part of a length": b"abc",
    "an empty header": pack(b"", b""),
    "a header past the end": pack(b"{}", b"", 100),
    "a header of 2**63 bytes": pack(b"{}", b"", 1 << 63),
    "a header of 200 MB": pack(b"{}", b"", 200 << 20),
    "no JSON": pack(b"{abc"),
    "no UTF-8": pack(b'{"\xff": 1}'),
    "deep JSON": pack(b"[" * 100_000),
    "a list": pack([FLOATS]),
    "a number for a tensor": pack({"a": 3}),
    "no shape": pack({"a": {"dtype": "F32", "data_offsets": [0, 8]}}),
    "offsets outside the file": pack({"a": FLOATS | {"data_offsets": [0, 800]}}),
    "offsets of 2**63": pack({"a": FLOATS | {"data_offsets": [1 << 63, (1 << 63) + 8]}}),
    "negative offsets": pack({"a": FLOATS | {"data_offsets": [-8, 0]}}),
    "offsets the wrong way": pack({"a": FLOATS | {"data_offsets": [8, 0]}}),
    "overlapping tensors": pack({"a": FLOATS, "b": FLOATS}),
    "a hole": pack({"a": FLOATS | {"data_offsets": [8, 16]}}, bytes(16)),
    "a shape that does not fit": pack({"a": FLOATS | {"shape": [3]}}),
    "a shape of 2**64": pack({"a": FLOATS | {"shape": [1 << 62, 4]}}),
    "a negative shape": pack({"a": FLOATS | {"shape": [-2]}}),
    "a fractional shape": pack({"a": FLOATS | {"shape": [2.0]}}),
    "an unknown type": pack({"a": FLOATS | {"dtype": "F33"}}),
    "eight-bit floats": pack({"a": FLOATS | {"dtype": "F8_E4M3", "shape": [8]}}),
    "four-bit floats": pack({"a": FLOATS | {"dtype": "F4", "shape": [16]}}),
    "scales": pack({"a": FLOATS | {"dtype": "F8_E8M0", "shape": [8]}}),
    "bytes left over": pack({"a": FLOATS}, bytes(9)),
    "bytes missing": pack({"a": FLOATS}, bytes(7)),
    "metadata that are a number": pack({"__metadata__": 3, "a": FLOATS}),
}


def mutated(file, rng):
    """Returns a file with random bytes changed, removed or inserted, or with its end cut off."""
    file = bytearray(file)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(file) or 1)
        match rng.randrange(6):
            case 0 if file:
                file[at : at + 1] = bytes([rng.randrange(256)])
            case 1 if file:
                file[at] ^= 1 << rng.randrange(8)
            case 2:
                file[at:at] = rng.choice(
                    [b"0", b"9" * 20, b"[", b"}", b'"', b"-1", b"e9", bytes(8)]
                )
            case 3:
                del file[at : at + rng.choice([1, 2, 50])]
            case 4:
                del file[at:]
            case 5:  # the length of the header
                file[:8] = struct.pack(
                    "<Q", rng.choice([0, 1, len(file), 1 << 40, rng.randrange(999)])
                )
    return bytes(file)
