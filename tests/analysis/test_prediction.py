"""Counts of kernels written for this test, floors computed by hand, and the command on small sizes."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch

import uniproj
from uniproj.kernels import backend

if backend() == "triton-interpreter":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from analysis.prediction import GPUS, Operator, Read, floors, launches, of_a_warp, operators  # noqa: E402
from analysis.prediction.__main__ import main  # noqa: E402
from experiments.errors import ExperimentError  # noqa: E402

BLOCK = 128
KERNELS = Path(uniproj.__file__).parent / "kernels"


@triton.jit
def _sums(x, y, limit, MORE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    while tl.max(total, 0) < limit:  # of as many trips as nobody knows, and so not unrolled
        total += tl.load(x + i)
        if MORE:
            total *= total
    tl.store(y + i, total)


def launched(more: bool):
    x, y = (torch.empty(1000, device="meta") for _ in range(2))
    (launch,) = launches(lambda: _sums[(7, 2)](x, y, 100.0, MORE=more, BLOCK=BLOCK, num_warps=2))
    return launch


def test_one_more_instruction_in_a_loop_is_counted_at_every_trip() -> None:
    one, more = launched(False), launched(True)
    assert (one.kernel, one.programs, one.warps) == ("_sums", 14, 2) and one.cubin[:4] == b"\x7fELF"
    counts = {(launch, trips): of_a_warp(launch, [trips]) for launch in (one, more) for trips in (0, 10, 1010)}
    body, longer = (counts[launch, 1010] - counts[launch, 10] for launch in (one, more))
    assert longer >= body + 1000 and body >= 3000  # a load, an addition, a branch
    assert 5 < counts[one, 0] < 100


def test_a_loop_without_trips_is_refused() -> None:
    with pytest.raises(ExperimentError, match="kernel _sums must have 2 loops, got 1 from Triton"):
        of_a_warp(launched(False), [1, 1])


def test_floors_by_hand() -> None:
    D = 10**8
    reads = (Read(D, 2.0 * 192e3), Read(D, 4.0 * D, cold=True))
    operator = Operator("made up", D, 5, lambda: None, {}, streamed=8.0 * D, cached=4.0 * D, reads=reads)
    found = floors(operator, 1e10, GPUS[0])
    assert found["memory"] == pytest.approx(40 * D / 3.35e12)
    assert found["issue"] == pytest.approx(1e10 / (4 * 132 * 1.755e9))
    assert found["cache"] == pytest.approx((44 + 16) * D / 5.5e12)  # half of the first array is in the first level
    assert found["lines"] == pytest.approx(2 * D / (4 * 132 * 1.755e9))
    assert found["predicted"] == max(found[name] for name in ("memory", "issue", "cache", "lines"))
    assert found["copies"] == pytest.approx(found["predicted"] / (8 * D / 3.35e12))


def test_the_files_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = [operator for operator in operators(100_000, 1000) if operator.name.startswith(("Uni", "Shared"))]
    monkeypatch.setattr("analysis.prediction.__main__.operators", lambda D, d: quick)
    assert main(["--sizes", "100000:1000", "--out", str(tmp_path)]) == 0
    table = pd.read_csv(tmp_path / "prediction.csv")
    assert (table[["instructions", "memory", "issue", "copies"]] > 0).all().all() and len(table) == 2 * 5
    assert set(table["goal"].dropna()) == {1.5, 4.0}
    record = json.loads((tmp_path / "prediction.json").read_text())
    assert record["provenance"]["versions"]["triton"] == triton.__version__ and len(record["floors"]) == len(table)
    assert (tmp_path / "prediction.md").read_text() in capsys.readouterr().out


def test_every_kernel_is_predicted_and_has_its_trips(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **options: found.append(self.__name__))
    for operator in operators(100_000, 1000):
        before = len(found)
        operator.call()
        assert set(found[before:]) == operator.trips.keys()
    files = {path.stem for path in KERNELS.glob("*_triton.py")} - {"grid_triton", "random_triton"}  # of no product
    assert set(found) == {kernel for file in files for kernel in _launched_by(file)}


def _launched_by(file: str) -> set[str]:
    """The kernels of a file that take an axis of the grid: others are called by these."""
    source = (KERNELS / f"{file}.py").read_text().split("@triton.jit")[1:]
    bodies = [part.split("\n\n\n")[0] for part in source]
    return {body.split("(")[0].split("def ")[1] for body in bodies if "program_id" in body or " = place(" in body}


def test_a_size_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--sizes", "10:20"])
    assert "must be D:d with 0 < d <= D, got '10:20'" in capsys.readouterr().err
    assert main(["--sizes", "3000000000:20"]) == 2
    assert "D must be at most 2,147,352,576, got 3,000,000,000" in capsys.readouterr().err


def test_the_partition_at_small_and_large_size_issues_as_much_for_each_row() -> None:
    found = []
    for D in (10**6, 10**8):
        forward = next(iter(operators(D, D // 100)))
        *_, deal = launches(partial(forward.call))
        found.append(of_a_warp(deal, [0]) * deal.programs / D)
    assert found[0] == pytest.approx(found[1], rel=0.01)
