"""The report of a masked autoencoder: its loss on held-out images, and its plots."""

import dataclasses
import json

import matplotlib.image
import pytest

from configs.mae_tiny import config as tiny
from sam_jax.data.example import BadSample
from sam_jax.data.open import open_source, select
from sam_jax.model.init import init_variables
from sam_jax.model.mae import mae_tiny
from tests.sam_jax.evaluate.toy_sources import ToySource
from train.config import Reconstruction
from train.overrides import to_dict
from train.report import reconstruction
from train.summary import write_summary

MODEL = mae_tiny(image_size=(32, 48), depth=1)
SCENES = open_source("scenes:40x40", masks=False)


@pytest.fixture(scope="module")
def params():
    return init_variables(MODEL, 0)["params"]


class PartlyBad(ToySource):
    """Scenes; the second one is broken and the third one is too small."""

    def __init__(self):
        examples = [SCENES[index] for index in range(5)]
        examples[1] = BadSample("broken image", "truncated")
        examples[2] = dataclasses.replace(examples[2], image=examples[2].image[:4])
        super().__init__(examples)

    def name(self, index):
        return f"<b>{index}</b>"


@pytest.mark.parametrize("normalized", [True, False])
def test_report_contains_figures_and_escapes_names(tmp_path, params, normalized):
    run = to_dict(dataclasses.replace(tiny, model=MODEL, objective=Reconstruction(normalized)))
    (tmp_path / "config.json").write_text(json.dumps(run))
    write_summary(tmp_path, {"model": "MaskedAutoencoder", "workdir": "runs/mae"})
    steps = [{"step": i, "loss": 1 / i, "step_seconds": 50.0} for i in (1, 2, 3)]
    rows = "".join(json.dumps(row) + "\n" for row in steps)
    (tmp_path / "metrics.jsonl").write_text(rows)
    evaluation = {"source": "scenes<script>", "index": "::9", "images": 4, "loss": 0.4321}
    page = reconstruction.write_reconstruction_report(
        tmp_path, MODEL, params, Reconstruction(normalized), select(PartlyBad(), ":"), evaluation
    )
    files = {path.name for path in page.parent.iterdir()}
    assert files == {"index.html", "curves.png", "reconstructions.png"}
    text = page.read_text()
    assert "<script>" not in text
    assert "<b>" not in text
    for part in ("0.432", "scenes&lt;script&gt;", "model.mask_ratio", "&lt;b&gt;3", "2 min",
                 "sam-jax convert runs/mae/weights mae.pth"):  # fmt: skip
        assert part in text
    assert ("the true ones" in text) == normalized
    picture = matplotlib.image.imread(page.parent / "reconstructions.png")
    assert picture[..., :3].std() > 0.05
    assert picture.shape[1] > 600
