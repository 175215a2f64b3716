"""The configuration of Sphinx, which builds the documentation: `make docs`."""

import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

from commands_pages import write_commands  # noqa: E402 - found by the path above

import sam_jax  # noqa: E402 - found by the path above

project = "sam_jax"
author = "The sam_jax authors"
copyright = author
version = release = sam_jax.__version__
html_title = "sam_jax"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]

# Pages: Markdown, whose headings are link targets as on GitHub, and notebooks as they are saved.
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_output_stderr = "remove-warn"

# The reference: shapes are in the descriptions, so signatures have names and defaults only.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
default_role = "code"  # single backquotes in docstrings
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Attributes", "params_style")]
toc_object_entries_show_parents = "hide"

html_theme = "sphinx_book_theme"
html_theme_options = {"home_page_in_toc": True, "show_navbar_depth": 1, "navbar_persistent": []}
html_static_path = ["_static"]
html_css_files = ["custom.css"]

# `make docs-links` requests external links. A test checks the others.
linkcheck_ignore = [r"https://github.com/sam-jax/.*", r"https://colab.research.google.com/.*"]

write_commands(DOCS / "commands")
