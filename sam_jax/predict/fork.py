"""Warns in a forked process, in which JAX cannot compute."""

import os
import warnings

_used_by: int | None = None  # the process that computed last; a fork inherits the number


def warn_if_forked() -> None:
    """Warns once in a process that was forked from one that computed.

    JAX has threads, which a fork does not copy, so that the next computation may hang.
    """
    global _used_by
    process = os.getpid()
    if _used_by not in (None, process):
        warnings.warn(
            f"process {process} was forked from a process that had used a model before, and may "
            "now hang, since a fork does not copy the threads of JAX: start it with "
            'multiprocessing.get_context("spawn"), or fork before a model is first used',
            RuntimeWarning,
            stacklevel=2,
        )
    _used_by = process
