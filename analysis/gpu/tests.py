"""Tests by pytest as a measurement: one row per test."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from analysis.overhead.runner import ROOT


class _Rows:
    """A plugin of pytest that keeps what became of every test: `note` says why it failed or was skipped."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self._add(report, report.duration)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if not report.passed:
            self._add(report, 0.0)

    def _add(self, report: pytest.TestReport | pytest.CollectReport, seconds: float) -> None:
        note = "" if report.passed else f"{report.outcome}: {_reason(report.longrepr)}"
        self.rows.append({"test": report.nodeid, "seconds": seconds, "note": note})


def _reason(found: Any) -> str:
    """One line out of what pytest keeps of a test that failed, or (file, line, reason) of one that was skipped."""
    crash = getattr(found, "reprcrash", None)
    text = found[2].removeprefix("Skipped: ") if isinstance(found, tuple) else crash.message if crash else str(found)
    return (text.strip().splitlines() or ["no message"])[0]


def measure(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per test.

    Raises RuntimeError where no test ran, and where the GPU is lost to this process: every later test would fail there.
    """
    options = ["-v", "-s", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-o", "addopts=", "-m", ""]
    if config["keyword"]:
        if find_spec("hypothesis") is None:
            return [{"test": config["paths"], "seconds": 0.0, "note": "skipped: hypothesis is not installed"}]
        options += ["-k", config["keyword"]]
    else:
        # without tests/conftest.py, which needs the packages of the whole suite
        options += ["--device", config["device"], "--confcutdir", str((ROOT / config["paths"]).parent)]
    kept = _Rows()
    pytest.main([*options, str(ROOT / config["paths"])], plugins=[kept])
    if not kept.rows:
        raise RuntimeError(f"tests: {config['paths']} must hold tests that can be run here, got none.")
    if config["device"] == "cuda":
        _check_gpu(kept.rows)
    return kept.rows


def _check_gpu(rows: list[dict[str, Any]]) -> None:
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        first = next((row["test"] for row in rows if row["note"].startswith("failed")), "a test that passed")
        raise RuntimeError(f"{first} left the GPU unusable: {str(error).splitlines()[0]}") from error
