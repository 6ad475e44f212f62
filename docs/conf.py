"""The pages of this folder as a site, with the docstrings of the package.

pip install -e ".[docs]"
sphinx-build -W --keep-going -b html docs build/site
"""

import re
from typing import Any

import dpmix_jax

project = "dpmix_jax"
author = "The dpmix_jax authors"
version = release = dpmix_jax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
html_theme = "sphinx_book_theme"
html_title = project

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebook is kept with what it printed
highlight_language = "none"  # of blocks that name no language

default_role = "py:obj"  # `name` in a docstring links to what it names, if documented
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_custom_sections = ["Formal guarantees"]
napoleon_use_ivar = True  # or each of `Attributes:` would be an entry of its own
napoleon_use_rtype = False  # or what comes before a colon would be put last
python_maximum_signature_line_length = 80


def _escape(app, what, name, obj, options, lines: list[str]) -> None:
    """Escapes the full stop of `size: N.`, which would begin an enumerated list."""
    lines[:] = [re.sub(r"^(\s*\w+: \w)\.$", r"\1\\.", line) for line in lines]


def _skip(app, what, name, obj, skip: bool, options) -> bool | None:
    """Skips the fields of named tuples, which `Attributes:` has already."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", _escape, priority=400)  # before napoleon
    app.connect("autodoc-skip-member", _skip)
