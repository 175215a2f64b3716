"""The folder of a run: whose it is, and what is written into it besides metrics and checkpoints."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

from sam_jax.data.loader import SkippedSample
from sam_jax.io.settings_guard import differences
from train.config import ConfigError, TrainConfig
from train.former_names import rename_saved
from train.overrides import to_dict

# Fields that may differ when a run goes on: they change nothing that has been computed already.
FREE = (
    "num_steps",
    "fsdp",
    "log_every",
    "checkpoint_every",
    "evaluate_every",
    "profile",
    "data.workers",
)


def check_or_create(
    workdir: Path, config: TrainConfig, needed: int, writes: bool = True, name: str | None = None
) -> None:
    """Makes the folder this run's own, and writes its config.json.

    Args:
      workdir: a new or empty folder, or that of a run with the same config.
      needed: bytes that the run will write.
      writes: whether to write, or to check alone.
      name: by which people know the folder, if not by its path.

    Raises:
      ConfigError: if it is another's, or has too little room.
    """
    name = name or str(workdir)
    path = workdir / "config.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        before = rename_saved(before)
        if found := differences(before, to_dict(config), ignore=FREE):
            raise ConfigError(
                f"{name} holds a run with another config: {'; '.join(found)}. Choose another "
                "--workdir, or the same values"
            )
    elif workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise ConfigError(f"{name} is neither empty nor a run's: choose another --workdir")
    parent = next(p for p in (workdir, *workdir.absolute().parents) if p.exists())
    if (free := shutil.disk_usage(parent).free) < needed:
        raise ConfigError(
            f"{name} needs room for {needed / 2**20:.0f} MiB; {free / 2**20:.0f} MiB are free"
        )
    if writes:
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(path, to_dict(config))


def write_json(path: Path, value: Any) -> None:
    """Writes a file that is whole or not there."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


class BadSamples:
    """Counts the images that could not be used, names them in a file, and ends a run of too many.

    Attributes:
      path: of a JSON lines file, one image a line; it is there if there is any.
      limit: the fraction of the `count` images that may be unusable.
    """

    def __init__(self, path: Path, limit: float, count: int) -> None:
        self.path, self.limit, self.count = path, limit, count
        self.known: dict[int, SkippedSample] = {}
        path.unlink(missing_ok=True)

    def add(self, problems: list[SkippedSample]) -> None:
        """Takes note of a step's problems.

        Raises:
          ConfigError: if too many images are unusable.
        """
        for problem in problems:
            if problem.index not in self.known:
                self.known[problem.index] = problem
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(dataclasses.asdict(problem)) + "\n")
        if len(self.known) > self.limit * self.count:
            last = list(self.known.values())[-1]
            raise ConfigError(
                f"{len(self.known)} of {self.count} images are unusable, more than data.max_bad="
                f"{self.limit} allows; the last was {last.name}: {last.reason}: {last.detail}. "
                f"{self.path} has them all; `sam-jax dataset check` finds them beforehand"
            )
