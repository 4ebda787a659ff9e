"""The committed results: sweeps and the tables of analyses, None for one that was not made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from experiments.errors import ExperimentError
from experiments.records import RECORDS, statistics
from experiments.records.gather import OVERHEAD, Records, read_sweep, read_table, together

NOT_RUN, NOT_AVAILABLE = "not run", "not available"
# a sweep that only checks that sweeps run
_SMOKE = "smoke"


@dataclass(frozen=True)
class Sweep:
    """A finished sweep."""

    name: str
    records: Records

    @cached_property
    def cells(self) -> pd.DataFrame:
        return self._checked(statistics.cells(self.records.runs))

    @property
    def finished(self) -> pd.DataFrame:
        """The runs that did not fail. Raises ExperimentError where a cell lacks a run."""
        self._checked(self.cells)
        return self.records.runs[self.records.runs["failed"].isna()]

    @cached_property
    def curves(self) -> pd.DataFrame:
        return statistics.mean_curves(self.cells, self.records.curves)

    def part(self, group: str) -> pd.DataFrame:
        """The cells with the score of one part of the test."""
        return self._checked(statistics.cells(statistics.of_group(self.records.runs, group)))

    def differences(self, reference: str) -> pd.DataFrame:
        return statistics.differences(self.records.runs, reference)

    def _checked(self, cells: pd.DataFrame) -> pd.DataFrame:
        if (short := cells[statistics.missing(cells)]).empty:
            return cells
        first = short.iloc[0]
        raise ExperimentError(
            f"figures: every cell of the sweep {self.name} must have {cells['runs'].max()} runs, got {first['runs']} "
            f"of {first['projection']} on {first['task']}. Run the sweep to its end and export it again."
        )


@dataclass(frozen=True)
class Committed:
    """The folder of committed results. Raises ExperimentError for one without sweeps."""

    folder: Path

    def __post_init__(self) -> None:
        if not any(self.folder.glob(f"sweeps/*/{RECORDS}")):
            at_hand = sorted(path.name for path in self.folder.iterdir()) if self.folder.is_dir() else "no folder"
            raise ExperimentError(
                f"figures: {self.folder} must hold sweeps/<name>/{RECORDS} as `python -m experiments.export` writes "
                f"them, got {at_hand or 'an empty folder'}. Pass the folder above `sweeps`, such as results."
            )

    def sweep(self, name: str) -> Sweep | None:
        """The sweep of this name, or None if it was not run.

        One of many hours may be run in parts, `name_<part>`, which have no cell in common: they are read as one.
        """
        if name not in self._known:
            places = [self.folder / "sweeps" / name, *sorted(self.folder.glob(f"sweeps/{name}_*"))]
            parts = [read_sweep(place) for place in places if place.is_dir()]
            if parts:
                self._known[name] = Sweep(name, together(parts))
        return self._known.get(name)

    @cached_property
    def _known(self) -> dict[str, Sweep]:
        """Those that were read: a sweep is in many figures."""
        return {}

    @property
    def sweeps(self) -> list[Sweep]:
        """Every study at hand, by name."""
        names = sorted(path.name for path in (self.folder / "sweeps").iterdir())
        whole = [name for name in names if not any(name.startswith(f"{other}_") for other in names)]
        return [sweep for name in whole if name != _SMOKE and (sweep := self.sweep(name))]

    @cached_property
    def costs(self) -> pd.DataFrame | None:
        """What `analysis.overhead` measured of each method on each base."""
        return self.read(
            str(OVERHEAD), *("base", "method", "trained", "step_ratio", "step_ratio_low", "step_ratio_high"),
            *("step_pairs", "peak_bytes", "peak_bytes_per_coordinate_beyond_lora", "file_bytes"),
        )  # fmt: skip

    def read(self, path: str, *columns: str) -> pd.DataFrame | None:
        """An analysis table, or None if it was not made. Raises ExperimentError where it lacks one of these columns."""
        file = self.folder / path
        return read_table(file, columns) if file.exists() else None

    def read_analysis(self, name: str, needed: Mapping[str, Sequence[str]]) -> dict[str, pd.DataFrame] | None:
        """The tables of an analysis with their columns, or None if one of them was not made."""
        found = {key: self.read(f"{name}/{name}-{key}.csv", *columns) for key, columns in needed.items()}
        made = {key: table for key, table in found.items() if table is not None}
        return made if len(made) == len(needed) else None


def complete(cells: pd.DataFrame, key: str) -> pd.DataFrame:
    """The complete cells. Raises ExperimentError where one of them lacks this size or setting."""
    found = cells[cells["status"] == statistics.COMPLETE]
    if key not in found or found[key].isna().any():
        raise ExperimentError(
            f"figures: every complete cell must have {key}, got none in the sweep {cells['sweep'].iloc[0]}. "
            "Export the sweep again."
        )
    return found


def one_task(cells: pd.DataFrame, what: str) -> str:
    """The task that all these cells have. Raises ExperimentError where there are several: scores of different tasks
    do not belong on one axis."""
    tasks = sorted(cells["task"].unique())
    if len(tasks) != 1:
        raise ExperimentError(f"figures: {what} must show one task, got {', '.join(tasks) or 'none'}. Choose one.")
    return tasks[0]


def one_cell(cells: pd.DataFrame, what: str) -> pd.Series | None:
    """The only cell, None if there is none. Raises ExperimentError where several could be meant."""
    if len(cells) > 1:
        raise ExperimentError(
            f"figures: {what} must be one cell of a sweep, got {len(cells)}. Use a sweep in which each method has one."
        )
    return cells.iloc[0] if len(cells) else None
