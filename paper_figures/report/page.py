"""The page: one HTML file with its style, its scripts and its data inside, and nothing fetched from anywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PARTS = Path(__file__).with_name("page")
SCRIPTS = ("format.js", "table.js", "chart.js", "sections.js", "main.js")


def render(data: Mapping[str, Any]) -> str:
    """The whole page as text; the same data give the same bytes. Raises ValueError for NaN or infinity."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    script = "\n".join((PARTS / name).read_text() for name in SCRIPTS)
    inside = {
        "STYLE": (PARTS / "style.css").read_text(),
        "SCRIPT": f"(() => {{\n'use strict';\n{script}\n}})();",
        # the data must not end the element that holds them
        "DATA": text.replace("<", "\\u003c"),
    }
    page = (PARTS / "page.html").read_text()
    for name, content in inside.items():
        page = page.replace(f"<!--{name}-->", content, 1)
    return page
