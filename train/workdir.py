"""The folder of a run: its lock, its config.json, and its evaluation."""

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from sam_jax.io.atomic import replace_nonfinite, write_json, write_json_lines
from sam_jax.io.lock import LockedError, exclusive_lock
from train.config import ConfigError, TrainConfig
from train.overrides import to_dict
from train.run_record import config_changes, newest_config

log = logging.getLogger("train")

FOLDERS = ("checkpoints", "weights", "report", "tensorboard")  # that a run writes
LOCK_NAME = ".lock"
# What the lead host has written before config.json, when another host checks the folder.
BEFORE_CONFIG = re.compile(r"\.lock|\.config\.json\..+\.tmp")


@contextlib.contextmanager
def lock(
    workdir: Path,
    config: TrainConfig,
    num_bytes: int,
    name: str,
    checkpoints: str | os.PathLike[str] | None = None,
) -> Iterator[None]:
    """Holds the folder of a run, so that no other run writes to it.

    Nothing is written to a folder that this run must not use. The lock ends with the process, also
    if it is killed; see `sam_jax.io.lock`.

    Args:
      workdir: The folder, which is created if it is missing.
      config: The configuration.
      num_bytes: The size of the files that the run will write.
      name: The name of the folder in error messages.
      checkpoints: As for `check_or_create`.

    Raises:
      ConfigError: If another run holds the folder, or for the reasons of `check_or_create`.
    """
    check_or_create(workdir, config, num_bytes, is_writer=False, name=name, checkpoints=checkpoints)
    workdir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(exclusive_lock(workdir / LOCK_NAME, name))
        except LockedError as error:
            raise ConfigError(f"{error}; choose another --workdir, or wait for it") from error
        yield


def check_or_create(
    workdir: Path,
    config: TrainConfig,
    num_bytes: int,
    is_writer: bool = True,
    name: str | None = None,
    checkpoints: str | os.PathLike[str] | None = None,
) -> None:
    """Checks that a folder is free or belongs to this run, and writes its config.json.

    Args:
      workdir: A new or empty folder, or that of a run with the same configuration.
      config: The configuration.
      num_bytes: The size of the files that the run will write.
      is_writer: True on the host that writes. Other hosts only check the folder.
      name: The name of the folder in error messages; by default its path.
      checkpoints: The folder of the checkpoints, which may be in an object store; by default that
        in the folder.

    Raises:
      ConfigError: If the folder belongs to another run, or the disk has too little space.
    """
    name = name or str(workdir)
    path = workdir / "config.json"
    if path.exists():
        before = _read_config(path, str(checkpoints or workdir / "checkpoints"))
        if changed := config_changes(before, config):
            raise ConfigError(
                f"{name} holds a run with another config: {'; '.join(changed)}. Choose another "
                "--workdir, or the same values"
            )
    elif workdir.exists() and not is_free(workdir):
        raise ConfigError(f"{name} is not empty and holds no run: choose another --workdir")
    for folder in FOLDERS:
        if (workdir / folder).exists() and not (workdir / folder).is_dir():
            raise ConfigError(f"{name}/{folder} is a file, and the run needs a folder: rename it")
    parent = next(p for p in (workdir, *workdir.absolute().parents) if p.exists())
    # A resumed run replaces the checkpoints and the weights that it has written.
    needed = num_bytes - sum(replaceable_size(workdir / folder) for folder in FOLDERS)
    if (free := shutil.disk_usage(parent).free) < needed:
        raise ConfigError(
            f"{name} needs {needed / 2**20:.0f} MiB of disk space; {free / 2**20:.0f} MiB are free"
        )
    if is_writer:
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(path, to_dict(config))


def is_free(workdir: Path) -> bool:
    """Returns True for a folder that holds nothing, or only the beginning of a run."""
    if not workdir.is_dir():
        return False
    return all(BEFORE_CONFIG.fullmatch(path.name) for path in workdir.iterdir())


def _read_config(path: Path, checkpoints: str) -> dict[str, Any]:
    """Reads config.json. If it is damaged, its values are those in the newest checkpoint."""
    try:
        config = json.loads(path.read_bytes())
    except ValueError:
        config = None
    if isinstance(config, dict):
        return config
    config = newest_config(checkpoints)
    if config is None:
        raise ConfigError(
            f"{path} is damaged, and no checkpoint holds its values: choose another --workdir"
        )
    log.warning("%s is damaged; its values are taken from the newest checkpoint", path)
    return config


def write_evaluation(
    workdir: Path, evaluation: dict[str, Any], objects: list[dict[str, Any]]
) -> None:
    """Writes evaluation.json, and objects.jsonl if there are objects.

    NaN and infinity become null, because JSON cannot express them.

    Args:
      workdir: The folder of the run.
      evaluation: Values by name, which may be nested.
      objects: The rows of objects.jsonl, without NaN and infinity.
    """
    write_json(workdir / "evaluation.json", replace_nonfinite(evaluation))
    if objects:
        write_json_lines(workdir / "objects.jsonl", objects)


def replaceable_size(folder: Path) -> int:
    """Returns the bytes of all files in a folder, except those of damaged checkpoints."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sum(path.stat().st_size for path in files if ".damaged" not in str(path))


def is_lead_host() -> bool:
    """Returns True on the host that writes."""
    return jax.process_index() == 0


def per_host_name(name: str) -> str:
    """Inserts the process index into a file name, except on the lead host."""
    path = Path(name)
    return f"{path.stem}_{jax.process_index()}{path.suffix}" if jax.process_index() else name
