"""Reads the README and the guides: their code blocks, and the stand-ins that comments declare.

A comment before a block says what replaces downloads and hours when a test runs the page:

    <!-- stand-in:
    photos: coco                          a file or folder of a kind that `stand_ins.MAKERS` makes
    --index :20 -> --index :1             a text that is replaced in this block and all later ones
    short training                        configs train for two steps
    no TPU compiler                       `python -m train.compile` is parsed, and not run
    no cloud                              commands of clouds are parsed, and not run
    -->
"""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SWITCHES = ("short training", "no TPU compiler", "no cloud")

PARTS = re.compile(
    r"^<!-- stand-in:(?P<comment>.*?)-->$|^```(?P<language>[a-z]+)\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


class Block(NamedTuple):
    """A block of code of a page.

    Attributes:
      language: "sh" or "python".
      line: The number of its first line.
      code: The code as the reader sees it.
      files: The stand-ins that are made before it runs: their kinds by their names.
      replacements: The texts that are replaced when it runs, in order.
      switches: Those of SWITCHES that apply.
    """

    language: str
    line: int
    code: str
    files: dict[str, str]
    replacements: list[tuple[str, str]]
    switches: set[str]

    def code_to_run(self):
        """Returns the code with its replacements."""
        code = self.code
        for old, new in self.replacements:
            code = code.replace(old, new)
        return code


def read_blocks(path):
    """Returns the blocks of commands and of Python of a page."""
    text = path.read_text(encoding="utf-8")
    blocks, files, replacements, switches = [], {}, [], set()
    for match in PARTS.finditer(text):
        if match["comment"] is not None:
            for line in filter(None, map(str.strip, match["comment"].splitlines())):
                if " -> " in line:
                    old, new = line.split(" -> ", 1)
                    replacements = [*replacements, (old, new)]
                elif ": " in line:
                    name, kind = line.split(": ")
                    files = files | {name: kind}
                else:
                    assert line in SWITCHES, f"{path.name}: unknown stand-in {line!r}"
                    switches = switches | {line}
        elif match["language"] in ("sh", "python"):
            line = text[: match.start("code")].count("\n") + 1
            code = match["code"]
            blocks.append(Block(match["language"], line, code, files, replacements, switches))
            files = {}
    return blocks


def split_commands(code):
    """Returns the commands of a shell script, each as a list of words."""
    commands, pending = [], ""
    for line in code.replace("\\\n", " ").splitlines():
        pending += f"{line}\n"
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:  # a quotation that continues in the next line
            continue
        pending, command = "", []
        for word in words:
            if word in ("&&", "||"):
                commands.append(command)
                command = []
            else:
                command.append(word)
        commands.append(command)
    assert not pending, f"a quotation does not end: {pending}"
    return [command for command in commands if command]


def program_of(words):
    """Returns the program of a command and its arguments: `python -m X ...` is the program X."""
    name = Path(words[0]).name
    if name.startswith("python") and words[1:2] == ["-m"]:
        return words[2], words[3:]
    return {"pip3": "pip"}.get(name, name), words[1:]


def inner_commands(words):
    """Returns the commands that a command of a cloud runs on other machines."""
    texts = [word.partition("=")[2] for word in words if word.startswith("--command=")]
    return [command for text in texts for command in split_commands(text)]
