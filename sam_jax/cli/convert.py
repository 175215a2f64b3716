"""`sam-jax convert`: weights from one format to another."""

import argparse
import os

from sam_jax.cli.help_texts import WEIGHTS_HELP
from sam_jax.weights import formats
from sam_jax.weights.compact import STORAGES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of the verb."""
    parser.description = "Converts weights between formats."
    parser.epilog = "example: sam-jax convert sam_vit_b_01ec64.pth sam_b/"
    parser.add_argument(
        "source",
        type=os.path.expanduser,
        metavar="SRC",
        help=f"{WEIGHTS_HELP}; or an encoder alone (MAE, DINOv2, timm), for an untrained model",
    )
    parser.add_argument(
        "target",
        type=os.path.expanduser,
        metavar="DST",
        help="a .pth or .safetensors file with official names, otherwise a weights directory",
    )
    parser.add_argument(
        "--format",
        choices=formats.FORMATS,
        help="the format of DST; default: chosen by its name",
    )
    parser.add_argument(
        "--storage",
        choices=STORAGES,
        default="float32",
        help="the dtype of large arrays in a weights directory; int8 has one scale per channel",
    )


def run(args: argparse.Namespace) -> None:
    """Runs the verb."""
    for note in formats.convert_file(args.source, args.target, args.format, args.storage):
        print(f"note: {note}")
    print(f"{args.source} -> {args.target}")
