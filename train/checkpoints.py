"""Checkpoints of the state, from which a killed run goes on as if it had not been killed.

Saving happens in the background and is atomic: a checkpoint that was being written when the run
died does not count. A damaged one is skipped in favour of the one before.
"""

import logging

import jax
import orbax.checkpoint as ocp
from etils import epath

KEPT = 2  # checkpoints

log = logging.getLogger("train")


class Checkpoints:
    """The checkpoints in a folder, an absolute path or an address in an object store."""

    def __init__(self, folder: epath.Path) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, create=True)
        self.manager = ocp.CheckpointManager(folder, options=options)

    def restore(self, state):
        """The newest state that can be read, shaped like the given one; None if there is none."""
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                args = ocp.args.Composite(state=ocp.args.StandardRestore(like))
                return self.manager.restore(step, args=args)["state"]
            except Exception as error:  # orbax raises bare ones
                log.warning("checkpoint %d cannot be read: %s", step, str(error).splitlines()[0])
                self.manager.delete(step)
        return None

    def save(self, step: int, state) -> None:
        """Starts to save a state; what it holds may be overwritten afterwards."""
        self.manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state)))

    def close(self) -> None:
        """Waits until all is saved."""
        self.manager.wait_until_finished()
        self.manager.close()
