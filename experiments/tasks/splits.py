"""Where rows come from: the hub by a data set's public name, or the same splits as files below a data folder."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from experiments.errors import ExperimentError
from experiments.tasks.formats import FORMATS

HUB = "hub"
_MOST_HELD_OUT = 1000


@dataclass(frozen=True)
class Splits:
    """Published splits of one data set.

    hub, subset: arguments of `datasets.load_dataset`, the hub's name with "{split}" where each split has a name of its
    own; folder: its place below a data folder, with files named as the splits. rows: how many the authors publish of
    each split. A hub that serves another number is refused, since its scores could not be compared; a folder may hold
    a part (as `<folder>_small`, or `<split>_subset` in it), which `Task.published` then shows.
    """

    hub: str
    folder: str
    subset: str | None = None
    rows: Mapping[str, int] = field(default_factory=dict)

    def read(self, split: str, data: str) -> pd.DataFrame:
        """A published split from the hub (data = "hub") or from files below the folder `data`."""
        if data != HUB:
            whole, part = Path(data) / self.folder, Path(data) / f"{self.folder}_small"
            return read_file(part if part.is_dir() and not whole.is_dir() else whole, split)
        hub = self.hub.format(split=split)
        rows = self._from_hub(hub, split)
        if split in self.rows and len(rows) != self.rows[split]:
            raise ExperimentError(
                f"tasks: {hub} {self.subset or ''} must have {self.rows[split]:,} rows in {split!r} as published, "
                f"got {len(rows):,}. Pin an older revision in a local copy and pass it as data: FOLDER."
            )
        return rows

    def _from_hub(self, hub: str, split: str) -> pd.DataFrame:
        from datasets import load_dataset

        try:
            return load_dataset(hub, self.subset, split=split, trust_remote_code=False).to_pandas()
        except (OSError, ValueError) as error:
            raise ExperimentError(
                f"tasks: {hub} {self.subset or ''} must be in the local cache or on a hub that can be reached, "
                f"got {type(error).__name__}. Connect, or pass a folder of files: data: FOLDER."
            ) from error


def read_file(folder: Path, split: str) -> pd.DataFrame:
    """The file `split` (or `split_subset`, a part of it) of a folder.

    Raises ExperimentError if it is missing, broken or empty.
    """
    if not folder.is_dir():
        raise ExperimentError(f"tasks: {folder} must be a folder with {split}, got none. Check `data`.")
    if found := files(folder, split):
        if len(found) > 1:
            raise ExperimentError(
                f"tasks: {folder} must hold {split} in one file, got {' and '.join(path.name for path in found)}. "
                "Remove all but one."
            )
        path = found[0]
        try:
            rows = FORMATS[path.suffix](path)
        except (ValueError, OSError, RecursionError) as error:
            raise ExperimentError(f"tasks: {path} must be valid {path.suffix[1:]}, got: {error}. Repair it.") from error
        if rows.empty:
            raise ExperimentError(f"tasks: {path} must hold rows, got none: it is empty. Fill it.")
        # rows are counted as the file has them, whatever index it brings
        return rows.reset_index(drop=True)
    raise ExperimentError(
        f"tasks: {folder} must hold {split} as one of {', '.join(FORMATS)}, got "
        f"{sorted(p.name for p in folder.iterdir())}. Add the file."
    )


def files(folder: Path, split: str) -> list[Path]:
    """The files that hold a split: of whole ones all, else those of a part."""
    for stem in (split, f"{split}_subset"):
        if found := [path for suffix in FORMATS if (path := folder / f"{stem}{suffix}").is_file()]:
            return found
    return []


def carve(rows: pd.DataFrame, split: str) -> pd.DataFrame:
    """ "train" or "validation" of published training rows: a tenth of them, at most 1000, is the validation split."""
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    if len(rows) < 10:
        raise ExperimentError(
            f"tasks: a tenth of the training rows is held out for validation, got {len(rows)} rows. Add rows, at least "
            "10, or a validation file."
        )
    held_out = min(_MOST_HELD_OUT, len(rows) // 10)
    return rows.iloc[order[:held_out] if split == "validation" else order[held_out:]]
