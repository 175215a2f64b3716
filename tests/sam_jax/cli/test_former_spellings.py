"""Tests that deprecated spellings still work and give a warning."""

import pytest

from sam_jax.cli.former_spellings import translate


@pytest.mark.parametrize(
    ("former", "present"),
    [
        ("data check sa1b:x", "dataset check sa1b:x"),
        ("data stats a --against b", "dataset stats a --compare-to b"),
        ("dataset stats a --against=b", "dataset stats a --compare-to=b"),
        ("evaluate --weights w --source s", "evaluate clicks --weights w --source s"),
        ("evaluate --source s --weights=w", "evaluate clicks --source s --weights=w"),
        ("evaluate --proposals p --source s", "evaluate proposals p --source s"),
        ("evaluate --source s --proposals=p", "evaluate proposals --source s p"),
    ],
)
def test_a_former_spelling_is_translated_and_named(former, present, capsys):
    assert translate(former.split()) == present.split()
    assert capsys.readouterr().err.startswith("warning: `")


@pytest.mark.parametrize(
    "argv",
    [
        "",
        "--help",
        "evaluate --help",
        "evaluate clicks --weights w --source s",
        "evaluate --weights w --proposals p",
        "dataset stats a --compare-to b",
        "predict data --weights w",
    ],
)
def test_other_command_lines_are_unchanged(argv, capsys):
    assert translate(argv.split()) == argv.split()
    assert capsys.readouterr().err == ""
