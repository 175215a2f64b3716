"""Bad steps: their loss or gradient is not finite. They change nothing, and too many stop a run."""

import logging

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from train.state import TrainState

MAX_NAMED = 5  # steps in a message
MAX_MESSAGES = 20

log = logging.getLogger("train")


class DivergedError(RuntimeError):
    """A run that cannot go on because its values are not finite."""


class BadSteps:
    """Counts the steps that changed nothing because their loss or gradient was not finite.

    The flags stay on the devices until `read`, so that the loop does not wait for every step. All
    hosts read them after the same steps and decide the same.

    Attributes:
      limit: The number of bad steps in a row that stops the run.
      in_a_row: The number of bad steps since the last good one.
      unlogged: The number of bad steps that were read since `take_count` was called.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_a_row = self.unlogged = self._messages = 0
        self._unread: list[tuple[int, Bool[Array, ""]]] = []

    def add(self, step: int, is_finite: Bool[Array, ""]) -> None:
        """Adds a step.

        Args:
          step: The number of steps done.
          is_finite: Whether its loss and its gradient are finite.
        """
        self._unread.append((step, is_finite))

    def read(self) -> None:
        """Waits for the steps that were added, and reports the bad ones.

        Raises:
          DivergedError: If `limit` steps in a row were bad.
        """
        steps = [step for step, _ in self._unread]
        flags = jax.device_get([is_finite for _, is_finite in self._unread])
        self._unread = []
        bad = [step for step, is_finite in zip(steps, flags, strict=True) if not is_finite]
        self.unlogged += len(bad)
        if bad:
            self._report(bad)
        for step, is_finite in zip(steps, flags, strict=True):
            self.in_a_row = 0 if is_finite else self.in_a_row + 1
            if self.in_a_row >= self.limit:
                raise DivergedError(
                    f"the run diverged: the loss or the gradient of {self.in_a_row} steps in a "
                    f"row, up to step {step}, was not finite. These steps changed nothing, and "
                    "the checkpoints are from before. Resuming would give the same: start "
                    "another --workdir with a smaller optimizer.peak_lr or a longer "
                    "optimizer.warmup_steps, or allow more such steps with max_bad_steps"
                )

    def take_count(self) -> int:
        """Returns the number of bad steps since the last call."""
        count, self.unlogged = self.unlogged, 0
        return count

    def _report(self, bad: list[int]) -> None:
        self._messages += 1
        if self._messages > MAX_MESSAGES:
            return
        named = ", ".join(map(str, bad[:MAX_NAMED]))
        more = f" and {len(bad) - MAX_NAMED} more" if len(bad) > MAX_NAMED else ""
        last = "; metrics.jsonl counts further ones" if self._messages == MAX_MESSAGES else ""
        log.warning(
            "step %s%s changed nothing: the loss or the gradient is not finite%s", named, more, last
        )


def check_finite(state: TrainState, step: int) -> None:
    """Checks the parameters and the optimizer's state, before a checkpoint of them is saved.

    A finite gradient can still overflow a parameter, if the learning rate is far too large.

    Args:
      state: The state.
      step: The number of steps done.

    Raises:
      DivergedError: If a value is not finite.
    """
    if not jax.device_get(_all_finite((state.params, state.opt_state))):
        raise DivergedError(
            f"the run diverged: parameters are not finite after step {step}, of which no "
            "checkpoint was saved. Start another --workdir with a smaller optimizer.peak_lr or a "
            "longer optimizer.warmup_steps"
        )


@jax.jit
def _all_finite(tree: object) -> Bool[Array, ""]:
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()
