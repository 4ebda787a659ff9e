"""Published scores beside ours: the blocks of rows that a table and its figure share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from experiments.names import method
from experiments.records import statistics
from paper_figures import style
from paper_figures.cells import with_numbers
from paper_figures.committed import NOT_AVAILABLE, NOT_RUN, Committed, Sweep, one_cell
from paper_figures.published import notes, of_table
from paper_figures.typesetting import Table

OURS = "Ours: mean over n seeds after the last step, Student's 95 % interval, as far as the metric goes."


@dataclass(frozen=True)
class Place:
    """Where a column's score is: a task, or one part of its test."""

    task: str
    group: str | None = None


@dataclass(frozen=True)
class Mean:
    """Where a column's score is the mean over tasks, taken seed by seed."""

    tasks: Sequence[str]


@dataclass(frozen=True)
class Ours:
    """One of our sweeps in a comparison: what it is called there, the place of each column it has, and the model, where
    the sweep has several."""

    sweep: str
    label: str
    places: Mapping[str, Place | Mean]
    model: str | None = None


@dataclass(frozen=True)
class Comparison:
    """A published table beside our sweeps. base: the model it is about; units: of each column, in their order."""

    name: str
    title: str
    base: str
    units: Mapping[str, str]
    ours: Sequence[Ours] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Score:
    """A cell: what is printed, and in percent (or the unit) what is drawn; None where there is nothing to draw.

    low, high: the ends of our interval, or a published mean less and plus its standard deviation.
    """

    text: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None


@dataclass(frozen=True)
class Row:
    """One method in one block. projection: its look, None for the grey of published ones."""

    block: str
    method: str
    projection: str | None
    trained: str
    scores: Mapping[str, Score]

    @property
    def known(self) -> bool:
        """Whether it has a number."""
        return any(score.value is not None for score in self.scores.values())


def rows(spec: Comparison, committed: Committed) -> list[Row]:
    """The published block first, then every method of each of our sweeps; one that was not run is one row."""
    found = _published(spec)
    for ours in spec.ours:
        found += _ours(spec, ours, committed.sweep(ours.sweep))
    return found


def _published(spec: Comparison) -> list[Row]:
    found = []
    for (name, trained), own in of_table(spec.name).groupby(["method", "trained"], sort=False):
        cells = {cell.column: _quoted(cell) for cell in own.itertuples()}
        scores = {column: cells.get(column, Score(NOT_AVAILABLE)) for column in spec.units}
        found.append(Row(f"published, {spec.base}", name, None, trained, scores))
    return found


def _quoted(cell: Any) -> Score:
    spread = {} if pd.isna(cell.sd) else {"low": cell.value - cell.sd, "high": cell.value + cell.sd}
    n = None if pd.isna(cell.n) else int(cell.n)
    return Score(cell.text if pd.isna(cell.doubt) else f"{cell.text} (?)", cell.value, n=n, **spread)


def _ours(spec: Comparison, ours: Ours, sweep: Sweep | None) -> list[Row]:
    block = f"ours, {ours.label}"
    if sweep is None or (cells := of_model(sweep.cells, ours.model)).empty:
        return [Row(block, "all methods", None, NOT_RUN, dict.fromkeys(spec.units, Score(NOT_RUN)))]
    found = []
    for name in style.order(cells["projection"].unique()):
        scores = {c: score_at(sweep, ours.places.get(c), name, ours.model) for c in spec.units}
        trained = cells.loc[cells["projection"] == name, "trained"].dropna()
        found.append(Row(block, method(name), name, style.span(trained) if len(trained) else NOT_RUN, scores))
    return found


def of_model(cells: pd.DataFrame, model: str | None) -> pd.DataFrame:
    """The cells, or runs, of one model; all of them where it is None."""
    return cells if model is None else cells[cells["model"] == model]


def score_at(sweep: Sweep, place: Place | Mean | None, projection: str, model: str | None = None) -> Score:
    """Our score of a projection there, or why there is none. model: one of several."""
    if place is None:
        return Score(NOT_RUN)
    if isinstance(place, Mean):
        each = [score_at(sweep, Place(task), projection, model) for task in place.tasks]
        if lost := [score for score in each if score.value is None]:
            return lost[0]
        runs = of_model(sweep.finished, model)
        return score(statistics.over_tasks(runs[(runs["projection"] == projection) & runs["task"].isin(place.tasks)]))
    cells = of_model(sweep.part(place.group) if place.group else sweep.cells, model)
    chosen = cells[(cells["projection"] == projection) & (cells["task"] == place.task)]
    return score(one_cell(chosen, f"{projection} on {place.task} in the sweep {sweep.name}"))


def score(cell: pd.Series | None) -> Score:
    """A cell of ours in percent: mean and 95 % interval, or why there is none."""
    if cell is None:
        return Score(NOT_RUN)
    if cell["status"] == statistics.STUCK:
        return Score(f"only {cell['n']} of {cell['runs']} trained" if cell["n"] else statistics.STUCK)
    if cell["status"] == statistics.INCOMPLETE:
        return Score("failed")
    mean, low, high = (100 * cell[key] for key in ("score", "score_low", "score_high"))
    if cell["n"] < 2:
        return Score(f"{mean:.1f} (n = 1)", mean, n=1)
    return Score(f"{mean:.1f} [{low:.1f}, {high:.1f}] (n = {cell['n']})", mean, low, high, int(cell["n"]))


def table(spec: Comparison, found: Sequence[Row]) -> Table:
    """One line per method and block that has a number."""
    heads = ["block", "method", "trained", *(f"{column}, {unit}" for column, unit in spec.units.items())]
    lines, unknown = with_numbers(
        [[r.block, r.method, r.trained, *(r.scores[c].text for c in spec.units)] for r in found], 3
    )
    return Table(spec.title, heads, lines, [*unknown, *notes(spec.name), *([OURS] if spec.ours else []), *spec.notes])
