"""Parsers of verbs that import the code of a verb only when it is used."""

import argparse
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
        """Declares the arguments, then parses."""
        if self._declare is not None:
            declare, self._declare = self._declare, None
            declare(self)
        return super().parse_known_args(args, namespace)
