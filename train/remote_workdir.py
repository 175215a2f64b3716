"""The folder of a run, on a disk or in an object store.

Object stores (gs://...) can neither append to a file, nor lock or rename one. A run whose workdir
is in one writes into a folder of its machine as any other does, and sends whole files before each
checkpoint and at its end: what comes after the last checkpoint is dropped by a run that goes on
from there anyway. Checkpoints are written to the store itself.
"""

import fnmatch
import logging
import shutil
import tempfile
from pathlib import Path

from etils import epath

from sam_jax.data.example import SourceError
from sam_jax.io import storage
from train.config import ConfigError

# What a run that goes on needs, or replaces.
FETCHED = ("config.json", "metrics.jsonl", "evaluations.jsonl", "bad_samples*.jsonl")
CACHES = "embeddings*.npy"  # which stay on their machine

log = logging.getLogger("train")


class RemoteWorkdir:
    """A run's files, and where they are sent to, if they are. A context, which ends with the run.

    Attributes:
      address: of the workdir, as given.
      folder: on this machine: the workdir itself, or one that is removed when all has been sent.
      checkpoints: the folder of the checkpoints.
    """

    def __init__(self, workdir: str | Path) -> None:
        """Chooses the folder.

        Raises:
          ConfigError: if the workdir is in a store of an unknown kind.
        """
        self.address = str(workdir).rstrip("/")
        self.is_remote = storage.is_url(self.address)
        if self.is_remote and not self.address.startswith("gs://"):
            raise ConfigError(f"--workdir must be a folder or gs://BUCKET/PATH; got {workdir}")
        if self.is_remote:
            self.folder = Path(tempfile.mkdtemp(prefix="sam_jax_"))
            self.checkpoints = epath.Path(self.address) / "checkpoints"
        else:
            self.folder = Path(workdir)
            self.checkpoints = epath.Path(self.folder.absolute() / "checkpoints")
        self._sent: dict[str, tuple[int, int]] = {}

    def pull(self) -> None:
        """Gets what a run goes on from.

        Raises:
          ConfigError: if the store cannot be read, or what is there is no run.
        """
        if not self.is_remote:
            return
        try:
            names = storage.listdir(self.address) if storage.is_folder(self.address) else []
            if names and "config.json" not in names:
                raise ConfigError(
                    f"{self.address} is neither empty nor a run's: choose another --workdir"
                )
            for name in names:
                if any(fnmatch.fnmatch(name, pattern) for pattern in FETCHED):
                    path = self.folder / name
                    path.write_bytes(storage.read_range(f"{self.address}/{name}"))
                    self._sent[name] = state_of(path)
        except (OSError, SourceError) as error:
            raise ConfigError(f"--workdir {self.address} cannot be read: {error}") from error

    def push(self) -> None:
        """Copies files that are new or have changed to the store, and removes those that are gone.

        Raises:
          OSError: if the store cannot be written to.
        """
        if not self.is_remote:
            return
        there = set()
        for path in sorted(self.folder.rglob("*")):
            if not path.is_file() or path.name.startswith(".") or path.match(CACHES):
                continue
            name = path.relative_to(self.folder).as_posix()
            there.add(name)
            state = state_of(path)
            if self._sent.get(name) != state:
                storage.upload(str(path), f"{self.address}/{name}")
                self._sent[name] = state
        for name in set(self._sent) - there:
            storage.remove(f"{self.address}/{name}")
            del self._sent[name]

    def __enter__(self) -> "RemoteWorkdir":
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Sends what is left, and removes what has been sent; if that fails, all stays here."""
        if not self.is_remote:
            return
        try:
            self.push()
        except OSError as failure:
            log.warning("%s could not be sent to %s: %s", self.folder, self.address, failure)
            if error is None:
                raise
        else:
            shutil.rmtree(self.folder)


def state_of(path: Path) -> tuple[int, int]:
    """What changes with a file."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size
