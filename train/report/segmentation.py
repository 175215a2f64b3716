"""What a run of SAM led to, to be looked at: three pictures and one page with the numbers."""

import json
from pathlib import Path

from sam_jax.data.example import Source
from sam_jax.predict.predictor import SamPredictor
from train.metrics import read_rows
from train.report.curves import count_of, draw_clicks, draw_curves
from train.report.html import items, table, write_page
from train.report.qualitative import choose_objects, draw_examples, play


def write_report(
    workdir: Path, predictor: SamPredictor, held_out: Source, evaluation: dict
) -> Path:
    """Writes curves.png, clicks.png, examples.png and then index.html into workdir/report/.

    Args:
      workdir: of the run, with its config.json and metrics.jsonl.
      predictor: of the trained model; its image is replaced.
      held_out: the examples that were evaluated on.
      evaluation: what evaluation.json holds.

    Returns:
      The path of index.html.
    """
    rows = read_rows(workdir / "metrics.jsonl")
    evaluations = read_rows(workdir / "evaluations.jsonl")
    config = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    evaluations.append({"step": config["num_steps"]} | evaluation)
    objects = [play(predictor, *chosen) for chosen in choose_objects(held_out)]
    figures = {
        "curves.png": draw_curves(rows, evaluations),
        "clicks.png": draw_clicks(evaluation),
        "examples.png": draw_examples(objects),
    }
    few, *_, many = evaluation["clicks"]
    return write_page(
        workdir,
        f"SAM trained on {config['data']['source']}",
        f"Mean IoU of {evaluation['objects']} held-out objects: "
        f"{evaluation['clicks'][few]['chosen']:.3f} after {count_of(few)}, "
        f"{evaluation['clicks'][many]['chosen']:.3f} after {count_of(many)}, "
        f"{evaluation['box']['chosen']:.3f} from a box.",
        make_body(evaluation, [shown.name for shown in objects]),
        figures,
    )


def make_body(evaluation: dict, names: list[str]) -> str:
    """The page's HTML of an evaluation, its pictures, and the objects that are shown."""
    by_prompt = {count_of(clicks): iou for clicks, iou in evaluation["clicks"].items()}
    by_prompt["box"] = evaluation["box"]
    scores = [(name, f"{iou['chosen']:.3f}", f"{iou['oracle']:.3f}")
              for name, iou in by_prompt.items()]  # fmt: skip
    others = [(k.replace("_", " "), v) for k, v in evaluation.items() if not isinstance(v, dict)]
    return BODY.format(scores=table(scores), others=table(others), names=items(names))


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
<p>Mean IoU. Of several outputs, chosen is the one with the highest predicted IoU, the oracle's
the best one. The ceiling is that of one click, for who knows all objects but not which one is
meant.</p>
<img src="clicks.png" alt="Mean IoU by the number of clicks">
<h2>Training</h2>
<img src="curves.png" alt="Loss and mean IoU against steps">
<h2>Held-out examples</h2>
<a href="examples.png"><img src="examples.png" alt="Clicks and masks of the objects below"></a>
<ol>
{names}
</ol>"""
