"""A P that takes all the memory, or fails in any other way, costs its own verdict alone."""

from __future__ import annotations

import resource
import subprocess
from pathlib import Path

import pytest

from analysis.isometry import isolated

GREEDY = '''
import os

import torch

from uniproj import register
from uniproj.registry import get


@register("greedy")
class Greedy(get("unilora")):
    """Uni-LoRA that wants more than half of the memory."""

    formula = "theta_D = P theta_d"
    source = "this test"
    variants = ({},)

    def __init__(self, layout, d, seed=0):
        super().__init__(layout, d, seed)
        torch.empty(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 6 // 10, dtype=torch.uint8)
'''


def test_a_verdict_has_its_time_and_memory_and_a_limit_on_both(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, whose own limits stay as they are."""
    limits = {}
    monkeypatch.setattr(resource, "setrlimit", lambda which, limit: limits.update({which: limit[0]}))
    monkeypatch.setattr(isolated, "end_with", lambda parent: None)

    def here(command: list[str], **_: object) -> subprocess.CompletedProcess:
        isolated.main(command[3:])
        return subprocess.CompletedProcess(command, 0, *capsys.readouterr())

    monkeypatch.setattr(subprocess, "run", here)
    row = isolated.run("unilora", {}, "eight-64", 4, 64, 0, [])
    assert row["verdict"] == "isometric" and row["number"] < 1e-10
    assert row["cpu_seconds"] > 0 and row["peak_bytes"] > 2**20
    assert limits[resource.RLIMIT_CPU] == isolated.LIMIT and limits[resource.RLIMIT_DATA] > 2**28


def test_a_projection_that_wants_all_memory_has_a_row_that_says_so(tmp_path: Path) -> None:
    plugin = tmp_path / "greedy.py"
    plugin.write_text(GREEDY)
    row = isolated.run("greedy", {}, "eight-64", 4, 64, 0, [str(plugin)])
    assert row["verdict"] == "not measured" and "can't allocate memory" in row["note"]
