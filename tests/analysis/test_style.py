"""Colours stay with their projection, and a figure written twice is the same file."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pytest

import uniproj
from analysis import style
from experiments.errors import ExperimentError


def _figure() -> plt.Figure:
    with style.use():
        figure, axes = plt.subplots(figsize=(style.COLUMN, 2))
        axes.plot([1, 2], [3, 4], color=style.colour("unilora"), marker=style.marker("unilora"))
    return figure


def test_no_two_projections_look_alike() -> None:
    looks = {(style.colour(name), style.marker(name)) for name in uniproj.names()}
    assert len(looks) == len(uniproj.names())


def test_another_packages_projection_changes_no_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: (style.colour(name), style.marker(name)) for name in uniproj.names()}

    class Foreign(uniproj.get("unilora")):  # type: ignore[misc]
        pass

    from uniproj import registry

    monkeypatch.setitem(registry._classes, "aardvark", Foreign)
    assert "aardvark" in uniproj.names()
    assert {name: (style.colour(name), style.marker(name)) for name in before} == before
    assert style.colour("aardvark") != style.UNKNOWN


def test_a_name_outside_the_registry_is_grey() -> None:
    assert style.colour("PEFT LORA") == style.UNKNOWN


def test_a_figure_is_the_same_file_each_time(tmp_path: Path) -> None:
    style.save(_figure(), tmp_path / "one.two")
    style.save(_figure(), tmp_path / "again")
    for kind in ("png", "pdf"):
        assert (tmp_path / f"one.two.{kind}").read_bytes() == (tmp_path / f"again.{kind}").read_bytes()
    assert b"CreationDate" not in (tmp_path / "again.pdf").read_bytes()
    assert not plt.get_fignums()


def test_a_folder_that_is_a_file_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(ExperimentError, match="must be writable"):
        style.save(_figure(), tmp_path / "taken" / "figure")
