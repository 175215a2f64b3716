"""Checkpoints of the state, from which a killed run resumes exactly.

Saving happens in the background and is atomic: a checkpoint that was being written when the run
was killed does not count. A damaged checkpoint is skipped in favour of the one before.
"""

import logging
import os
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from train.state import TrainState

MAX_TO_KEEP = 2  # checkpoints

log = logging.getLogger("train")


class Checkpoints:
    """The checkpoints of a run.

    Attributes:
      manager: Orbax's manager of the folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Opens a folder: an absolute path, or a URL of an object store."""
        options = ocp.CheckpointManagerOptions(max_to_keep=MAX_TO_KEEP, create=True)
        self.manager = ocp.CheckpointManager(epath.Path(folder), options=options)

    def restore(self, make_state: Callable[[int], TrainState]) -> TrainState | None:
        """Restores the newest readable checkpoint.

        Args:
          make_state: A function of the number of steps done that returns a state with the shapes
            and shardings to restore to.

        Returns:
          The restored state, or None if there is none.
        """
        for step in sorted(self.manager.all_steps(), reverse=True):
            target = jax.tree.map(ocp.utils.to_shape_dtype_struct, _to_saved(make_state(step)))
            try:
                args = ocp.args.Composite(state=ocp.args.StandardRestore(target))
                return _from_saved(self.manager.restore(step, args=args)["state"])
            except Exception as error:  # orbax raises bare ones
                log.warning("checkpoint %d cannot be read: %s", step, str(error).splitlines()[0])
                self.manager.delete(step)
        return None

    def save(self, step: int, state: TrainState) -> None:
        """Starts to save a state, whose arrays may be overwritten when this returns."""
        args = ocp.args.Composite(state=ocp.args.StandardSave(_to_saved(state)))
        self.manager.save(step, args=args)

    def close(self) -> None:
        """Waits until everything is saved."""
        self.manager.wait_until_finished()
        self.manager.close()


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
