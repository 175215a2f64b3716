"""What a run led to, to be looked at: three pictures and one page with the numbers."""

import html
import io
import json
import os
from pathlib import Path

from flax.traverse_util import flatten_dict

from sam_jax.data.example import Source
from sam_jax.predict.predictor import SamPredictor
from train.examples import choose_objects, draw_examples, play
from train.metrics import read_rows
from train.plots import count_of, draw_clicks, draw_curves

DPI = 120

MAIN = (
    *("model.image_size", "model.patch_size", "model.embed_dim", "model.depth", "model.dtype"),
    *("data.source", "data.held_out", "objective.points", "objective.extra_rounds"),
    *("objective.focal", "objective.masks_per_image", "optimizer.peak_lr"),
    *("optimizer.warmup_steps", "optimizer.drop_at", "optimizer.weight_decay"),
    *("optimizer.layer_decay", "batch_size", "num_steps", "init_from"),
    *("match_attention", "train_only", "seed"),
)  # fields of the config on the page


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
    folder = workdir / "report"
    folder.mkdir(exist_ok=True)
    config = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    rows = read_rows(workdir / "metrics.jsonl")
    evaluations = read_rows(workdir / "evaluations.jsonl")
    evaluations.append({"step": config["num_steps"]} | evaluation)
    objects = [play(predictor, *chosen) for chosen in choose_objects(held_out)]
    figures = {
        "curves.png": draw_curves(rows, evaluations),
        "clicks.png": draw_clicks(evaluation),
        "examples.png": draw_examples(objects),
    }
    for name, figure in figures.items():
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=DPI)
        write_whole(folder / name, png.getvalue())
    page = folder / "index.html"
    names = [shown.name for shown in objects]
    write_whole(page, make_page(config, evaluation, names).encode("utf-8"))
    return page


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file that is whole or not there."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def make_page(config: dict, evaluation: dict, names: list[str]) -> str:
    """The page's HTML: no script, nothing from elsewhere, and all text escaped."""
    by_prompt = {count_of(clicks): iou for clicks, iou in evaluation["clicks"].items()}
    by_prompt["box"] = evaluation["box"]
    scores = [(name, f"{iou['chosen']:.3f}", f"{iou['oracle']:.3f}")
              for name, iou in by_prompt.items()]  # fmt: skip
    others = [(k.replace("_", " "), v) for k, v in evaluation.items() if not isinstance(v, dict)]
    fields = flatten_dict(config, sep=".")
    few, *_, many = evaluation["clicks"]
    source = config["data"]["source"]
    return PAGE.format(
        title=html.escape(f"SAM trained on {source}"),
        summary=html.escape(
            f"Mean IoU of {evaluation['objects']} held-out objects: "
            f"{evaluation['clicks'][few]['chosen']:.3f} after {count_of(few)}, "
            f"{evaluation['clicks'][many]['chosen']:.3f} after {count_of(many)}, "
            f"{evaluation['box']['chosen']:.3f} from a box."
        ),
        scores=table(scores),
        others=table(others),
        names="\n".join(f"<li>{html.escape(name)}</li>" for name in names),
        config=table([(name, fields[name]) for name in MAIN if name in fields]),
    )


def table(rows: list[tuple]) -> str:
    """Rows of a table, the first cell of each being its heading."""
    cells = lambda row: "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row)
    return "\n".join(
        f'<tr><th scope="row">{html.escape(str(first))}</th>{cells(rest)}</tr>'
        for first, *rest in rows
    )


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ max-width: 76rem; margin: 2rem auto; padding: 0 1rem; background: #fff; color: #222;
  font: 1rem/1.5 system-ui, sans-serif; }}
h1, h2 {{ line-height: 1.2; overflow-wrap: anywhere; }}
h2 {{ margin-top: 2.5rem; }}
img {{ max-width: 100%; height: auto; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: 0.2rem 1.5rem 0.2rem 0; border-bottom: 1px solid #ddd; text-align: left;
  vertical-align: top; overflow-wrap: anywhere; }}
th[scope=row] {{ font-weight: normal; }}
.side {{ display: flex; flex-wrap: wrap; gap: 1rem 3rem; align-items: flex-start; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{summary}</p>
<h2>Evaluation</h2>
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
</ol>
<h2>Configuration</h2>
<table>
{config}
</table>
<p>All fields: <a href="../config.json">config.json</a></p>
</body>
</html>
"""
