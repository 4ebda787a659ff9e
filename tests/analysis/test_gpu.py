"""The command for a GPU: a rehearsal where nothing but what it needs is installed, and what its page says."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
import torch

from analysis.gpu import __main__, packages, report, tests
from analysis.gpu.parts import TESTS, parts
from analysis.overhead import kernel, model, problem, runner
from analysis.overhead.problem import Entrant, Method
from analysis.overhead.workloads import DEFAULT
from experiments.timing import LEAST_VALUES
from uniproj import names

ROOT = Path(__file__).parent.parent.parent
MACHINE = {"seed": 0, "device": "cpu", "hardware": "any", "threads": 1, "versions": {}}


def _closure(roots: list[str]) -> set[importlib.metadata.Distribution]:
    """These distributions and all that they require, but for extras."""
    from packaging.requirements import Requirement

    found: dict[str, importlib.metadata.Distribution] = {}
    ahead = [Requirement(root).name for root in roots]
    while ahead:
        name = re.sub(r"[-_.]+", "-", ahead.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # of another system, say
            continue
        needed = [Requirement(line) for line in found[name].requires or []]
        ahead += [need.name for need in needed if need.marker is None or need.marker.evaluate({"extra": ""})]
    return set(found.values())


@pytest.fixture
def bare_python(tmp_path: Path) -> Path:
    """An interpreter that has what uniproj requires, Triton and pytest, and nothing else: no uniproj either."""
    venv.create(tmp_path / "venv", symlinks=True)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for distribution in _closure([*declared, "triton", "pytest"]):
        for top in {Path(file).parts[0] for file in distribution.files or [] if Path(file).parts[0] != ".."}:
            if top != "__pycache__" and not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    return tmp_path / "venv" / "bin" / "python"


@pytest.mark.system
def test_a_rehearsal_to_its_end_and_a_second_one_that_finds_everything_done(bare_python: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    seen = []
    for _ in range(2):
        done = subprocess.run(
            ["make", "gpu", f"PYTHON={bare_python}", f"ARGS=--device cpu --tiny --out {out}"],
            cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        page = (out / "gpu.md").read_text()
        assert done.returncode == 0, done.stderr + page
        assert page in done.stdout
        seen.append((page, "measurements:" in done.stderr))
    assert seen[0] == (page, True) and seen[1] == (page, False)

    found = json.loads((out / "gpu.json").read_text())
    assert found["provenance"]["versions"]["datasets"] == "not installed"
    progress = {row["part"]: row for row in found["parts"]}
    assert progress.keys() == {"tests", "kernel", "model", "mixed", "suite"}
    assert all(row["done"] == row["asked"] > 0 for row in progress.values())
    passed = {row["test"].split("::")[0] for row in found["tests"] if not row["note"]}
    assert passed == {f"tests/gpu/{name}.py" for name in TESTS[:-1]}
    assert [row["test"] for row in found["tests"] if row["note"] == "skipped: hypothesis is not installed"]
    assert {row["table"] for row in found["mixed"]} == {"seconds", "ratios"}
    tables = (out / "overhead.md").read_text()
    assert all(f"| {name} |" in tables for name in ("tiny r=4", "PEFT UNILORA", "PEFT VBLORA", "vera", "copy"))


def test_packages_that_are_missing_or_too_old_are_named_before_anything_is_imported() -> None:
    assert packages.missing() == []
    assert packages.missing(["numpy>=2", "no-such-thing>=1.5"]) == ["no-such-thing>=1.5 (not installed)"]
    numpy = importlib.metadata.version("numpy")
    assert packages.missing(["numpy<1", "torch>=2"]) == [f"numpy<1 (found {numpy})"]
    # -S: an interpreter without any package
    done = subprocess.run([sys.executable, "-S", "-m", "analysis.gpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    named = re.findall(r"(\w+)\S* \(not installed\)", done.stderr)
    assert {"torch", "peft", "transformers", "pydantic", "triton", "pytest"} <= set(
        named
    ) and "Traceback" not in done.stderr


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert __main__.main(["--out", str(tmp_path / "out")]) == 2
    assert "--device cuda must be available" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_what_has_no_time_is_left_out(tmp_path, capsys) -> None:
    assert __main__.main(["--device", "cpu", "--tiny", "--seconds", "0", "--out", str(tmp_path)]) == 1
    assert "Nothing was measured." in capsys.readouterr().out


def test_the_parts_share_the_time_and_begin_with_what_matters_most() -> None:
    asked = {part.name: part for part in parts("cuda", False)}
    assert sum(part.share for part in asked.values()) == pytest.approx(1.0)
    models = [(job["base"], job["method"]) for job in asked["model"].jobs]
    assert set(models) == {(base, name) for base in DEFAULT["cuda"] for name in [*model.PEFT, *names()]}
    assert len(set(models)) == len(models) and models[0] == (DEFAULT["cuda"][0], model.REFERENCE)
    peers = {base for base, name in models[:14] if name in model.PEFT}
    assert peers == set(DEFAULT["cuda"]) and len({name for _, name in models[:7]} - {*model.PEFT}) == 3
    assert all(min(job["pairs"], job["pairs_checkpointing"]) >= LEAST_VALUES for job in asked["model"].jobs)
    assert {job["users"] for job in asked["mixed"].jobs} == {16, 256}
    files = {Path(job["paths"]).name for job in asked["tests"].jobs}
    assert files == {path.name for path in (ROOT / "tests" / "gpu").glob("test_*.py")}


def test_the_page_names_what_failed_and_what_is_left_out(tmp_path: Path) -> None:
    jobs = {part.name: [{**job, **MACHINE} for job in part.jobs] for part in parts("cpu", True)}
    numbers, waiting, *_ = jobs["tests"]
    rows = [
        {"test": f"a.py::{n}", "seconds": 0.0, "note": note} for n, note in (("b", ""), ("c", "failed: 3 is not 4"))
    ]
    runner.save(tmp_path, numbers, [*rows, {"test": "a.py::d[0]", "seconds": 0.0, "note": "skipped: no GPU"}])
    runner._write(tmp_path, waiting, {"status": runner.FAILED, "reason": "ended by SIGSEGV", "rows": []})
    page, whole = report.write(tmp_path, jobs)
    assert not whole and page == (tmp_path / "gpu.md").read_text()
    assert "| a.py | 1 | 1 | 1 |" in page and "- d: skipped: no GPU" in page
    progress = {row["part"]: row for row in json.loads((tmp_path / "gpu.json").read_text())["parts"]}
    of_tests = progress["tests"]
    assert (of_tests["asked"], of_tests["done"]) == (len(jobs["tests"]), 1)
    assert all(f"| {row['left out']} |" in page for row in progress.values())
    assert "a.py::c failed: 3 is not 4" in of_tests["failed"]
    assert "test_waiting.py failed: ended by SIGSEGV" in of_tests["failed"]
    assert "test_operators.py" in of_tests["left out"] and "test_numbers.py" not in of_tests["left out"]
    assert progress["mixed"]["left out"].count(";") == len(jobs["mixed"]) - 1
    assert not (tmp_path / "overhead.md").exists()


def test_a_row_for_every_test(tmp_path: Path) -> None:
    file = tmp_path / "test_few.py"
    file.write_text(
        "import pytest\n\ndef test_good(): pass\n\ndef test_bad(): assert 1 == 2\n\n"
        "def test_none(): pytest.skip('not here')\n\n@pytest.fixture\ndef broken(): raise OSError('no disk')\n\n"
        "def test_setup(broken): pass\n"
    )
    config = {"paths": str(file), "keyword": "test_", "device": "cpu"}
    rows = {row["test"].split("::")[-1]: row["note"] for row in tests.measure(config)}
    assert rows == {
        "test_good": "", "test_bad": "failed: assert 1 == 2", "test_none": "skipped: not here",
        "test_setup": "failed: OSError: no disk",
    }  # fmt: skip
    broken, empty = tmp_path / "test_broken.py", tmp_path / "test_empty.py"
    broken.write_text("import nothing_of_this_name")
    (row,) = tests.measure({**config, "paths": str(broken)})
    assert row["note"].startswith("failed: ")
    empty.touch()
    with pytest.raises(RuntimeError, match=r"test_empty.py must hold tests that can be run here, got none"):
        tests.measure({**config, "paths": str(empty)})


def test_the_gpu_is_timed_while_all_calls_wait_in_its_queue(monkeypatch) -> None:
    """Events around the calls, behind work that keeps the GPU busy for longer than they take to be launched."""
    log: list[object] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, _: "Event") -> float:
            return 6.0  # ms

    monkeypatch.setattr(torch.cuda, "_sleep", log.append)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(problem, "_SHORTEST", 3e-3)
    method = Method(lambda: log.append("forward"), lambda _: log.append("adjoint"))
    entrant = Entrant("any", method, torch.device("cuda"), 0.0, 0, (1e-3, 5e-3))
    assert entrant.run_on_gpu() == pytest.approx((6e-3 / 3, 6e-3))
    sleep, *rest = log
    assert sleep > 3e-3 * 1.9e9  # cycles of a clock below 2 GHz
    assert rest[:6] == ["event", "forward", "forward", "forward", "event", "wait"]
    assert rest[6] == "forward" and rest[8:] == ["event", "adjoint", "event", "wait"] and rest[7] > 5e-3 * 1.9e9


def test_the_page_shows_the_time_of_the_gpu_alone(tmp_path: Path) -> None:
    class Racer:
        def __init__(self, name: str, *seconds: float) -> None:
            self.name, self.run_on_gpu = name, lambda: seconds

    racing = [Racer("copy", 2e-6, 0.0), Racer("clone", 3e-6, 0.0), Racer("own", 3e-6, 8e-6)]
    found = kernel._timed_on_gpu(racing, 6)
    assert "gpu_adjoint_per_copy" not in found["copy"] and found["clone"]["gpu_forward_per_copy"] == pytest.approx(1.5)
    jobs = {part.name: [{**job, **MACHINE} for job in part.jobs] for part in parts("cpu", True)}
    common = {"case": "a model", "family": "f", "D": 1000, "d": 9, "note": ""}
    runner.save(tmp_path, jobs["kernel"][0], [{**common, "method": name, **row} for name, row in found.items()])
    page, _ = report.write(tmp_path, jobs)
    assert "| a model | 1,000 | own | 3 | 8 | 1.5 [1.5, 1.5] | 4 [4, 4] |" in page
