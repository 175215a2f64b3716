"""Tests that the automatic stage writes SA-1B, with the same files after it was killed."""

import io
import itertools
import json
import os
import random
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam_jax.data.example import BadSample
from sam_jax.data.loader import Loader
from sam_jax.data.open import open_source
from sam_jax.data.segmentation_batch import SegmentationTransform
from sam_jax.engine.automatic import label_images
from sam_jax.engine.folder import acquire, finished_ids, skipped_ids, write_json
from sam_jax.engine.instances import write_instances
from sam_jax.masks import rle
from sam_jax.visualize.overlay import draw_masks
from tests.sam_jax.engine.bright import generate

ROOT = Path(__file__).resolve().parents[3]


def label(source, folder, indices=None, generators=(generate,), **options):
    """Labels images and returns the findings, sorted by index."""
    indices = range(len(source)) if indices is None else indices
    acquire(folder, {})
    found = label_images(source, indices, generators, folder, **options)
    return sorted(found, key=lambda finding: finding.index)


def content(folder):
    """Returns the bytes of every file in a folder, including hidden ones."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def write(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def photo(seed=0, size=(40, 60)):
    small = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize(size[::-1]))


def test_results_are_sa1b_files_with_indices_as_ids(tmp_path):
    scenes = open_source("scenes:40x60")
    found = label(scenes, tmp_path, [3, 11, 700])
    source = open_source(f"sa1b:{tmp_path}")
    assert [Path(source.name(i)).name for i in range(3)] == ["sa_3.jpg", "sa_11.jpg", "sa_700.jpg"]
    for i, finding in enumerate(found):
        records = generate(scenes.image(finding.index))
        assert finding.masks == len(records) > 0
        assert source[i].masks == [record["segmentation"] for record in records]
        assert np.abs(source[i].image.astype(int) - scenes.image(finding.index)).mean() < 4
        written = json.loads((tmp_path / f"sa_{finding.index}.json").read_text())
        assert written["annotations"] == [{"id": k, **r} for k, r in enumerate(records)]
        assert written["image"] == {
            "image_id": finding.index,
            "width": 60,
            "height": 40,
            "file_name": f"sa_{finding.index}.jpg",
        }


def test_results_can_be_trained_on(tmp_path):
    label(open_source("scenes:40x60"), tmp_path, range(4))
    source = open_source(f"sa1b:{tmp_path}")
    loader = Loader(source, np.arange(4), SegmentationTransform((40, 64), 2), batch_size=4, seed=0)
    batch, problems = loader.batch(0)
    assert problems == []
    assert batch.valid.any(axis=1).all()


def test_an_upright_rgb_jpeg_is_copied_and_other_images_are_converted_to_jpeg(tmp_path):
    photos = tmp_path / "photos"
    write(photos / "a.jpg", photo(), quality=70)
    write(photos / "b.png", photo(), compress_level=0)
    write(photos / "c.jpg", photo()[..., 0])
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    write(photos / "d.jpg", photo(), exif=exif)
    exif[0x0112] = 1
    write(photos / "e.jpg", photo(), exif=exif)
    source = open_source(f"images:{photos}")
    assert all(finding.reason is None for finding in label(source, tmp_path / "out"))
    for i, name in enumerate("abcde"):
        path = tmp_path / "out" / f"sa_{i}.jpg"
        kept = path.read_bytes() == source.encoded(i)
        assert kept == (name in "ae"), name
        with Image.open(path) as image:
            assert (image.format, image.mode) == ("JPEG", "RGB")
            assert np.abs(np.asarray(image).astype(int) - source.image(i)).mean() < 3
    masks = open_source(f"sa1b:{tmp_path / 'out'}")[3].masks
    assert masks[0]["size"] == [60, 40]


def test_bad_images_have_a_reason_and_no_files(tmp_path):
    photos = tmp_path / "photos"
    write(photos / "a.png", photo())
    (photos / "b.jpg").write_bytes(b"text")
    write(photos / "c.png", photo(size=(4, 60)))
    Image.new("1", (9000, 9000)).save(photos / "d.png")
    write(photos / "e.png", np.full((10, 70_000, 3), 9, np.uint8))
    write(photos / "f.png", photo())
    source = open_source(f"images:{photos}")
    (photos / "f.png").unlink()
    found = label(source, tmp_path / "out")
    assert [finding.reason for finding in found] == [
        None,
        "broken image",
        "rejected image",
        "broken image",
        "rejected image",
        "missing file",
    ]
    assert found[2].detail == "image must have sides of at least 8 pixels; got 4 x 60"
    assert "at most 67108864 pixels" in found[3].detail
    assert found[4].detail == "a JPEG has at most 65500 pixels a side; got 10 x 70000"
    assert sorted(os.listdir(tmp_path / "out")) == ["everything.json", "sa_0.jpg", "sa_0.json"]


def test_an_image_without_masks_counts_as_finished(tmp_path):
    write(tmp_path / "photos" / "gray.png", np.full((30, 30, 3), 90, np.uint8))
    (finding,) = label(open_source(f"images:{tmp_path / 'photos'}"), tmp_path / "out")
    assert (finding.masks, finding.reason) == (0, None)
    assert finished_ids(tmp_path / "out") == {0}
    assert json.loads((tmp_path / "out" / "sa_0.json").read_text())["annotations"] == []
    with pytest.raises(BadSample, match="no masks"):
        open_source(f"sa1b:{tmp_path / 'out'}")[0]


def test_empty_masks_are_left_out(tmp_path):
    """Checks empty masks, which everything mode returns if there is no stability threshold."""

    def with_an_empty_one(image):
        record = {"segmentation": rle.encode(np.zeros(image.shape[:2], bool)), "area": 0}
        return [*generate(image), record | {"stability_score": float("nan")}]

    scenes = open_source("scenes:40x60")
    label(scenes, tmp_path, [2], [with_an_empty_one])
    masks = open_source(f"sa1b:{tmp_path}")[0].masks
    assert masks == [record["segmentation"] for record in generate(scenes.image(2))]


def test_overlays_show_images_and_masks_and_are_not_read_as_images(tmp_path):
    scenes = open_source("scenes:40x60")
    label(scenes, tmp_path, [5, 6], overlays=True)
    assert sorted(os.listdir(tmp_path / "overlays")) == ["sa_5.png", "sa_6.png"]
    with Image.open(tmp_path / "overlays" / "sa_5.png") as drawn:
        image, overlay = np.split(np.asarray(drawn), 2, axis=1)
    np.testing.assert_array_equal(image, scenes.image(5))
    masks = [record["segmentation"] for record in generate(scenes.image(5))]
    np.testing.assert_array_equal(overlay, draw_masks(image, masks))
    assert len(open_source(f"sa1b:{tmp_path}")) == 2


def test_generators_process_two_images_at_once_with_a_bounded_queue(tmp_path):
    indices, working, most = itertools.count(), [0, 0], [0, 0]
    lock, all_busy = threading.Lock(), threading.Barrier(4)

    def on(device):
        def slowly(image):
            with lock:
                working[device] += 1
                most[device] = max(most[device], working[device])
            all_busy.wait(timeout=60)  # raises unless four threads wait at the same time
            with lock:
                working[device] -= 1
            return generate(image)

        return slowly

    acquire(tmp_path, {})
    scenes = open_source("scenes:40x60")
    found = label_images(scenes, indices, [on(0), on(1)], tmp_path)
    for _ in range(8):
        next(found)
    assert next(indices) <= 8 + 2 * 4
    assert most == [2, 2]
    all_busy.abort()
    with pytest.raises(threading.BrokenBarrierError):
        list(found)


@pytest.mark.parametrize("error", [RuntimeError, ValueError])
def test_an_unexpected_error_ends_the_run(error, tmp_path):
    def fail(image):
        raise error("out of memory")

    with pytest.raises(error, match="out of memory"):
        label(open_source("scenes:40x60"), tmp_path, itertools.count(), [fail])
    (tmp_path / "sa_3.jpg").mkdir()
    found = label_images(open_source("scenes:40x60"), [3], [generate], tmp_path)
    with pytest.raises(OSError, match="sa_3"):
        list(found)


def test_a_folder_with_other_settings_is_refused(tmp_path):
    out = tmp_path / "new" / "out"
    acquire(out, {"points_per_side": 32, "pair": (1, 2)})
    acquire(out, {"points_per_side": 32, "pair": (1, 2)})
    message = "was started with other settings: points_per_side was 32, is 16; more was None, is T"
    with pytest.raises(ValueError, match=message):
        acquire(out, {"points_per_side": 16, "pair": (1, 2), "more": True})
    for invalid in (b"[1]", b"", b'{"points'):
        (out / "everything.json").write_bytes(invalid)
        with pytest.raises(ValueError, match=r"everything\.json is not a settings file: choose"):
            acquire(out, {})
    (tmp_path / "photo.jpg").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"is not empty and has no everything\.json.*another --out"
    ):
        acquire(tmp_path, {})
    with pytest.raises(FileExistsError):
        acquire(tmp_path / "photo.jpg", {})


def test_restarted_processes_remove_unfinished_files(tmp_path):
    acquire(tmp_path, {})
    (tmp_path / "overlays").mkdir()
    for process in range(4):
        for name in ("sa_7.jpg", "sa_7.json", "instances.json", "overlays/sa_7.png"):
            path = tmp_path / name
            unfinished = f".{path.name}.process{process}.{uuid.uuid4().hex}.tmp"
            path.with_name(unfinished).write_bytes(b"cut sh")
        write_json(tmp_path / f"skipped_{process}.json", [{"index": process}], process=process)
    foreign = [".DS_Store", ".holiday.png.process0.12ab.tmp", ".photo_2.jpg.process1.12ab.tmp"]
    for name in foreign:
        (tmp_path / name).write_bytes(b"of another program")
    assert skipped_ids(tmp_path) == {0, 1, 2, 3}
    acquire(tmp_path, {}, process=1, processes=3)
    assert skipped_ids(tmp_path) == {0, 2, 3}
    left = {path.name.split(".")[3] for path in tmp_path.rglob(".sa_7.*.tmp")}
    assert left == {"process0", "process2", "process3"}
    for process in (0, 2):
        acquire(tmp_path, {}, process=process, processes=3)
    assert sorted(content(tmp_path)) == [*foreign, "everything.json"]


def test_instances_are_read_as_coco(tmp_path):
    label(open_source("scenes:40x60"), tmp_path, [8, 2, 5])
    write_instances(tmp_path, [2, 5, 8])
    coco, sa1b = open_source(f"coco:{tmp_path}"), open_source(f"sa1b:{tmp_path}")
    assert len(coco) == 3
    for i in range(3):
        assert (coco.name(i), coco[i].masks) == (sa1b.name(i), sa1b[i].masks)
        np.testing.assert_array_equal(coco[i].image, sa1b[i].image)
    written = json.loads((tmp_path / "instances.json").read_text())
    ids = [annotation["id"] for annotation in written["annotations"]]
    assert ids == list(range(1, len(ids) + 1))
    assert [image["id"] for image in written["images"]] == [2, 5, 8]
    for annotation in written["annotations"]:
        rows, columns = np.nonzero(rle.decode(annotation["segmentation"]))
        x, y, width, height = annotation["bbox"]
        assert (x, y) == (columns.min(), rows.min())
        assert (x + width, y + height) == (columns.max() + 1, rows.max() + 1)
        assert annotation["predicted_iou"] == 0.9


def test_a_coco_file_may_have_no_instances(tmp_path):
    acquire(tmp_path, {})
    write_instances(tmp_path, [])
    written = json.loads((tmp_path / "instances.json").read_text())
    assert (written["images"], written["annotations"]) == ([], [])


def check_visible(folder):
    """Checks that every visible file is complete, and that every JSON has its image."""
    for path in sorted(folder.rglob("*.*")):
        if path.name.startswith("."):
            continue
        if path.suffix == ".json":
            json.loads(path.read_bytes())
            if path.name.startswith("sa_"):
                assert path.with_suffix(".jpg").exists()
                assert (folder / "overlays" / path.with_suffix(".png").name).exists()
        else:
            with Image.open(io.BytesIO(path.read_bytes())) as image:
                image.load()


def test_a_killed_run_can_be_completed_without_partial_files(tmp_path):
    """Kills the run at each step of an image, and at random times."""
    for i in range(24):
        write(tmp_path / "photos" / f"{i:02d}.{'jpg' if i % 2 else 'png'}", photo(i, (120, 160)))
    (tmp_path / "photos" / "07.jpg").write_bytes(b"text")
    command = [sys.executable, "-m", "tests.sam_jax.engine.bright", str(tmp_path / "photos")]

    def start(out, at_step=0):
        return subprocess.Popen(
            [*command, str(tmp_path / out), str(at_step)], cwd=ROOT, stdout=subprocess.PIPE
        )

    with start("reference") as undisturbed:
        assert undisturbed.wait(timeout=120) == 0
    seconds = random.Random(0)
    for at_step in (1, 3, 4, 5, 6, 8, 0, 0, 0):
        with start("killed", at_step) as process:
            process.stdout.readline()  # the run has started
            clock = threading.Timer(seconds.uniform(0.01, 0.1), process.kill)
            if not at_step:
                clock.start()
            while process.poll() is None:
                check_visible(tmp_path / "killed")
            clock.cancel()
        assert process.returncode == -9 or not at_step  # the run may finish before the timer
    with start("killed") as process:
        assert process.wait(timeout=120) == 0
    assert content(tmp_path / "killed") == content(tmp_path / "reference")
    assert len(finished_ids(tmp_path / "reference")) == 23
    assert skipped_ids(tmp_path / "reference") == {7}
