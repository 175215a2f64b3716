"""Checkpoints of the state, from which a killed run resumes exactly.

Saving happens in the background and is atomic: a checkpoint that was being written when the run
was killed does not count. Each checkpoint holds a checksum of each array, which is verified after
the array was restored. A damaged checkpoint is renamed and kept, and the one before it is used. A
checkpoint that cannot be read for any other reason stops the run, and nothing is changed.
"""

import logging
import os
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh

from sam_jax.io import storage
from sam_jax.io.settings_guard import differences
from train.checkpoint_reading import (
    CheckpointError,
    DamagedError,
    drop_unfinished_tasks,
    hide_remaining_errors,
    one_line,
    read_state,
    read_verified_record,
)
from train.checksum import checksums
from train.config import ConfigError, TrainConfig
from train.run_record import (
    FOLDER,
    FORMAT,
    config_changes,
    describe_arrays,
    make_record,
    versions,
)
from train.sharding import max_over_hosts
from train.state import TrainState

MAX_TO_KEEP = 2  # checkpoints
MAX_FAILED_SAVES = 3  # in a row

log = logging.getLogger("train")
# Orbax logs the pages of a traceback, and then raises the error, which is reported here.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
Result = TypeVar("Result")


class Checkpoints:
    """The checkpoints of a run.

    Attributes:
      folder: Their folder.
      manager: Orbax's manager of the folder.
      mesh: The devices of the states.
      config: The run.
      data: The description of its images.
      failed: The number of checkpoints in a row that could not be saved.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        mesh: Mesh,
        config: TrainConfig,
        data: dict[str, Any],
    ) -> None:
        """Opens a folder.

        Args:
          folder: An absolute path, or a URL of an object store.
          mesh: The devices of the states.
          config: The run.
          data: The description of its images, see `describe_data`.
        """
        self.folder = epath.Path(folder)
        self.manager = open_manager(self.folder)
        self.mesh, self.config, self.data = mesh, config, data
        self.failed = 0
        self._saving: int | None = None  # the step that is saved in the background

    def restore(self, make_state: Callable[[int], TrainState]) -> TrainState | None:
        """Restores the newest intact checkpoint. Newer ones, which are damaged, are renamed.

        Args:
          make_state: A function of the number of steps done that returns a state with the shapes
            and shardings to restore to.

        Returns:
          The restored state, or None if there is no checkpoint, not even a damaged one.

        Raises:
          CheckpointError: If all checkpoints are damaged, or the newest one that is not known to
            be damaged cannot be read.
          ConfigError: If that one is of a run with another configuration or other images.
        """
        hide_remaining_errors()
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                return self._restore_step(step, make_state)
            except DamagedError as damage:
                self._set_aside(step, str(damage))
        if damaged := sorted(path.name for path in self.folder.glob("*.damaged*")):
            raise CheckpointError(
                f"no checkpoint in {self.folder} is intact; damaged are {', '.join(damaged)}. To "
                "start at step 0, choose another --workdir"
            )
        return None

    def save(self, step: int, state: TrainState) -> None:
        """Starts to save a state, whose arrays may be overwritten when this returns.

        If a checkpoint cannot be saved, this is logged, and the run goes on. The checkpoints before
        it are kept.

        Args:
          step: The number of steps done.
          state: The state.

        Raises:
          CheckpointError: If MAX_FAILED_SAVES checkpoints in a row could not be saved.
        """
        self._finish_saving()
        saved = _to_saved(state)
        record = make_record(step, self.config, self.data, self._describe(saved))
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(saved), **{FOLDER: ocp.args.JsonSave(record)}
        )

        def start() -> None:
            if self.failed:
                self.manager = open_manager(self.folder)
            self.manager.save(step, args=args)

        if self.failed < MAX_FAILED_SAVES and self._try_to_save(step, start):
            self._saving = step
        if self.failed >= MAX_FAILED_SAVES:
            raise CheckpointError(
                f"the last {self.failed} checkpoints could not be saved to {self.folder}; see the "
                "reasons above. With these removed, the same command resumes the run"
            )

    def close(self) -> None:
        """Waits until everything is saved. A checkpoint that cannot be saved is logged.

        Hosts do not wait for each other here, since another host may have failed.
        """
        if self._saving is not None:
            if reason := failure_of(self.manager.wait_until_finished):
                self._give_up(self._saving, reason)
            else:
                self.manager.close()
            self._saving = None
        elif not self.failed:
            self.manager.close()

    def _restore_step(self, step: int, make_state: Callable[[int], TrainState]) -> TrainState:
        """Restores a checkpoint.

        Raises:
          DamagedError: If its bytes are damaged.
          CheckpointError: If it cannot be read for another reason.
          ConfigError: If it is of a run with another configuration or other images.
        """
        folder = self.folder / str(step)
        record = on_all_hosts(lambda: read_verified_record(folder))
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, _to_saved(make_state(step)))
        if record is not None:
            self._check(folder, step, record, describe_arrays(target))
        saved = on_all_hosts(lambda: read_state(folder, target, record))
        if record is None:
            log.warning(
                "checkpoint %d holds no checksums, because an older version wrote it: damage to it "
                "would go unnoticed",
                step,
            )
        else:
            found = self._describe(saved)
            if wrong := [path for path in found if found[path] != record["arrays"][path]]:
                others = f" and {len(wrong) - 1} more" if wrong[1:] else ""
                raise DamagedError(f"wrong checksum of {wrong[0]}{others}")
            if changed := differences(record["versions"], versions()):
                log.warning("since checkpoint %d was written: %s", step, "; ".join(changed))
        return _from_saved(saved)

    def _check(
        self, folder: epath.Path, step: int, record: dict[str, Any], arrays: dict[str, Any]
    ) -> None:
        """Raises an error if a checkpoint is not of this run, or not of this version's format."""
        if record["format"] > FORMAT:
            raise CheckpointError(
                f"{folder} was written by sam_jax {record['versions']['sam_jax']}, a newer version "
                "with another format: use that version"
            )
        if record["step"] != step:
            raise CheckpointError(f"{folder} holds step {record['step']}: rename it to this number")
        data = {"data": self.data}
        changed = config_changes(record["config"], self.config)
        changed += differences({"data": record["data"]}, data)
        if changed:
            raise ConfigError(
                f"{folder} is of a run with another config or other images: {'; '.join(changed)}. "
                "Choose another --workdir, or use the same config and images"
            )
        saved = {path: f"{x['dtype']}{x['shape']}" for path, x in record["arrays"].items()}
        present = {path: f"{x['dtype']}{x['shape']}" for path, x in arrays.items()}
        if changed := differences(saved, present):
            raise CheckpointError(
                f"{folder} holds other arrays than this version of the code uses: {changed[0]} "
                f"({len(changed)} differences). Use the version that wrote it: "
                f"{record['versions']['sam_jax']}, revision {record['versions']['revision']}"
            )

    def _describe(self, saved: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Returns the dtype, shape and checksum of each array by its path."""
        pairs = zip(describe_arrays(saved).items(), checksums(self.mesh, saved), strict=True)
        return {path: array | {"checksum": checksum} for (path, array), checksum in pairs}

    def _set_aside(self, step: int, reason: str) -> None:
        """Renames a damaged checkpoint. The lead host does this for all hosts."""
        folder = self.folder / str(step)

        def rename() -> None:
            if jax.process_index():
                return
            try:
                names = {path.name for path in self.folder.iterdir()}
                name = f"{step}.damaged"
                for i in range(2, len(names) + 2):
                    name = name if name not in names else f"{step}.damaged_{i}"
                (folder / "reason.txt").write_text(f"{reason}\n")
                storage.rename_folder(str(folder), str(self.folder / name))
            except OSError as error:
                raise CheckpointError(
                    f"{folder} is damaged ({reason}) and cannot be renamed: {error}"
                ) from error
            log.warning("checkpoint %d is damaged: %s; it is kept as %s", step, reason, name)

        on_all_hosts(rename)
        self.manager.reload()

    def _finish_saving(self) -> None:
        """Waits until the checkpoint that is saved in the background is complete."""
        if self._saving is not None:
            if self._try_to_save(self._saving, self.manager.wait_until_finished):
                self.failed = 0
            self._saving = None

    def _try_to_save(self, step: int, action: Callable[[], Any]) -> bool:
        """Returns True if a part of saving succeeded on all hosts; otherwise logs the reason."""
        reason = failure_of(action)
        if not max_over_hosts(int(reason is not None)):
            return True
        self._give_up(step, reason or "another host failed")
        return False

    def _give_up(self, step: int, reason: str) -> None:
        """Logs that a checkpoint could not be saved, and closes the manager.

        The manager keeps the error and unfinished tasks. The next save opens the folder again.
        """
        self.failed += 1
        log.warning(
            "checkpoint %d could not be saved: %s; the ones before it are kept", step, reason
        )
        failure_of(self.manager.close)  # the same error again
        drop_unfinished_tasks()


def open_manager(folder: epath.Path) -> ocp.CheckpointManager:
    """Opens a folder of checkpoints, and removes what interrupted saves have left in it."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=MAX_TO_KEEP,
        create=True,
        cleanup_tmp_directories=True,
        # A folder that cannot be created in the background is waited for, for minutes.
        async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
    )
    return ocp.CheckpointManager(folder, options=options)


def on_all_hosts(action: Callable[[], Result]) -> Result:
    """Calls a function on all hosts. If it raises one of two errors on some of them, all raise it.

    Args:
      action: The function, which may raise DamagedError or CheckpointError. Another error would
        leave the other hosts waiting, until the watchdog ends them.

    Returns:
      Its result on this host.

    Raises:
      DamagedError: If it raised this on at least one host, and no CheckpointError.
      CheckpointError: If it raised this on at least one host.
    """
    failure: DamagedError | CheckpointError | None = None
    try:
        result = action()
    except (DamagedError, CheckpointError) as error:
        failure = error
    severity = 0 if failure is None else 1 + isinstance(failure, CheckpointError)
    worst = max_over_hosts(severity)
    if failure is not None and worst == severity:
        raise failure
    if worst:
        raise (DamagedError, CheckpointError)[worst - 1]("another host could not read it")
    return result


def failure_of(action: Callable[[], Any]) -> str | None:
    """Calls a function and returns the message of the error that it raises, or None."""
    try:
        action()
    except Exception as error:  # orbax raises bare ones
        return one_line(error)
    return None


# The names in a checkpoint are a file format: they do not change with those of `TrainState`.
def _to_saved(state: TrainState) -> dict[str, Any]:
    return {
        "step": state.step,
        "params": state.params,
        "constants": state.constants,
        "optimizer": state.opt_state,
    }


def _from_saved(saved: dict[str, Any]) -> TrainState:
    return TrainState(saved["step"], saved["params"], saved["constants"], saved["optimizer"])
