"""Mutations of any bytes; and of JSON, safetensors and PyTorch files by their structure."""

import copy
import io
import json
import random
import struct
import zipfile
from typing import Any

NUMBERS = [0, -1, 1, 2, 3, 255, 256, 1 << 14, 1 << 15, (1 << 31) - 1, 1 << 31, 1 << 40, 1 << 63]
NUMBERS += [1 << 64, 10**400]
VALUES = [None, True, False, "", "a", "\x00", "é" * 3000, 0.5, -0.0, 1e308, 1e999, [], {}, [[]]]
VALUES += [[0] * 1000, {"a": {"b": [1]}}, list(range(50)), *NUMBERS]
PIECES = [bytes(1), bytes(8), b"\xff" * 4, b"\xff" * 8, b"\0\0\0\x80", b"\xff\xff\xff\x7f"]
PIECES += [b"-1", b"9" * 20, b"1e999", b"NaN", b"[" * 50, b"{", b"}", b'"', b"\\", b"../", b"\n"]
OPCODES = [bytes([code]) for code in b"(.012FGIJKLMNPQRSTUVX])abcdefghijlopqrstu}"]
OPCODES += [bytes([code]) for code in range(0x80, 0x99)]
# Attacks: had one of them run, it would have created a file or imported a module.
SYSTEM = b"cos\nsystem\nX\x0c\x00\x00\x00touch canary"
OPCODES += [SYSTEM + b"\x85R", SYSTEM + b"\x85\x81", b"(" + SYSTEM[11:] + b"ios\nsystem\n"]
OPCODES += [b"cantigravity\ngeohash\n", b"cbuiltins\neval\n", b"ctorch\nload\n", b")R", b"\x85R"]
OPCODES += [b"\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch canary\x85R", b"ctorch\nSize\n"]
OPCODES += [b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n", b"h\x00", b"b"]


def mutate_bytes(data: bytes, rng: random.Random, pieces: list[bytes] = PIECES) -> bytes:
    """Returns a copy with one to four changes: bits, bytes, pieces, deletions, copies or cuts."""
    mutant = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        at = rng.randrange(len(mutant) + 1)
        length = rng.choice([1, 2, 8, 64, 4096])
        match rng.randrange(7):
            case 0 if at < len(mutant):
                mutant[at] ^= 1 << rng.randrange(8)
            case 1:
                mutant[at : at + 1] = rng.randbytes(1)
            case 2:
                piece = rng.choice(pieces)
                mutant[at : at + len(piece) * rng.randrange(2)] = piece
            case 3:
                del mutant[at : at + length]
            case 4:
                mutant[at:at] = mutant[at : at + length]
            case 5:
                mutant[at : at + length] = bytes(len(mutant[at : at + length]))
            case 6 if rng.randrange(4) == 0:
                del mutant[at:]
    return bytes(mutant)


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """Returns JSON with one to four values or keys replaced, added or removed; or changed bytes."""
    if rng.randrange(4) == 0:
        return mutate_bytes(data, rng)
    value = json.loads(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        value = _mutate_value(value, rng)
    return json.dumps(value).encode()


def _mutate_value(value: Any, rng: random.Random) -> Any:
    """Returns a value with one change, somewhere in it."""
    if not isinstance(value, dict | list) or not value or rng.randrange(20) == 0:
        if type(value) is int and rng.randrange(3):
            return rng.choice([value + 1, value - 1, 2 * value, -value, value // 2, *NUMBERS])
        return copy.deepcopy(rng.choice(VALUES))
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = rng.choice(keys)
    match rng.randrange(8):
        case 0:
            del value[key]
        case 1 if isinstance(value, dict):
            value[rng.choice([str(key)[:-1], f"{key}x", "", "version"])] = value[key]
        case 1:
            value *= rng.choice([2, 100])
        case 2:
            value[key] = value[rng.choice(keys)]
        case _:
            value[key] = _mutate_value(value[key], rng)
    return value


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Returns a safetensors file with a mutated header whose length fits, or with changed bytes."""
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = data[8 : 8 + length], data[8 + length :]
    match rng.randrange(4):
        case 0:
            return mutate_bytes(data, rng)
        case 1:
            return struct.pack("<Q", rng.choice([0, 1, len(data), 1 << 63])) + header + rest
        case 2:
            return data[: 8 + length] + mutate_bytes(rest, rng)
    header = mutate_json(header, rng)
    return struct.pack("<Q", len(header)) + header + rest


def mutate_torch(data: bytes, rng: random.Random) -> bytes:
    """Returns a `.pth` file with a mutated entry whose checksum fits, or with changed bytes."""
    if rng.randrange(3) == 0:
        return mutate_bytes(data, rng)
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(changed, "w") as out:
        names = archive.namelist()
        pickle = next(name for name in names if name.endswith("data.pkl"))
        target = pickle if rng.randrange(4) else rng.choice(names)
        for name in names:
            content = archive.read(name)
            if name == target:
                content = mutate_bytes(content, rng, OPCODES)
            out.writestr(name, content)
    return changed.getvalue()
