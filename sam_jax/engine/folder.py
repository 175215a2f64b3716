"""The output folder of the automatic stage. Several processes can fill it, and runs can resume.

    everything.json           the settings of the run
    images.json               the names of the images by their ids, in the order of the ids
    sa_ID.jpg, sa_ID.json     an image and its masks, as in SA-1B; the JSON is written last
    overlays/sa_ID.png        the image beside its masks
    skipped_PROCESS.json      the images that a process could not use
    instances.json            all masks, as in COCO

Files are written atomically, under a temporary name that contains the number of the process.
Several processes, on one host or on several hosts that share the folder, can therefore fill it
without communicating. A restarted process removes only its unfinished files, see `acquire`. While
a process runs, it holds a lock, so that no other one works under its number; see
`reserve_process_number`.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sam_jax.io.atomic import atomic_path
from sam_jax.io.lock import exclusive_lock, is_locked
from sam_jax.io.settings_guard import check_settings

SETTINGS_NAME = "everything.json"
NAMES_NAME = "images.json"
OVERLAYS_NAME = "overlays"
FINISHED = re.compile(r"sa_([0-9]+)\.json")
SKIPPED = re.compile(r"skipped_([0-9]+)\.json")
UNFINISHED = re.compile(
    r"\.(?:sa_[0-9]+\.(?:jpg|json|png)|(?:skipped_[0-9]+|instances|everything|images)\.json)"
    r"\.process([0-9]+)\.[0-9a-f]+\.tmp"
)


@contextlib.contextmanager
def reserve_process_number(folder: Path, process: int) -> Iterator[None]:
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


class Results(NamedTuple):
    """The ids of the images that have a JSON file.

    Attributes:
      finished: All files of the image begin as they were written, and the JSON file ends so.
      damaged: A file is missing, unreadable, empty, cut off or another one, as after a defect of
        the disk.
    """

    finished: set[int]
    damaged: set[int]


def find_results(folder: Path) -> Results:
    """Finds the images whose files were written, reading the ends of each file.

    Args:
      folder: The folder.
    """
    names = os.listdir(folder)
    ids = {int(match[1]) for name in names if (match := FINISHED.fullmatch(name))}
    finished = {i for i in ids if _is_complete(folder, i)}
    return Results(finished, ids - finished)


def finished_ids(folder: Path) -> set[int]:
    """Returns the ids of the images whose files are complete."""
    return find_results(folder).finished


def skipped_ids(folder: Path) -> set[int]:
    """Returns the ids of the images that any process found to be unusable.

    Raises:
      ValueError: If a list of such images is damaged.
    """
    files = [folder / name for name in os.listdir(folder) if SKIPPED.fullmatch(name)]
    return {entry["index"] for file in files for entry in read_json(file)}


def read_json(path: Path) -> Any:
    """Reads a JSON file that a run wrote.

    Raises:
      ValueError: If it is damaged. The message names it.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}): remove it, and run the same command again"
        ) from error


def write_names(folder: Path, names: Mapping[int, str], *, process: int) -> None:
    """Writes which image has which id. All processes write the same file.

    Args:
      folder: The folder.
      names: The names of all images by their ids.
      process: The number of this process.

    Raises:
      OSError: If the file cannot be written.
    """
    write_json(folder / NAMES_NAME, names, process=process, indent=1)


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


def _is_complete(folder: Path, image_id: int) -> bool:
    """Returns True if the files of an image have their first bytes, and the JSON file its last."""
    start = json.dumps({"image": {"image_id": image_id}})[:-2].encode() + b","
    starts = {f"sa_{image_id}.json": start, f"sa_{image_id}.jpg": b"\xff\xd8"}
    if (folder / OVERLAYS_NAME).is_dir():
        starts[f"{OVERLAYS_NAME}/sa_{image_id}.png"] = b"\x89PNG"
    try:
        contents = [(_ends_of(folder / name, len(start)), start) for name, start in starts.items()]
    except OSError:
        return False
    (_, json_end), _ = contents[0]
    return json_end == b"}\n" and all(found == start for (found, _), start in contents)


def _ends_of(path: Path, count: int) -> tuple[bytes, bytes]:
    """Returns the first `count` bytes of a file, and the last two.

    Raises:
      OSError: If it is not a regular file, or cannot be read.
    """
    if not path.is_file():  # a pipe would be waited for
        raise FileNotFoundError(f"there is no file {path}")
    with open(path, "rb") as file:
        first = file.read(count)
        file.seek(max(0, os.fstat(file.fileno()).st_size - 2))
        return first, file.read()


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
