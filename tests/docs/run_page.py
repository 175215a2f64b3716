"""Runs the commands and examples of a page in the present folder, which stands for a checkout.

`python -P -m tests.docs.run_page PAGE`; with -P, the folder's stand-ins do not replace modules.
"""

import configparser
import contextlib
import subprocess
import sys
from pathlib import Path

from sam_jax.cli.main import main as sam_jax_main
from tests.docs import stand_ins
from tests.docs.pages import ROOT, program_of, read_blocks, split_commands
from train.__main__ import main as train_main

# What a checkout contains and the pages use.
CHECKOUT = ("configs", "docs", "tests", "Makefile", "setup.cfg")


def run_page(path):
    """Runs a page in the present folder, which must be empty."""
    blocks = read_blocks(path)
    make_checkout(any("short training" in block.switches for block in blocks))
    made = {*CHECKOUT}
    namespace = {"__name__": "__main__"}
    for block in blocks:
        print(f"{path.name}:{block.line}", flush=True)
        for name, kind in block.files.items():
            made.add(Path(name).parts[0])
            stand_ins.MAKERS[kind](Path(name))
        code = block.code_to_run()
        if block.language == "python":
            lines = "\n" * (block.line - 1)  # so that errors name the line of the page
            exec(compile(lines + code, str(path), "exec"), namespace)
        else:
            for words in split_commands(code):
                run_command(words, block.switches)
    found = {entry.name for entry in Path().iterdir() if entry.suffix != ".json"}
    assert found <= made | {"out", "runs"}, found  # which git ignores


def make_checkout(short_training):
    """Links what a checkout contains; with short training, configs are replaced."""
    for name in CHECKOUT:
        Path(name).symlink_to(ROOT / name)
    if short_training:
        Path("configs").unlink()
        names = [config.stem for config in (ROOT / "configs").glob("*.py")]
        stand_ins.write_configs(Path("configs"), names)


def run_command(words, switches):
    """Runs a command, or nothing if it must not run here; test_pages.py parses all of them."""
    program, arguments = program_of(words)
    if program == "sam-jax":
        with contextlib.suppress(SystemExit) if "--help" in words else contextlib.nullcontext():
            assert sam_jax_main(arguments) == 0, words
    elif program == "train":
        assert "short training" in switches, words
        sys.argv = ["train", *arguments]
        assert train_main() == 0, words
    elif program == "make":
        for command in recipe(arguments):
            if program_of(command)[0] == "train":
                run_command(command, switches)
    elif program in ("gcloud", "xpk"):
        assert "no cloud" in switches, words
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


if __name__ == "__main__":
    run_page(Path(sys.argv[1]))
