"""Writes a page for each command from what its `--help` prints, when Sphinx starts."""

import argparse
import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from sam_jax.cli.main import make_parser

ROOT = Path(__file__).resolve().parents[1]
WIDTH = "84"  # characters per line of the help texts
TRAIN_MODULES = ("train", "train.compile")


def write_commands(folder: Path) -> None:
    """Writes a page for each verb of `sam-jax`, one for each training program, and an index.

    Args:
      folder: The folder of the pages.
    """
    os.environ["COLUMNS"] = WIDTH
    pages = {name: list(help_texts(verb)) for name, verb in subcommands(make_parser()).items()}
    pages |= {name: [(f"python -m {name}", module_help(name))] for name in TRAIN_MODULES}

    folder.mkdir(exist_ok=True)
    for name, sections in pages.items():
        blocks = (f"```text\n{text}```\n" for _, text in sections)
        headings = (f"{'##' if i else '#'} {title}\n" for i, (title, _) in enumerate(sections))
        parts = (part for pair in zip(headings, blocks, strict=True) for part in pair)
        write_page(folder / f"{name}.md", "\n".join(parts))
    write_page(folder / "index.md", index_page(list(pages)))


def help_texts(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    """Yields the name and the help text of a command, then those of its subcommands."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        parser.parse_args(["--help"])
    yield parser.prog, text.getvalue()
    for subparser in subcommands(parser).values():
        yield from help_texts(subparser)


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Returns the parsers of the subcommands of a command, whose arguments are declared."""
    groups = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return {name: subparser for group in groups for name, subparser in group.choices.items()}


def module_help(name: str) -> str:
    """Returns the help text of a module that is run by `python -m`."""
    command = [sys.executable, "-m", name, "--help"]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout  # noqa: S603 - our modules


def index_page(names: list[str]) -> str:
    """Returns the page that lists all commands."""
    entries = "\n".join(names)
    toctree = f"```{{toctree}}\n{entries}\n```\n"
    return f"# Commands\n\nThe text that each command prints with `--help`.\n\n{toctree}"


def write_page(path: Path, text: str) -> None:
    """Writes a page unless it has this text, so that Sphinx builds only what changed."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
