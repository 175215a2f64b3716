"""Files that are either complete or absent, also after a crash or a power cut.

A file is written under a temporary name in the same folder, flushed to the disk, and renamed.
"""

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str], *, writer: str = "") -> Iterator[Path]:
    """Yields a temporary path whose file replaces `path` if the block succeeds.

    Args:
      path: The file to write or to replace. Its folder must exist.
      writer: A name that becomes part of the temporary name, `.NAME.WRITER.HEX.tmp`, by which a
        restarted process finds the files that it left unfinished when it was killed.

    Yields:
      A path in the same folder that does not exist yet. The block must create a file there. If it
      raises, the file is removed and `path` keeps its former content.

    Raises:
      OSError: If the file cannot be written or renamed.
    """
    path = Path(path)
    prefix = f".{path.name}.{writer}." if writer else f".{path.name}."
    temporary = path.with_name(f"{prefix}{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: str | os.PathLike[str], value: Any, indent: int | None = 2) -> None:
    """Writes a value as JSON with a final newline, atomically.

    Args:
      path: The file to write.
      value: A value that `json.dumps` accepts.
      indent: Number of spaces to indent nested values by. None writes one line.

    Raises:
      ValueError: If the value holds NaN or infinity, which JSON cannot express.
    """
    text = json.dumps(value, indent=indent, allow_nan=False) + "\n"
    write_bytes(path, text.encode())
