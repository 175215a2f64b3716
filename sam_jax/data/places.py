"""Files on a disk, or in an object store, by an address such as gs://bucket/folder.

Stores are read through fsspec, which needs the package of the store (gcsfs for gs://).
"""

import os
from collections.abc import Iterator
from typing import Any

from sam_jax.data.example import SourceError


def is_file(path: str) -> bool:
    """Whether it is a file that can be read from its beginning to its end."""
    if not is_address(path):
        return os.path.isfile(path)
    store, name = _store_of(path)
    return store.isfile(name)


def is_folder(path: str) -> bool:
    """Whether it is a folder; in a store, whether anything is below it."""
    if not is_address(path):
        return os.path.isdir(path)
    store, name = _store_of(path)
    return store.isdir(name)


def names_in(folder: str) -> list[str]:
    """The names of what is in a folder.

    Raises:
      OSError: if it cannot be read.
    """
    if not is_address(folder):
        return os.listdir(folder)
    store, name = _store_of(folder)
    return [path.rstrip("/").rsplit("/", 1)[-1] for path in store.ls(name, detail=False)]


def walk(folder: str) -> Iterator[tuple[str, list[str]]]:
    """Every folder from this one down, by name, with the names of its files.

    Raises:
      OSError: if one cannot be read.
    """
    if is_address(folder):
        store, name = _store_of(folder)
        for below, _, files in sorted(store.walk(name, on_error="raise")):
            yield store.unstrip_protocol(below), list(files)
        return
    for below, folders, files in os.walk(folder, onerror=_raise):
        folders.sort()
        yield below, files


def version_of(path: str) -> tuple[int, int]:
    """The bytes of a file, and when it was changed, in nanoseconds; 0 in a store."""
    if not is_address(path):
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns
    store, name = _store_of(path)
    return store.size(name), 0


def read_part(path: str, offset: int = 0, size: int | None = None) -> bytes:
    """Reads `size` bytes of a file from an offset, or all there are of them.

    Raises:
      OSError: if it cannot be read.
    """
    if not is_address(path):
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read() if size is None else file.read(size)
    store, name = _store_of(path)
    try:
        return store.cat_file(name, start=offset, end=None if size is None else offset + size)
    except OSError:
        raise
    except Exception as error:  # of the store's own kinds
        raise OSError(str(error)) from error


def write_whole(path: str, data: bytes) -> None:
    """Puts a file into a store, whole or not at all.

    Raises:
      OSError: if it cannot be written.
    """
    store, name = _store_of(path)
    try:
        store.pipe_file(name, data)
    except OSError:
        raise
    except Exception as error:  # of the store's own kinds
        raise OSError(str(error)) from error


def is_address(path: str) -> bool:
    """Whether a path is in an object store."""
    return "://" in path


def _store_of(path: str) -> tuple[Any, str]:
    """The file system of an address, and its name there."""
    try:
        import fsspec.core

        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise SourceError(
            f"{path} cannot be reached: {error}. For gs:// it takes the extra: pip install "
            "'sam_jax[gcs]'"
        ) from error


def _raise(error: OSError) -> None:
    raise error
