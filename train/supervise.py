"""Restarts a training run that fails: `python -m train.supervise CONFIG --workdir DIR`.

The arguments are those of `python -m train`. Options of the supervisor come first, and `--` may
separate them: `python -m train.supervise --max-failures 5 -- CONFIG --workdir DIR`.

A run that crashes, or ends because another process of it failed, is started again, and resumes from
its newest checkpoint. After repeated failures without a new checkpoint, the supervisor gives up.
Errors that a restart cannot mend, such as a wrong config or a loss that diverged, are final.

exit code          meaning                                                    restart
0                  done                                                       no
1, 2               a user's error or a diverged run; wrong usage              no
130, 143           stopped by SIGINT or SIGTERM, after saving a checkpoint    no
all others         killed, crashed (70), or a process failed or hung (75)     yes
"""

import argparse
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence

from sam_jax.io import storage

FINAL_CODES = (0, 1, 2, 130, 143)
FIRST_WAIT = 5.0  # seconds before the first restart; doubled for each further failure
LONGEST_WAIT = 300.0  # seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the supervisor and returns the exit code of the last run."""
    parser = argparse.ArgumentParser(
        prog="python -m train.supervise",
        description="Restarts a training run that fails.",
        epilog="All other arguments are those of `python -m train`.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--max-failures",
        type=int,
        default=3,
        metavar="N",
        help="give up after N failures without a new checkpoint between them; default: 3",
    )
    parser.add_argument("--workdir", required=True, help="the folder of the run")
    arguments = sys.argv[1:] if argv is None else argv
    args, train_args = parser.parse_known_args([a for a in arguments if a != "--"])
    if args.max_failures < 1:
        parser.error(f"--max-failures must be at least 1; got {args.max_failures}")
    child = Child([sys.executable, "-m", "train", *train_args, "--workdir", args.workdir])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: child.send(number))
    return supervise(
        child.run, lambda: newest_checkpoint(args.workdir), args.max_failures, child.wait
    )


def supervise(
    run: Callable[[], int],
    progress: Callable[[], int],
    max_failures: int,
    wait: Callable[[float], int | None],
) -> int:
    """Runs until a final exit code, or until too many failures.

    Args:
      run: Runs the training and returns its exit code, which is negative after a signal.
      progress: Returns the step of the newest checkpoint.
      max_failures: The number of failures at one step after which to give up.
      wait: Waits for some seconds; returns an exit code if a signal ends the wait.

    Returns:
      The exit code.
    """
    failures, last = 0, None
    while True:
        code = run()
        if code in FINAL_CODES:
            return code
        step = progress()
        failures = failures + 1 if step == last else 1
        last = step
        code = 128 - code if code < 0 else code
        happened = f"the run ended with exit code {code}; its newest checkpoint is of step {step}"
        if failures >= max_failures:
            say(f"{happened}, as in the last {failures} attempts: giving up")
            return code
        seconds = min(FIRST_WAIT * 2 ** (failures - 1), LONGEST_WAIT)
        say(f"{happened}: it will be started again in {seconds:.0f} s")
        if (stopped := wait(seconds)) is not None:
            return stopped


class Child:
    """A training process, and the signals for it."""

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._stop: int | None = None  # the number of a signal that stops the supervisor
        self._stopped = threading.Event()

    def run(self) -> int:
        """Runs the command and returns its exit code."""
        if self._stop:
            return 128 + self._stop
        # In a group of its own. Otherwise, Ctrl-C would reach it twice, which ends it at once.
        with subprocess.Popen(self._command, process_group=0) as self._process:  # noqa: S603 - our own
            if self._stop:  # the signal came while the process was started
                self._process.send_signal(self._stop)
            try:
                return self._process.wait()
            finally:
                self._process.kill()

    def send(self, number: int) -> None:
        """Passes a signal on to the process, and prevents a restart."""
        self._stop = number
        self._stopped.set()
        if self._process is not None:
            self._process.send_signal(number)  # does nothing if it has ended

    def wait(self, seconds: float) -> int | None:
        """Waits; returns the exit code for a signal if one came."""
        self._stopped.wait(seconds)
        return 128 + self._stop if self._stop else None


def newest_checkpoint(workdir: str) -> int:
    """Returns the step of the newest checkpoint in a workdir; 0 if there is none."""
    try:
        names = storage.listdir(f"{workdir.rstrip('/')}/checkpoints")
    except OSError:
        return 0
    return max((int(name) for name in names if name.isdecimal()), default=0)


def say(message: str) -> None:
    """Prints a message."""
    print(f"train.supervise: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
