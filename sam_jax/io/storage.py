"""Files on a disk or in an object store, named by a path or by a URL such as gs://bucket/folder.

Object stores are reached through fsspec, which needs the package of the store (gcsfs for gs://). An
object is written completely or not at all. It cannot be appended to, locked or renamed.

Only regular files are read: a named pipe would block its reader forever, and a device may have no
end. Links are followed.

All functions raise OSError if the disk or the store fails.
"""

import contextlib
import io
import os
import stat as file_types
from collections.abc import Iterator
from typing import Any

from sam_jax.io.extras import install_hint


def is_url(path: str) -> bool:
    """Returns True if a path is in an object store."""
    return "://" in path


def is_file(path: str) -> bool:
    """Returns True if a path is a regular file.

    Raises:
      OSError: If the store cannot be reached.
    """
    return _object_type(path) == "file" if is_url(path) else os.path.isfile(path)


def is_folder(path: str) -> bool:
    """Returns True if a path is a folder. In a store, a folder is a prefix of an object's name.

    Raises:
      OSError: If the store cannot be reached.
    """
    return _object_type(path) == "directory" if is_url(path) else os.path.isdir(path)


def listdir(folder: str) -> list[str]:
    """Returns the names of the files and folders in a folder.

    Raises:
      OSError: If the folder cannot be read.
    """
    if not is_url(folder):
        return os.listdir(folder)
    with _open_store(folder) as (store, name):
        paths = [path.rstrip("/") for path in store.ls(name, detail=False)]
    marker = name.rstrip("/")  # an empty object with which some tools represent a folder
    return [path.rsplit("/", 1)[-1] for path in paths if path != marker]


def walk(folder: str) -> Iterator[tuple[str, list[str]]]:
    """Walks through a folder and all folders below it, in the order of their names.

    Args:
      folder: A path or a URL.

    Yields:
      The path of each folder, and the names of its files.

    Raises:
      OSError: If a folder cannot be read.
    """
    if is_url(folder):
        with _open_store(folder) as (store, name):
            found = [(path, list(files)) for path, _, files in store.walk(name, on_error="raise")]
            for path, files in sorted(found, key=lambda entry: entry[0].split("/")):
                yield store.unstrip_protocol(path), files
        return
    for path, folders, files in os.walk(folder, onerror=_raise):
        folders.sort()
        yield path, files


def open_file(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Opens a regular file on a disk to read it.

    Args:
      path: A path; links are followed.

    Returns:
      The file.

    Raises:
      OSError: If the file is missing, cannot be read, or is not a regular file.
    """

    def open_without_waiting(name: str, flags: int) -> int:
        # Opening a named pipe without O_NONBLOCK waits for its writer. The type is that of the
        # opened file, which cannot be replaced any more.
        descriptor = os.open(name, flags | os.O_NONBLOCK)
        if file_types.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
        raise OSError(f"{name} is not a regular file")

    try:
        return open(path, "rb", opener=open_without_waiting)
    except ValueError as error:  # a null byte or a lone surrogate in the name
        raise FileNotFoundError(f"no file can have the name {os.fspath(path)!a}") from error


def stat(path: str) -> tuple[int, int]:
    """Returns the size of a regular file in bytes and its modification time in nanoseconds.

    The modification time of an object in a store is 0.

    Raises:
      OSError: If the file cannot be read, or is not a regular file.
    """
    if not is_url(path):
        with open_file(path) as file:
            status = os.fstat(file.fileno())
        return status.st_size, status.st_mtime_ns
    with _open_store(path) as (store, name):
        return store.info(name)["size"], 0


def read_range(path: str, offset: int = 0, size: int | None = None) -> bytes:
    """Reads a range of a regular file.

    Args:
      path: A path or a URL.
      offset: The first byte.
      size: The number of bytes. None reads to the end.

    Returns:
      The bytes; fewer than `size` if the file ends earlier. No more memory is allocated than the
      file has bytes.

    Raises:
      OSError: If the file cannot be read, or is not a regular file.
    """
    if not is_url(path):
        with open_file(path) as file:
            remaining = max(0, os.fstat(file.fileno()).st_size - offset)
            file.seek(offset)
            return file.read(remaining if size is None else min(size, remaining))
    with _open_store(path) as (store, name):
        return store.cat_file(name, start=offset, end=None if size is None else offset + size)


def upload_bytes(url: str, data: bytes) -> None:
    """Writes an object of a store. See `sam_jax.io.atomic` for files on a disk.

    Raises:
      OSError: If the object cannot be written.
    """
    with _open_store(url) as (store, name):
        store.pipe_file(name, data)


def upload(path: str, url: str) -> None:
    """Copies a file on a disk to an object store.

    Args:
      path: The file.
      url: The object to write.

    Raises:
      OSError: If the file cannot be read or the object cannot be written.
    """
    with _open_store(url) as (store, name):
        store.put_file(path, name)


def remove(url: str) -> None:
    """Removes an object from a store.

    Raises:
      OSError: If the object cannot be removed.
    """
    with _open_store(url) as (store, name):
        store.rm_file(name)


def rename_folder(folder: str, new: str) -> None:
    """Renames a folder.

    In a store, its objects are copied before they are removed, so each of them exists all the time.

    Args:
      folder: The folder.
      new: Its new path or URL, at which there is nothing.

    Raises:
      OSError: If the folder cannot be renamed.
    """
    if not is_url(folder):
        os.rename(folder, new)
        return
    with _open_store(folder) as (store, name):
        store.copy(name, store._strip_protocol(new), recursive=True)
        store.rm(name, recursive=True)


def _object_type(url: str) -> str | None:
    with _open_store(url) as (store, name):
        try:
            return store.info(name)["type"]
        except FileNotFoundError:
            return None


@contextlib.contextmanager
def _open_store(url: str) -> Iterator[tuple[Any, str]]:
    """Yields the file system of a URL and the path in it. Converts all errors to OSError."""
    try:
        import fsspec.core

        store, name = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise OSError(
            f"{url} cannot be reached: {error}. For gs:// {install_hint('gcs')}"
        ) from error
    try:
        yield store, name
    except OSError:
        raise
    except Exception as error:  # stores raise errors of many other types
        raise OSError(f"{url} cannot be reached: {error}") from error


def _raise(error: OSError) -> None:
    raise error
