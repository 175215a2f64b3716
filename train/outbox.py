"""The folder of a run, on a disk or in an object store.

Object stores (gs://...) can neither append to a file, nor lock or rename one. A run whose workdir
is in one writes into a folder of its machine as any other does, and sends whole files before each
checkpoint and at its end: what comes after the last checkpoint would be dropped by a run that goes
on from there anyway. Checkpoints are written to the store itself.
"""

import shutil
import tempfile
from pathlib import Path

from etils import epath

from train.config import ConfigError

NEEDED = ("config.json", "metrics.jsonl", "evaluations.jsonl")  # by a run that goes on
CACHES = ("embeddings*.npy",)  # which stay on their machine


class Outbox:
    """A run's files, and where they are sent to, if they are.

    Attributes:
      address: of the workdir, as given.
      folder: on this machine: the workdir itself, or one that `close` removes.
      checkpoints: the folder of the checkpoints.
    """

    def __init__(self, workdir: str | Path) -> None:
        self.address = epath.Path(workdir)
        self.is_remote = "://" in str(workdir)
        if self.is_remote:
            self.folder = Path(tempfile.mkdtemp(prefix="sam_jax_"))
            self.checkpoints = self.address / "checkpoints"
        else:
            self.folder = Path(workdir)
            self.checkpoints = epath.Path(self.folder.absolute() / "checkpoints")
        self._sent: dict[Path, tuple[int, int]] = {}

    def fetch(self) -> None:
        """Gets what a run goes on from.

        Raises:
          ConfigError: if the store cannot be read, or what is there is no run.
        """
        if not self.is_remote:
            return
        try:
            if not self.address.exists():
                return
            names = [path.name for path in self.address.iterdir()]
            if names and "config.json" not in names:
                raise ConfigError(
                    f"{self.address} is neither empty nor a run's: choose another --workdir"
                )
            for name in set(NEEDED) & set(names):
                path = self.folder / name
                path.write_bytes((self.address / name).read_bytes())
                self._sent[path] = state_of(path)
        except ImportError as error:
            raise ConfigError(
                f"--workdir {self.address} needs the extra: pip install 'sam_jax[gcs]'"
            ) from error

    def send(self) -> None:
        """Copies files that are new or have changed to the store, each as a whole."""
        if not self.is_remote:
            return
        for path in sorted(self.folder.rglob("*")):
            is_cache = any(path.match(name) for name in CACHES)
            if not path.is_file() or path.name.startswith(".") or is_cache:
                continue
            state = state_of(path)
            if self._sent.get(path) != state:
                target = self.address / path.relative_to(self.folder).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                with path.open("rb") as file, target.open("wb") as copy:
                    shutil.copyfileobj(file, copy)
                self._sent[path] = state

    def close(self) -> None:
        """Sends what is left, and removes what has been sent."""
        self.send()
        if self.is_remote:
            shutil.rmtree(self.folder)


def state_of(path: Path) -> tuple[int, int]:
    """What changes with a file."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size
