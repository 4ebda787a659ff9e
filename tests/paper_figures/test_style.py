"""Colours stay with their projection, and a figure written twice is the same file."""

from __future__ import annotations

import itertools
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb

import uniproj
from experiments import names
from experiments.errors import ExperimentError
from paper_figures import style


def _figure() -> plt.Figure:
    with style.use():
        figure, axes = plt.subplots(figsize=(style.COLUMN, 2))
        axes.plot([1, 2], [3, 4], color=style.colour("unilora"), marker=style.marker("unilora"))
    return figure


def test_no_two_projections_look_alike() -> None:
    looks = {(style.colour(name), style.marker(name)) for name in uniproj.names()}
    assert len(looks) == len(uniproj.names())


def test_no_two_colours_are_near_each_other() -> None:
    """In CIELAB, where a distance of 2.3 is just seen: 15 between any two, 25 between those of the paper's methods."""
    places = {name: _lab(style.colour(name)) for name in uniproj.names()}
    paper = set(style.order(uniproj.names())[:7])
    assert len({style.colour(name) for name in places}) == len(places)
    for one, other in itertools.combinations(places, 2):
        distance = np.linalg.norm(places[one] - places[other])
        assert distance > (25 if {one, other} <= paper else 15), (one, other, distance)


def _lab(colour: str) -> np.ndarray:
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    f = np.cbrt(to_xyz @ linear / np.array([0.9505, 1.0, 1.089]))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_every_projection_has_a_name_of_its_own() -> None:
    called = [names.method(name) for name in uniproj.names()]
    assert len(set(called)) == len(called) and not set(called) & set(uniproj.names())
    assert names.method("aardvark") == "aardvark" and names.variant("lora_xs (side=A)") == "LoRA-XS (side=A)"


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
    for name in ("one.two", "again"):
        figure = _figure()
        style.save(figure, tmp_path / name)
        assert not plt.fignum_exists(figure.number)
    for kind in ("png", "pdf"):
        assert (tmp_path / f"one.two.{kind}").read_bytes() == (tmp_path / f"again.{kind}").read_bytes()
    assert b"CreationDate" not in (tmp_path / "again.pdf").read_bytes()


def test_a_folder_that_is_a_file_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(ExperimentError, match="must be writable"):
        style.save(_figure(), tmp_path / "taken" / "figure")
