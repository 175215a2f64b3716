"""Files on a disk, or in an object store, by an address such as gs://bucket/folder.

Stores are reached through fsspec, which needs the package of the store (gcsfs for gs://). An object
is written as a whole or not at all; it can neither be appended to, nor locked, nor renamed.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from sam_jax.data.example import SourceError


def is_file(path: str) -> bool:
    """Whether it is a file that can be read from its beginning to its end.

    Raises:
      OSError: if a store does not say.
    """
    return _kind_of(path) == "file" if is_url(path) else os.path.isfile(path)


def is_folder(path: str) -> bool:
    """Whether it is a folder; in a store, whether anything is below it.

    Raises:
      OSError: if a store does not say.
    """
    return _kind_of(path) == "directory" if is_url(path) else os.path.isdir(path)


def listdir(folder: str) -> list[str]:
    """The names of what is in a folder.

    Raises:
      OSError: if it cannot be read.
    """
    if not is_url(folder):
        return os.listdir(folder)
    with _store_of(folder) as (store, name):
        paths = [path.rstrip("/") for path in store.ls(name, detail=False)]
    here = name.rstrip("/")
    return [path.rsplit("/", 1)[-1] for path in paths if path != here]  # an object that marks it


def walk(folder: str) -> Iterator[tuple[str, list[str]]]:
    """Every folder from this one down, by name, with the names of its files.

    Raises:
      OSError: if one cannot be read.
    """
    if is_url(folder):
        with _store_of(folder) as (store, name):
            found = [(below, list(files)) for below, _, files in store.walk(name, on_error="raise")]
            for below, files in sorted(found, key=lambda found: found[0].split("/")):
                yield store.unstrip_protocol(below), files
        return
    for below, folders, files in os.walk(folder, onerror=_raise):
        folders.sort()
        yield below, files


def stat(path: str) -> tuple[int, int]:
    """The bytes of a file, and when it was changed, in nanoseconds; 0 in a store.

    Raises:
      OSError: if it cannot be read.
    """
    if not is_url(path):
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns
    with _store_of(path) as (store, name):
        return store.info(name)["size"], 0


def read_range(path: str, offset: int = 0, size: int | None = None) -> bytes:
    """Reads `size` bytes of a file from an offset, or all there are of them.

    Raises:
      OSError: if it cannot be read.
    """
    if not is_url(path):
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read() if size is None else file.read(size)
    with _store_of(path) as (store, name):
        return store.cat_file(name, start=offset, end=None if size is None else offset + size)


def write_bytes(address: str, data: bytes) -> None:
    """Puts bytes into a store.

    Raises:
      OSError: if it cannot be written.
    """
    with _store_of(address) as (store, name):
        store.pipe_file(name, data)


def upload(path: str, address: str) -> None:
    """Puts a file of a disk into a store.

    Raises:
      OSError: if it cannot be read or written.
    """
    with _store_of(address) as (store, name):
        store.put_file(path, name)


def remove(address: str) -> None:
    """Removes a file from a store.

    Raises:
      OSError: if it cannot be removed.
    """
    with _store_of(address) as (store, name):
        store.rm_file(name)


def is_url(path: str) -> bool:
    """Whether a path is in an object store."""
    return "://" in path


def _kind_of(address: str) -> str | None:
    with _store_of(address) as (store, name):
        try:
            return store.info(name)["type"]
        except FileNotFoundError:
            return None


@contextlib.contextmanager
def _store_of(path: str) -> Iterator[tuple[Any, str]]:
    """The file system of an address, and its name there; what goes wrong there is an OSError."""
    try:
        import fsspec.core

        store, name = fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise SourceError(
            f"{path} cannot be reached: {error}. For gs:// it takes the extra: pip install "
            "'sam_jax[gcs]'"
        ) from error
    try:
        yield store, name
    except OSError:
        raise
    except Exception as error:  # of the store's own kinds
        raise OSError(f"{path} cannot be reached: {error}") from error


def _raise(error: OSError) -> None:
    raise error
