"""The report of a run of SAM: pictures, and one page with the numbers."""

import json
from pathlib import Path
from typing import Any

from sam_jax.data.example import Source
from sam_jax.evaluate.object_scores import LARGE_AREA
from sam_jax.predict.predictor import SamPredictor
from train.report.calibration import draw_calibration
from train.report.curves import count_clicks, draw_clicks, draw_curves
from train.report.gallery import choose_rows, draw_gallery, predict_rows
from train.report.page import list_names, table_rows, write_page
from train.report.qualitative import choose_objects, click_on_object, draw_objects
from train.rows import read_rows
from train.summary import read_summary


def write_report(
    workdir: Path, predictor: SamPredictor, eval_split: Source, evaluation: dict[str, Any]
) -> Path:
    """Writes pictures and then index.html into workdir/report/.

    The pictures are curves.png, clicks.png, calibration.png, gallery.png and examples.png. If the
    evaluation used tiles, so do the gallery and the examples.

    Args:
      workdir: The folder of the run, with all its JSON files.
      predictor: The predictor of the trained model; its image is replaced.
      eval_split: The examples of the evaluation.
      evaluation: The content of evaluation.json.

    Returns:
      The path of index.html.
    """
    rows = read_rows(workdir / "metrics.jsonl")
    evaluations = read_rows(workdir / "evaluations.jsonl")
    config = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    evaluations.append({"step": config["num_steps"]} | evaluation)
    tiles = evaluation["tiles"]["size"] if "tiles" in evaluation else "none"
    examples = [click_on_object(predictor, *x, tiles) for x in choose_objects(eval_split)]
    boxed_rows = choose_rows(read_rows(workdir / "objects.jsonl"))
    boxed = list(predict_rows(predictor, eval_split, boxed_rows, tiles))
    figures = {
        "curves.png": draw_curves(rows, evaluations),
        "clicks.png": draw_clicks(evaluation),
        "calibration.png": draw_calibration(evaluation),
        "gallery.png": draw_gallery(boxed),
        "examples.png": draw_objects(examples),
    }
    body = BODY.format(
        scores=make_tables(evaluation),
        others=table_rows(other_values(evaluation)),
        gallery=list_names(shown.name for shown in boxed),
        examples=list_names(shown.name for shown in examples),
    )
    weights = f"{read_summary(workdir)['workdir']}/weights"
    where = ["--source", config["data"]["source"], "--index", config["data"]["held_out"] or ":"]
    commands = [
        [
            "sam-jax",
            "predict",
            "IMAGE",
            "--weights",
            weights,
            "--point",
            "X,Y",
            "--out",
            "out/mask",
        ],
        ["sam-jax", "everything", "IMAGE", "--weights", weights, "--overlays", "--out", "out/all"],
        ["sam-jax", "evaluate", "clicks", "--weights", weights, *where],
        ["sam-jax", "convert", weights, "sam.pth"],
    ]
    title = f"SAM trained on {config['data']['source']}"
    return write_page(workdir, title, summarize(evaluation), body, figures, commands)


def summarize(evaluation: dict[str, Any]) -> str:
    """Returns a sentence with the main figures."""

    def figures(scores: dict[str, Any]) -> str:
        few, *_, many = scores["clicks"]
        clicks = [
            f"{scores['clicks'][n]['chosen']:.3f} after {count_clicks(n)}" for n in (few, many)
        ]
        return f"{', '.join(clicks)}, {scores['box']['chosen']:.3f} from a box"

    text = f"Mean IoU of {evaluation['objects']} held-out objects: {figures(evaluation)}"
    if "tiles" in evaluation:
        text += f"; in tiles {figures(evaluation['tiles'])}"
    return f"{text}. Their filled boxes have {evaluation['fill']:.3f}."


def make_tables(evaluation: dict[str, Any]) -> str:
    """Makes the HTML tables of the scores of all objects, and of large ones if there are any."""
    columns = {"entire image": evaluation}
    if "tiles" in evaluation:
        columns[f"tiles: {evaluation['tiles']['size']}"] = evaluation["tiles"]
    tables = [make_table(f"{evaluation['objects']} objects", columns)]
    if evaluation.get("large", evaluation)["objects"] < evaluation["objects"]:
        large = {title: scores["large"] for title, scores in columns.items()}
        area = f"at least {100 * LARGE_AREA:g}% of the image"
        tables.append(make_table(f"{evaluation['large']['objects']} objects, each {area}", large))
    return "\n".join(tables)


def make_table(caption: str, columns: dict[str, dict[str, Any]]) -> str:
    """Makes an HTML table of scores.

    Args:
      caption: Its caption.
      columns: For each way in which objects were seen, its title and its scores.

    Returns:
      The HTML.
    """
    scores = list(columns.values())
    rows = [
        (count_clicks(n), *(f"{x['clicks'][n][kind]:.3f}" for x in scores for kind in KINDS))
        for n in scores[0]["clicks"]
    ]
    rows.append(("box", *(f"{x['box'][kind]:.3f}" for x in scores for kind in KINDS)))
    for name, key in (("filled box", "fill"), ("resolution bound", "bound")):
        cells = [cell for x in scores for cell in (f"{x[key]:.3f}", "")]
        rows.append((name, *cells))
    kinds = "".join(f"<th>{kind}</th>" for _ in scores for kind in KINDS)
    heads = [f'<tr><th scope="row">prompt</th>{kinds}</tr>']
    if len(columns) > 1:
        titles = "".join(f'<th colspan="{len(KINDS)}">{title}</th>' for title in columns)
        heads.insert(0, f'<tr><th scope="row"></th>{titles}</tr>')
    return "\n".join(
        ["<table>", f"<caption>{caption}</caption>", *heads, table_rows(rows), "</table>"]
    )


def other_values(evaluation: dict[str, Any]) -> list[tuple[str, Any]]:
    """Returns the names and values that are not in the tables of scores."""
    return [
        (name.replace("_", " "), value)
        for name, value in evaluation.items()
        if not isinstance(value, dict) and name not in ("fill", "bound")
    ]


KINDS = ("chosen", "oracle")

BODY = """<h2>Held-out examples</h2>
<a href="examples.png"><img src="examples.png" alt="Clicks and masks of the objects below"></a>
{examples}
<h2>Typical objects</h2>
<p>Nobody chose these objects: they are next to the 10th, the 50th and the 90th percentile of the
IoU of masks that are predicted from boxes. Dark images are drawn brighter.</p>
<a href="gallery.png"><img src="gallery.png" alt="Boxes and masks of the objects below"></a>
{gallery}
<h2>Evaluation</h2>
<div class="side">
{scores}
<table>
{others}
</table>
</div>
<p>Mean IoU. If there are several outputs, "chosen" is the output with the highest predicted IoU,
and "oracle" is the best one. "Filled box" is the IoU of a mask with its own filled box: a model
that is prompted with boxes must be better than that. The resolution bound is the IoU of a mask with
itself, after it was reduced to the resolution of the model's masks, which the model can hardly
exceed. The ceiling is an upper bound for one click: the mean IoU of a predictor that knows all
objects of the image, but not which one is meant. In tiles, the model sees each object in a part of
the image, enlarged. The scores of each object are in
<a href="../objects.jsonl">objects.jsonl</a>.</p>
<img src="clicks.png" alt="Mean IoU by the number of clicks">
<h2>Predicted IoU</h2>
<p>The model predicts the IoU of each of its masks. Above the dashed line it is too cautious, below
the line it overestimates its masks. The bars count the objects by predicted IoU.</p>
<img src="calibration.png" alt="True IoU by predicted IoU">
<h2>Training</h2>
<img src="curves.png" alt="Loss and mean IoU by step">"""
