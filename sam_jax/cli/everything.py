"""`sam-jax everything`: all masks of many images, in the format of SA-1B."""

import argparse
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from sam_jax.cli.everything_settings import image_names, run_settings
from sam_jax.cli.help_texts import SLICE_HELP, WEIGHTS_HELP
from sam_jax.data.example import Source
from sam_jax.data.open import Subset, open_image_source, select
from sam_jax.data.validate import Finding, printable
from sam_jax.engine.automatic import label_images
from sam_jax.engine.folder import (
    acquire,
    find_results,
    finished_ids,
    reserve_process_number,
    skipped_ids,
    write_json,
    write_names,
)
from sam_jax.engine.instances import write_instances
from sam_jax.everything.generator import SamAutomaticMaskGenerator
from sam_jax.everything.options import sa1b_preset
from sam_jax.io.compilation_cache import use_compilation_cache
from sam_jax.io.output import check_folder
from sam_jax.model.sam import Sam, replace_fields
from sam_jax.predict.tiles_option import DEFAULT_TILES_HELP, parse_tiles
from sam_jax.weights.formats import load

# Options that are arguments of `SamAutomaticMaskGenerator`, with the names of the official amg.py.
GENERATOR_OPTIONS = {
    "points_per_side": (int, "points along each side of the grid; default: 32"),
    "points_per_batch": (
        int,
        "points decoded at once; more are faster and take more memory; default: 64",
    ),
    "pred_iou_thresh": (float, "drop masks with a lower predicted IoU; default: 0.88"),
    "stability_score_thresh": (float, "drop masks with a lower stability score; default: 0.95"),
    "stability_score_offset": (
        float,
        "the shift of the mask threshold that defines the stability score; default: 1.0",
    ),
    "box_nms_thresh": (
        float,
        "drop masks whose box overlaps that of a better mask by more than this IoU; default: 0.7",
    ),
    "crop_n_layers": (
        int,
        "layers of crops that are segmented too, the i-th with 2^i x 2^i crops; default: 0",
    ),
    "crop_nms_thresh": (float, "as --box-nms-thresh, between crops; default: 0.7"),
    "crop_overlap_ratio": (
        float,
        "overlap of the crops of the first layer, as a fraction of the shorter side of the image; "
        "default: 0.341",
    ),
    "crop_n_points_downscale_factor": (
        int,
        "factor by which the points along a side decrease from layer to layer; default: 1",
    ),
    "min_mask_region_area": (
        int,
        "fill holes and remove islands that have fewer pixels; default: 0",
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of the verb."""
    parser.description = (
        "Segments everything in images, and writes images and masks in the format of SA-1B: "
        "sa_ID.jpg and sa_ID.json, where ID is the index in the source; images.json holds the name "
        "for each ID. After an interruption the same command continues. Images that cannot be used "
        "are named, skipped, and listed in skipped_0.json; the exit code is 1 only if none can be "
        "used."
    )
    parser.epilog = (
        "example: sam-jax everything photos/ --weights sam_vit_h --preset sa1b --out masks/"
    )
    parser.add_argument(
        "images",
        metavar="IMAGES",
        help="an image file, a folder of images, or a source as for `sam-jax dataset check`, "
        "whose masks are ignored",
    )
    parser.add_argument("--weights", type=os.path.expanduser, required=True, help=WEIGHTS_HELP)
    parser.add_argument(
        "--out",
        type=os.path.expanduser,
        required=True,
        metavar="DIR",
        help="the folder of the results",
    )
    parser.add_argument("--index", default=":", metavar="SLICE", help=SLICE_HELP)
    parser.add_argument(
        "--preset",
        choices=("sa1b",),
        help="the settings with which SA-1B was made; the options below override them",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="the precision of the model; bfloat16 is faster on accelerators; default: that of "
        "the weights",
    )
    parser.add_argument(
        "--overlays", action="store_true", help="also draw images and masks, in DIR/overlays"
    )
    parser.add_argument(
        "--coco",
        action="store_true",
        help="also write DIR/instances.json, once all images are done",
    )
    generator = parser.add_argument_group(
        "mask generation", "The defaults are those without --preset."
    )
    for name, (kind, text) in GENERATOR_OPTIONS.items():
        option = f"--{name.replace('_', '-')}"
        generator.add_argument(option, type=kind, metavar=kind.__name__.upper(), help=text)
    generator.add_argument(
        "--tiles",
        type=parse_tiles,
        metavar="SIZE|auto|none",
        help="also segment overlapping tiles of SIZE pixels per side; auto: tiles of the size of "
        f"the model's input, and of 2, 4, ... times that; none: no tiles; {DEFAULT_TILES_HELP}",
    )
    parallel = parser.add_argument_group(
        "several processes",
        "Each process segments its share of the images. The processes need to see DIR, but not "
        "each other.",
    )
    parallel.add_argument(
        "--processes", type=int, default=1, metavar="N", help="the number of processes"
    )
    parallel.add_argument(
        "--process", type=int, default=0, metavar="I", help="the number of this process, from 0"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the verb and returns the exit code."""
    folder = check_arguments(args)
    images = select(open_image_source(args.images), args.index)
    use_compilation_cache()
    model, variables = load(args.weights)
    model = replace_fields(model, dtype=args.dtype or model.dtype)
    options = generator_options(args)
    generators = make_generators(model, variables, options)

    settings = run_settings(args, images, model, variables, options)
    with reserve_process_number(folder, args.process):
        return label_share(args, folder, settings, images, generators)


def label_share(
    args: argparse.Namespace,
    folder: Path,
    settings: dict[str, Any],
    images: Subset,
    generators: list[SamAutomaticMaskGenerator],
) -> int:
    """Segments the images of this process and returns the exit code."""
    acquire(folder, settings, process=args.process, processes=args.processes)

    write_names(folder, image_names(args, images), process=args.process)
    assigned = images.indices[args.process :: args.processes]
    results = find_results(folder)
    for index in sorted(results.damaged.intersection(assigned.tolist())):
        print(f"{folder}/sa_{index}.json or its image is damaged: it is made again")
    remaining = assigned[~np.isin(assigned, list(results.finished))]
    findings = label_images(
        images.source,
        map(int, remaining),
        [generator.generate for generator in generators],
        folder,
        process=args.process,
        overlays=args.overlays,
    )
    try:
        num_masks, skipped = report_progress(
            findings, len(assigned) - len(remaining), len(assigned)
        )
        write_json(folder / f"skipped_{args.process}.json", skipped, process=args.process, indent=1)
    except OSError as error:
        raise OSError(f"{error}: what is finished stays; run the same command again") from error
    for reason, count in Counter(entry["reason"] for entry in skipped).most_common():
        print(f"{count:7d}  {reason}")
    num_usable, num_new = len(assigned) - len(skipped), len(remaining) - len(skipped)
    if num_usable and not remaining.size:
        print(f"all {len(assigned)} images were segmented before; their masks are in {args.out}")
    else:
        print(
            f"segmented {num_usable} of {len(assigned)} images, {num_new} of them in this run: "
            f"{num_masks} masks are in {args.out}"
        )
    if num_new and not num_masks:
        unusable = {entry["index"] for entry in skipped}
        index = next(index for index in remaining.tolist() if index not in unusable)
        print(explain_no_masks(generators[0], images.source, index))
    if args.coco:
        write_coco(folder, images, args.process)
    return 0 if num_usable or not len(assigned) else 1


def check_arguments(args: argparse.Namespace) -> Path:
    """Checks the arguments that no other function checks.

    Returns:
      The folder of the results.

    Raises:
      ValueError: If one is wrong.
    """
    if not 0 <= args.process < args.processes:
        raise ValueError(
            f"--process must be at least 0 and less than --processes; got {args.process} of "
            f"{args.processes}"
        )
    if "://" in args.out:
        raise ValueError(f"--out must be a folder on a disk; got {args.out}")
    # The images are a folder, or KIND:FOLDER.
    for folder in (args.images, args.images.partition(":")[2]):
        if folder and Path(folder).expanduser().is_dir():
            out, resolved = (Path(path).expanduser().resolve() for path in (args.out, folder))
            if out.is_relative_to(resolved):
                raise ValueError(f"--out must be outside of {folder}, the folder of the images")
    return check_folder(args.out, "--out")


def generator_options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments of the generator: those of the preset, overridden by options."""
    preset = sa1b_preset() if args.preset == "sa1b" else {}
    given = {name: getattr(args, name) for name in (*GENERATOR_OPTIONS, "tiles")}
    given = {name: value for name, value in given.items() if value is not None}
    return preset | given | {"output_mode": "coco_rle"}


def make_generators(
    model: Sam, variables: dict[str, Any], options: dict[str, Any]
) -> list[SamAutomaticMaskGenerator]:
    """Makes a generator on each device of this process."""
    return [
        SamAutomaticMaskGenerator(model, jax.device_put(variables, device), **options)
        for device in jax.local_devices()
    ]


def explain_no_masks(generator: SamAutomaticMaskGenerator, source: Source, index: int) -> str:
    """Says which thresholds to lower if no mask passed them, from the best scores of an image."""
    best = generator.best_scores(source.image(index))
    limits = {
        "--pred-iou-thresh": (generator.pred_iou_thresh, best.predicted_iou),
        "--stability-score-thresh": (generator.stability_score_thresh, best.stability_score),
    }
    lower = [option for option, (limit, score) in limits.items() if score <= limit] or [*limits]
    thresholds = " and ".join(f"{option} (now {limits[option][0]:g})" for option in lower)
    return (
        f"no mask passed the thresholds: lower {thresholds}. The best scores in "
        f"{printable(source.name(index))} are {best.predicted_iou:.3f} for the predicted IoU and "
        f"{best.stability_score:.3f} for the stability"
    )


def report_progress(
    findings: Iterable[Finding], num_done: int, total: int
) -> tuple[int, list[dict[str, Any]]]:
    """Consumes findings, with a progress bar and a line for each image that cannot be used.

    Args:
      findings: The results of `label_images`.
      num_done: The number of images that were done before.
      total: The number of images of this process.

    Returns:
      The number of masks, and the images that cannot be used, for JSON.
    """
    num_masks, skipped = 0, []
    with tqdm(initial=num_done, total=total, unit=" images", disable=None) as bar:
        for finding in findings:
            num_masks += finding.masks
            if finding.reason is not None:
                tqdm.write(str(finding))
                skipped.append(
                    {
                        "index": finding.index,
                        "name": finding.name,
                        "reason": finding.reason,
                        "detail": finding.detail,
                    }
                )
            bar.set_postfix(masks=num_masks, refresh=False)
            bar.update()
    return num_masks, sorted(skipped, key=lambda entry: entry["index"])


def write_coco(folder: Path, images: Subset, process: int) -> None:
    """Writes instances.json if no process has an image left to segment."""
    done = finished_ids(folder)
    missing = set(images.indices.tolist()) - done - skipped_ids(folder)
    if missing:
        print(
            f"{len(missing)} images are not finished: instances.json will be written by the last "
            "process"
        )
    else:
        write_instances(folder, sorted(done), process=process)
