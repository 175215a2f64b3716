"""Refuses to continue a run in a folder that was started with other settings."""

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

LENGTH = "number of "  # before the name of a list of mappings


class SettingsError(ValueError):
    """A folder that belongs to a run with other settings, or to no run at all."""


def check_settings(
    path: str | os.PathLike[str],
    settings: Mapping[str, Any],
    *,
    ignore: Collection[str] = (),
    folder: str | None = None,
    option: str = "--workdir",
) -> bool:
    """Checks that a run with these settings may write to a folder. Nothing is written.

    Args:
      path: The settings file, in the folder.
      settings: Everything that the results depend on. Values are those of JSON; mappings may be
        nested.
      ignore: Settings that may differ, as dotted names.
      folder: The name of the folder in error messages; its path by default.
      option: The command-line option that chooses the folder, for error messages.

    Returns:
      True if the folder was started with these settings; False if it is missing or empty. Hidden
      files do not count.

    Raises:
      SettingsError: If the folder was started with other settings, or has files but no settings.
    """
    path = Path(path)
    folder = folder or str(path.parent)
    if not path.exists():
        if path.parent.exists() and not _is_empty(path.parent):
            raise SettingsError(
                f"{folder} is not empty and has no {path.name}, so it was not started by this "
                f"command: choose another {option}"
            )
        return False
    before = _read_settings(path, option)
    # Through JSON, which turns tuples into lists.
    if changed := differences(before, json.loads(json.dumps(settings)), ignore):
        raise SettingsError(
            f"{folder} was started with other settings: {'; '.join(changed)}. Choose another "
            f"{option}, or use the same settings"
        )
    return True


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], ignore: Collection[str] = ()
) -> list[str]:
    """Lists the settings that changed, for example "optimizer.lr was 0.1, is 0.2".

    Args:
      before: The former settings. Values may be mappings, and lists of mappings.
      now: The present settings.
      ignore: Dotted names of settings that may differ.

    Returns:
      One description for each difference. A missing setting is the same as None.
    """
    before, now = _flatten(before), _flatten(now)
    changed = {name for name in before | now if before.get(name) != now.get(name)}
    for name in [name for name in changed if name.startswith(LENGTH)]:
        before, now = {name: 0} | before, {name: 0} | now
        items = name.removeprefix(LENGTH)  # which are not compared, since their number differs
        changed -= {other for other in changed if other == items or other.startswith(f"{items}[")}
    return [
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in before | now
        if name in changed and name not in ignore
    ]


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Replaces nested mappings by names such as "a.b", and lists of them by "a[0].b"."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            flat[f"{LENGTH}{prefix}{name}"] = len(value)
            for i, item in enumerate(value):
                flat |= _flatten(item, f"{prefix}{name}[{i}].")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and all(name.startswith(".") for name in os.listdir(folder))


def _read_settings(path: Path, option: str) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise SettingsError(f"{path} is not a settings file: choose another {option}")
    return settings
