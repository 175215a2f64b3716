"""The report of a run of SAM: three pictures, and one page with the numbers."""

import json
from pathlib import Path
from typing import Any

from sam_jax.data.example import Source
from sam_jax.predict.predictor import SamPredictor
from train.metrics import read_rows
from train.report.curves import count_clicks, draw_clicks, draw_curves
from train.report.page import list_items, table_rows, write_page
from train.report.qualitative import choose_objects, click_on_object, draw_objects


def write_report(
    workdir: Path, predictor: SamPredictor, eval_split: Source, evaluation: dict[str, Any]
) -> Path:
    """Writes curves.png, clicks.png, examples.png and then index.html into workdir/report/.

    Args:
      workdir: The folder of the run, with its config.json and metrics.jsonl.
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
    objects = [click_on_object(predictor, *chosen) for chosen in choose_objects(eval_split)]
    figures = {
        "curves.png": draw_curves(rows, evaluations),
        "clicks.png": draw_clicks(evaluation),
        "examples.png": draw_objects(objects),
    }
    few, *_, many = evaluation["clicks"]
    return write_page(
        workdir,
        f"SAM trained on {config['data']['source']}",
        f"Mean IoU of {evaluation['objects']} held-out objects: "
        f"{evaluation['clicks'][few]['chosen']:.3f} after {count_clicks(few)}, "
        f"{evaluation['clicks'][many]['chosen']:.3f} after {count_clicks(many)}, "
        f"{evaluation['box']['chosen']:.3f} from a box.",
        make_body(evaluation, [shown.name for shown in objects]),
        figures,
    )


def make_body(evaluation: dict[str, Any], names: list[str]) -> str:
    """Makes the HTML of an evaluation, its pictures, and the names of the shown objects."""
    prompts = {count_clicks(clicks): iou for clicks, iou in evaluation["clicks"].items()}
    prompts["box"] = evaluation["box"]
    scores = [
        (name, f"{iou['chosen']:.3f}", f"{iou['oracle']:.3f}") for name, iou in prompts.items()
    ]
    others = [(k.replace("_", " "), v) for k, v in evaluation.items() if not isinstance(v, dict)]
    return BODY.format(
        scores=table_rows(scores), others=table_rows(others), names=list_items(names)
    )


BODY = """<h2>Evaluation</h2>
<div class="side">
<table>
<tr><th>prompt</th><th>chosen</th><th>oracle</th></tr>
{scores}
</table>
<table>
{others}
</table>
</div>
<p>Mean IoU. If there are several outputs, "chosen" is the output with the highest predicted IoU,
and "oracle" is the best one. The ceiling is an upper bound for one click: the mean IoU of a
predictor that knows all objects of the image, but not which one is meant.</p>
<img src="clicks.png" alt="Mean IoU by the number of clicks">
<h2>Training</h2>
<img src="curves.png" alt="Loss and mean IoU by step">
<h2>Held-out examples</h2>
<a href="examples.png"><img src="examples.png" alt="Clicks and masks of the objects below"></a>
<ol>
{names}
</ol>"""
