"""The page of a run: one HTML file beside its pictures, with nothing from elsewhere."""

import html
import io
import json
import os
from pathlib import Path

from flax.traverse_util import flatten_dict
from matplotlib.figure import Figure

DPI = 120

MAIN = (
    *("model.image_size", "model.patch_size", "model.embed_dim", "model.depth", "model.dtype"),
    *("data.source", "data.held_out", "objective.num_clicks", "objective.num_extra_rounds"),
    *("model.mask_ratio", "data.min_area", "objective.focal", "objective.masks_per_image"),
    *("optimizer.peak_lr", "optimizer.warmup_steps", "optimizer.lr_boundaries"),
    *("optimizer.cosine_steps", "optimizer.weight_decay"),
    *("optimizer.layer_decay", "batch_size", "num_steps", "init_from"),
    *("mimetic_init_scale", "trainable", "seed"),
)  # fields of the config on the page


def write_page(
    workdir: Path, title: str, summary: str, body: str, figures: dict[str, Figure]
) -> Path:
    """Writes pictures, and then index.html, into workdir/report/.

    Args:
      workdir: of the run, with its config.json.
      title, summary: text.
      body: HTML between the summary and the configuration, whose text is escaped.
      figures: by the names of their files.

    Returns:
      The path of index.html.
    """
    folder = workdir / "report"
    folder.mkdir(exist_ok=True)
    for name, figure in figures.items():
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=DPI)
        write_whole(folder / name, png.getvalue())
    config = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    page = folder / "index.html"
    write_whole(page, make_page(config, title, summary, body).encode("utf-8"))
    return page


def make_page(config: dict, title: str, summary: str, body: str) -> str:
    """The page's HTML."""
    fields = flatten_dict(config, sep=".")
    return PAGE.format(
        title=html.escape(title),
        summary=html.escape(summary),
        body=body,
        config=table([(name, fields[name]) for name in MAIN if name in fields]),
    )


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file that is whole or not there."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def table(rows: list[tuple]) -> str:
    """Rows of a table, the first cell of each being its heading."""
    cells = lambda row: "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row)
    return "\n".join(
        f'<tr><th scope="row">{html.escape(str(first))}</th>{cells(rest)}</tr>'
        for first, *rest in rows
    )


def items(names: list[str]) -> str:
    """Items of a list."""
    return "\n".join(f"<li>{html.escape(name)}</li>" for name in names)


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
{body}
<h2>Configuration</h2>
<table>
{config}
</table>
<p>All fields: <a href="../config.json">config.json</a></p>
</body>
</html>
"""
