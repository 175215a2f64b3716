"""The page of a report: one HTML file next to its pictures, which refers to nothing else."""

import html
import io
import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict
from matplotlib.figure import Figure

from sam_jax.io.atomic import write_bytes
from sam_jax.visualize.style import DPI
from train.rows import read_rows
from train.summary import format_duration, read_summary, training_seconds

# Fields of the configuration that the page shows, if the task has them.
MAIN_FIELDS = (
    *("model.image_encoder.image_size", "model.image_encoder.patch_size"),
    *("model.image_encoder.embed_dim", "model.image_encoder.depth", "model.image_encoder.dtype"),
    *("model.image_size", "model.patch_size", "model.embed_dim", "model.depth", "model.dtype"),
    *("data.source", "data.held_out", "objective.num_clicks", "objective.num_extra_rounds"),
    *("model.mask_ratio", "data.min_area", "objective.focal", "objective.masks_per_image"),
    *("optimizer.peak_lr", "optimizer.warmup_steps", "optimizer.lr_boundaries"),
    *("optimizer.cosine_steps", "optimizer.weight_decay"),
    *("optimizer.layer_decay", "batch_size", "num_steps", "init_from"),
    *("mimetic_init_scale", "trainable", "seed"),
)


def write_page(
    workdir: Path,
    title: str,
    summary: str,
    body: str,
    figures: dict[str, Figure],
    commands: Sequence[Sequence[str]],
) -> Path:
    """Writes pictures, and then index.html, into workdir/report/.

    Args:
      workdir: The folder of the run, with its config.json, summary.json and metrics.jsonl.
      title: The title, as plain text.
      summary: The text under the title, as plain text.
      body: The HTML between the summary and the facts of the run.
      figures: The pictures by file name.
      commands: The words of commands that use the weights of the run.

    Returns:
      The path of index.html.
    """
    folder = workdir / "report"
    folder.mkdir(exist_ok=True)
    for name, figure in figures.items():
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=DPI)
        write_bytes(folder / name, png.getvalue())
    config = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    fields = flatten_dict(config, sep=".")
    page = PAGE.format(
        title=html.escape(title),
        summary=html.escape(summary),
        body=body,
        commands=html.escape("\n".join(map(shlex.join, commands))),
        facts=table_rows(facts_of_run(workdir)),
        config=table_rows([(name, fields[name]) for name in MAIN_FIELDS if name in fields]),
    )
    path = folder / "index.html"
    write_bytes(path, page.encode("utf-8", "backslashreplace"))
    return path


def facts_of_run(workdir: Path) -> list[tuple[str, str]]:
    """Returns the names and values of the facts in summary.json, and the time of the training.

    Args:
      workdir: The folder of the run.
    """
    facts = read_summary(workdir)
    versions = facts.pop("versions")
    seconds = training_seconds(read_rows(workdir / "metrics.jsonl"))
    facts["training"] = format_duration(seconds)
    facts["revision"] = versions.pop("revision") or "unknown"
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    return list(facts.items())


def table_rows(rows: Iterable[Sequence[Any]]) -> str:
    """Makes the rows of an HTML table; the first cell of each row is its heading."""
    lines = []
    for heading, *cells in rows:
        data = "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells)
        lines.append(f'<tr><th scope="row">{html.escape(str(heading))}</th>{data}</tr>')
    return "\n".join(lines)


def list_names(names: Iterable[str]) -> str:
    """Makes a numbered HTML list of names, which is shown on a click."""
    items = "\n".join(f"<li>{html.escape(name)}</li>" for name in names)
    return f"<details><summary>Names</summary>\n<ol>\n{items}\n</ol>\n</details>"


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
caption {{ text-align: left; font-weight: bold; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: 0.2rem 1.5rem 0.2rem 0; border-bottom: 1px solid #ddd; text-align: left;
  vertical-align: top; overflow-wrap: anywhere; }}
th[scope=row] {{ font-weight: normal; overflow-wrap: normal; }}
pre {{ padding: 0.75rem 1rem; background: #f4f4f4; overflow-x: auto; }}
.side {{ display: flex; flex-wrap: wrap; gap: 1rem 3rem; align-items: flex-start; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{summary}</p>
{body}
<h2>Use the weights</h2>
<pre>{commands}</pre>
<h2>Run</h2>
<table>
{facts}
</table>
<h2>Configuration</h2>
<table>
{config}
</table>
<p>All fields: <a href="../config.json">config.json</a></p>
</body>
</html>
"""
