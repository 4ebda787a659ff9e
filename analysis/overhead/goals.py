"""What was aimed at on the CPU, beside what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from analysis.overhead.kernel import CASES
from analysis.overhead.model import PEFT, REFERENCE
from analysis.overhead.summary import Row

_BASE = "smollm2"
_OWN = "unilora"
_STEPS = ("unilora", "vera", "tied_lora", "lora_xs", "fastfood", "vblora")
_PEAKS = ("lora_xs", "fastfood", "vblora")
_FROM_8E5, _AT_1E7, _AT_4E7 = 786_432, 9_994_240, 39_976_960


@dataclass(frozen=True)
class _Goal:
    """A number of one row, and the bound that it should keep to."""

    what: str
    row: Row
    key: str
    bound: float
    at_least: bool = False

    def verdict(self) -> Row:
        """The row of the table: the goal in words, the figure with its interval, the bound and whether it is reached.

        Where the interval holds the bound, the measurement cannot tell.
        """
        value, low, high = (self.row.get(key) for key in (self.key, f"{self.key}_low", f"{self.key}_high"))
        found = {"what": self.what, "goal": f"{'>=' if self.at_least else '<='} {self.bound:g}", "value": value}
        if value is None:
            return found | {"reached": "not measured"}
        reached = value >= self.bound if self.at_least else value <= self.bound
        told = low is None or high is None or not low < self.bound < high
        found |= {} if low is None else {"value_low": low, "value_high": high}
        return found | {"reached": ("yes" if reached else "no") + ("" if told else ", within the interval")}


def goals(kernel: Sequence[Row], model: Sequence[Row]) -> list[Row]:
    """One row for each goal of a part that was measured."""
    found = [*(_of_kernels(kernel) if kernel else ()), *(_of_models(model) if model else ())]
    return [goal.verdict() for goal in found]


def _of_kernels(rows: Sequence[Row]) -> Iterator[_Goal]:
    for case in CASES:
        name = f"{case.architecture} r={case.r}"
        mine = [row for row in rows if row.get("case") == name and row.get("family") == _OWN]
        others = [row for row in mine if row.get("both_per_ours") is not None]
        if others:
            fastest = min(others, key=lambda row: row["both_per_ours"])
            what = f"D = {fastest['D']:,}: time of the fastest competitor, {fastest['method']}, over uniproj's"
            yield _Goal(what, fastest, "both_per_ours", 1.0, at_least=True)
        if (peft := _one(mine, lambda row: row.get("method") == "PEFT UNILORA")) and peft.get("D", 0) >= _FROM_8E5:
            yield _Goal(f"D = {peft['D']:,}: PEFT UNILORA over uniproj", peft, "both_per_ours", 10.0, at_least=True)
        if own := _one(mine, lambda row: row.get("method") == _OWN and row.get("D") in (_AT_1E7, _AT_4E7)):
            bound = 8.0 if own["D"] == _AT_1E7 else 5.0
            yield _Goal(f"D = {own['D']:,}: forward and adjoint over a copy", own, "both_per_copy", bound)
    for row in (row for row in rows if row.get("method") == "fastfood" and row.get("bytes_per_coordinate") is not None):
        yield _Goal(f"D = {row['D']:,}: fastfood's state, bytes per coordinate", row, "bytes_per_coordinate", 5.0)


def _of_models(rows: Sequence[Row]) -> Iterator[_Goal]:
    of = {row["method"]: row for row in rows if row.get("base") == _BASE}
    lora: float | None = of.get(REFERENCE, {}).get("inference_ratio_high")
    for method in (name for name in _STEPS if name in of):
        yield _Goal(f"{method}: step over LoRA's", of[method], "step_ratio", 1.02)
    if lora is not None:
        for method in (name for name in of if name not in PEFT):
            what = f"{method}: token over LoRA's, {REFERENCE} beside itself up to"
            yield _Goal(what, of[method], "inference_ratio", lora)
    for method in (name for name in _PEAKS if name in of):
        what = f"{method}: peak beyond LoRA's, bytes per coordinate"
        yield _Goal(what, of[method], "peak_bytes_per_coordinate_beyond_lora", 8.0)


def _one(rows: Sequence[Row], holds: Callable[[Row], bool]) -> Row | None:
    return next((row for row in rows if holds(row)), None)
