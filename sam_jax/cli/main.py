"""`sam-jax VERB`: the command line. A verb's code is imported only when it runs."""

import argparse
import sys
from pathlib import Path

from sam_jax.cli import everything

EXAMPLES = {
    "predict": "sam-jax predict photo.jpg --weights sam_vit_b --point 500,375 --out masks/",
    "everything": "sam-jax everything photos/ --weights sam_vit_h --preset sa1b --out masks/",
    "convert": "sam-jax convert sam_vit_b_01ec64.pth sam_b/",
    "info": "sam-jax info --weights sam_b/",
    "evaluate": "sam-jax evaluate --weights sam_vit_b --source coco:photos/ --json scores.json",
    "data": "sam-jax data check sa1b:images/ --json report.json",
    "data stats": "sam-jax data stats sa1b:images/ --index ::100 --out statistics/",
}


SOURCE_HELP = (
    "sa1b:PATH, coco:FOLDER, labels:FOLDER, images:FOLDER, tfds:DATASET[/SPLIT][@FOLDER] or scenes"
)
SLICE_HELP = "of the images, as in Python: 0::5, :100, 7"
SMALL = (256, 256)  # frame that images are read for where only their masks are asked for


def main(argv=None):
    """Runs a verb -> the exit code: 0 done, 1 failed, 2 wrong usage."""
    parser = argparse.ArgumentParser(prog="sam-jax", description="Segment Anything in JAX.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_predict(verbs)
    _add_everything(verbs)
    _add_convert(verbs)
    _add_info(verbs)
    _add_evaluate(verbs)
    _add_data(verbs)
    args = parser.parse_args(argv)
    try:
        return args.run(args) or 0
    except (OSError, ValueError) as error:
        print(f"sam-jax {args.verb}: {error}", file=sys.stderr)
        return 1


def _add_verb(verbs, name, help, run):
    verb = verbs.add_parser(
        name, help=help, description=f"{help}.", epilog=f"example: {EXAMPLES[name]}"
    )
    verb.set_defaults(run=run)
    return verb


def _add_predict(verbs):
    verb = _add_verb(verbs, "predict", "mask one object of an image", _predict)
    verb.add_argument("image", help="a JPEG, PNG or WebP file")
    verb.add_argument("--weights", required=True, help="anything that sam_jax.load takes")
    verb.add_argument(
        "--point",
        action="append",
        default=[],
        type=_point,
        metavar="X,Y[,0|1]",
        help="a point in pixels, on the object (1, the default) or off it (0); repeat for more",
    )
    verb.add_argument("--box", type=_box, metavar="X0,Y0,X1,Y1", help="a box around the object")
    verb.add_argument(
        "--masks",
        type=int,
        choices=(1, 3),
        help="how many; by default 3 for a single point or box, which may mean several things",
    )
    verb.add_argument("--out", required=True, help="folder for overlay.png, masks and masks.json")


def _add_everything(verbs):
    verb = _add_verb(verbs, "everything", "mask everything in images", everything.run)
    everything.add_arguments(verb)


def _add_convert(verbs):
    verb = _add_verb(verbs, "convert", "convert weights between formats", _convert)
    verb.add_argument("source", metavar="SRC", help="anything that sam_jax.load takes")
    verb.add_argument(
        "target",
        metavar="DST",
        help="a .pth or .safetensors file with official names, otherwise a weights directory",
    )
    verb.add_argument(
        "--format",
        choices=("sam_jax", "official", "huggingface"),
        help="the format of DST, if its name does not say it",
    )


def _add_info(verbs):
    verb = _add_verb(verbs, "info", "print versions, devices and a model", _info)
    verb.add_argument("--weights", help="anything that sam_jax.load takes")


def _add_evaluate(verbs):
    verb = _add_verb(
        verbs,
        "evaluate",
        "measure a model's mean IoU after clicks and boxes, or the recall of proposed masks",
        _evaluate,
    )
    what = verb.add_mutually_exclusive_group(required=True)
    what.add_argument("--weights", help="anything that sam_jax.load takes")
    what.add_argument(
        "--proposals",
        metavar="SOURCE",
        help="masks of the same images, the best of each first; sa_7.json is of image 7",
    )
    verb.add_argument("--source", required=True, metavar="SOURCE", help=SOURCE_HELP)
    verb.add_argument("--index", default=":", metavar="SLICE", help=SLICE_HELP)
    verb.add_argument("--json", metavar="FILE", help="write the scores to a file too")


def _add_data(verbs):
    verb = _add_verb(verbs, "data", "look after images with masks", None)
    actions = verb.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = actions.add_parser(
        "check",
        help="read all of a source to see what cannot be used",
        description="Read all of a source to see what cannot be used. Exit code 1 if there is any.",
        epilog=f"example: {EXAMPLES['data']}",
    )
    check.set_defaults(run=_data_check)
    check.add_argument("source", metavar="SOURCE", help=SOURCE_HELP)
    check.add_argument("--json", metavar="FILE", help="write what was found to a file too")
    stats = actions.add_parser(
        "stats",
        help="measure how many masks there are, how large and concave, and where",
        description="Measure how many masks there are, how large and concave, and where.",
        epilog=f"example: {EXAMPLES['data stats']}",
    )
    stats.set_defaults(run=_data_stats)
    stats.add_argument("source", metavar="SOURCE", help=SOURCE_HELP)
    stats.add_argument("--index", default=":", metavar="SLICE", help=SLICE_HELP)
    stats.add_argument("--out", metavar="DIR", help="folder for statistics.json and plots")
    stats.add_argument(
        "--against",
        metavar="SOURCE",
        help="another annotation of the same images in the same order, to measure the IoU with",
    )


def _predict(args):
    if not args.point and args.box is None:
        raise ValueError("nothing was asked for: give --point X,Y, --box X0,Y0,X1,Y1 or both")
    from sam_jax.cli.predict import predict_file
    from sam_jax.predict.predictor import SamPredictor
    from sam_jax.weights.formats import load

    result = predict_file(
        SamPredictor(*load(args.weights)),
        args.image,
        args.out,
        points=[point[:2] for point in args.point],
        labels=[point[2] for point in args.point],
        box=args.box,
        num_masks=args.masks,
    )
    for mask in result["masks"]:
        print(f"{mask['file']}  predicted IoU {mask['predicted_iou']:.3f}  {mask['area']} pixels")
    print(f"overlay.png, masks and masks.json are in {args.out}")


def _convert(args):
    from sam_jax.weights.formats import convert_file

    for note in convert_file(args.source, args.target, args.format):
        print(f"note: {note}")
    print(f"{args.source} -> {args.target}")


def _info(args):
    from sam_jax.cli import info

    info.print_info(args.weights)


def _evaluate(args):
    import json

    scores, table = (_evaluate_clicks if args.weights else _evaluate_proposals)(args)
    print(table)
    if args.json:
        scores = {"source": args.source, "index": args.index} | scores
        Path(args.json).write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")


def _evaluate_clicks(args):
    from tqdm import tqdm

    from sam_jax.data.open import open_source, select
    from sam_jax.evaluate.clicks import evaluate_clicks, table
    from sam_jax.predict.predictor import SamPredictor
    from sam_jax.weights.formats import load

    images = select(open_source(args.source), args.index)
    predictor = SamPredictor(*load(args.weights))
    scores = evaluate_clicks(predictor, images, tqdm(range(len(images)), unit="image"))
    return scores, table(scores)


def _evaluate_proposals(args):
    from tqdm import tqdm

    from sam_jax.data.open import open_source, select
    from sam_jax.evaluate.proposals import evaluate_proposals, pair_images, table

    truths = select(open_source(args.source, reduce_to=SMALL), args.index)
    proposals = open_source(args.proposals, reduce_to=SMALL)
    pairs = pair_images(proposals, truths)
    print(f"{len(pairs)} of {len(truths)} images have proposals")
    bar = tqdm(pairs, unit=" images", disable=None)
    scores = evaluate_proposals(proposals, truths.source, bar)
    return {"proposals": args.proposals} | scores, table(scores)


def _data_check(args):
    import json

    from sam_jax.data.open import open_source
    from sam_jax.data.validate import check, summarize

    source = open_source(args.source)
    result = {"source": args.source, **summarize(_shown(check(source), len(source)))}
    for reason, count in result["reasons"].items():
        print(f"{count:7d}  {reason}")
    usable, samples, masks = result["usable"], result["samples"], result["masks"]
    print(f"{usable} of {samples} samples are usable, {masks} masks")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)
    return 0 if usable == samples else 1


def _data_stats(args):
    import json

    from sam_jax.data.open import open_source, select
    from sam_jax.evaluate import quality, statistics

    if args.out:
        try:
            from sam_jax.visualize import dataset_plots
        except ImportError as error:
            raise ValueError(f'--out draws plots: {error}; pip install "sam_jax[viz]"') from error
    images = select(open_source(args.source, reduce_to=SMALL), args.index)
    source, indices = images.source, images.indices.tolist()
    if args.against:
        compared = quality.compare(source, open_source(args.against, reduce_to=SMALL), indices)
    found = statistics.collect(_shown(statistics.measure(source, indices), len(indices)))
    print(statistics.table(found))
    result = {"source": args.source, "index": args.index, **found}
    if args.against:
        known = [bad["name"] for bad in found["bad"]]
        agreement = quality.collect(_shown(compared, len(indices), known))
        print(quality.table(agreement))
        result["against"] = {"source": args.against, **agreement}
    if args.out:
        dataset_plots.save_plots(args.out, result)
        path = Path(args.out) / "statistics.json"
        path.write_text(json.dumps(result) + "\n", encoding="utf-8")
        print(f"statistics.json and plots are in {args.out}")


def _shown(findings, total, known=()):
    """Findings as they are, with a bar, and a line for each new one of what cannot be used."""
    from tqdm import tqdm

    for finding in tqdm(findings, total=total, unit=" samples", disable=None):
        if finding.reason is not None and finding.name not in known:
            tqdm.write(str(finding))
        yield finding


def _point(text):
    """'X,Y' or 'X,Y,LABEL' -> (x, y, label)."""
    numbers = _numbers(text)
    if len(numbers) not in (2, 3) or numbers[2:] not in ([], [0], [1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not X,Y or X,Y,0 or X,Y,1")
    return (*numbers[:2], int(numbers[2]) if len(numbers) == 3 else 1)


def _box(text):
    numbers = _numbers(text)
    if len(numbers) != 4:
        raise argparse.ArgumentTypeError(f"{text!r} is not X0,Y0,X1,Y1")
    return numbers


def _numbers(text):
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers with commas between") from None
