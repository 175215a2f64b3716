"""The output of commands, which names files that may have any name."""

import io
import sys


def escape_output() -> None:
    """Lets stdout and stderr escape characters that their encoding lacks, instead of failing.

    Every command calls this first. Consoles of ASCII or cp1252 have few characters, and a file name
    may hold bytes that are no text in any encoding.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
