"""What is said and shown of a masked autoencoder: its error on held-out images, and pictures."""

import dataclasses
import json

import matplotlib.image
import numpy as np
import pytest

from configs.mae_tiny import config as tiny
from sam_jax.data.example import BadSample
from sam_jax.data.open import open_source, select
from sam_jax.model.init import init_variables
from sam_jax.model.mae import mae_tiny, normalize_patches
from train.config import Reconstruction
from train.overrides import to_dict
from train.report import reconstruction

MODEL = mae_tiny(image_size=(32, 48), depth=1)
SCENES = open_source("scenes:40x40", masks=False)


@pytest.fixture(scope="module")
def params():
    return init_variables(MODEL, 0)["params"]


@dataclasses.dataclass(frozen=True)
class Bad:
    """Scenes of which the second is broken and the third too small."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        if index == 1:
            raise BadSample("broken image", "it fell down")
        example = SCENES[index]
        return dataclasses.replace(example, image=example.image[:4]) if index == 2 else example

    def name(self, index):
        return f"<b>{index}</b>"


def evaluate(params, indices, source=SCENES):
    return reconstruction.evaluate_reconstruction(MODEL, params, Reconstruction(), source, indices)


def test_an_images_loss_is_its_own_whatever_comes_with_it(params):
    alone = [evaluate(params, [i])["loss"] for i in range(20)]
    together = evaluate(params, range(20))  # more than one batch
    assert together["loss"] == pytest.approx(np.mean(alone), rel=1e-5)
    assert together["images"] == 20
    assert np.std(alone) > 1e-3


def test_bad_images_are_counted(params):
    found = evaluate(params, range(5), Bad())
    assert (found["images"], found["bad_samples"]) == (3, 2)
    assert found["loss"] == pytest.approx(evaluate(params, [0, 3, 4])["loss"], rel=1e-5)
    with pytest.raises(ValueError, match="no held-out image can be used"):
        evaluate(params, [1, 2], Bad())


def test_hidden_pixels_are_those_of_hidden_patches_and_paintings_have_their_scale(params):
    image = np.stack([reconstruction.middle_of(SCENES.image(i), MODEL) for i in range(16)])
    _, hidden, painted = map(
        np.asarray, reconstruction.paint(MODEL, Reconstruction(), params, np.arange(16), image)
    )
    patches = hidden.reshape(16, 4, 8, 6, 8)
    assert (patches == patches[:, :, :1, :, :1]).all()
    assert (hidden.mean((1, 2)) == 0.75).all()
    assert (painted >= 0).all()
    assert (painted <= 255).all()
    true = np.random.default_rng(0).uniform(-2, 2, (2, 3, 192)).astype(np.float32)
    np.testing.assert_allclose(
        reconstruction.in_scale_of(true, normalize_patches(true)), true, atol=1e-5
    )


@pytest.mark.parametrize("normalized", [True, False])
def test_the_report(tmp_path, params, normalized):
    run = to_dict(dataclasses.replace(tiny, model=MODEL, objective=Reconstruction(normalized)))
    (tmp_path / "config.json").write_text(json.dumps(run))
    rows = "".join(json.dumps({"step": i, "loss": 1 / i}) + "\n" for i in (1, 2, 3))
    (tmp_path / "metrics.jsonl").write_text(rows)
    evaluation = {"source": "scenes<script>", "index": "::9", "images": 4, "loss": 0.4321}
    page = reconstruction.write_reconstruction_report(
        tmp_path, MODEL, params, Reconstruction(normalized), select(Bad(), ":"), evaluation
    )
    files = {path.name for path in page.parent.iterdir()}
    assert files == {"index.html", "curves.png", "paintings.png"}
    text = page.read_text()
    assert "<script>" not in text
    assert "<b>" not in text
    for said in ("0.432", "scenes&lt;script&gt;", "model.mask_ratio", "&lt;b&gt;3"):
        assert said in text
    assert ("the true ones" in text) == normalized
    picture = matplotlib.image.imread(page.parent / "paintings.png")
    assert picture[..., :3].std() > 0.05
    assert picture.shape[1] > 600
