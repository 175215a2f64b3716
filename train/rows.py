"""JSON lines files that grow during a run and survive its interruptions."""

import json
import logging
from pathlib import Path
from typing import Any

from sam_jax.io.atomic import append_bytes, replace_nonfinite, write_json_lines

Row = dict[str, Any]  # the object on one line

log = logging.getLogger("train")


def append_row(path: Path, row: Row) -> None:
    """Appends a row to a JSON lines file.

    Args:
      path: The file. It is created if it does not exist.
      row: Values by name. NaN and infinity are written as null.

    Raises:
      OSError: If the row cannot be written. The file then has its former content.
    """
    append_bytes(path, (json.dumps(replace_nonfinite(row), allow_nan=False) + "\n").encode())


def drop_rows_after(path: Path, step: int) -> None:
    """Removes the rows of later steps, and damaged ones, from a JSON lines file, if it exists."""
    rows = [row for row in read_rows(path) if row["step"] <= step]
    if rows:
        write_json_lines(path, map(replace_nonfinite, rows))
    else:
        path.unlink(missing_ok=True)


def read_rows(path: Path) -> list[Row]:
    """Reads a JSON lines file.

    A missing file has no rows. Text after the last line break, which was not written to the end, is
    skipped. Other lines that are no JSON objects are skipped and reported.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            log.warning("%s: line %d is damaged and left out: %.60r", path, number, line)
    return rows
