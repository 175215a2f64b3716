"""Tests that names of files that a console cannot show end no command."""

import io
import os
import sys

import pytest
from PIL import Image

from sam_jax.cli import everything
from sam_jax.cli.main import main
from tests.sam_jax.engine import bright

NAMES = ("фото.jpg", os.fsdecode(b"\xff\xfe.jpg"), "\x1b[31mé.jpg")


class Console(io.TextIOWrapper):
    """A console of few characters."""

    def __init__(self, encoding):
        super().__init__(io.BytesIO(), encoding=encoding)

    def text(self):
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)


@pytest.fixture(params=["ascii", "cp1252", "utf-8"])
def run(request, monkeypatch):
    """Returns a function that runs a command and returns its exit code, stdout and stderr."""

    def run(*command):
        streams = Console(request.param), Console(request.param)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", streams[0])
            patch.setattr(sys, "stderr", streams[1])
            return main(list(command)), *(stream.text() for stream in streams)

    return run


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "папка"
    folder.mkdir()
    Image.new("RGB", (60, 40)).save(folder / "good.png")
    for name in NAMES:
        (folder / name).write_bytes(b"text")
    return folder


def test_a_check_names_every_file(folder, run):
    code, out, _ = run("dataset", "check", f"images:{folder}")
    assert code == 1
    assert out.endswith("1 of 4 samples are usable, 0 masks\n")
    assert "\\udcff\\udcfe.jpg: broken image: the image is not a JPEG" in out
    assert "\\x1b[31m" in out
    assert ("\\u0444" in out) != ("фото" in out)


def test_everything_names_every_file(folder, run, monkeypatch, tmp_path):
    class Bright(everything.SamAutomaticMaskGenerator):
        generate = staticmethod(bright.generate)

    monkeypatch.setattr(everything, "SamAutomaticMaskGenerator", Bright)
    for name in "ab":
        options = ("--weights", "sam_tiny", "--out", str(tmp_path / name))
        code, out, _ = run("everything", str(folder), *options)
        assert code == 0
        assert "segmented 1 of 4 images" in out
    skipped = [(tmp_path / name / "skipped_0.json").read_bytes() for name in "ab"]
    assert skipped[0] == skipped[1]
    assert b"0x" not in skipped[0]


def test_errors_name_the_file(folder, run):
    for name in NAMES:
        prompt = ("--point", "5,5", "--out", str(folder / "out"))
        code, _, err = run("predict", "a.jpg", *prompt, "--weights", str(folder / f"{name}.pth"))
        assert code == 1
        assert err.startswith("sam-jax predict: no weights at ")
