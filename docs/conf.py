"""The documentation's site: `make docs` builds these pages and the docstrings, and fails for a broken reference."""

import re
from pathlib import Path
from typing import Any

import uniproj

project = "uniproj"
author = copyright = "The uniproj authors"
version = release = uniproj.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = f"uniproj {release}"
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
default_role = "code"  # docstrings put code between single backticks, as Markdown does
autodoc_typehints = "description"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}

nitpicky = True
# other projects' names, as the build asks no other site; private bases; the type variable of a decorator
nitpick_ignore_regex = [("py:.*", r"(?!uniproj\b).*|.*\._\w+|uniproj\.registry\.P")]

_ROOT = Path(__file__).parent.parent
_HOST = "https://github.com/uniproj/uniproj/blob/main/"


def _link_to_the_repository(app: Any, page: str, source: list[str]) -> None:
    """A link from a page to a file beside docs/, which is no page of the site, leads to the file on the host."""

    def to_host(found: re.Match[str]) -> str:
        path = found[2]
        # one that is missing stays as it is and fails the build
        return f"{found[1]}({_HOST}{path})" if (_ROOT / path).exists() else found[0]

    source[0] = re.sub(r"(?<!!)(\[[^\]]*\])\(\.\./([^)#]+)\)", to_host, source[0])


def setup(app: Any) -> None:
    app.connect("source-read", _link_to_the_repository)
