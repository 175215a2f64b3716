"""Runs every command and example of the README and the guides, each page in a fresh folder."""

import configparser
import contextlib
import subprocess
import sys

import pytest

from sam_jax.cli.main import main as sam_jax_main
from tests.docs import stand_ins
from tests.docs.pages import (
    PAGES,
    ROOT,
    inner_commands,
    program_of,
    read_blocks,
    split_commands,
)
from train.__main__ import main as train_main

# What a checkout holds and the pages use.
CHECKOUT = ("configs", "docs", "tests", "Makefile", "setup.cfg")


@pytest.mark.slow
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    blocks = read_blocks(path)
    monkeypatch.chdir(tmp_path)
    for name in CHECKOUT:
        (tmp_path / name).symlink_to(ROOT / name)
    if any("short training" in block.switches for block in blocks):
        (tmp_path / "configs").unlink()
        names = [config.stem for config in (ROOT / "configs").glob("*.py")]
        stand_ins.write_configs(tmp_path / "configs", names)
    made = {*CHECKOUT}
    namespace = {"__name__": "__main__"}
    for block in blocks:
        for name, kind in block.files.items():
            made.add(name.partition("/")[0])
            stand_ins.MAKERS[kind](tmp_path / name)
        code = block.code_to_run()
        if block.language == "python":
            lines = "\n" * (block.line - 1)  # so that errors name the line of the page
            exec(compile(lines + code, str(path), "exec"), namespace)
        else:
            for words in split_commands(code):
                run_command(words, block.switches, monkeypatch)
    assert {entry.name for entry in tmp_path.iterdir()} <= made | {"out", "runs"}


def run_command(words, switches, monkeypatch):
    """Runs a command, or checks it if it must not run here; test_pages.py parses all of them."""
    program, arguments = program_of(words)
    if program == "sam-jax":
        with contextlib.suppress(SystemExit) if "--help" in words else contextlib.nullcontext():
            assert sam_jax_main(arguments) == 0, words
    elif program == "train":
        assert "short training" in switches, words
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["train", *arguments])
            assert train_main() == 0, words
    elif program == "make":
        for command in recipe(arguments):
            if program_of(command)[0] == "train":
                run_command(command, switches, monkeypatch)
    elif program in ("gcloud", "xpk"):
        assert "no cloud" in switches, words
        assert all(program_of(inner)[0] != "" for inner in inner_commands(words))
    elif program == "train.compile":
        assert "no TPU compiler" in switches, words
    elif program == "git":
        setup = configparser.ConfigParser(interpolation=None)
        setup.read(ROOT / "setup.cfg")
        assert arguments == ["clone", setup["metadata"]["url"]]
    else:
        assert program in ("pip", "cd"), words


def recipe(targets):
    """Returns the commands that make would run."""
    command = ["make", "-n", *targets]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    return split_commands(done.stdout)
