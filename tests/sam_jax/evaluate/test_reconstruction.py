"""Tests the reconstruction loss of images, and the reconstructed pixels."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from sam_jax.cli.main import main
from sam_jax.data.example import BadSample
from sam_jax.data.open import open_source
from sam_jax.evaluate import reconstruction
from sam_jax.model.init import init_variables
from sam_jax.model.mae import mae_tiny, normalize_patches
from sam_jax.weights.formats import save
from tests.sam_jax.evaluate.toy_sources import ToySource

MODEL = mae_tiny(image_size=(32, 48), depth=1)
SCENES = open_source("scenes:40x40", masks=False)


@pytest.fixture(scope="module")
def variables():
    return init_variables(MODEL, 0)


def partly_bad():
    """Returns five scenes, of which the second is broken and the third too small."""
    examples = [SCENES[index] for index in range(5)]
    examples[1] = BadSample("broken image", "it fell down")
    examples[2] = dataclasses.replace(examples[2], image=examples[2].image[:4])
    return ToySource(examples)


def evaluate(variables, indices, source=SCENES):
    params = variables["params"]
    return reconstruction.evaluate_reconstruction(MODEL, params, True, source, indices)


def test_the_loss_of_an_image_does_not_depend_on_its_batch(variables):
    alone = [evaluate(variables, [i])["loss"] for i in range(20)]
    together = evaluate(variables, range(20))  # more than one batch
    assert together["loss"] == pytest.approx(np.mean(alone), rel=1e-5)
    assert together["images"] == 20
    assert np.std(alone) > 1e-3


def test_bad_images_are_counted(variables):
    found = evaluate(variables, range(5), partly_bad())
    assert (found["images"], found["bad_samples"]) == (3, 2)
    assert found["loss"] == pytest.approx(evaluate(variables, [0, 3, 4])["loss"], rel=1e-5)
    with pytest.raises(ValueError, match="no held-out image can be used"):
        evaluate(variables, [1, 2], partly_bad())


def test_masked_pixels_are_patches_and_colors_are_in_range(variables):
    images = np.stack([reconstruction.center_crop(SCENES.image(i), MODEL) for i in range(16)])
    batch = np.arange(16, dtype=np.int32), images
    outputs = reconstruction.reconstruct(MODEL, True, variables["params"], *batch)
    _, masked, colors = map(np.asarray, outputs)
    patches = masked.reshape(16, 4, 8, 6, 8)
    assert (patches == patches[:, :, :1, :, :1]).all()
    assert (masked.mean((1, 2)) == 0.75).all()
    assert (colors >= 0).all()
    assert (colors <= 255).all()


def test_unnormalize_inverts_normalize():
    target = jax.random.uniform(jax.random.key(0), (2, 3, 192), minval=-2, maxval=2)
    normalized = normalize_patches(target)
    np.testing.assert_allclose(
        reconstruction.unnormalize_patches(normalized, target), target, atol=1e-5
    )


def test_the_command_writes_the_loss(variables, tmp_path, capsys):
    save(tmp_path / "mae", MODEL, variables)
    options = ["--source", "scenes:40x40", "--index", ":3", "--json", str(tmp_path / "scores.json")]
    assert main(["evaluate", "reconstruction", "--weights", str(tmp_path / "mae"), *options]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["loss"] == pytest.approx(evaluate(variables, range(3))["loss"], rel=1e-6)
    assert f"loss of 3 images: {scores['loss']:.4f}" in capsys.readouterr().out
    options = ["--source", "scenes:40x40", "--index", ":3", "--raw-pixels"]
    assert main(["evaluate", "reconstruction", "--weights", str(tmp_path / "mae"), *options]) == 0
    assert f"{scores['loss']:.4f}" not in capsys.readouterr().out


def test_the_command_refuses_other_weights(capsys):
    options = ["--weights", "sam_tiny", "--source", "scenes:40x40"]
    assert main(["evaluate", "reconstruction", *options]) == 1
    message = "sam_tiny must be the weights directory of a masked autoencoder"
    assert message in capsys.readouterr().err
