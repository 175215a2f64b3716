"""Adds the README to the package's metadata, with links that also lead somewhere on an index.

All other settings are in setup.cfg. Links of the README are relative, so that they work in forks.
"""

import configparser
import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def absolute_links(text: str, url: str) -> str:
    """Returns Markdown whose relative links lead into a repository.

    Args:
      text: The Markdown of a file in the root of the repository.
      url: The address of the repository on GitHub.
    """
    text = re.sub(r"(!\[[^]]*\]\()(?!https?:|#)", rf"\1{url}/raw/main/", text)  # pictures
    return re.sub(r"(\]\()(?!https?:|#)", rf"\1{url}/blob/main/", text)


if __name__ == "__main__":
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    setup(long_description=absolute_links(readme, config["metadata"]["url"]))
