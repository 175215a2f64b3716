"""Checks where a command will write, before it computes anything."""

import os
from pathlib import Path


def check_folder(path: str, option: str) -> Path:
    """Checks that a folder can be written to, or created. Nothing is written.

    Args:
      path: The folder.
      option: The option that chooses it, for error messages.

    Returns:
      The folder.

    Raises:
      ValueError: If it is a file or a broken link, or cannot be written to or created.
    """
    folder = Path(path)
    existing = next(part for part in (folder, *folder.parents) if os.path.lexists(part))
    if not existing.exists():
        target = os.readlink(existing)
        raise ValueError(f"{option} {path}: {existing} is a link to {target}, which does not exist")
    if not existing.is_dir():
        raise ValueError(f"{option} {path}: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{option} {path}: {existing} cannot be written to")
    return folder


def check_file(path: str, option: str) -> Path:
    """Checks that a file can be written in an existing folder. Nothing is written.

    Args:
      path: The file.
      option: The option that chooses it, for error messages.

    Returns:
      The file.

    Raises:
      ValueError: If it is a folder, or its folder is missing or cannot be written to.
    """
    file = Path(path)
    if file.is_dir():
        raise ValueError(f"{option} {path} is a folder; it must be a file")
    if not os.path.lexists(file.parent):
        raise ValueError(f"{option} {path}: there is no folder {file.parent}")
    check_folder(str(file.parent), option)
    return file
