"""`--engines FOLDER` keeps what was measured of each engine."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--engines", metavar="FOLDER", help="write a record of each engine to this folder")
