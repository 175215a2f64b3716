"""Files and directories that are either complete or absent.

A file is written under a temporary name in the same folder, flushed to the disk, and renamed. So
it is complete even after a power cut. A directory is filled, flushed and renamed in the same way.
"""

import contextlib
import json
import math
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
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
      OSError: If the file cannot be written or renamed. It names `path`.
    """
    path = Path(path)
    prefix = f".{path.name}.{writer}." if writer else f".{path.name}."
    temporary = path.with_name(f"{prefix}{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno and error.filename in (None, str(temporary)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        with contextlib.suppress(OSError):  # missing, or the disk became read-only
            temporary.unlink()


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str], marker: str) -> Iterator[Path]:
    """Yields an empty temporary directory that replaces `path` if the block succeeds.

    If the block raises, the temporary directory is removed and `path` keeps its former content.

    Args:
      path: The directory to write or to replace; parent directories are created.
      marker: Name of a file that every directory of this kind has. A directory without it is not
        replaced, unless it is empty.

    Yields:
      The temporary directory, which is on the same disk.

    Raises:
      FileExistsError: If something else than such a directory is at `path`.
      OSError: If the directory cannot be created or renamed.
    """
    path = Path(path)
    is_empty = path.is_dir() and not any(path.iterdir())
    if path.exists() and not (path / marker).is_file() and not is_empty:
        raise FileExistsError(
            f"{path} exists and has no {marker}: choose another name or remove it"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    new, old = temporary / "new", temporary / "old"
    try:
        new.mkdir()
        yield new
        _flush_files(new)
        if path.exists():
            path.rename(old)
        try:
            new.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
    finally:
        shutil.rmtree(temporary)


def _flush_files(folder: Path) -> None:
    """Waits until all files in a folder are on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def append_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Appends to a file, which is created if it does not exist.

    Args:
      path: The file.
      data: The bytes to append.

    Raises:
      OSError: If not all of them can be written. The file then has its former content.
    """
    path = Path(path)
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "ab") as file:
            file.write(data)
    except OSError:
        with contextlib.suppress(OSError):
            os.truncate(path, size)
        raise


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


def write_json_lines(path: str | os.PathLike[str], values: Iterable[Any]) -> None:
    """Writes each value as JSON on a line of its own, atomically.

    Args:
      path: The file to write.
      values: Values that `json.dumps` accepts.

    Raises:
      ValueError: If a value holds NaN or infinity, which JSON cannot express.
    """
    lines = [json.dumps(value, allow_nan=False) + "\n" for value in values]
    write_bytes(path, "".join(lines).encode())


def replace_nonfinite(value: Any) -> Any:
    """Replaces NaN and infinity, also in nested dicts and lists, by None, which JSON calls null."""
    if isinstance(value, dict):
        return {name: replace_nonfinite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [replace_nonfinite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
