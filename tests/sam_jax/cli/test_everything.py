"""Tests `sam-jax everything`. One test uses the model, and the others a fake generator."""

import errno
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from sam_jax.cli import everything
from sam_jax.cli.main import main
from sam_jax.data.open import open_source
from sam_jax.engine.folder import reserve_process_number
from sam_jax.everything import generator
from sam_jax.masks import rle
from tests.sam_jax.engine import bright

SCENE = Path(__file__).parents[2] / "data" / "scene.png"


class Bright(generator.SamAutomaticMaskGenerator):
    """A fake generator with the same arguments. Its masks are bright regions."""

    generate = staticmethod(bright.generate)


@pytest.fixture
def fake_generator(monkeypatch):
    monkeypatch.setattr(everything, "SamAutomaticMaskGenerator", Bright)
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])


@pytest.fixture
def photos(tmp_path):
    """Returns a folder with three photos, a broken file and an image that is too small."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, name in enumerate(("a.jpg", "c.png", "e.jpg")):
        small = np.random.default_rng(i).integers(0, 256, (4, 6, 3), dtype=np.uint8)
        Image.fromarray(small).resize((60, 40)).save(folder / name)
    (folder / "b\n.jpg").write_bytes(b"text")
    Image.new("RGB", (60, 4)).save(folder / "d.png")
    return folder


def run(images, out, *options):
    return main(["everything", str(images), "--weights", "sam_tiny", "--out", str(out), *options])


def ids(out):
    return sorted(int(path.stem[3:]) for path in Path(out).glob("sa_*.json"))


def test_a_model_segments_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    options = ["--points-per-side", "3", "--pred-iou-thresh", "0.5", "--box-nms-thresh", "0.6"]
    options += ["--stability-score-thresh", "0.5", "--min-mask-region-area", "4", "--overlays"]
    out = tmp_path / "out"
    assert run(SCENE, out, *options, "--coco") == 0
    assert "segmented 1 of 1 images, 1 of them in this run: " in capsys.readouterr().out
    assert sorted(os.listdir(out)) == [
        "everything.json",
        "images.json",
        "instances.json",
        "overlays",
        "sa_0.jpg",
        "sa_0.json",
        "skipped_0.json",
    ]
    annotations = json.loads((out / "sa_0.json").read_text())["annotations"]
    assert annotations
    for annotation in annotations:
        assert annotation["area"] == rle.decode(annotation["segmentation"]).sum()
        assert annotation["predicted_iou"] > 0.5
        assert annotation["stability_score"] >= 0.5
    for kind in ("sa1b", "coco"):
        (example,) = open_source(f"{kind}:{out}")
        assert example.masks == [annotation["segmentation"] for annotation in annotations]
    settings = json.loads((out / "everything.json").read_text())
    assert (settings["points_per_side"], settings["crop_n_layers"]) == (3, 0)


def test_tiles_are_an_option_of_the_generator(fake_generator, photos, tmp_path):
    assert run(photos, tmp_path / "out", "--tiles", "auto") == 0
    settings = json.loads((tmp_path / "out" / "everything.json").read_text())
    assert settings["tiles"] == "auto"


def test_default_tiles_depend_on_the_weights(fake_generator, photos, tmp_path):
    for weights, option, expected in (
        ("sam_tiny", [], None),
        ("sam_nuclei", [], "auto"),
        ("sam_nuclei", ["--tiles", "none"], None),
    ):
        out = tmp_path / f"{weights}{len(option)}"
        assert run(photos, out, "--weights", weights, *option) == 0
        assert json.loads((out / "everything.json").read_text())["tiles"] == expected
        explicit = ["--tiles", str(expected).lower()]
        assert run(photos, out, "--weights", weights, *explicit) == 0


def test_bad_images_are_named_and_skipped(fake_generator, photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(photos, out) == 0
    lines = capsys.readouterr().out.splitlines()
    named = sorted(lines[:2])
    assert named[0].startswith(f"{photos}/b\\n.jpg: broken image: ")
    assert named[1].startswith(f"{photos}/d.png: rejected image: image must have sides of at least")
    assert sorted(lines[2:4]) == ["      1  broken image", "      1  rejected image"]
    assert lines[4].startswith("segmented 3 of 5 images, 3 of them in this run: ")
    assert ids(out) == [0, 2, 4]
    bad = json.loads((out / "skipped_0.json").read_text())
    assert [(entry["index"], entry["reason"]) for entry in bad] == [
        (1, "broken image"),
        (3, "rejected image"),
    ]


def test_a_second_run_segments_only_the_missing_images(fake_generator, photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(photos, out) == 0
    kept = (out / "sa_4.json").stat().st_mtime_ns
    (out / "sa_0.json").unlink()
    Image.new("RGB", (60, 40)).save(photos / "d.png")
    capsys.readouterr()
    assert run(photos, out, "--coco") == 0
    assert "segmented 4 of 5 images, 2 of them in this run: " in capsys.readouterr().out
    assert ids(out) == [0, 2, 3, 4]
    assert (out / "sa_4.json").stat().st_mtime_ns == kept
    assert [entry["index"] for entry in json.loads((out / "skipped_0.json").read_text())] == [1]
    images = json.loads((out / "instances.json").read_text())["images"]
    assert [image["file_name"] for image in images] == [f"sa_{i}.jpg" for i in (0, 2, 3, 4)]


def test_processes_share_the_images_and_the_last_writes_coco(
    fake_generator, photos, tmp_path, capsys
):
    out = tmp_path / "out"
    options = ["--coco", "--index", "1:", "--processes", "2"]
    assert run(photos, out, *options, "--process", "1") == 0  # the small image, and e.jpg
    assert ids(out) == [2, 4]
    printed = capsys.readouterr().out
    assert (
        "2 images are not finished: instances.json will be written by the last process" in printed
    )
    assert not (out / "instances.json").exists()
    assert run(photos, out, *options, "--process", "0") == 1  # both images are bad
    assert "segmented 0 of 2 images" in capsys.readouterr().out
    assert len(open_source(f"coco:{out}")) == 2
    assert sorted(path.name for path in out.glob("skipped_*")) == [
        "skipped_0.json",
        "skipped_1.json",
    ]
    assert run(photos, out, "--index", "1:", "--processes", "9", "--process", "8") == 0


@pytest.mark.parametrize("spelling", ["photos", "./photos/", "images:photos", "~/photos"])
def test_an_index_names_the_image_of_each_id(
    fake_generator, photos, tmp_path, monkeypatch, spelling
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (photos / "below").mkdir()
    name = os.fsdecode(b"below/\xff.png")  # is no UTF-8
    Image.new("RGB", (60, 40)).save(photos / name)
    out = tmp_path / "out"
    options = ["--index", "1:", "--processes", "2"]
    assert run(spelling, out, *options, "--process", "1") == 0
    index = (out / "images.json").read_bytes()
    expected = {"1": "b\n.jpg", "2": name, "3": "c.png", "4": "d.png", "5": "e.jpg"}
    assert json.loads(index) == expected
    assert run(spelling, out, *options, "--process", "0") == 0
    assert (out / "images.json").read_bytes() == index


def test_the_index_of_a_file_is_its_name(fake_generator, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(photos)
    for i, spelling in enumerate(("c.png", photos / "c.png", "../photos/c.png")):
        assert run(spelling, tmp_path / str(i)) == 0
        assert json.loads((tmp_path / str(i) / "images.json").read_text()) == {"0": "c.png"}


def test_damaged_results_are_named_and_made_again(fake_generator, photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(photos, out, "--overlays") == 0
    json_file, jpeg_file = out / "sa_2.json", out / "sa_2.jpg"
    text, jpeg = json_file.read_bytes(), jpeg_file.read_bytes()
    other = (out / "sa_4.json").read_bytes()
    for damaged in (b"", b"{", bytes(len(text)), text[:-40], text[: len(text) // 2] * 2, other):
        json_file.write_bytes(damaged)
        capsys.readouterr()
        assert run(photos, out, "--overlays") == 0
        printed = capsys.readouterr().out
        assert f"{out}/sa_2.json or its image is damaged: it is made again" in printed
        assert "segmented 3 of 5 images, 1 of them in this run: " in printed
        assert json_file.read_bytes() == text
    overlay = out / "overlays" / "sa_2.png"
    for damage in (
        jpeg_file.unlink,
        lambda: jpeg_file.write_bytes(b""),
        overlay.unlink,
        lambda: (json_file.unlink(), os.mkfifo(json_file)),
    ):
        damage()
        assert run(photos, out, "--overlays") == 0
        assert (jpeg_file.read_bytes(), json_file.read_bytes()) == (jpeg, text)
        assert overlay.is_file()
        assert "is damaged: " in capsys.readouterr().out
    assert run(photos, out, "--overlays") == 0
    assert "is damaged: " not in capsys.readouterr().out


def test_coco_names_a_damaged_file(fake_generator, photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(photos, out) == 0
    path = out / "sa_2.json"
    path.write_bytes(path.read_bytes().replace(b'"annotations": [', b'"annotations": [?', 1))
    assert run(photos, out, "--coco") == 1
    error = capsys.readouterr().err
    assert f"{path} is damaged (" in error
    assert "remove it, and run the same command again" in error
    assert error.count("\n") == 1
    assert not (out / "instances.json").exists()
    path.unlink()
    assert run(photos, out, "--coco") == 0


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_full_disk_is_named_and_leaves_no_partial_file(
    fake_generator, photos, tmp_path, monkeypatch, capsys, error
):
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert run(photos, whole) == 0
    fsync, calls = os.fsync, []

    def fail(file):
        calls.append(file)
        if len(calls) > 4:
            raise OSError(error, os.strerror(error))
        fsync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        capsys.readouterr()
        assert run(photos, out) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    described = f"[Errno {error}] {os.strerror(error)}: '{out}/sa_"
    assert message.startswith(f"sam-jax everything: {described}")
    assert message.endswith("': what is finished stays; run the same command again\n")
    assert not [name for name in os.listdir(out) if name.startswith(".")]
    for path in out.iterdir():
        assert path.read_bytes() == (whole / path.name).read_bytes()
    assert run(photos, out) == 0
    for path in whole.iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes()


@pytest.mark.parametrize(
    ("scores", "lower"),
    [
        ((0.71, 0.96), "lower --pred-iou-thresh (now 0.88). The"),
        ((0.91, 0.9), "lower --stability-score-thresh (now 0.95). The"),
        ((0.99, 0.99), "--pred-iou-thresh (now 0.88) and --stability-score-thresh (now 0.95). The"),
    ],
)
def test_thresholds_that_no_mask_passes_are_named(
    photos, tmp_path, monkeypatch, capsys, scores, lower
):
    class Strict(Bright):
        generate = staticmethod(lambda image: bright.generate(image)[:0])
        best_scores = staticmethod(lambda image: generator.BestScores(*scores))

    monkeypatch.setattr(everything, "SamAutomaticMaskGenerator", Strict)
    assert run(photos, tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert lower in printed
    expected = f"in {photos}/a.jpg are {scores[0]:.3f} for the predicted IoU and {scores[1]:.3f} "
    assert expected in printed
    assert run(photos, tmp_path / "out") == 0
    assert "passed the thresholds" not in capsys.readouterr().out


def test_other_settings_are_refused(fake_generator, photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(photos, out, "--preset", "sa1b", "--crop-n-layers", "1", "--dtype", "bfloat16") == 0
    settings = json.loads((out / "everything.json").read_text())
    preset = generator.sa1b_preset() | {"crop_n_layers": 1, "output_mode": "coco_rle"}
    assert {name: settings[name] for name in preset} == preset
    assert (settings["dtype"], settings["overlays"]) == ("bfloat16", False)
    capsys.readouterr()
    assert run(photos, out, "--preset", "sa1b", "--dtype", "bfloat16", "--overlays") == 1
    error = capsys.readouterr().err
    assert (
        "started with other settings: overlays was False, is True; crop_n_layers was 1, is 2"
        in error
    )
    again = ["--preset", "sa1b", "--crop-n-layers", "1", "--dtype", "bfloat16"]
    assert run(photos / ".." / photos.name, out, *again, "--points-per-batch", "16") == 0
    capsys.readouterr()
    (photos / "aa.png").write_bytes((photos / "c.png").read_bytes())
    assert run(photos, out, "--preset", "sa1b", "--crop-n-layers", "1", "--dtype", "bfloat16") == 1
    assert "number of images was 5, is 6; checksum of their names was" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        ("missing.jpg", [], "there is no file and no folder missing.jpg"),
        ("photos", ["--index", "9:"], "the slice '9:' of 5 examples leaves none"),
        (
            "photos",
            ["--process", "1"],
            "--process must be at least 0 and less than --processes",
        ),
        ("photos", ["--points-per-batch", "0"], "points_per_batch must be at least 1"),
        (
            "photos",
            ["--out", "photos/masks"],
            "--out must be outside of photos, the folder of the images",
        ),
        (
            "images:photos",
            ["--out", "photos"],
            "--out must be outside of photos, the folder of the images",
        ),
        ("photos", ["--out", "gs://bucket/masks"], "--out must be a folder on a disk; got gs://"),
        ("photos", ["--out", "."], "is not empty and has no everything.json"),
    ],
)
def test_wrong_arguments_are_reported_in_one_line(
    fake_generator, photos, tmp_path, monkeypatch, images, options, message, capsys
):
    monkeypatch.chdir(tmp_path)
    assert run(images, "out", *options) == 1
    error = capsys.readouterr().err
    assert error.startswith("sam-jax everything: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert len(os.listdir(photos)) == 5


def test_a_second_process_of_the_same_number_is_rejected(fake_generator, photos, tmp_path, capsys):
    out = tmp_path / "out"
    unfinished = out / ".sa_0.jpg.process0.ab12.tmp"
    with reserve_process_number(out, 0):
        unfinished.touch()
        assert run(photos, out) == 1
        message = f"process number 0 of {out} is in use by process {os.getpid()} on "
        assert message in capsys.readouterr().err
        assert sorted(os.listdir(out)) == [".process0.lock", unfinished.name]
        # Another number may work in the folder at the same time.
        assert run(photos, out, "--process", "1", "--processes", "3") == 0
        assert unfinished.exists()
    assert run(photos, out) == 0
    assert not [name for name in os.listdir(out) if name.startswith(".")]


def test_unfinished_files_of_a_process_that_runs_are_kept(fake_generator, photos, tmp_path):
    out = tmp_path / "out"
    unfinished = out / ".sa_9.jpg.process3.ab12.tmp"
    with reserve_process_number(out, 3):
        unfinished.touch()
        assert run(photos, out) == 0
        assert unfinished.exists()
    assert run(photos, out) == 0
    assert not unfinished.exists()
