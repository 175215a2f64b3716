"""Reads and writes PyTorch's zip `.pth` files without torch; only tensors and plain values.

Source: PyTorch 2.13, `torch/serialization.py`, `torch/_utils.py` (`_rebuild_tensor_v2`).

A pickle is a program that may call any function. It is never run here: `pickletools` parses its
opcodes, and a small interpreter applies them to inert values. A global is a name that is compared
with a list, and is never imported. Sizes in a file are used only after they have been compared with
the number of bytes in the file.

Differences from `torch.load`:
  - only zip files of uncompressed entries are read, which torch has written since version 1.6, so
    that no entry can expand;
  - only the globals below are allowed: those of `torch.load(weights_only=True)`, NumPy scalars and
    arrays, and `argparse.Namespace`;
  - `OrderedDict` and `argparse.Namespace` become dicts, parameters and storages become arrays;
    gradient flags, hooks, devices and attributes (`_metadata`) are dropped;
  - other values (a Counter, a size, a device, a dtype, a set, bytes, a complex, quantized or float8
    tensor, an integer over 64 bits) are skipped, and replaced by a `Global` that names their type
    or constructor. Items of a dict whose key is not a plain value are dropped;
  - a tensor with more elements than its storage (`expand`) is an error, since a copy of it would be
    larger than the file;
  - only little-endian files are read; the checksum of every entry that is used is verified.
"""

import functools
import itertools
import math
import os
import pickletools
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from sam_jax.io.atomic import atomic_path

_TYPES = {"Float": "<f4", "Double": "<f8", "Half": "<f2", "BFloat16": ml_dtypes.bfloat16}
_TYPES |= {"Long": "<i8", "Int": "<i4", "Short": "<i2", "Char": "i1", "Byte": "u1", "Bool": "?"}
_DTYPES = {f"torch {name}Storage": np.dtype(dtype) for name, dtype in _TYPES.items()}
_STORAGES = {dtype: name for name, dtype in _DTYPES.items()}
_WRITABLE = ", ".join(str(dtype) for dtype in _STORAGES)
_OF_TYPE = "torch._tensor _rebuild_from_type_v2"  # a tensor with attributes
_READ = {"argparse Namespace", "collections OrderedDict", *_DTYPES, _OF_TYPE}
_READ |= {f"torch._utils _rebuild_{x}" for x in ("tensor_v2", "parameter", "parameter_with_state")}
# Globals whose values are skipped. Those of PyTorch are in `torch/_weights_only_unpickler.py`.
_SKIPPED = re.compile(
    r"collections Counter|_codecs encode|(__builtin__|builtins) (set|bytes|bytearray|complex)"
    r"|torch (Size|device|bool|(q?u?int|b?float|complex|bits)\d\w*|per_(tensor|channel)_\w+)"
    r"|torch(\.\w+)? (\w*Tensor|\w+Storage)|torch\.nn\.parameter Parameter"
    r"|torch\._utils _rebuild_\w+|torch\.serialization _get_layout"
    r"|numpy(\._?core\.multiarray)? (scalar|dtype|_reconstruct|ndarray)"
)
# Types of the keys of dicts: an attacker cannot find many values of them whose hashes collide.
_KEYS = (str, int, float, bool, type(None))

# The number of values that an opcode pops from the stack; None pops all values above the last mark.
_NUM_POPPED = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "TUPLE": None}
_NUM_POPPED |= {"APPEND": 1, "APPENDS": None, "SETITEM": 2, "SETITEMS": None}
_NUM_POPPED |= {"BINPERSID": 1, "REDUCE": 2, "NEWOBJ": 2, "BUILD": 1}

# Together these bound the memory and time for any file. SAM ViT-H needs a twentieth of each.
_MAX_DIRECTORY = 4 << 20  # bytes; the objects of zipfile are ten times as large
_MAX_PICKLE = 16 << 20  # bytes
_MAX_VALUES = 500_000  # of opcodes, and of values in the result, where shared ones count repeatedly
_MAX_DEPTH = 32

_WEIGHTS = "torch.save(model.state_dict(), new_path)"
_RESAVE = "torch.save(torch.load(path), new_path)"
_ALLOWED = f"only tensors and plain values are allowed. If you trust it: {_WEIGHTS}"
_DAMAGED = "the file is damaged: download or save it again"


class TorchFileError(ValueError):
    """A file that is damaged or has content that is not allowed; the message suggests a remedy."""


def read(path: str | os.PathLike[str]) -> dict[str | int, Any]:
    """Reads a checkpoint.

    Args:
      path: The file.

    Returns:
      The dict that was saved. Tensors are read-only arrays. They are views of the same memory if
      they shared a storage, so that all of them need the size of the file. A `Global` stands for
      each value that was skipped.

    Raises:
      TorchFileError: If the file is not one that `torch.save` writes, or if it has content that is
        not allowed.
      OSError: If the file cannot be opened.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise TorchFileError(f"{path}: not a regular file; give the path of a .pth file")
    with open(path, "rb") as file:
        try:
            return _read(file)
        except TorchFileError as error:
            raise TorchFileError(f"{path}: {error}") from error
        # pickletools warns about invalid escapes, which `python -W error` turns into an exception.
        except (zipfile.BadZipFile, NotImplementedError, LookupError, ValueError, Warning) as error:
            raise TorchFileError(f"{path}: {_DAMAGED} ({error!r})") from error


def write(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict that `torch.load(path, weights_only=True)` opens.

    Equal tensors in equal order give equal bytes. The file is written atomically.

    Args:
      path: The file, which is replaced if it exists.
      tensors: Arrays by name, of any shapes and strides: bool, uint8, int8 to int64, float16 to
        float64, or bfloat16.

    Raises:
      ValueError: If a name is not a string or a value cannot be stored. Nothing is written then.
    """
    tensors = dict(tensors)
    for name, array in tensors.items():
        if not isinstance(name, str):
            raise ValueError(f"{name!r}: names must be strings")
        if not isinstance(array, np.ndarray) or array.dtype not in _STORAGES:
            got = f"{type(array).__name__} of {getattr(array, 'dtype', 'no dtype')}"
            raise ValueError(f"{name!r}: got {got}, must be ndarray of {_WRITABLE}")
    with atomic_path(path) as temporary, open(temporary, "xb") as file:
        _write(file, tensors)


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise TorchFileError(message)


def _read(file: BinaryIO) -> dict[str | int, Any]:
    size = _check_ends(file)
    archive = zipfile.ZipFile(file)
    entries = _entries(archive, file, size)
    folder = next(iter(entries), "").split("/")[0]
    pickle, order = entries.get(f"{folder}/data.pkl"), entries.get(f"{folder}/byteorder")
    if pickle is None or pickle.file_size > _MAX_PICKLE:
        raise TorchFileError(
            f"not a checkpoint: it must have a data.pkl of at most {_MAX_PICKLE} bytes"
        )
    if order and (order.file_size != 6 or archive.read(order) != b"little"):
        raise TorchFileError(
            f"not little-endian; save it again on a little-endian machine: {_RESAVE}"
        )
    content = functools.cache(archive.read)

    def storage(dtype: np.dtype, key: str, numel: int) -> np.ndarray:
        name, size = f"{folder}/data/{key}", numel * dtype.itemsize
        _check(name in entries, f"{name[:80]!r} is missing; {_DAMAGED}")
        stored = entries[name].file_size
        _check(stored == size, f"{name!r} has {stored} bytes, must have {size}; {_DAMAGED}")
        return np.frombuffer(content(name), dtype)

    checkpoint = _unpickle(archive.read(pickle), storage)
    _check(isinstance(checkpoint, dict), f"holds a {type(checkpoint).__name__}, must hold a dict")
    return dict(_copy_tree(checkpoint, itertools.count()))


def _entries(archive: zipfile.ZipFile, file: BinaryIO, size: int) -> dict[str, zipfile.ZipInfo]:
    """Returns the entries by name, uncompressed, disjoint and inside the file's `size` bytes."""
    entries: dict[str, zipfile.ZipInfo] = {}
    end = 0
    for entry in sorted(archive.infolist(), key=lambda entry: entry.header_offset):
        name, start = entry.filename, entry.header_offset
        is_plain = entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & ~0x808
        if not is_plain or entry.compress_size != entry.file_size:
            raise TorchFileError(f"{name!r} is packed or encrypted; if you trust it: {_RESAVE}")
        _check(name not in entries, f"two entries are named {name!r}; {_DAMAGED}")
        _check(end <= start <= size - 30, f"{name!r} overlaps another entry; {_DAMAGED}")
        file.seek(start + 26)
        end = start + 30 + sum(struct.unpack("<2H", file.read(4))) + entry.file_size
        _check(end <= size, f"{name!r} reaches past the end; {_DAMAGED}")
        entries[name] = entry
    return entries


def _check_ends(file: BinaryIO) -> int:
    """Checks that a zip file is complete and its directory small; returns the file's size."""
    head = file.read(4)
    older = f"If PyTorch before 1.6 wrote it and you trust it, save it with a newer one: {_RESAVE}"
    _check(head == b"PK\x03\x04", f"starts with {head!r}, not as a zip file. {older}")
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 98))
    tail = file.read()
    _check(tail[-22:-18] == b"PK\x05\x06" and tail[-2:] == b"\0\0", f"cut off: {_DAMAGED}")
    (length,) = struct.unpack("<I", tail[-10:-6])
    if tail[-42:-38] == b"PK\x06\x07":  # zip64: a longer record before may have another length
        (start,) = struct.unpack("<Q", tail[-34:-26])
        _check(start == size - 98, f"the zip64 directory is misplaced; {_DAMAGED}")
        length = max(length, *struct.unpack("<Q", tail[40:48]))
    _check(length <= _MAX_DIRECTORY, f"zip directory of {length} bytes, at most {_MAX_DIRECTORY}")
    return size


@dataclass(frozen=True)
class Global:
    """A name in a pickle, which is never imported, or a value that was skipped.

    Attributes:
      name: A module and a name in it, with a space between. For a value, the name of its type or of
        the function that would have made it.
    """

    name: str


@dataclass
class _Namespace:
    items: dict[str | int, Any]  # set by BUILD, without a copy, so that shared items need no memory


def _unpickle(data: bytes, storage: Callable[[np.dtype, str, int], np.ndarray]) -> Any:
    """Returns built-in values, arrays and instances of the above, possibly shared or cyclic."""
    stack: list[Any] = []
    outer_stacks: list[list[Any]] = []  # the values below each mark
    memo: dict[int, Any] = {}
    argument: Any
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if count == _MAX_VALUES:
            raise TorchFileError(f"data.pkl has over {count} opcodes; {_WEIGHTS}")
        name, num_popped = opcode.name, _NUM_POPPED.get(opcode.name, 0)
        if num_popped is None:
            items, stack = stack, outer_stacks.pop()
        else:
            items = [stack.pop() for _ in range(num_popped)][::-1]
        match name:
            case "PROTO":
                _check(argument == 2, f"pickle protocol {argument}, must be torch.save's 2")
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "BININT1" | "BININT2" | "BININT" | "BINFLOAT" | "BINUNICODE" | "NONE":
                stack.append(argument)
            case "LONG1":  # longer integers could be chosen such that all of their hashes collide
                stack.append(argument if abs(argument) < 1 << 64 else Global("builtins int"))
            case "NEWTRUE" | "NEWFALSE":
                stack.append(name == "NEWTRUE")
            case "MARK":
                outer_stacks.append(stack)
                stack = []
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3" | "TUPLE":
                stack.append(tuple(items))
            case "EMPTY_LIST" | "EMPTY_DICT":
                stack.append([] if name == "EMPTY_LIST" else {})
            case "APPEND" | "APPENDS":
                _check(
                    isinstance(stack[-1], list),
                    f"data.pkl appends to a value that is not a list; {_DAMAGED}",
                )
                stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                _check(
                    isinstance(stack[-1], dict),
                    f"data.pkl adds items to a value that is not a dict; {_DAMAGED}",
                )
                pairs = zip(items[::2], items[1::2], strict=True)
                stack[-1].update((key, item) for key, item in pairs if type(key) in _KEYS)
            case "GLOBAL":
                is_allowed = argument in _READ or _SKIPPED.fullmatch(argument)
                _check(bool(is_allowed), f"refers to {argument[:80]!r}; {_ALLOWED}")
                stack.append(Global(argument))
            case "BINPERSID" | "REDUCE" | "NEWOBJ":
                stack.append(_construct(items, storage))
            case "BUILD":
                target, state = stack[-1], items[0]
                is_known = isinstance(target, OrderedDict | _Namespace) and isinstance(state, dict)
                is_known |= isinstance(target, Global) and target.name not in _READ
                _check(
                    is_known, f"data.pkl sets attributes of a {type(target).__name__}; {_DAMAGED}"
                )
                if isinstance(target, _Namespace):
                    target.items = state
            case "STOP":
                _check(
                    len(stack) == 1 and not outer_stacks, f"data.pkl leaves values over; {_DAMAGED}"
                )
            case _:
                raise TorchFileError(f"data.pkl has the opcode {name}, unknown to torch.save")
    return stack[0]


def _construct(items: list[Any], storage: Callable[[np.dtype, str, int], np.ndarray]) -> Any:
    """Returns the storage of a persistent id, or the result of a global called with arguments."""
    match items:
        case [(str(kind), Global(name), str(key), str(), int(numel))] if kind == "storage":
            return storage(_DTYPES[name], key, numel) if name in _DTYPES else Global(name)
        case [Global("collections OrderedDict"), ()]:
            return OrderedDict()
        case [Global("argparse Namespace"), ()]:
            return _Namespace({})
        case [Global("torch._utils _rebuild_parameter"), (np.ndarray() as tensor, _, _)]:
            return tensor
        case [
            Global("torch._utils _rebuild_parameter_with_state"),
            (np.ndarray() as tensor, _, _, _),
        ]:
            return tensor
        case [Global(name), (Global() as function, _, tuple() as arguments, _)] if (
            name == _OF_TYPE != function.name
        ):
            return _construct([function, arguments], storage)
        case [
            Global("torch._utils _rebuild_tensor_v2"),
            (np.ndarray() as flat, offset, tuple(sizes), tuple(strides), _, _),
        ]:
            return _view(flat, offset, sizes, strides)
        case [Global(name), (Global() as skipped, *_)] if name in _READ - _DTYPES.keys():
            return skipped
        case [Global(name), tuple()] if name not in _READ:
            return Global(name)
    raise TorchFileError(f"data.pkl calls a function that torch.save never calls; {_DAMAGED}")


def _view(flat: np.ndarray, offset: Any, sizes: tuple[Any, ...], strides: tuple[Any, ...]) -> Any:
    """Returns the tensor with these sizes; offset and strides count elements of the storage."""
    numbers = (offset, *sizes, *strides)
    is_valid = all(type(number) is int and 0 <= number < 1 << 48 for number in numbers)
    is_valid = is_valid and len(sizes) == len(strides) <= 64
    _check(is_valid, f"a tensor has an impossible shape; {_DAMAGED}")
    numel = math.prod(sizes)
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if numel > flat.size or (numel and last >= flat.size):
        expanded = "if it was expanded, save its clone() instead"
        raise TorchFileError(f"{sizes} exceeds a storage of {flat.size} elements; {expanded}")
    start, byte_strides = offset * flat.itemsize, [stride * flat.itemsize for stride in strides]
    return np.ndarray(sizes, flat.dtype, flat, start if numel else 0, byte_strides)


def _copy_tree(value: Any, visited: Iterator[int], depth: int = 0) -> Any:
    """Copies a value into dicts, lists and tuples that are not shared."""
    if next(visited) > _MAX_VALUES or depth > _MAX_DEPTH:
        raise TorchFileError(f"has over {_MAX_VALUES} values or {_MAX_DEPTH} levels; {_WEIGHTS}")
    value = value.items if isinstance(value, _Namespace) else value
    if isinstance(value, dict):
        return {key: _copy_tree(item, visited, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copy_tree(item, visited, depth + 1) for item in value)
    return value


def _write(file: BinaryIO, tensors: dict[str, np.ndarray]) -> None:
    with zipfile.ZipFile(file, "w") as archive:

        def add(name: str, data: Any) -> None:
            entry = zipfile.ZipInfo(f"archive/{name}")  # dated 1980
            entry.create_system = 0
            # The data follow the header, the name, 20 bytes of zip64 sizes, and the padding, which
            # has 4 bytes of header. They are aligned to 64 bytes, as torch aligns them.
            padding = -(file.tell() + 30 + len(entry.filename) + 20 + 4) % 64
            entry.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
            with archive.open(entry, "w", force_zip64=True) as out:
                out.write(data)

        add("data.pkl", _pickle(tensors))
        add("byteorder", b"little")
        for key, array in enumerate(tensors.values()):
            add(f"data/{key}", np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        add("version", b"3\n")


def _pickle(tensors: dict[str, np.ndarray]) -> bytes:
    """Returns opcodes that build an OrderedDict of `_rebuild_tensor_v2(storage, 0, sizes, ...)`."""
    empty = b"ccollections\nOrderedDict\n)R"
    items = []
    for key, (name, array) in enumerate(tensors.items()):
        kind = b"c%s\n" % _STORAGES[array.dtype].replace(" ", "\n").encode()
        storage = _push(("storage", kind, str(key), "cpu", array.size)) + b"Q"
        lengths = [max(size, 1) for size in array.shape]
        strides = tuple(math.prod(lengths[axis + 1 :]) for axis in range(array.ndim))
        tensor = _push((storage, 0, array.shape, strides, b"\x89", empty))
        items += [_push(name), b"ctorch._utils\n_rebuild_tensor_v2\n", tensor, b"R"]
    return b"\x80\x02" + empty + b"(" + b"".join(items) + b"u."


def _push(value: Any) -> bytes:
    """Returns opcodes that push a value; bytes are already opcodes."""
    match value:
        case str():
            text = value.encode("utf-8", "surrogatepass")
            return b"X" + struct.pack("<I", len(text)) + text
        case int():
            size = value.bit_length() // 8 + 1
            return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)
        case tuple():
            return b"(" + b"".join(map(_push, value)) + b"t"
    return bytes(value)
