"""Tests of the README and the guides that run nothing: every command, name and link is valid."""

import ast
import configparser
import importlib
import importlib.util
import re
import subprocess
import sys

import pytest

import sam_jax
from sam_jax.cli.main import make_parser
from tests.docs.pages import (
    PAGES,
    ROOT,
    inner_commands,
    program_of,
    read_blocks,
    split_commands,
)
from train.__main__ import make_parser as make_train_parser
from train.overrides import load_config, override

DOCS = ROOT / "docs"
BLOCKS = {path: read_blocks(path) for path in PAGES}
SETUP = configparser.ConfigParser(interpolation=None)
SETUP.read(ROOT / "setup.cfg")
URL = SETUP["metadata"]["url"]
EXTRAS = set(SETUP["options.extras_require"])

by_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)


def commands_of(path):
    """Returns the commands of a page as readers see them, with those that clouds run."""
    commands = []
    for block in BLOCKS[path]:
        if block.language == "sh":
            for words in split_commands(block.code):
                commands += [words, *inner_commands(words)]
    return commands


def arguments_of(path, program):
    """Returns the arguments of the commands of a page that run a program."""
    calls = map(program_of, commands_of(path))
    return [arguments for name, arguments in calls if name == program]


def parse(parser, arguments):
    """Parses arguments; help is a success."""
    if "--help" not in arguments:
        return parser.parse_args(arguments)
    with pytest.raises(SystemExit, match=r"^0$"):
        parser.parse_args(arguments)
    return None


# Commands.


@by_page
def test_every_program_is_known(path):
    known = {"sam-jax", "train", "train.compile", "make", "pip", "git", "cd", "gcloud", "xpk"}
    on_other_machines = {"sudo", "[", "venv"}
    assert {program_of(words)[0] for words in commands_of(path)} <= known | on_other_machines


@by_page
def test_every_command_of_sam_jax_parses(path, capsys):
    for arguments in arguments_of(path, "sam-jax"):
        parse(make_parser(), arguments)


@by_page
def test_every_training_command_parses_and_its_fields_exist(path, monkeypatch, caplog):
    monkeypatch.chdir(ROOT)
    for arguments in arguments_of(path, "train"):
        args = parse(make_train_parser(), arguments)
        override(load_config(args.config), args.set)
    assert not caplog.records, "a former name of a field"


@by_page
def test_every_command_of_the_tpu_compiler_parses(path, monkeypatch):
    from train.aot.__main__ import parse_arguments

    for arguments in arguments_of(path, "train.compile"):
        monkeypatch.setattr(sys, "argv", ["train.compile", *arguments])
        assert (ROOT / parse_arguments().config).is_file()


@by_page
def test_every_target_of_make_exists(path):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    inline = re.findall(r"`make ([a-z-]+)`", path.read_text())
    for target in [*inline, *(word for words in arguments_of(path, "make") for word in words)]:
        assert target in targets


@by_page
def test_every_extra_exists(path):
    text = path.read_text()
    named = re.findall(r"(?:\.|sam_jax)\[([a-z,]+)\]", text) + re.findall(r"extra `([a-z]+)`", text)
    assert {name for names in named for name in names.split(",")} <= EXTRAS


def test_the_guide_lists_the_extras_for_users():
    text = (ROOT / "docs" / "install.md").read_text()
    for_developers = {"test", "docs", "dev", "reference"}
    assert set(re.findall(r"^\| `([a-z]+)` \|", text, re.MULTILINE)) == EXTRAS - for_developers


def test_commands_do_not_share_folders():
    users = {}
    for path in PAGES:
        for words in commands_of(path):
            name, arguments = program_of(words)
            for option in ("--out", "--workdir"):
                if option in arguments:
                    folder = arguments[arguments.index(option) + 1]
                    users.setdefault(folder, set()).add((name, *arguments))
    assert {folder: calls for folder, calls in users.items() if len(calls) > 1} == {}


def test_results_are_ignored_by_git():
    results = ["docs/_build/x", "docs/commands/x"]
    for path in PAGES:
        for words in commands_of(path):
            for option in ("--out", "--workdir", "--json"):
                if option in words[:-1] and "$" not in words[words.index(option) + 1]:
                    results.append(words[words.index(option) + 1])
    command = ["git", "check-ignore", *results]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == results


# Python.


@by_page
def test_every_name_that_python_uses_exists(path):
    for block in BLOCKS[path]:
        if block.language != "python":
            continue
        tree = ast.parse(block.code, f"{path.name}:{block.line}")
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module}.{alias.name}"
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    assert importlib.util.find_spec(alias.name), alias.name


@by_page
def test_every_name_of_the_package_exists(path):
    for name in re.findall(r"`sam_jax((?:\.[A-Za-z_0-9]+)+)", path.read_text()):
        found, parts = sam_jax, name.strip(".").split(".")
        for i, part in enumerate(parts):
            if not hasattr(found, part):
                importlib.import_module(".".join(["sam_jax", *parts[: i + 1]]))
            found = getattr(found, part)


def test_the_reference_lists_every_public_name():
    text = (ROOT / "docs" / "api.md").read_text()
    listed = re.findall(r"auto(?:class|function):: (\w+)", text)
    assert sorted(listed) == sam_jax.__all__


# Links, badges and versions.


def without_code(path):
    """Returns a page without its blocks of code, which may contain anything."""
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors_of(path):
    """Returns the anchors of the headings of a page, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.+)$", without_code(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "path", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "docs/photos/README.md"], ids=str
)
def test_every_internal_link_leads_somewhere(path):
    text = re.sub(r"`[^`\n]+`", "", without_code(path))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:|\.\./\.\./actions/", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{path.name}: {link}"
        assert not anchor or anchor in anchors_of(target), f"{path.name}: {link}"
        if path.parent == DOCS:  # links to other files would be dead in the built pages
            assert target.parent in (DOCS, DOCS / "photos"), f"{path.name}: {link}"


def test_every_guide_is_in_the_table_of_contents():
    text = (ROOT / "docs" / "index.md").read_text()
    for path in DOCS.glob("[!i]*.md"):
        assert f"\n{path.stem}\n" in text
    for path in (ROOT / "colabs").glob("*.ipynb"):
        assert f"\nnotebooks/{path.stem}\n" in text


def test_the_repository_has_one_address():
    assert URL.startswith("https://github.com/")
    files = [*PAGES, *(ROOT / "colabs").glob("*.ipynb"), ROOT / "setup.cfg"]
    name = URL.removeprefix("https://github.com/")
    for path in files:
        text = path.read_text()
        for found in re.findall(r"(?:github\.com|com/github)/([\w.-]+/sam_jax)", text):
            assert found == name, path
        for found in re.findall(r"git clone (https://\S+)", text):
            assert found.rstrip('\\n",') == URL, path


def test_the_badges_are_true():
    readme = (ROOT / "README.md").read_text()
    workflow = re.search(r"actions/workflows/([\w.]+)/badge.svg", readme)[1]
    checks = (ROOT / ".github" / "workflows" / workflow).read_text()
    (matrix,) = re.findall(r"python: \[(.*)\]", checks)
    versions = re.findall(r"3\.\d+", matrix)
    assert f"Python {versions[0]} to {versions[-1]}" in readme
    classifiers = SETUP["metadata"]["classifiers"]
    assert re.findall(r"Python :: (3\.\d+)", classifiers) == versions
    assert SETUP["options"]["python_requires"] == f">= {versions[0]}"
    assert SETUP["metadata"]["license"] == "Apache-2.0"
    assert "license-Apache--2.0" in readme


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


def test_every_stand_in_is_used():
    for path, blocks in BLOCKS.items():
        replacements = {pair for block in blocks for pair in block.replacements}
        for old, new in replacements:
            used = any(is_used(block, old, new) for block in blocks)
            assert used, f"{path.name}: {old} -> {new}"


def is_used(block, old, new):
    """Returns True if a replacement changes the code of a block."""
    if (old, new) not in block.replacements:
        return False
    before = block.replacements[: block.replacements.index((old, new))]
    return old in block._replace(replacements=before).code_to_run()


def test_a_page_is_read_as_it_is_written(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```sh\na 'b c' \\\n    d  # e\nf && g --command=\"\n  h\"\n```\n"
        "<!-- stand-in:\nphotos: coco\nx -> y -> z\n-->\n```python\nx = 1\n```\n```text\nno\n```\n"
    )
    first, second = read_blocks(page)
    commands = split_commands(first.code)
    assert commands == [["a", "b c", "d"], ["f"], ["g", "--command=\n  h"]]
    assert inner_commands(commands[2]) == [["h"]]
    assert (second.line, second.files, second.code_to_run()) == (
        12, {"photos": "coco"}, "y -> z = 1\n",
    )  # fmt: skip
