"""`sam-jax everything`: its arguments, and what it does with them."""

import argparse
from collections import Counter
from pathlib import Path

PACKAGES = ("jax", "jaxlib", "numpy", "scipy", "pillow")  # whose code has a part in the results

# Options that are arguments of `SamAutomaticMaskGenerator`, with the names of the official amg.py.
OPTIONS = {
    "points_per_side": (int, "points a side of the grid; 32"),
    "points_per_batch": (int, "points decoded at a time: more are quicker and take memory; 64"),
    "pred_iou_thresh": (float, "least IoU that the model expects of a mask; 0.88"),
    "stability_score_thresh": (float, "least stability of a mask; 0.95"),
    "stability_score_offset": (float, "by which the threshold is moved for the stability; 1.0"),
    "box_nms_thresh": (float, "most overlap of the boxes of two masks; 0.7"),
    "crop_n_layers": (int, "layers of crops, each with four times as many as the one before; 0"),
    "crop_nms_thresh": (float, "most overlap of the boxes of masks of two crops; 0.7"),
    "crop_overlap_ratio": (float, "of crops, over the image's shorter side; 0.341"),
    "crop_n_points_downscale_factor": (int, "by which the grid shrinks from layer to layer; 1"),
    "min_mask_region_area": (int, "pixels below which holes are filled, islands removed; 0"),
}


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Declares the arguments of the verb."""
    verb.description = (
        "Mask everything in images, and write images and masks as SA-1B has them: sa_ID.jpg and "
        "sa_ID.json, where ID is the index in the source. The same command goes on where a killed "
        "one was. Images that cannot be used are named, skipped and listed in skipped_0.json; the "
        "exit code is 1 only if none could be used."
    )
    verb.add_argument(
        "images",
        metavar="IMAGE|FOLDER|SOURCE",
        help="an image file, a folder of them, or a source as for `data check`, whose masks are "
        "left aside",
    )
    verb.add_argument("--weights", required=True, help="anything that sam_jax.load takes")
    verb.add_argument("--out", required=True, metavar="DIR", help="where all results go")
    verb.add_argument(
        "--index", default=":", metavar="SLICE", help="of the images, as in Python: 0::5, :100, 7"
    )
    verb.add_argument(
        "--preset", choices=("sa1b",), help="the settings that made SA-1B; options go before them"
    )
    verb.add_argument("--dtype", choices=("bfloat16", "float32"), help="of the model's products")
    verb.add_argument("--overlays", action="store_true", help="draw the masks, in DIR/overlays")
    verb.add_argument(
        "--coco", action="store_true", help="write DIR/instances.json too, when all images are done"
    )
    generator = verb.add_argument_group("what a mask is (defaults without a preset)")
    for name, (kind, text) in OPTIONS.items():
        option = f"--{name.replace('_', '-')}"
        generator.add_argument(option, type=kind, metavar=kind.__name__.upper(), help=text)
    several = verb.add_argument_group(
        "several hosts that see DIR, each with its share; they need not talk to each other"
    )
    several.add_argument("--processes", type=int, default=1, help="how many there are")
    several.add_argument("--process", type=int, default=0, help="which one this is, from 0")


def run(args: argparse.Namespace) -> int:
    """Does what was asked for -> the exit code, 0 or 1."""
    import jax
    import numpy as np

    from sam_jax.data.open import open_image_source, select
    from sam_jax.engine.automatic import label_images
    from sam_jax.engine.folder import claim, finished, write_json
    from sam_jax.everything.generator import SamAutomaticMaskGenerator
    from sam_jax.model.sam import replace_fields
    from sam_jax.weights.formats import load

    _check(args)
    images = select(open_image_source(args.images), args.index)
    model, variables = load(args.weights)
    model = replace_fields(model, dtype=args.dtype or model.dtype)
    options = _options(args)
    generators = [
        SamAutomaticMaskGenerator(model, jax.device_put(variables, device), **options).generate
        for device in jax.local_devices()
    ]
    folder, process, processes = Path(args.out).expanduser(), args.process, args.processes
    settings = _settings(args, images, model, variables, options)
    claim(folder, settings, process=process, processes=processes)

    share = images.indices[process::processes]
    todo = share[~np.isin(share, list(finished(folder)))]
    findings = label_images(
        images.source, map(int, todo), generators, folder, process=process, overlays=args.overlays
    )
    masks, bad = _follow(findings, len(share) - len(todo), len(share))
    write_json(folder / f"skipped_{process}.json", bad, process=process, indent=1)
    for reason, count in Counter(entry["reason"] for entry in bad).most_common():
        print(f"{count:7d}  {reason}")
    usable, new = len(share) - len(bad), len(todo) - len(bad)
    print(f"{usable} of {len(share)} images are masked, {new} of them now: {masks} masks")
    if args.coco:
        _write_coco(folder, images, process)
    return 0 if usable or not len(share) else 1


def _check(args):
    if not 0 <= args.process < args.processes:
        raise ValueError(
            f"--process must be at least 0 and less than --processes; got {args.process} of "
            f"{args.processes}"
        )
    if "://" in args.out:
        raise ValueError(f"--out must be a folder on a disk; got {args.out}")
    for place in (args.images, args.images.partition(":")[2]):
        if place and Path(place).expanduser().is_dir():
            inner, outer = Path(args.out).expanduser().resolve(), Path(place).expanduser().resolve()
            if inner.is_relative_to(outer):
                raise ValueError(f"--out must not lie in {place}, among the images that are read")


def _options(args):
    """The keyword arguments of the generator: of the preset, and over these what was given."""
    from sam_jax.everything.generator import sa1b_preset

    preset = sa1b_preset() if args.preset == "sa1b" else {}
    given = {name: value for name in OPTIONS if (value := getattr(args, name)) is not None}
    return preset | given | {"output_mode": "coco_rle"}


def _settings(args, images, model, variables, options):
    """All that the results depend on: a run with other settings must not go on in the folder."""
    import importlib.metadata
    import inspect
    import os
    import zlib

    import jax
    import numpy as np

    import sam_jax
    from sam_jax.everything.generator import SamAutomaticMaskGenerator

    source, names, weights = images.source, 0, 0
    for index in range(len(source)):  # a file more or less would give others other numbers
        name = os.path.basename(source.name(index))
        names = zlib.crc32(name.encode("utf-8", "surrogatepass"), names)
    for leaf in jax.tree.leaves(variables):  # the path does not say what is there
        weights = zlib.crc32(np.asarray(leaf).tobytes(), weights)
    of_generator = inspect.signature(SamAutomaticMaskGenerator).bind_partial(**options)
    of_generator.apply_defaults()
    return {
        "sam_jax": sam_jax.__version__,
        **{package: importlib.metadata.version(package) for package in PACKAGES},
        "device": jax.local_devices()[0].device_kind,
        "images": _resolved(args.images),
        "index": args.index,
        "number of images": len(source),
        "checksum of their names": names,
        "weights": args.weights,
        "checksum of the weights": weights,
        "dtype": model.dtype,
        "overlays": args.overlays,
        **{name: x for name, x in of_generator.arguments.items() if name != "points_per_batch"},
    }


def _resolved(place):
    """A place by one name, however it is written."""
    kind, colon, path = place.rpartition(":")
    path = Path(path).expanduser()
    return f"{kind}{colon}{path.resolve()}" if path.exists() else place


def _follow(findings, done, total):
    """Shows what becomes of the images -> the number of masks, and the bad images, fit for JSON."""
    from tqdm import tqdm

    masks, bad = 0, []
    with tqdm(initial=done, total=total, unit=" images", disable=None) as bar:
        for finding in findings:
            masks += finding.masks
            if finding.reason is not None:
                tqdm.write(str(finding))
                fields = ("index", "name", "reason", "detail")
                bad.append({name: getattr(finding, name) for name in fields})
            bar.set_postfix(masks=masks, refresh=False)
            bar.update()
    return masks, sorted(bad, key=lambda entry: entry["index"])


def _write_coco(folder, images, process):
    from sam_jax.engine.folder import finished, skipped
    from sam_jax.engine.instances import write_instances

    done = finished(folder)
    missing = set(images.indices.tolist()) - done - skipped(folder)
    if missing:
        print(f"{len(missing)} images are not finished: the last process writes instances.json")
    else:
        write_instances(folder, sorted(done), process=process)
