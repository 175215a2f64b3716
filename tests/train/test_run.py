"""Training runs as users start them: interrupted, resumed, rejected and fine-tuned."""

import functools
import hashlib
import json
import os
import re
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

import sam_jax
from sam_jax.weights.formats import load_autoencoder
from tests.train.running import AUTOENCODER, CONFIG, ROOT, finish, losses, start_run
from train import __main__ as command
from train.rows import read_rows


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("configs") / "small.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def start(config):
    """Starts `python -m train` in a process."""
    return functools.partial(start_run, config)


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory):
    """The workdir of a run that was never interrupted."""
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    finish(start(workdir))
    return workdir


def digest(workdir):
    return hashlib.sha256((workdir / "weights" / "weights.safetensors").read_bytes()).hexdigest()


def test_a_finished_workdir_has_weights_an_evaluation_and_a_report(uninterrupted):
    assert [step for step, _, _ in losses(uninterrupted)] == list(range(1, 13))
    model, variables = sam_jax.load(uninterrupted / "weights")
    assert model.image_size == (48, 64)
    assert set(variables) == {"params", "constants"}
    scores = json.loads((uninterrupted / "evaluation.json").read_text())
    assert scores["source"] == "scenes:48x64"
    assert set(scores["clicks"]) == {"1", "2", "3", "5", "9"}
    assert set(scores["box"]) == {"chosen", "oracle"}
    objects = read_rows(uninterrupted / "objects.jsonl")
    assert len(objects) == scores["objects"] > 0
    box = np.mean([row["box"]["chosen"] for row in objects])
    np.testing.assert_allclose(box, scores["box"]["chosen"], atol=1e-4)
    assert {"curves.png", "clicks.png", "examples.png"} <= {
        path.name for path in (uninterrupted / "report").iterdir()
    }
    assert any((uninterrupted / "tensorboard").iterdir())


@pytest.mark.slow
def test_a_run_killed_three_times_has_the_same_result(start, uninterrupted, tmp_path):
    workdir = tmp_path / "killed"
    for rows in (3, 6, 9):
        process = start(workdir)
        deadline = time.monotonic() + 240
        while len(read_rows(workdir / "metrics.jsonl")) < rows:
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()
        process.communicate()
    finish(start(workdir))
    assert losses(workdir) == losses(uninterrupted)
    assert digest(workdir) == digest(uninterrupted)


@pytest.mark.slow
def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(start, uninterrupted, tmp_path):
    workdir = tmp_path / "damaged"
    finish(start(workdir, "num_steps=10"))
    newest = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    for path in newest.rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)
    output = finish(start(workdir))
    assert "checkpoint 10 is damaged: " in output
    assert re.search(r"^resuming from step [1-9]$", output, re.MULTILINE)
    assert "Traceback" not in output
    assert newest.with_name("10.damaged").is_dir()
    assert losses(workdir) == losses(uninterrupted)
    assert digest(workdir) == digest(uninterrupted)


def test_frozen_parts_keep_their_parameters(start, uninterrupted, tmp_path):
    workdir = tmp_path / "tuned"
    settings = (
        f"init_from={uninterrupted / 'weights'}",
        "trainable=mask_decoder",
        "data.flips=False",
        "data.jitter=0.3,0.7",
        "data.jitter_unit=object",
        "data.views=2",
        f"feature_cache={tmp_path / 'features'}",
    )
    output = finish(start(workdir, *settings, "num_steps=3"))
    words = [line.split()[0] for line in output.splitlines()[:7]]
    assert words == ["model", "devices", "images", "steps", "workdir", "masks", "slots"]
    assert "are trained" in output.splitlines()[0]
    assert output.index("compiling the step ...") < output.index("step 3 of 3: loss ")
    assert "resuming" not in output
    assert sam_jax.load(uninterrupted / "weights")[0].object_share is None
    assert sam_jax.load(workdir / "weights")[0].object_share == (0.3, 0.7)
    assert json.loads((workdir / "evaluation.json").read_text())["tiles"]["size"] == "auto"
    before, after = (sam_jax.load(w / "weights")[1]["params"] for w in (uninterrupted, workdir))
    for part, tree in after.items():
        pairs = zip(*map(jax.tree.leaves, (tree, before[part])), strict=True)
        assert all(np.array_equal(x, y) for x, y in pairs) is (part != "mask_decoder")


@pytest.mark.slow
def test_a_killed_run_of_a_masked_autoencoder_has_the_same_result(tmp_path):
    config = tmp_path / "autoencoder.py"
    config.write_text(AUTOENCODER)
    start = functools.partial(start_run, config)
    for name in ("uninterrupted", "killed"):
        process = start(tmp_path / name)
        while name == "killed" and len(read_rows(tmp_path / name / "metrics.jsonl")) < 5:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.002)
        if name == "killed":
            process.kill()
            process.communicate()
            process = start(tmp_path / name)
        finish(process)
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    assert losses(killed) == losses(uninterrupted)
    assert [step for step, _, _ in losses(uninterrupted)] == list(range(1, 9))
    weights = [(w / "weights" / "mae.safetensors").read_bytes() for w in (uninterrupted, killed)]
    assert weights[0] == weights[1]
    assert load_autoencoder(uninterrupted / "weights")[0].image_size == (32, 32)
    scores = json.loads((uninterrupted / "evaluation.json").read_text())
    assert (scores["images"], scores["bad_samples"]) == (5, 0)
    assert 0 < scores["loss"] < 2
    (intermediate,) = read_rows(uninterrupted / "evaluations.jsonl")
    assert (intermediate["step"], intermediate["images"]) == (4, 5)
    assert {path.name for path in (uninterrupted / "report").iterdir()} == {
        *("index.html", "curves.png", "reconstructions.png"),
    }


def error_of(monkeypatch, capsys, config, workdir, *settings):
    """Runs the command, which must fail, and returns its error output."""
    arguments = ["--set", *settings] if settings else []
    argv = ["train", str(config), "--workdir", str(workdir), *arguments]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.chdir(ROOT)
    assert command.main() == 1
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optimizers.peak_lr=1", "did you mean optimizer?"),
        ("optimizer.peak_lr=fast", "optimizer.peak_lr must be of type float; got 'fast'"),
        ("batch_size=0", "batch_size must be at least 1; got 0"),
        (
            "model.image_encoder.image_size=(50,64)",
            "model.image_encoder.image_size must be two multiples of patch_size = 16",
        ),
        ("data.source=photos:x", "must be sa1b:PATH"),
        ("data.source=coco:/nowhere", "/nowhere"),
        ("data.held_out=1:1", "leaves none"),
        ("init_from=/nowhere.pth", "no weights at /nowhere.pth"),
        (
            "trainable=decoder data.flips=False",
            "trainable names 'decoder', where there is no parameter",
        ),
    ],
)
def test_an_invalid_run_is_rejected_before_anything_is_written(
    monkeypatch, capsys, config, tmp_path, setting, message
):
    error = error_of(monkeypatch, capsys, config, tmp_path / "run", *setting.split())
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_an_empty_source_is_rejected(monkeypatch, capsys, config, tmp_path):
    (tmp_path / "empty").mkdir()
    error = error_of(
        monkeypatch, capsys, config, tmp_path / "run", f"data.source=labels:{tmp_path / 'empty'}"
    )
    assert "empty" in error
    assert not (tmp_path / "run").exists()


def test_a_workdir_of_another_config_is_rejected(monkeypatch, capsys, config, uninterrupted):
    before = sorted((path, path.stat().st_mtime_ns) for path in uninterrupted.rglob("*"))
    error = error_of(monkeypatch, capsys, config, uninterrupted, "seed=1", "num_steps=20")
    assert "seed was 0, is 1" in error
    assert "num_steps" not in error
    assert sorted((path, path.stat().st_mtime_ns) for path in uninterrupted.rglob("*")) == before


def test_a_folder_with_other_files_is_rejected(monkeypatch, capsys, config, tmp_path):
    (tmp_path / "thesis.tex").touch()
    assert "is not empty and holds no run" in error_of(monkeypatch, capsys, config, tmp_path)


def test_a_full_disk_is_rejected(monkeypatch, capsys, config, tmp_path):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    error = error_of(monkeypatch, capsys, config, tmp_path / "run")
    assert "MiB of disk space" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_too_many_bad_samples_end_a_run(start, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    index = []
    for i in range(4):
        Image.fromarray(np.full((48, 64, 3), 40 * i, np.uint8)).save(images / f"{i}.png")
        label = np.zeros((48, 64), np.uint16)
        label[5:20, 5:30] = 1
        Image.fromarray(label).save(images / f"{i}_label.png")
        index.append(
            {
                "id": str(i),
                "image": f"images/{i}.png",
                "label": f"images/{i}_label.png",
                "height": 48,
                "width": 64,
                "instances": 1,
            }
        )
    (tmp_path / "index.json").write_text(json.dumps(index))
    broken = images / "2.png"
    broken.write_bytes(broken.read_bytes()[:60])

    source = (f"data.source=labels:{tmp_path}", "data.held_out=0:1", "num_steps=6")
    process = start(tmp_path / "strict", *source, "data.max_bad=0.1")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 1
    assert "1 of 3 images are unusable, more than data.max_bad=0.1 allows" in output
    assert "Traceback" not in output

    finish(start(tmp_path / "lenient", *source, "data.max_bad=0.5"))
    rows = (tmp_path / "lenient" / "bad_samples.jsonl").read_text().splitlines()
    assert [json.loads(row)["index"] for row in rows] == [2]
    assert json.loads(rows[0])["reason"] == "broken image"
