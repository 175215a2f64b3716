"""The folder of a run, on a disk or in an object store.

Object stores (gs://...) can neither append to a file, nor lock or rename one. A run whose workdir
is in one writes to a temporary folder on its machine as any other run does, and uploads entire
files before each checkpoint and at its end. Rows of a file that are newer than the last checkpoint
are lost with the machine, but a resumed run would drop them anyway. Checkpoints are written
directly to the store.
"""

import fnmatch
import logging
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

from etils import epath

from sam_jax.io import storage
from train.config import ConfigError

# Files that a resumed run reads or replaces.
PULLED = ("config.json", "metrics.jsonl", "evaluations.jsonl", "bad_samples*.jsonl")

log = logging.getLogger("train")


class RemoteWorkdir:
    """The files of a run, and their copies in an object store if the workdir is there.

    It is a context manager that is left when the run ends.

    Attributes:
      address: The workdir as it was given.
      is_remote: Whether it is in an object store.
      folder: The folder on this machine: the workdir itself, or a temporary folder that is removed
        once everything is uploaded.
      checkpoints: The folder of the checkpoints.
    """

    def __init__(self, workdir: str | Path) -> None:
        """Chooses the folder.

        Raises:
          ConfigError: If the workdir is in a store of an unknown kind.
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
        self._pushed: dict[str, tuple[int, int]] = {}

    def pull(self) -> None:
        """Downloads the files that a resumed run needs.

        Raises:
          ConfigError: If the store cannot be read, or the workdir holds something else than a run.
        """
        if not self.is_remote:
            return
        try:
            names = storage.listdir(self.address) if storage.is_folder(self.address) else []
            if names and "config.json" not in names:
                raise ConfigError(
                    f"{self.address} is not empty and holds no run: choose another --workdir"
                )
            for name in names:
                if any(fnmatch.fnmatch(name, pattern) for pattern in PULLED):
                    path = self.folder / name
                    path.write_bytes(storage.read_range(f"{self.address}/{name}"))
                    self._pushed[name] = file_state(path)
        except OSError as error:
            raise ConfigError(f"--workdir {self.address} cannot be read: {error}") from error

    def push(self) -> None:
        """Uploads files that are new or have changed, and removes those that no longer exist.

        Raises:
          OSError: If the store cannot be written to.
        """
        if not self.is_remote:
            return
        found = set()
        for path in sorted(self.folder.rglob("*")):
            if not path.is_file() or path.name.startswith("."):
                continue
            name = path.relative_to(self.folder).as_posix()
            found.add(name)
            state = file_state(path)
            if self._pushed.get(name) != state:
                storage.upload(str(path), f"{self.address}/{name}")
                self._pushed[name] = state
        for name in set(self._pushed) - found:
            storage.remove(f"{self.address}/{name}")
            del self._pushed[name]

    def __enter__(self) -> "RemoteWorkdir":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Uploads the remaining files and removes the temporary folder.

        If the upload fails, the folder is kept, and the failure is logged.
        """
        if not self.is_remote:
            return
        try:
            self.push()
        except OSError as failure:
            log.warning("%s could not be uploaded to %s: %s", self.folder, self.address, failure)
            if error is None:
                raise
        else:
            shutil.rmtree(self.folder)


def file_state(path: Path) -> tuple[int, int]:
    """Returns the modification time and the size, one of which changes with the content."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size
