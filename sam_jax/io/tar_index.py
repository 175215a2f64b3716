"""Where the files in a tar lie, so that each can be read from there. Nothing is ever extracted.

Formats: ustar, pax and GNU, as tar(5) of libarchive describes them. A member's name is a label and
no path. Links, devices, folders and sparse files are passed over. Deliberate differences to
`tarfile`: nothing but headers is read; a size cannot be negative, so every archive comes to an end;
a damaged header is an error, where `tarfile` takes it for the end.
"""

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from sam_jax.data.example import SourceError
from sam_jax.io import storage

BLOCK = 512
MAX_EXTENDED = 1 << 20  # bytes of an extended header: names and numbers
_LENGTH = re.compile(rb"([1-9][0-9]{0,6}) ")
REGULAR = (b"0", b"\0", b"7")
WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes


class Member(NamedTuple):
    """A regular file in a tar: `size` bytes from `offset` on; the tar may end before."""

    name: str
    offset: int
    size: int


def members(path: str) -> Iterator[Member]:
    """The regular files in a tar, in its order.

    Raises:
      SourceError: if it is no tar, compressed, or damaged; a tar that is cut short is none of it.
    """
    with open_parts(path) as (read, end):
        if end < BLOCK:
            raise SourceError(f"{path} is no tar: it has {end} bytes")
        at = 0
        extended: dict[str, Any] = {}  # what extended headers say of the next member
        while at + BLOCK <= end and any(header := read(at, BLOCK)):
            try:
                kind, size = _check(header), _number(header[124:136])
                if kind in (b"L", b"x"):
                    extended |= _extended(kind, read(at + BLOCK, min(size, MAX_EXTENDED)), size)
                elif kind == b"S":
                    raise ValueError("it is of a sparse file; pack the tar without --sparse")
            except ValueError as error:
                raise SourceError(_damaged(path, at, error)) from error
            if kind not in (b"L", b"K", b"x", b"g"):
                size = 0 if kind in WITHOUT_DATA else extended.get("size", size)
                if kind in REGULAR and not extended.get("sparse"):
                    yield Member(extended.get("path", _name(header)), at + BLOCK, size)
                extended = {}
            at += BLOCK + -(-size // BLOCK) * BLOCK


@contextlib.contextmanager
def open_parts(path: str) -> Iterator[tuple[Callable[[int, int], bytes], int]]:
    """A file's reader, f(offset, size) -> bytes, and its end."""
    if storage.is_url(path):
        yield functools.partial(storage.read_range, path), storage.stat(path)[0]
        return
    with open(path, "rb", buffering=0) as file:

        def read(at, size):
            file.seek(at)
            return file.read(size)

        yield read, os.fstat(file.fileno()).st_size


def _check(header: bytes) -> bytes:
    """Checks a header's sum -> the kind of its member."""
    rest = header[:148] + b" " * 8 + header[156:]
    if _number(header[148:156]) != sum(rest):
        raise ValueError("its sum is wrong")
    return header[156:157]


def _number(field: bytes) -> int:
    """Octal digits, or a large number in base 256."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if not re.fullmatch(rb"[0-7]*", digits):
        raise ValueError(f"{field!r} is not a size")
    return int(digits or b"0", 8)


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0")[0]
    prefix = header[345:500].split(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return _text(prefix + b"/" + name if prefix else name)


def _extended(kind: bytes, data: bytes, size: int) -> dict[str, Any]:
    """What an extended header says of the next member: its path, its size, whether it is sparse."""
    if size > MAX_EXTENDED:
        raise ValueError(f"an extended header of {size} bytes; at most {MAX_EXTENDED} are allowed")
    if kind == b"L":
        return {"path": _text(data.split(b"\0")[0])}
    found: dict[str, Any] = {}
    at = 0
    while at < len(data):  # records "LENGTH KEY=VALUE\n"; the length is that of all of it
        length = _LENGTH.match(data, at)
        end = at + int(length[1]) if length else 0
        if length is None or not length.end() < end <= len(data):
            raise ValueError("an extended header is damaged")
        key, _, value = data[length.end() : end - 1].partition(b"=")
        if key == b"path":
            found["path"] = _text(value)
        elif key == b"size":
            if not re.fullmatch(rb"[0-9]{1,19}", value):
                raise ValueError(f"{value[:40]!r} is not a size")
            found["size"] = int(value)
        elif key.startswith(b"GNU.sparse"):
            found["sparse"] = True
        at = end
    return found


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _damaged(path: str, at: int, error: ValueError) -> str:
    if at == 0:
        return f"{path} is no tar; a compressed one has to be unpacked first, as by gunzip"
    return (
        f"{path}: the header at byte {at} is damaged: {error}; fetch the file again, or remove it"
    )
