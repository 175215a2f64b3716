"""`sam-jax evaluate NAME`: the evaluations of `sam_jax.evaluate.protocol`."""

import argparse
import functools
import os

from sam_jax.cli.help_texts import SLICE_HELP
from sam_jax.cli.lazy_parser import LazyParser
from sam_jax.data.open import source_usage
from sam_jax.evaluate.protocol import EVALUATIONS, load_evaluation
from sam_jax.io.atomic import write_json
from sam_jax.io.output import check_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the evaluations, and the arguments that all of them share."""
    parser.description = (
        "Evaluates a model, or masks that were predicted before, on images with masks. "
        "`sam-jax evaluate NAME --help` describes an evaluation."
    )
    parser.epilog = (
        "example: sam-jax evaluate clicks --weights sam_vit_b --source coco:photos/. The former "
        "spelling without NAME still works in this version."
    )
    evaluations = parser.add_subparsers(
        dest="evaluation", required=True, metavar="NAME", parser_class=LazyParser
    )
    for name, entry in EVALUATIONS.items():
        evaluations.add_parser(name, help=entry.help, declare=functools.partial(_declare, name))


def run(args: argparse.Namespace) -> None:
    """Runs the verb."""
    evaluation = load_evaluation(args.evaluation)
    if args.json:
        check_file(args.json, "--json")
    scores = evaluation.run(args)
    print(evaluation.format_table(scores))
    if args.json:
        write_json(args.json, {"source": args.source, "index": args.index} | scores)


def _declare(name: str, parser: argparse.ArgumentParser) -> None:
    load_evaluation(name).add_arguments(parser)
    parser.add_argument("--source", required=True, metavar="SOURCE", help=source_usage())
    parser.add_argument("--index", default=":", metavar="SLICE", help=SLICE_HELP)
    parser.add_argument(
        "--json",
        type=os.path.expanduser,
        metavar="FILE",
        help="also write the scores to a file",
    )
