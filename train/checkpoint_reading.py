"""Reads the files of a checkpoint, and tells damaged bytes from other errors."""

import functools
import gc
import logging
import sys
import warnings
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from sam_jax.io import storage
from sam_jax.io.settings_guard import differences
from train.run_record import RecordError, read_record, versions

# Packages that read checkpoints. If one of them has changed, an error does not prove damage.
READERS = ("jax", "orbax-checkpoint", "tensorstore")
READ_SIZE = 2**26  # bytes read at once


class CheckpointError(RuntimeError):
    """Checkpoints that cannot be restored or saved; the message says why and what to do."""


class DamagedError(Exception):
    """A checkpoint whose bytes are damaged."""


def read_verified_record(folder: epath.Path) -> dict[str, Any] | None:
    """Reads the record of a checkpoint.

    Args:
      folder: The checkpoint.

    Returns:
      Its record; None if an older version wrote it, without a record.

    Raises:
      DamagedError: If its bytes are damaged.
      CheckpointError: If it cannot be read for another reason.
    """
    try:
        return read_record(str(folder))
    except RecordError as error:
        raise DamagedError(str(error)) from error
    except OSError as error:
        raise _unreadable(folder, error) from error


def read_state(folder: epath.Path, target: Any, record: dict[str, Any] | None) -> dict[str, Any]:
    """Reads a state.

    An error proves that the bytes are damaged if all bytes can be read, the same software wrote
    them for the same arrays, and the error occurs twice.

    Args:
      folder: The checkpoint.
      target: The shapes and shardings of its arrays.
      record: Its record.

    Returns:
      The arrays, whose checksums are not verified yet.

    Raises:
      DamagedError: If the bytes are damaged.
      CheckpointError: If they cannot be read for another reason.
    """
    reason = ""
    for _ in range(2):
        try:
            handler = ocp.StandardCheckpointHandler()
            return handler.restore(folder / "state", args=ocp.args.StandardRestore(target))
        except Exception as error:  # orbax raises bare ones
            reason = one_line(error)
            if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                raise CheckpointError(
                    f"{folder} needs more memory than there is: {reason}. Use more devices, or a "
                    "larger fsdp"
                ) from error
        drop_unfinished_tasks()
        try:
            _read_all_bytes(str(folder))
        except OSError as error:
            raise _unreadable(folder, error) from error
    if record is None:
        raise CheckpointError(
            f"{folder} cannot be restored: {reason}. An older version wrote it without checksums, "
            "so it may be damaged or of other code. To resume from the checkpoint before it, "
            f"rename it to {folder.name}.damaged"
        )
    present = {name: versions()[name] for name in READERS}
    if changed := differences({name: record["versions"].get(name) for name in READERS}, present):
        raise CheckpointError(
            f"{folder} cannot be restored: {reason}. The reason may be that {'; '.join(changed)}: "
            "install the former versions, or rename the folder to "
            f"{folder.name}.damaged to resume from the checkpoint before it"
        )
    raise DamagedError(reason)


def _read_all_bytes(folder: str) -> None:
    """Reads all files of a folder; raises OSError if one of them cannot be read."""
    for path, names in storage.walk(folder):
        for name in names:
            offset = 0
            while storage.read_range(f"{path}/{name}", offset, READ_SIZE):
                offset += READ_SIZE


def _unreadable(folder: epath.Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{folder} cannot be read: {error}. Nothing was changed. Make it readable and start again, "
        f"or rename it to {folder.name}.damaged to resume from the checkpoint before it"
    )


@functools.cache
def hide_remaining_errors() -> None:
    """Hides errors of orbax's other reads and writes, which go on when one of them has failed.

    They would be printed with their tracebacks, perhaps much later.
    """
    hook = sys.unraisablehook

    def hide(unraisable: Any) -> None:
        text = str(unraisable.exc_value)
        if not text.startswith(("Encountered error while reading array", "Event loop is closed")):
            hook(unraisable)

    sys.unraisablehook = hide
    logging.getLogger("asyncio").addFilter(
        lambda record: "exception was never retrieved" not in record.getMessage()
    )


def drop_unfinished_tasks() -> None:
    """Drops reads and writes that orbax has not begun because another one has failed.

    Otherwise Python would warn of each of them, perhaps much later.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        gc.collect()


def one_line(error: BaseException) -> str:
    """Returns the beginning of an error's message, which orbax makes many lines long."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].partition(" [tensorstore_spec")[0][:300]
