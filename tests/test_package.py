"""Tests of the package as others get it: the wheel in an environment of its own, and the sdist."""

import configparser
import email
import importlib.metadata
import json
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import sam_jax
from setup import absolute_links

ROOT = Path(__file__).resolve().parents[1]
URL = "https://github.com/sam-jax/sam_jax"
CHECK = """
import json, sys
import sam_jax
from sam_jax import *
model, variables = load("sam_nuclei")
print(json.dumps([sam_jax.__file__, sam_jax.__version__, str(model.object_share)]))
"""


def run(*command, cwd):
    """Runs a command and returns what it prints."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(kind, folder):
    """Builds a "wheel" or an "sdist" from a copy of the files that git knows."""
    source = folder / "source"
    if not source.exists():
        source.mkdir()
        options = ("--cached", "--others", "--exclude-standard")
        for name in run("git", "ls-files", *options, cwd=ROOT).splitlines():
            if (ROOT / name).is_file() and not name.startswith(("tests/", "docs/", "colabs/")):
                (source / name).parent.mkdir(parents=True, exist_ok=True)
                (source / name).write_bytes((ROOT / name).read_bytes())
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(folder)!r}))"
    return folder / run(sys.executable, "-c", code, cwd=source).splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build("wheel", tmp_path_factory.mktemp("wheel"))


def requirements(name, found=None):
    """Returns the names of the packages that a package needs, without those of extras."""
    found = set() if found is None else found
    for text in importlib.metadata.requires(name) or ():
        requirement = Requirement(text)
        is_needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if is_needed and requirement.name not in found:
            found.add(requirement.name)
            requirements(requirement.name, found)
    return found


def make_environment(folder, wheel):
    """Makes a virtual environment with a wheel and what it needs, and nothing else.

    The needed packages are linked from the environment of the tests instead of being downloaded.
    """
    run(sys.executable, "-m", "venv", "--without-pip", str(folder), cwd=folder.parent)
    python = folder / "bin" / "python"
    options = ("--python", str(python), "install", "--quiet", "--no-deps", "--no-index")
    run(sys.executable, "-m", "pip", *options, str(wheel), cwd=folder.parent)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        required = email.message_from_bytes(archive.read(metadata)).get_all("Requires-Dist")
    for text in required:
        requirement = Requirement(text)
        if requirement.marker is None:
            for name in {requirement.name} | requirements(requirement.name):
                link_package(name, site)
    return folder / "bin"


def link_package(name, site):
    """Links the top-level files and folders of an installed package."""
    distribution = importlib.metadata.distribution(name)
    for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
        target = Path(distribution.locate_file(top))
        if not (site / top).exists():
            (site / top).symlink_to(target)


@pytest.mark.slow
def test_the_wheel_works_in_an_environment_of_its_own(wheel, tmp_path):
    programs = make_environment(tmp_path / "environment", wheel)
    (tmp_path / "empty").mkdir()
    printed = run(str(programs / "python"), "-W", "error", "-c", CHECK, cwd=tmp_path / "empty")
    file, version, share = json.loads(printed.splitlines()[-1])
    assert Path(file).is_relative_to(tmp_path)
    assert (version, share) == (sam_jax.__version__, "(0.25, 0.75)")

    scene = str(ROOT / "tests" / "data" / "scene.png")
    arguments = ("--weights", "sam_tiny", "--point", "45,97", "--out", "out")
    run(str(programs / "sam-jax"), "predict", scene, *arguments, cwd=tmp_path / "empty")
    assert (tmp_path / "empty" / "out" / "overlay.png").is_file()


@pytest.mark.slow
def test_the_wheel_contains_the_library_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    info = f"sam_jax-{sam_jax.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"sam_jax", info}
    files = {path for path in (ROOT / "sam_jax").rglob("*") if path.is_file()}
    known = {str(path.relative_to(ROOT)) for path in files if path.suffix != ".pyc"}
    assert known <= set(names)
    assert "sam_jax/py.typed" in names
    assert f"{info}/licenses/LICENSE" in names


@pytest.mark.slow
def test_the_metadata_lead_to_the_project(wheel):
    with zipfile.ZipFile(wheel) as archive:
        path = f"sam_jax-{sam_jax.__version__}.dist-info/METADATA"
        metadata = email.message_from_bytes(archive.read(path))
    assert metadata["Author"] == "The sam_jax authors"
    assert metadata["License"] == "Apache-2.0"
    assert f"Source, {URL}" in metadata.get_all("Project-URL")
    assert metadata["Description-Content-Type"] == "text/markdown"
    description = metadata.get_payload(decode=True).decode()
    assert f"]({URL}/raw/main/docs/hero.jpg)" in description
    links = re.findall(r"\]\(([^)]+)\)", description)
    assert len(links) > 20
    assert all(link.startswith("https://") for link in links)


@pytest.mark.slow
def test_the_sdist_builds_the_same_wheel(wheel, tmp_path):
    with tarfile.open(build("sdist", tmp_path)) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    code = f"from setuptools import build_meta; print(build_meta.build_wheel({str(tmp_path)!r}))"
    again = tmp_path / run(sys.executable, "-c", code, cwd=source).splitlines()[-1]
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        assert sorted(first.namelist()) == sorted(second.namelist())


def test_links_of_the_readme_become_absolute():
    text = "[![a](../../b.svg)](../../b) ![c](d.jpg) [e](f.md#g) [h](https://i)"
    assert absolute_links(text, "https://x") == (
        "[![a](https://x/raw/main/../../b.svg)](https://x/blob/main/../../b) "
        "![c](https://x/raw/main/d.jpg) [e](https://x/blob/main/f.md#g) [h](https://i)"
    )


def test_the_oldest_versions_are_those_that_are_tested():
    tested = (ROOT / "tests" / "oldest.txt").read_text().splitlines()
    pinned = {name: version for name, _, version in (line.partition("==") for line in tested)}
    for requirement in map(Requirement, all_requirements()):
        (lowest,) = [part.version for part in requirement.specifier if part.operator == ">="]
        assert pinned[requirement.name].startswith(lowest), requirement


def all_requirements():
    """Returns the requirements of the package and of training."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    options = config["options"]["install_requires"], config["options.extras_require"]["train"]
    return [line for option in options for line in option.split("\n") if line]
