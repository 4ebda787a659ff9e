"""The command: what it writes, that it goes on where it stopped, and what it says when something is wrong."""

import copy
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from analysis.overhead import growth, kernel, model, problem, report, runner
from analysis.overhead.__main__ import jobs, main, parse
from analysis.overhead.shapes import Llama
from analysis.overhead.workloads import WORKLOADS

SMALL = Llama(layers=2, hidden=64, intermediate=128, heads=4, kv_heads=2)
KERNEL_ROWS = {"unilora": 2 + 7, "fastfood": 2 + 2, "vblora": 2 + 2}
METHODS = ("PEFT LORA", "unilora")


@pytest.fixture
def measured(monkeypatch) -> list[str]:
    """Few and small jobs, measured in this process; the list names every measurement as it is made."""
    done: list[str] = []

    def run(configs: list[dict], out: Path, *_: object) -> list[str | None]:
        (config,) = configs
        done.append(runner.describe(config))
        try:
            runner.measure(out, config)
        except RuntimeError as error:
            return [f"RuntimeError: {error}"]
        return [None]

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(runner, "_run", run)
    monkeypatch.setitem(kernel.ARCHITECTURES, "small", SMALL.all_linear)
    monkeypatch.setattr(kernel, "CASES", (kernel.Case("small", 4, 128, 6),))
    monkeypatch.setattr(problem, "_SHORTEST", 1e-4)
    monkeypatch.setattr(growth, "SIZES_D", (1e4, 4e4, 1e5))
    monkeypatch.setattr(growth, "ALONG_D", ("unilora",))
    monkeypatch.setattr(growth, "ALONG_d", ())
    monkeypatch.setattr(model, "PAIRS", {"cpu": (6, 6, 6)})
    return done


def run(out: Path, *more: str) -> int:
    return main(["--out", str(out), "--models", "tiny", "--methods", *METHODS, *more])


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open() as lines:
        return list(csv.DictReader(lines))


def test_everything_is_written_and_a_second_run_measures_nothing(tmp_path, measured, capsys) -> None:
    assert run(tmp_path, "--json") == 0
    assert measured == [
        "kernel small unilora 4", "kernel small fastfood 4", "kernel small vblora 4",
        "model tiny PEFT LORA 4", "model tiny unilora 4", "growth unilora D",
    ]  # fmt: skip
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "overhead.json").read_text())
    assert {"hardware", "versions", "commits", "first", "last"} == set(printed["provenance"])
    for record in printed["records"]:
        assert record["status"] == "done" and record["config"]["seed"] == 0
        assert record["provenance"]["versions"]["torch"] == torch.__version__

    found = rows_of(tmp_path / "overhead-kernel.csv")
    assert [sum(row["family"] == family for row in found) for family in KERNEL_ROWS] == [*KERNEL_ROWS.values()]
    # r = 4: 2 layers of q, o (64 + 64), k, v (32 + 64) and three of (64 + 128)
    assert {row["D"] for row in found} == {str(2 * 4 * (2 * 128 + 2 * 96 + 3 * 192))}
    assert (
        len(rows_of(tmp_path / "overhead-growth.csv")) == 3 and len(rows_of(tmp_path / "overhead-exponents.csv")) == 1
    )
    lora, unilora = rows_of(tmp_path / "overhead-model.csv")
    # tiny: one layer of width 32, inner 64, two of four heads for keys and values
    D = 4 * (2 * 64 + 2 * 48 + 3 * 96)
    assert int(lora["trained"]) == int(lora["D"]) == D and int(unilora["trained"]) == 128
    assert int(lora["state_bytes"]) == 0 and int(unilora["file_bytes"]) >= 4 * 128
    assert float(lora["peak_bytes_per_coordinate_beyond_lora"]) == 0.0
    assert float(unilora["step_ratio_low"]) <= float(unilora["step_ratio"]) <= float(unilora["step_ratio_high"])

    text = (tmp_path / "overhead.md").read_text()
    assert all(f"## {title}" in text for title in ("Goals", "Kernel", "Model", "Growth")) and "D = 623,443,968" in text
    assert torch.__version__ in text and "threads: 1;" in text
    widths = {block.split("\n")[0].count("|") for block in text.split("\n\n") if block.startswith("|")}
    assert widths == {len(columns) + 1 for columns in (report.GOALS, report.KERNEL, report.MODEL, report.GROWTH)}
    assert (tmp_path / "overhead.png").read_bytes().startswith(b"\x89PNG")

    measured.clear()
    assert run(tmp_path) == 0 and measured == []
    assert (tmp_path / "overhead.md").read_text() == text and "## Kernel" in capsys.readouterr().out
    assert run(tmp_path, "--parts", "growth") == 0 and measured == []


def test_another_machine_count_of_threads_or_version_is_measured_anew(tmp_path, measured, monkeypatch) -> None:
    kept = None
    for change in (
        lambda: None,
        lambda: monkeypatch.setenv("OMP_NUM_THREADS", "2"),
        lambda: monkeypatch.setattr("analysis.overhead.surroundings.device_name", lambda _: "another"),
        lambda: monkeypatch.setattr("analysis.overhead.surroundings.versions", lambda: {"torch": "0"}),
    ):
        change()
        (job,) = [job for job in jobs(parse([])) if job["part"] == "growth"]
        assert job != kept and not runner.is_done(tmp_path, job)
        runner.save(tmp_path, job, [])
        assert runner.is_done(tmp_path, job)
        kept = job


def test_a_failure_is_recorded_reported_and_tried_again(tmp_path, measured, monkeypatch, capsys) -> None:
    measure = growth.measure

    def broken(config: dict) -> list[dict]:
        if config["method"] == "fastfood":
            raise RuntimeError("no such thing")
        return measure(config)

    monkeypatch.setattr(growth, "ALONG_D", ("unilora", "fastfood"))
    monkeypatch.setattr(growth, "measure", broken)
    assert run(tmp_path, "--parts", "growth", "--json") == 1
    out, err = capsys.readouterr()
    assert "growth fastfood D failed: RuntimeError: no such thing" in err
    assert [record["status"] for record in json.loads(out)["records"]] == ["done", "failed"]
    assert "failed: RuntimeError: no such thing" in (tmp_path / "overhead.md").read_text()
    monkeypatch.setattr(growth, "measure", measure)
    measured.clear()
    assert run(tmp_path, "--parts", "growth") == 0 and measured == ["growth fastfood D"]


def test_a_method_that_fails_within_a_measurement_is_a_failure_too(tmp_path, measured, monkeypatch, capsys) -> None:
    def broken(_):
        raise RuntimeError("no such operator")

    own, other = kernel.FAMILIES["fastfood"]
    family = (own, kernel.Candidate(other.name, broken, 4))
    monkeypatch.setattr(kernel, "FAMILIES", {"fastfood": family})
    assert run(tmp_path, "--parts", "kernel") == 1
    table = capsys.readouterr().out
    assert "failed: RuntimeError: no such operator" in table and "| fastfood |" in table


def test_unknown_names_are_refused(capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--methods", "peft/c4a"])
    assert "unknown entrant 'peft/c4a'. Did you mean 'peft/c3a'" in capsys.readouterr().err
    for option, name in {"--models": "gpt5", "--parts": "all", "--device": "tpu"}.items():
        with pytest.raises(SystemExit) as refusal:
            main([option, name])
        error = capsys.readouterr().err
        assert refusal.value.code == 2 and f"invalid choice: '{name}'" in error and "choose from" in error


@pytest.mark.parametrize("text", ['{"status": "do', "[]", '{"status": "done"}'])
def test_a_damaged_record_is_named(text: str, tmp_path, measured, capsys) -> None:
    (job, *_) = [job for job in jobs(parse([])) if job["part"] == "growth"]
    file = runner.path(tmp_path, job)
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert run(tmp_path, "--parts", "growth") == 2 and measured == []
    error = capsys.readouterr().err
    assert str(file) in error and "away" in error


def test_bad_surroundings_are_named(tmp_path, measured, monkeypatch, capsys) -> None:
    (tmp_path / "file").touch()
    assert run(tmp_path / "file") == 2 and "must be writable" in capsys.readouterr().err
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert run(tmp_path) == 2 and "OMP_NUM_THREADS must be a count of at least 1, got 'many'" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(tmp_path, "--device", "cuda") == 2 and "Use --device cpu" in capsys.readouterr().err
    monkeypatch.setattr(sys, "platform", "darwin")
    assert run(tmp_path) == 2 and "Run it on Linux" in capsys.readouterr().err
    assert measured == []


def growth_job(**changes: object) -> dict:
    return {
        "part": "growth", "method": "unilora", "axis": "D", "sizes": [1e4, 4e4], "per_column": 19,
        "seed": 0, "device": "cpu", "hardware": "any", "threads": 1, "versions": {}, **changes,
    }  # fmt: skip


def test_a_measurement_writes_its_record_and_says_last_why_it_failed(tmp_path, monkeypatch, capsys) -> None:
    """What the process of a measurement does, in this one."""

    def leave(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(runner, "end_with", lambda _: None)
    monkeypatch.setattr(os, "_exit", leave)
    done, failed = growth_job(), growth_job(method="nothing")
    runner.main([str(tmp_path), json.dumps([done]), "1"])
    (record,) = runner.load(tmp_path, [done, failed])
    assert [row["D"] for row in record["rows"]] == [10_240, 40_960]
    assert record["provenance"]["hardware"]["threads"] == 1
    with pytest.raises(SystemExit, match="1"):
        runner.main([str(tmp_path), json.dumps([failed]), "1"])
    assert "unknown projection 'nothing'" in capsys.readouterr().err.splitlines()[-1]


def fake_python(folder: Path, monkeypatch, script: str) -> None:
    (folder / "python").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("kill -9 $$", "ended by SIGKILL (out of memory?)"),
        ("echo first; echo last 1>&2; exit 3", "last"),
        ("exit 3", "ended with status 3 without a word"),
    ],
)
def test_the_reason_of_a_process_that_ended(script: str, reason: str, tmp_path, monkeypatch) -> None:
    fake_python(tmp_path, monkeypatch, script)
    runner.run_all([growth_job()], tmp_path)
    (record,) = runner.load(tmp_path, [growth_job()])
    assert record["status"] == "failed" and record["reason"] == reason


def test_one_process_measures_several_and_a_failure_costs_only_its_own(tmp_path, monkeypatch) -> None:
    first, broken, last = jobs_ = [growth_job(method=name) for name in ("unilora", "fastfood", "vera")]
    for job in (first, last):
        runner.save(tmp_path / "prepared", job, [])
    copies = [f"cp {runner.path(tmp_path / 'prepared', job)} {tmp_path}/records" for job in (first, last)]
    count = f"echo >> {tmp_path}/processes; mkdir -p {tmp_path}/records"
    once = f"[ $(wc -l < {tmp_path}/processes) = 1 ]"
    fake_python(tmp_path, monkeypatch, f"{count}; if {once}; then {copies[0]}; echo no; exit 1; fi; {copies[1]}")
    runner.run_all(jobs_, tmp_path, together=True)
    assert [record["status"] for record in runner.load(tmp_path, jobs_)] == ["done", "failed", "done"]
    assert runner.load(tmp_path, [broken])[0]["reason"] == "no"
    assert (tmp_path / "processes").read_text() == "\n\n"


def test_what_does_not_fit_into_the_time_is_cut_off_or_left_out_and_comes_last(tmp_path, monkeypatch) -> None:
    cut, left = jobs_ = [growth_job(method=name) for name in ("unilora", "fastfood")]
    fake_python(tmp_path, monkeypatch, "echo starts; exec sleep 60")
    for expected in ([cut], [cut, left]):
        runner.run_all(jobs_, tmp_path, seconds=1.0)
        assert [record["config"] for record in runner.load(tmp_path, jobs_)] == expected
    reasons = {record["reason"] for record in runner.load(tmp_path, jobs_)}
    assert reasons == {"cut off when the time was over. Its last words: starts"}


def test_what_a_measurement_started_is_cut_off_with_it(tmp_path, monkeypatch) -> None:
    fake_python(tmp_path, monkeypatch, f"sleep 60 & echo $! > {tmp_path}/started; wait")
    runner.run_all([growth_job()], tmp_path, seconds=1.0)
    started, end = Path("/proc") / (tmp_path / "started").read_text().strip() / "stat", time.monotonic() + 5
    # gone, or dead and asked for by no parent yet
    while started.exists() and started.read_text().rsplit(")")[-1].split()[0] != "Z":
        assert time.monotonic() < end


def test_an_interruption_ends_the_running_measurement(tmp_path, monkeypatch, capsys) -> None:
    fake_python(tmp_path, monkeypatch, "exec sleep 60")
    children, wait = [], subprocess.Popen.wait

    def interrupted(child: subprocess.Popen, _: float) -> None:
        children.append(child)
        monkeypatch.setattr(subprocess.Popen, "wait", wait)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    assert run(tmp_path, "--parts", "growth") == 130
    assert "The same command goes on" in capsys.readouterr().err
    assert [child.returncode for child in children] == [-signal.SIGKILL]


def test_every_adapter_attaches_to_the_tiny_base_and_every_parameter_gets_a_gradient() -> None:
    work = WORKLOADS["tiny"]
    tiny, batch = work.load(), work.training_batch(torch.device("cpu"))
    for name in (*model.names(), "peft/c3a: {block_size: 16}", "full"):
        attached = model.attach(copy.deepcopy(tiny), work, name)
        attached(**batch).loss.backward()
        assert all(p.grad is not None for p in model.parameters(attached)), name


@pytest.mark.system
def test_a_measurement_in_its_own_process(tmp_path) -> None:
    runner.run_all([growth_job()], tmp_path)
    (record,) = runner.load(tmp_path, [growth_job()])
    assert record["status"] == "done", record["reason"]


@pytest.mark.slow
def test_the_command_itself(tmp_path) -> None:
    argv = [sys.executable, "-m", "analysis.overhead", "--parts", "model", "--models", "tiny", "--methods", "PEFT LORA"]
    done = subprocess.run([*argv, "--out", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "| tiny | PEFT LORA | 2,048 |" in done.stdout and (tmp_path / "overhead.png").exists()
