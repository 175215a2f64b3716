"""`sam-jax dataset check` and `sam-jax dataset stats`: images with masks, checked and measured."""

import argparse
import contextlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Bool, UInt8
from tqdm import tqdm

from sam_jax.cli.help_texts import SLICE_HELP, WEIGHTS_HELP
from sam_jax.cli.lazy_parser import LazyParser
from sam_jax.data import validate
from sam_jax.data.example import RLE, BadSample
from sam_jax.data.open import Subset, open_source, select, source_usage, with_full_size
from sam_jax.data.validate import Finding
from sam_jax.evaluate import quality, statistics
from sam_jax.evaluate.clicks import decode_masks
from sam_jax.evaluate.pairs import MASKS_ONLY, read_masks
from sam_jax.evaluate.resolution import cut_to_tile, format_resolution, summarize_resolution
from sam_jax.io.atomic import write_json
from sam_jax.io.extras import install_hint
from sam_jax.io.output import check_file, check_folder
from sam_jax.model.sam import Sam
from sam_jax.predict.tiles_option import DEFAULT_TILES_HELP, parse_tiles, resolve_tiles
from sam_jax.weights.formats import load

AnyFinding = TypeVar("AnyFinding", bound=Finding)
Sample = tuple[UInt8[np.ndarray, "_ _ 3"], Sequence[RLE]]  # an image and its masks
SavePlots = Callable[[str, dict[str, Any], list[Sample]], list[str]]

SAMPLES = 8  # images that are drawn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the two actions of the verb."""
    parser.description = "Checks and measures images with masks."
    parser.epilog = "example: sam-jax dataset check sa1b:images/ --json report.json"
    actions = parser.add_subparsers(
        dest="action", required=True, metavar="ACTION", parser_class=LazyParser
    )
    actions.add_parser(
        "check", help="read all samples and list those that cannot be used", declare=_declare_check
    )
    actions.add_parser(
        "stats",
        help="measure the number, size, concavity and position of masks",
        declare=_declare_stats,
    )


def run(args: argparse.Namespace) -> int:
    """Runs the verb and returns the exit code."""
    return args.run_action(args)


def _declare_check(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Reads all images and masks of a source and lists those that cannot be used. The exit code "
        "is 1 if there is an image that cannot be used."
    )
    parser.epilog = "example: sam-jax dataset check sa1b:images/ --json report.json"
    parser.set_defaults(run_action=run_check)
    parser.add_argument("source", metavar="SOURCE", help=source_usage())
    parser.add_argument(
        "--json",
        type=os.path.expanduser,
        metavar="FILE",
        help="also write the result to a file",
    )


def _declare_stats(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measures the masks of a source: how many there are per image, their size relative to the "
        "image, their concavity and their position, as section 5 of the paper does."
    )
    parser.epilog = "example: sam-jax dataset stats sa1b:images/ --index ::100 --out statistics/"
    parser.set_defaults(run_action=run_stats)
    parser.add_argument("source", metavar="SOURCE", help=source_usage())
    parser.add_argument("--index", default=":", metavar="SLICE", help=SLICE_HELP)
    parser.add_argument(
        "--out",
        type=os.path.expanduser,
        metavar="DIR",
        help="write statistics.json and plots to this folder",
    )
    parser.add_argument(
        "--compare-to",
        metavar="SOURCE",
        help="another annotation of the same images in the same order; its masks are matched with "
        "those of the first, and the IoU of the pairs is reported",
    )
    parser.add_argument(
        "--model",
        type=os.path.expanduser,
        metavar="WEIGHTS",
        help="also measure how large objects are for this model, and which IoU its masks can reach "
        f"at their resolution: {WEIGHTS_HELP}",
    )
    parser.add_argument(
        "--tiles",
        type=parse_tiles,
        metavar="SIZE|auto|none",
        help="with --model: also measure objects in the tiles in which it sees them, see "
        f"`sam-jax evaluate clicks`; {DEFAULT_TILES_HELP}",
    )


def run_check(args: argparse.Namespace) -> int:
    """Runs `dataset check` and returns the exit code."""
    if args.json:
        check_file(args.json, "--json")
    source = open_source(args.source)
    findings = show_findings(validate.check(source), len(source))
    result = {"source": args.source, **validate.summarize(findings)}
    for reason, count in result["reasons"].items():
        print(f"{count:7d}  {reason}")
    for reason, count in result.get("skipped_masks", {}).items():
        print(f"{count:7d}  {reason}, masks of usable samples that are skipped")
    usable, samples, masks = result["usable"], result["samples"], result["masks"]
    print(f"{usable} of {samples} samples are usable, {masks} masks")
    if args.json:
        write_json(args.json, result, indent=1)
    return 0 if usable == samples else 1


def run_stats(args: argparse.Namespace) -> int:
    """Runs `dataset stats` and returns the exit code.

    Raises:
      ValueError: If there are tiles and no model, or plots are wanted and cannot be drawn.
    """
    if args.tiles is not None and not args.model:
        raise ValueError(f"--tiles {args.tiles} needs --model, the model that sees the tiles")
    if args.out:
        check_folder(args.out, "--out")
    model = load(args.model)[0] if args.model else None
    save_plots = import_plots() if args.out else None
    images = select(open_source(args.source, decode_size=MASKS_ONLY), args.index)
    comparisons = start_comparison(images, args.compare_to) if args.compare_to else None

    result = {"source": args.source, "index": args.index, **measure_masks(images)}
    if model is not None:
        resolution = measure_resolution(images, model, resolve_tiles(model, args.tiles))
        result["resolution"] = {"model": args.model, **resolution}
    if comparisons is not None:
        known = [bad["name"] for bad in result["bad"]]
        agreement = quality.summarize(show_findings(comparisons, len(images), known))
        print(quality.format_table(agreement))
        result["against"] = {"source": args.compare_to, **agreement}
    if save_plots is not None:
        plots = save_plots(args.out, result, read_samples(images))
        write_json(Path(args.out) / "statistics.json", result, indent=None)
        print(f"statistics.json, {', '.join(plots)} are in {args.out}")
    return 0


def measure_masks(images: Subset) -> dict[str, Any]:
    """Measures and prints the statistics of the masks of images."""
    measurements = statistics.measure(images.source, images.indices.tolist())
    result = statistics.summarize(show_findings(measurements, len(images)))
    print(statistics.format_table(result))
    return result


def measure_resolution(images: Subset, model: Sam, tiles: int | str | None) -> dict[str, Any]:
    """Measures and prints how well a model's resolution can show the masks of images.

    Args:
      images: The images. Those that cannot be read are left out.
      model: The model.
      tiles: A result of `resolve_tiles`; None for the entire image only.

    Returns:
      The result of `summarize_resolution` for entire images; with tiles also "tiles": {"size":
      `tiles`, and their result}.
    """
    canvas, low_res = model.image_size, model.low_res
    result = summarize_resolution(decode_readable(images), canvas, low_res)
    print(f"resolution, entire image: {format_resolution(result)}")
    if tiles is not None:
        parts = (cut_to_tile(mask, canvas, tiles) for mask in decode_readable(images))
        tiled = summarize_resolution(parts, canvas, low_res)
        print(f"resolution, tiles {tiles}: {format_resolution(tiled)}")
        result["tiles"] = {"size": tiles, **tiled}
    return result


def decode_readable(images: Subset) -> Iterator[Bool[np.ndarray, "h w"]]:
    """Yields the masks of images, without those of images that cannot be used."""
    for index in tqdm(images.indices.tolist(), unit=" samples", disable=None):
        try:
            masks = read_masks(images.source, index)
            yield from decode_masks(masks) if masks else ()
        except BadSample:
            continue


def read_samples(images: Subset) -> list[Sample]:
    """Reads up to SAMPLES usable images that are spread evenly over those given, in full size."""
    source = with_full_size(images)
    samples = []
    for i in np.linspace(0, len(images) - 1, min(SAMPLES, len(images)), dtype=int).tolist():
        with contextlib.suppress(BadSample):
            example = source[i]
            samples.append((example.image, example.masks))
    return samples


def start_comparison(images: Subset, other: str) -> Iterator[quality.Comparison]:
    """Opens another source of the same images, to be compared image by image."""
    second = open_source(other, decode_size=MASKS_ONLY)
    return quality.compare(images.source, second, images.indices.tolist())


def import_plots() -> SavePlots:
    """Imports `save_plots`, which needs an optional package.

    Raises:
      ValueError: If matplotlib is not installed.
    """
    try:
        from sam_jax.visualize.dataset_plots import save_plots
    except ImportError as error:
        raise ValueError(f"--out draws plots: {error}; {install_hint('viz')}") from error
    return save_plots


def show_findings(
    findings: Iterable[AnyFinding], total: int, known: Collection[str] = ()
) -> Iterator[AnyFinding]:
    """Passes findings on, with a progress bar and a line for each sample with a problem.

    Args:
      findings: One for each sample.
      total: Their number.
      known: The names of samples without a line, as they had one before.

    Yields:
      The findings.
    """
    for finding in tqdm(findings, total=total, unit=" samples", disable=None):
        has_problem = finding.reason is not None or finding.skipped_masks
        if has_problem and finding.name not in known:
            tqdm.write(str(finding))
        yield finding
