"""The output folder of the automatic stage. Several processes can fill it, and runs can resume.

    everything.json           the settings of the run
    sa_ID.jpg, sa_ID.json     an image and its masks, as in SA-1B; the JSON is written last
    overlays/sa_ID.png        the image with its masks drawn over it
    skipped_PROCESS.json      the images that a process could not use
    instances.json            all masks, as in COCO

Files are written atomically, under a temporary name that contains the number of the process.
Several processes, on one host or on several hosts that share the folder, can therefore fill it
without communicating. A restarted process removes only its unfinished files, see `acquire`. While
a process runs, it holds a lock, so that no other one works under its number; see `hold_number`.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sam_jax.io.atomic import atomic_path
from sam_jax.io.lock import exclusive_lock, is_locked
from sam_jax.io.settings_guard import check_settings

SETTINGS_NAME = "everything.json"
OVERLAYS_NAME = "overlays"
FINISHED = re.compile(r"sa_([0-9]+)\.json")
SKIPPED = re.compile(r"skipped_([0-9]+)\.json")
UNFINISHED = re.compile(
    r"\.(?:sa_[0-9]+\.(?:jpg|json|png)|(?:skipped_[0-9]+|instances|everything)\.json)"
    r"\.process([0-9]+)\.[0-9a-f]+\.tmp"
)


@contextlib.contextmanager
def hold_number(folder: Path, process: int) -> Iterator[None]:
    """Reserves the number of a process in a folder while the block runs.

    Args:
      folder: The folder, which is created if it is missing.
      process: The number of this process.

    Raises:
      LockedError: If another process works in the folder under this number.
      OSError: If the folder cannot be created or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"process number {process} of {folder}"
    with exclusive_lock(folder / _lock_name(process), name):
        yield


def acquire(
    folder: Path, settings: Mapping[str, Any], *, process: int = 0, processes: int = 1
) -> None:
    """Creates the folder or checks its settings, and removes the leftovers of killed processes.

    Args:
      folder: A new or empty folder, or that of a run with the same settings.
      settings: Everything that the results depend on, as JSON values.
      process: The number of this process, from 0.
      processes: The number of processes. If an earlier run had more, each process also removes
        the leftovers of those whose number modulo `processes` is `process`, unless they still run.

    Raises:
      SettingsError: If the folder was started with other settings, or has files but no settings.
      OSError: If the folder cannot be created or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    has_settings = check_settings(folder / SETTINGS_NAME, settings, option="--out")
    for directory in (folder, folder / OVERLAYS_NAME):
        if directory.is_dir():
            _remove_leftovers(directory, folder, process, processes)
    if not has_settings:
        write_json(folder / SETTINGS_NAME, settings, process=process, indent=1)


def finished_ids(folder: Path) -> set[int]:
    """Returns the ids of the images whose files are complete."""
    return {int(match[1]) for name in os.listdir(folder) if (match := FINISHED.fullmatch(name))}


def skipped_ids(folder: Path) -> set[int]:
    """Returns the ids of the images that any process found to be unusable."""
    files = [folder / name for name in os.listdir(folder) if SKIPPED.fullmatch(name)]
    return {entry["index"] for file in files for entry in json.loads(file.read_bytes())}


def write_json(path: Path, value: Any, *, process: int, indent: int | None = None) -> None:
    """Writes a value as JSON; see `write_file`."""
    text = json.dumps(value, indent=indent, allow_nan=False) + "\n"
    write_file(path, [text.encode()], process=process)


def write_file(path: Path, chunks: Iterable[bytes], *, process: int) -> None:
    """Writes a file atomically.

    Args:
      path: The file to write or to replace.
      chunks: The content, in pieces.
      process: The number of this process.

    Raises:
      OSError: If the file cannot be written.
    """
    with atomic_path(path, writer=f"process{process}") as temporary, open(temporary, "xb") as file:
        file.writelines(chunks)


def _remove_leftovers(directory: Path, folder: Path, process: int, processes: int) -> None:
    """Removes unfinished files and lists of skipped images. The run writes them again."""
    for name in os.listdir(directory):
        match = UNFINISHED.fullmatch(name) or SKIPPED.fullmatch(name)
        if match and int(match[1]) % processes == process:
            writer = int(match[1])
            if writer == process or not is_locked(folder / _lock_name(writer)):
                (directory / name).unlink()


def _lock_name(process: int) -> str:
    return f".process{process}.lock"
