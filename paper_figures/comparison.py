"""Published scores beside ours: the blocks of rows that a table and its figure share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

from experiments.records import statistics
from paper_figures import style
from paper_figures.committed import NOT_AVAILABLE, NOT_RUN, Committed, Sweep, one_cell
from paper_figures.published import notes, of_table
from paper_figures.typesetting import Table

OURS = "Ours: mean over n seeds after the last step, Student's 95 % interval, as far as the metric goes."


@dataclass(frozen=True)
class Place:
    """Where a column's score is: a task, one part of its test, one of several models."""

    task: str
    group: str | None = None
    model: str | None = None


@dataclass(frozen=True)
class Mean:
    """Where a column's score is the mean over tasks, taken seed by seed."""

    tasks: Sequence[str]


@dataclass(frozen=True)
class Ours:
    """One of our sweeps in a comparison: what it is called there, and the place of each column it has."""

    sweep: str
    label: str
    places: Mapping[str, Place | Mean]


@dataclass(frozen=True)
class Comparison:
    """A table of the paper. methods: projections it compares; unit: of scores, units: of columns with others."""

    name: str
    title: str
    published: str
    columns: Sequence[str]
    unit: str
    methods: Mapping[str, str]
    ours: Sequence[Ours]
    notes: Sequence[str] = field(default_factory=list)
    units: Mapping[str, str] = field(default_factory=dict)

    def unit_of(self, column: str) -> str:
        """The unit of a column."""
        return self.units.get(column, self.unit)


@dataclass(frozen=True)
class Score:
    """A cell: what is printed, and in percent (or the unit) what is drawn; None where there is nothing to draw."""

    text: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None


@dataclass(frozen=True)
class Row:
    """One method in one block."""

    block: str
    method: str
    projection: str | None
    trained: str
    scores: Mapping[str, Score]


def rows(spec: Comparison, committed: Committed) -> list[Row]:
    """The published block first, then each of ours; a method or cell that is missing is named, not left out."""
    found = _published(spec)
    for ours in spec.ours:
        found += _ours(spec, ours, committed.sweep(ours.sweep))
    return found


def _published(spec: Comparison) -> list[Row]:
    values = of_table(spec.name)
    block = f"published, {spec.published}"
    listed = list(dict.fromkeys(zip(values["method"], values["projection"], values["trained"], strict=True)))
    known = {projection for _, projection, _ in listed}
    listed += [(label, name, NOT_AVAILABLE) for name, label in spec.methods.items() if name not in known]
    found = []
    for method, projection, trained in listed:
        own = values[values["method"] == method].set_index("column")["value"]
        cells = {c: Score(f"{own[c]:g}", float(own[c])) if c in own else Score(NOT_AVAILABLE) for c in spec.columns}
        found.append(Row(block, method, projection, trained, cells))
    return found


def _ours(spec: Comparison, ours: Ours, sweep: Sweep | None) -> list[Row]:
    block = f"ours, {ours.label}"
    found = []
    for name, label in spec.methods.items():
        if sweep is None:
            found.append(Row(block, label, name, NOT_RUN, {c: Score(NOT_RUN) for c in spec.columns}))
            continue
        cells = {c: score_at(sweep, ours.places.get(c), name) for c in spec.columns}
        trained = sweep.cells.loc[sweep.cells["projection"] == name, "trained"].dropna()
        found.append(Row(block, label, name, style.span(trained) if len(trained) else NOT_RUN, cells))
    return found


def score_at(sweep: Sweep, place: Place | Mean | None, projection: str) -> Score:
    """Our score of a projection there, or why there is none."""
    if place is None:
        return Score(NOT_RUN)
    if isinstance(place, Mean):
        each = [score_at(sweep, Place(task), projection) for task in place.tasks]
        if lost := [score for score in each if score.value is None]:
            return lost[0]
        runs = sweep.finished
        return score(statistics.over_tasks(runs[(runs["projection"] == projection) & runs["task"].isin(place.tasks)]))
    cells = sweep.part(place.group) if place.group else sweep.cells
    chosen = cells[(cells["projection"] == projection) & (cells["task"] == place.task)]
    if place.model:
        chosen = chosen[chosen["model"] == place.model]
    return score(one_cell(chosen, f"{projection} on {place.task} in the sweep {sweep.name}"))


def score(cell: pd.Series | None) -> Score:
    """A cell of ours in percent: mean and 95 % interval, or why there is none."""
    if cell is None:
        return Score(NOT_RUN)
    if cell["status"] != statistics.COMPLETE:
        return Score("failed" if cell["status"] == statistics.INCOMPLETE else cell["status"])
    mean, low, high = (100 * cell[key] for key in ("score", "score_low", "score_high"))
    if cell["n"] < 2:
        return Score(f"{mean:.1f} (n = 1)", mean, n=1)
    return Score(f"{mean:.1f} [{low:.1f}, {high:.1f}] (n = {cell['n']})", mean, low, high, int(cell["n"]))


def table(spec: Comparison, found: Sequence[Row]) -> Table:
    """One line per method and block."""
    heads = ["block", "method", "trained", *(f"{column}, {spec.unit_of(column)}" for column in spec.columns)]
    lines = [[r.block, r.method, r.trained, *(r.scores[c].text for c in spec.columns)] for r in found]
    unknown = ["Published: no value is known to us."] if of_table(spec.name).empty else []
    return Table(spec.title, heads, lines, [*unknown, *notes(spec.name), OURS, *spec.notes])
