"""The interface of an evaluation, and the table of all evaluations.

To add one, write a file in this folder with the three functions of `Evaluation` and add a row to
`EVALUATIONS`: `sam-jax evaluate NAME` then runs it.
"""

import argparse
import importlib
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable


@runtime_checkable
class Evaluation(Protocol):
    """The functions that a module of this folder defines for the command line.

    `sam-jax evaluate` adds `--source`, `--index` and `--json` for every evaluation.
    """

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds the arguments of this evaluation only, and sets the description and the epilog."""
        ...

    def run(self, args: argparse.Namespace) -> dict[str, Any]:
        """Evaluates on the images `args.index` of `args.source`.

        Returns:
          The scores, as JSON values.

        Raises:
          OSError: If a file cannot be read.
          ValueError: If an argument is wrong or there is nothing to evaluate.
        """
        ...

    def format_table(self, scores: dict[str, Any]) -> str:
        """Formats the scores as text for a terminal."""
        ...


class EvaluationEntry(NamedTuple):
    """A row of the table.

    Attributes:
      help: The help text in lower case, without a full stop.
      module: The module that defines the functions of `Evaluation`.
    """

    help: str
    module: str


EVALUATIONS = {
    "clicks": EvaluationEntry(
        "mean IoU of a model after 1 to 9 clicks and after a box", "sam_jax.evaluate.clicks"
    ),
    "proposals": EvaluationEntry("average recall of saved masks", "sam_jax.evaluate.proposals"),
    "reconstruction": EvaluationEntry(
        "reconstruction loss of a masked autoencoder", "sam_jax.evaluate.reconstruction"
    ),
}


def load_evaluation(name: str) -> Evaluation:
    """Imports an evaluation.

    Args:
      name: A key of `EVALUATIONS`.

    Returns:
      The module of the evaluation.
    """
    return cast(Evaluation, importlib.import_module(EVALUATIONS[name].module))
