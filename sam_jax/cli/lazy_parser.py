"""Parsers of verbs that import the code of a verb only when it is used."""

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Any


class LazyParser(argparse.ArgumentParser):
    """A parser that declares its arguments when it parses for the first time.

    With it `sam-jax --help` lists all verbs without importing their code, and so without jax.
    """

    def __init__(
        self, *, declare: Callable[[argparse.ArgumentParser], None] | None = None, **kwargs: Any
    ) -> None:
        """Creates a parser.

        Args:
          declare: A function that declares the arguments.
          **kwargs: The arguments of `argparse.ArgumentParser`.
        """
        super().__init__(**kwargs)
        self._declare = declare

    def parse_known_args(  # type: ignore[override]  # argparse's has overloads
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Declares the arguments, then parses them; values may begin with a minus sign."""
        if self._declare is not None:
            declare, self._declare = self._declare, None
            declare(self)
        words = None if args is None else join_negative_values(args)
        return super().parse_known_args(words, namespace)


def join_negative_values(words: Sequence[str]) -> list[str]:
    """Writes options whose values begin with a minus sign and a digit as "--option=value".

    `argparse` takes a value such as "-5,10" or "-3:" for an option.

    Args:
      words: A command line without the name of the program.
    """
    joined: list[str] = []
    for word in words:
        is_value = re.match(r"-\.?[0-9]", word) and joined and joined[-1].startswith("--")
        if is_value and "=" not in joined[-1]:
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined
