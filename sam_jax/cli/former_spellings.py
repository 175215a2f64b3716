"""Former spellings of commands, which still work in this version with a warning."""

import sys
from collections.abc import Sequence


def translate(argv: Sequence[str]) -> list[str]:
    """Rewrites a command line in a former spelling.

    - `data` is now `dataset`, and its option `--against` is `--compare-to`;
    - `evaluate --weights W ...` is now `evaluate clicks --weights W ...`;
    - `evaluate --proposals P ...` is now `evaluate proposals P ...`.

    Args:
      argv: A command line without the name of the program.

    Returns:
      The command line in the present spelling. What was rewritten is named on stderr.
    """
    verb, *rest = argv or [""]
    if verb == "data":
        _warn("sam-jax data", "sam-jax dataset")
        verb = "dataset"
    if verb == "dataset" and _has_option(rest, "--against"):
        _warn("--against", "--compare-to")
        rest = [_renamed(word, "--against", "--compare-to") for word in rest]
    if verb == "evaluate" and rest and rest[0].startswith("-"):
        if _has_option(rest, "--proposals") and not _has_option(rest, "--weights"):
            _warn("sam-jax evaluate --proposals P", "sam-jax evaluate proposals P")
            rest = ["proposals", *_option_as_argument(rest, "--proposals")]
        elif _has_option(rest, "--weights") and not _has_option(rest, "--proposals"):
            _warn("sam-jax evaluate --weights W", "sam-jax evaluate clicks --weights W")
            rest = ["clicks", *rest]
    return [verb, *rest] if argv else []


def _warn(former: str, present: str) -> None:
    print(
        f"warning: `{former}` is deprecated and will be removed: use `{present}`", file=sys.stderr
    )


def _has_option(words: Sequence[str], option: str) -> bool:
    return any(word == option or word.startswith(f"{option}=") for word in words)


def _renamed(word: str, former: str, present: str) -> str:
    return present + word[len(former) :] if _has_option([word], former) else word


def _option_as_argument(words: Sequence[str], option: str) -> list[str]:
    """Removes the name of an option and keeps its value."""
    return [word.removeprefix(f"{option}=") for word in words if word != option]
