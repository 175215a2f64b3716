"""The folder that the automatic stage fills: whose it is, and files that are whole or not there.

    everything.json           what it is made with
    sa_ID.jpg, sa_ID.json     an image and its masks, as in SA-1B; the json comes last
    overlays/sa_ID.png        the masks in colors
    skipped_PROCESS.json      the images that a process could not use
    instances.json            all masks, as in COCO

A file is written under a hidden name that holds the number of its process, and renamed when it is
on the disk. So several processes, on one host or on many that see the folder, fill it together and
need not talk to each other, and a killed one is started again by the same command.
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SETTINGS = "everything.json"
OVERLAYS = "overlays"
FINISHED = re.compile(r"sa_([0-9]+)\.json")
SKIPPED = re.compile(r"skipped_([0-9]+)\.json")
UNFINISHED = re.compile(
    r"\.([0-9]+)\.(?:sa_[0-9]+\.(?:jpg|json|png)|(?:skipped_[0-9]+|instances|everything)\.json)"
)


def claim(folder: Path, settings: dict[str, Any], *, process: int = 0, processes: int = 1) -> None:
    """Makes the folder this run's own, and clears away what a killed run left of its processes.

    Args:
      folder: a new or empty folder, or that of a run with the same settings.
      settings: all that the results depend on, fit for JSON.
      process, processes: which process this is, from 0, and how many there are. There may have been
        more before: this one takes care of each whose number leaves `process` over.
    Raises:
      ValueError: if the folder is another's; it names what differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    visible = [name for name in os.listdir(folder) if not name.startswith(".")]
    if SETTINGS in visible:
        _check_settings(folder, settings)
    elif visible:
        raise ValueError(f"{folder} is neither empty nor of such a run: choose another --out")
    for place in (folder, folder / OVERLAYS):
        for name in os.listdir(place) if place.is_dir() else []:
            left = UNFINISHED.fullmatch(name) or SKIPPED.fullmatch(name)
            if left and int(left[1]) % processes == process:
                (place / name).unlink()
    if SETTINGS not in visible:
        write_json(folder / SETTINGS, settings, process=process, indent=1)


def finished(folder: Path) -> set[int]:
    """The ids of the images that need nothing more."""
    return {int(match[1]) for name in os.listdir(folder) if (match := FINISHED.fullmatch(name))}


def skipped(folder: Path) -> set[int]:
    """The ids of the images that any process has found to be unusable."""
    files = [folder / name for name in os.listdir(folder) if SKIPPED.fullmatch(name)]
    return {entry["index"] for file in files for entry in json.loads(file.read_bytes())}


def write_json(path: Path, value: Any, *, process: int, indent: int | None = None) -> None:
    """Writes a value as JSON, see `write_file`."""
    text = json.dumps(value, indent=indent, allow_nan=False) + "\n"
    write_file(path, [text.encode()], process=process)


def write_file(path: Path, chunks: Iterable[bytes], *, process: int) -> None:
    """Writes a file that is whole or not there, also after a power cut.

    Raises:
      OSError: if it cannot be written.
    """
    unfinished = path.with_name(f".{process}.{path.name}")
    with open(unfinished, "xb") as file:  # which nobody else is writing
        file.writelines(chunks)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Raises ValueError unless the folder's settings are these."""
    try:
        before = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except ValueError:
        before = None
    if not isinstance(before, dict):
        raise ValueError(f"{folder / SETTINGS} is not of such a run: choose another --out")
    if found := _differences(before, json.loads(json.dumps(settings))):
        raise ValueError(
            f"{folder} was begun with other settings: {'; '.join(found)}. Choose another --out, or "
            "the same values"
        )


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    names = [name for name in before | now if before.get(name) != now.get(name)]
    return [f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in names]
