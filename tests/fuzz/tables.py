"""The tables of readers that are fuzzed, by name.

Each entry is a function `targets(folder)` that returns a list of `Target`s and may write in the
folder.
"""

from collections.abc import Callable
from pathlib import Path

from tests.fuzz import weights
from tests.fuzz.harness import Target

TABLES: dict[str, Callable[[Path], list[Target]]] = {"weights": weights.targets}
