"""The folder of a run: its lock, its config.json, and the images that could not be used."""

import contextlib
import dataclasses
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from sam_jax.data.loader import SkippedSample
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


class BadSamples:
    """Counts images that could not be used, lists them in a file, and stops a run with too many.

    Images that are used without some of their masks are listed, but do not count as unusable.

    Attributes:
      path: A JSON lines file with one image per line. It exists if there is any such image.
      limit: The fraction of the images that may be unusable.
      count: The number of all images.
      known: The unusable images so far, by index.
      used_in_part: The indices of the images of which some masks are unusable.
    """

    def __init__(self, path: Path, limit: float, count: int) -> None:
        self.path, self.limit, self.count = path, limit, count
        self.known: dict[int, SkippedSample] = {}
        self.used_in_part: set[int] = set()
        path.unlink(missing_ok=True)

    def add(self, skipped: list[SkippedSample]) -> None:
        """Adds the samples that were skipped in a step.

        Args:
          skipped: The samples; see `Loader.batch`.

        Raises:
          ConfigError: If too many images are unusable.
        """
        for sample in skipped:
            if sample.index in (self.used_in_part if sample.skipped_masks else self.known):
                continue
            if sample.skipped_masks:
                self.used_in_part.add(sample.index)
            else:
                self.known[sample.index] = sample
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(dataclasses.asdict(sample)) + "\n")
            except OSError as error:
                log.warning("%s is unusable, and cannot be listed: %s", sample.name, error)
        if len(self.known) > self.limit * self.count:
            last = list(self.known.values())[-1]
            raise ConfigError(
                f"{len(self.known)} of {self.count} images are unusable, more than data.max_bad="
                f"{self.limit} allows; the last was {last.name}: {last.reason}: {last.detail}. "
                f"{self.path} lists all of them; `sam-jax dataset check` finds them beforehand"
            )


def is_lead_host() -> bool:
    """Returns True on the host that writes."""
    return jax.process_index() == 0


def per_host_name(name: str) -> str:
    """Inserts the process index into a file name, except on the lead host."""
    path = Path(name)
    return f"{path.stem}_{jax.process_index()}{path.suffix}" if jax.process_index() else name
