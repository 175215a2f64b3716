"""Tests the command line. Tests of imports start a new process."""

import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import sam_jax
from sam_jax.cli.lazy_parser import join_negative_values
from sam_jax.cli.main import main
from sam_jax.cli.predict import Prompt, outside_of_image
from sam_jax.evaluate.protocol import EVALUATIONS
from sam_jax.masks import rle
from sam_jax.model.init import init_variables
from sam_jax.model.mae import mae_tiny
from sam_jax.visualize.overlay import BOX_COLOR
from sam_jax.weights.formats import read, save


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny"
    model = sam_jax.sam_tiny(depth=2, global_blocks=(1,), decoder_heads=8)
    sam_jax.save(path, model, jax.jit(lambda: init_variables(model, seed=0))())
    return str(path)


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def run(*args):
    command = [sys.executable, *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_help_does_not_import_jax():
    source = (
        "import sys, sam_jax.cli.main\n"
        "try: sam_jax.cli.main.main(['--help'])\n"
        "except SystemExit: pass\n"
    )
    result = run("-c", source + "print([m for m in sys.modules if m.startswith(('jax', 'flax'))])")
    assert result.stdout.endswith("[]\n"), result.stdout + result.stderr
    for verb in ("predict", "everything", "convert", "info", "evaluate", "dataset"):
        assert f"\n    {verb}" in result.stdout


@pytest.mark.parametrize(
    "verb",
    [
        *("predict", "everything", "convert", "info", "dataset", "dataset check", "dataset stats"),
        *("evaluate", *(f"evaluate {name}" for name in EVALUATIONS)),
    ],
)
def test_every_subcommand_has_an_example(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*verb.split(), "--help"])
    assert stop.value.code == 0
    assert f"example: sam-jax {verb} " in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("words", "joined"),
    [
        (["--point", "-5,10", "--box", "-1,-2,3,4"], ["--point=-5,10", "--box=-1,-2,3,4"]),
        (["--index", "-3:", "--x", "-.5"], ["--index=-3:", "--x=-.5"]),
        (["--overlays", "--out", "x", "-5"], ["--overlays", "--out", "x", "-5"]),
        (["--point=1,2", "-5,10", "-h"], ["--point=1,2", "-5,10", "-h"]),
    ],
)
def test_values_may_begin_with_a_minus_sign(words, joined):
    assert join_negative_values(words) == joined


def test_a_home_folder_is_expanded_in_every_path(weights, photo, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(weights, tmp_path / "tiny")
    shutil.copy(photo, tmp_path / "photo.png")
    command = ["predict", "~/photo.png", "--weights=~/tiny", "--out=~/masks"]
    assert main([*command, "--point", "-5,10", "--masks", "1"]) == 0
    assert json.loads((tmp_path / "masks" / "masks.json").read_text())["points"] == [[-5.0, 10.0]]
    assert capsys.readouterr().err.startswith("warning: --point -5,10 lies outside of the image")
    assert main(["convert", "~/tiny", "~/tiny.pth"]) == 0
    assert (tmp_path / "tiny.pth").exists()
    assert main(["info", "--weights=~/tiny.pth"]) == 0
    assert main(["dataset", "check", "images:~/masks", "--json=~/report.json"]) in (0, 1)
    assert (tmp_path / "report.json").exists()
    assert not os.path.lexists("~")


def test_a_result_that_cannot_be_written_is_named_before_computing(photo, tmp_path, capsys):
    for out, message in (
        (photo, f"--out {photo}: {photo} is not a folder"),
        (f"{photo}/masks", f"{photo} is not a folder"),
    ):
        assert main(["predict", photo, "--weights", "none", "--point", "1,1", "--out", out]) == 1
        assert message in capsys.readouterr().err
        assert main(["everything", photo, "--weights", "none", "--out", out]) == 1
        assert message in capsys.readouterr().err
        assert main(["dataset", "stats", "scenes:8x8", "--out", out]) == 1
        assert message in capsys.readouterr().err
    json_option = ["--json", str(tmp_path / "missing" / "x.json")]
    for command in (
        ["dataset", "check", "scenes:8x8"],
        ["evaluate", "clicks", "--weights", "none", "--source", "scenes:8x8"],
    ):
        assert main([*command, *json_option]) == 1
        assert f"there is no folder {tmp_path / 'missing'}" in capsys.readouterr().err


def test_an_interruption_is_one_line(monkeypatch, capsys):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("sam_jax.cli.info.run", interrupt)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "sam-jax info: interrupted\n"


def test_python_m_is_the_same_program():
    result = run("-m", "sam_jax", "--help")
    assert result.returncode == 0
    assert result.stdout.startswith("usage: sam-jax")


def test_predict_writes_overlay_masks_and_json(weights, photo, tmp_path, capsys):
    out = tmp_path / "new" / "masks"
    assert (
        main(["predict", photo, "--weights", weights, "--point", "45,30", "--out", str(out)]) == 0
    )
    files = sorted(os.listdir(out))
    assert files == ["mask_0.png", "mask_1.png", "mask_2.png", "masks.json", "overlay.png"]
    assert "mask_0.png  predicted IoU" in capsys.readouterr().out

    result = json.loads((out / "masks.json").read_text())
    assert (result["height"], result["width"]) == (60, 90)
    assert (result["points"], result["labels"], result["box"]) == ([[45.0, 30.0]], [1], None)
    predicted = [record["predicted_iou"] for record in result["masks"]]
    assert predicted == sorted(predicted, reverse=True)
    for record in result["masks"]:
        mask = np.asarray(Image.open(out / record["file"]))
        assert np.array_equal(mask, rle.decode(record["segmentation"]))
        assert mask.sum() == record["area"]
        if record["area"]:
            rows, columns = np.nonzero(mask)
            x, y = columns.min(), rows.min()
            assert record["bbox"] == [x, y, columns.max() - x, rows.max() - y]
    assert np.asarray(Image.open(out / "overlay.png")).shape == (60, 90, 3)


def test_predict_in_tiles_names_the_tile(weights, tmp_path):
    image = tmp_path / "large.png"
    pixels = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(image)
    command = ["predict", str(image), "--weights", weights, "--box", "101,60,150,80", "--tiles"]
    assert main([*command, "auto", "--out", str(tmp_path / "auto")]) == 0
    result = json.loads((tmp_path / "auto" / "masks.json").read_text())
    tile = result["tile"]
    assert 50 < tile["height"] == tile["width"] < 200
    rows = slice(tile["top"], tile["top"] + tile["height"])
    columns = slice(tile["left"], tile["left"] + tile["width"])
    for record in result["masks"]:
        mask = rle.decode(record["segmentation"])
        assert mask.shape == (200, 300)
        assert mask[rows, columns].sum() == mask.sum()
    closeup = np.asarray(Image.open(tmp_path / "auto" / "closeup.png"))
    zoom = closeup.shape[0] // tile["height"]
    assert closeup.shape == (zoom * tile["height"], zoom * tile["width"], 3)
    assert 512 <= closeup.shape[0] < 512 + tile["height"]
    x, y = (zoom * (c - start + 0.5) - 0.5 for c, start in ((101, tile["left"]), (60, tile["top"])))
    assert closeup[round(y), round(x)].tolist() == list(BOX_COLOR)
    assert main([*command, "500", "--out", str(tmp_path / "one")]) == 0
    assert not (tmp_path / "one" / "closeup.png").exists()
    result = json.loads((tmp_path / "one" / "masks.json").read_text())
    assert result["tile"] == {"top": 0, "left": 0, "height": 200, "width": 300}


def test_a_model_for_windows_around_objects_predicts_in_tiles_by_default(tmp_path):
    y, x = np.mgrid[:120, :160]
    centers = [(30, 40), (70, 110), (95, 30)]
    is_disc = np.any([(y - cy) ** 2 + (x - cx) ** 2 <= 8**2 for cy, cx in centers], axis=0)
    image = tmp_path / "cells.png"
    Image.fromarray(np.where(is_disc, 180, 10).astype(np.uint8)).convert("RGB").save(image)
    command = ["predict", str(image), "--weights", "sam_nuclei", "--box", "101,61,119,79"]
    results = {}
    for tiles in ("default", "auto", "none"):
        option = [] if tiles == "default" else ["--tiles", tiles]
        assert main([*command, *option, "--out", str(tmp_path / tiles)]) == 0
        results[tiles] = json.loads((tmp_path / tiles / "masks.json").read_text())
    assert results["default"] == results["auto"]
    assert results["default"]["tile"]["height"] < 60
    assert "tile" not in results["none"]
    assert results["default"]["masks"] != results["none"]["masks"]


@pytest.mark.parametrize(
    ("options", "count"),
    [
        (["--point", "45,30", "--point", "3,4,0"], 1),
        (["--box", "5,6,50,40"], 3),
        (["--box", "5,6,50,40", "--point", "45,30,1"], 1),
        (["--point", "45,30", "--masks", "1"], 1),
        (["--point", "45,30", "--box", "5,6,50,40", "--masks", "3"], 3),
    ],
)
def test_three_masks_for_one_prompt_and_one_for_several(weights, photo, tmp_path, options, count):
    assert main(["predict", photo, "--weights", weights, *options, "--out", str(tmp_path)]) == 0
    assert len(json.loads((tmp_path / "masks.json").read_text())["masks"]) == count


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--point", "1,2,3"], "'1,2,3' is not X,Y or X,Y,0 or X,Y,1"),
        (["--point", "1;2"], "'1;2' is not a list of numbers separated by commas"),
        (["--box", "1,2,3"], "'1,2,3' is not X0,Y0,X1,Y1"),
        (["--masks", "2"], "invalid choice"),
        (["--tiles", "x"], "'x' is not auto, none or a number of pixels of at least 16"),
    ],
)
def test_wrong_usage_has_exit_code_2(weights, photo, tmp_path, options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["predict", photo, "--weights", weights, *options, "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "there is no prompt"),
        (["--point", "nan,3"], "point_coords must be finite"),
        (["--box", "9,9,3,3"], "--box must have X0 < X1 and Y0 < Y1; got [9.0, 9.0, 3.0, 3.0]"),
    ],
)
def test_errors_are_one_line_and_leave_no_file(weights, photo, tmp_path, options, message, capsys):
    out = tmp_path / "out"
    assert main(["predict", photo, "--weights", weights, *options, "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("sam-jax predict: ")
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_missing_and_broken_files_are_named(weights, photo, tmp_path, capsys):
    out = str(tmp_path / "out")
    click = ["--point", "1,1", "--out", out]
    missing = str(tmp_path / "missing")
    assert main(["predict", photo, "--weights", missing, *click]) == 1
    assert f"no weights at {missing}" in capsys.readouterr().err
    assert main(["predict", missing, "--weights", weights, *click]) == 1
    assert missing in capsys.readouterr().err
    text = tmp_path / "text.png"
    text.write_text("not an image")
    assert main(["predict", str(text), "--weights", weights, *click]) == 1
    assert "text.png" in capsys.readouterr().err
    assert not os.path.exists(out)


def test_an_image_too_large_is_refused_before_it_is_decoded(weights, tmp_path, capsys):
    path = tmp_path / "large.png"
    Image.new("1", (9000, 9000)).save(path)
    options = ["--weights", weights, "--point", "1,1", "--out", str(tmp_path / "out")]
    assert main(["predict", str(path), *options]) == 1
    assert "at most 67108864 pixels; got 9000 x 9000" in capsys.readouterr().err


def test_the_orientation_of_a_photo_is_applied(weights, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees clockwise
    path = tmp_path / "side.jpg"
    Image.new("RGB", (80, 40)).save(path, exif=exif)
    options = ["--weights", weights, "--point", "1,1", "--out", str(tmp_path)]
    assert main(["predict", str(path), *options]) == 0
    result = json.loads((tmp_path / "masks.json").read_text())
    assert (result["height"], result["width"]) == (80, 40)


def test_convert_through_all_formats_is_lossless(weights, tmp_path, capsys):
    paths = [str(tmp_path / name) for name in ("a.pth", "b.safetensors", "hf", "back")]
    assert main(["convert", weights, paths[0]]) == 0
    assert main(["convert", paths[0], paths[1]]) == 0
    assert main(["convert", paths[1], paths[2], "--format", "huggingface"]) == 0
    assert main(["convert", paths[2], paths[3]]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{paths[2]} -> {paths[3]}"
    first, last = (os.path.join(p, "weights.safetensors") for p in (weights, paths[3]))
    with open(first, "rb") as a, open(last, "rb") as b:
        assert a.read() == b.read()


def test_convert_writes_an_autoencoder_with_official_names(tmp_path, capsys):
    model = mae_tiny(image_size=(16, 24))
    save(tmp_path / "mae", model, init_variables(model, 0))
    assert main(["convert", str(tmp_path / "mae"), str(tmp_path / "mae.pth")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'mae'} -> {tmp_path / 'mae.pth'}\n"
    tensors = read(tmp_path / "mae.pth").tensors
    assert tensors["decoder_pos_embed"].shape == (1, 1 + 2 * 3, 64)
    assert main(["info", "--weights", str(tmp_path / "mae")]) == 1
    assert "holds a masked autoencoder, not a SAM" in capsys.readouterr().err


@pytest.fixture
def labels(tmp_path):
    """Returns the folder of a source with two usable samples."""
    folder = tmp_path / "labels"
    for name in ("a", "b"):
        for kind, pixels in (("images", np.zeros((6, 8, 3))), ("masks", np.ones((6, 8)))):
            (folder / name / kind).mkdir(parents=True)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / kind / f"{name}.png")
    return folder


def test_dataset_check_of_a_source_without_errors(labels, tmp_path, capsys):
    report = tmp_path / "report.json"
    assert main(["dataset", "check", f"labels:{labels}", "--json", str(report)]) == 0
    assert capsys.readouterr().out == "2 of 2 samples are usable, 2 masks\n"
    result = json.loads(report.read_text())
    expected = {"samples": 2, "usable": 2, "masks": 2, "reasons": {}, "bad": []}
    assert result == {"source": f"labels:{labels}", **expected}


def test_dataset_check_counts_unusable_masks_of_usable_samples(labels, capsys):
    for name in ("c", "d"):
        Image.new("L", (8, 6)).save(labels / "b" / "masks" / f"{name}.png")
    assert main(["dataset", "check", f"labels:{labels}"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{labels}/b/images/b.png: usable: 1 masks without 2 empty mask: mask 1: it has no pixels "
        "of 6 x 8",
        "      2  empty mask, masks of usable samples that are skipped",
        "2 of 2 samples are usable, 2 masks",
    ]


def test_dataset_check_names_unusable_samples(labels, tmp_path, capsys):
    image = labels / "b" / "images" / "b.png"
    image.write_text("not an image")
    report = tmp_path / "report.json"
    assert main(["dataset", "check", f"labels:{labels}", "--json", str(report)]) == 1
    captured = capsys.readouterr()
    first, *counts = captured.out.splitlines()
    assert first.startswith(f"{image}: broken image: ")
    assert counts == ["      1  broken image", "1 of 2 samples are usable, 1 masks"]
    assert captured.err == ""  # no progress bar outside a terminal
    assert json.loads(report.read_text())["bad"][0]["name"] == str(image)


@pytest.mark.parametrize(
    ("source", "message"),
    [("label:x", "did you mean labels"), ("coco:missing", "there is no missing/instances.json")],
)
def test_an_unknown_source_is_reported_in_one_line(source, message, capsys):
    assert main(["dataset", "check", source]) == 1
    error = capsys.readouterr().err
    assert error.startswith("sam-jax dataset: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("points", "box", "outside"),
    [
        ([(0, 0), (200, 100)], [-5, -5, 1, 1], []),
        ([(100, 200)], None, ["--point 100,200"]),
        ([(-1, 5)], [201, 5, 210, 9], ["--point -1,5", "--box 201,5,210,9"]),
    ],
)
def test_prompts_outside_of_the_image_are_named(points, box, outside):
    texts = outside_of_image(Prompt(points, [1] * len(points), box), (100, 200))
    assert [text.partition(" lies outside")[0] for text in texts] == outside
    assert all(text.endswith("200 pixels wide and 100 pixels high") for text in texts)


def test_version_is_printed(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"sam_jax {sam_jax.__version__}\n"


def test_info_prints_versions_devices_and_the_model(weights, capsys):
    assert main(["info", "--weights", weights]) == 0
    printed = capsys.readouterr().out
    for word in ("sam_jax", "python", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain",
                 "device", "trainable parameters"):  # fmt: skip
        assert word in printed
    lines = printed.partition("weights  ")[0].splitlines()
    assert {line[16] for line in lines} == {" "}, "the values must be aligned"
    assert "embed_dim = 64" in printed
