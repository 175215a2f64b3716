"""`sam-jax VERB`: the command line. The code of a verb is imported only when the verb is used."""

import argparse
import functools
import importlib
import sys
from collections.abc import Sequence

import sam_jax
from sam_jax.cli.former_spellings import translate
from sam_jax.cli.lazy_parser import LazyParser
from sam_jax.io.console import escape_output
from sam_jax.io.tpu import silence_libtpu

# The help text of each verb, and the module that defines its add_arguments(parser) and run(args).
VERBS = {
    "predict": ("segment one object of an image", "sam_jax.cli.predict"),
    "everything": ("segment everything in images", "sam_jax.cli.everything"),
    "convert": ("convert weights between formats", "sam_jax.cli.convert"),
    "info": ("print versions, devices and a model", "sam_jax.cli.info"),
    "evaluate": ("evaluate a model or its masks", "sam_jax.cli.evaluate"),
    "dataset": ("check and measure images with masks", "sam_jax.cli.dataset"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb.

    Args:
      argv: The command line without the name of the program; by default that of the process.

    Returns:
      The exit code: 0 if the verb succeeded, 1 if it failed, 130 if it was interrupted.

    Raises:
      SystemExit: With exit code 2 after wrong usage, and 0 after --help.
    """
    escape_output()
    silence_libtpu()
    args = make_parser().parse_args(translate(sys.argv[1:] if argv is None else argv))
    try:
        return args.run(args) or 0
    except (OSError, ValueError) as error:
        print(f"sam-jax {args.verb}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"sam-jax {args.verb}: interrupted", file=sys.stderr)
        return 130


def make_parser() -> argparse.ArgumentParser:
    """Makes the parser of all verbs."""
    parser = argparse.ArgumentParser(
        prog="sam-jax",
        description="Segment Anything in JAX. `sam-jax VERB --help` describes a verb.",
    )
    parser.add_argument("--version", action="version", version=f"sam_jax {sam_jax.__version__}")
    verbs = parser.add_subparsers(
        dest="verb", required=True, metavar="VERB", parser_class=LazyParser
    )
    for name, (help_text, module) in VERBS.items():
        verbs.add_parser(name, help=help_text, declare=functools.partial(_declare, module))
    return parser


def _declare(module: str, parser: argparse.ArgumentParser) -> None:
    verb = importlib.import_module(module)
    verb.add_arguments(parser)
    parser.set_defaults(run=verb.run)
