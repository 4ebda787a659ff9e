"""One run and the whole command: results, interruption and resumption, skipping, and no look at the test split."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from experiments import compare, tasks, train
from experiments.files import read_json
from experiments.records import statistics
from experiments.records.reading import load, losses
from experiments.runs import result
from experiments.runs.callbacks import checkpoints
from experiments.runs.config import RunConfig
from experiments.runs.folder import LOSSES, RESULT, prepare
from experiments.runs.resolve import resolve
from experiments.runs.result import did_not_train
from experiments.runs.run import Run
from experiments.runs.training import INTERRUPTED, last_checkpoint
from experiments.sweeps import launchers
from tests.experiments.processes import train_until
from uniproj.format import THETA_D
from uniproj.tuner import adapter_of

CYCLIC = (Path(__file__).parents[3] / "examples" / "cyclic.py").read_text()


def _theta(folder: Path) -> torch.Tensor:
    return load_file(folder / "adapter" / "adapter_model.safetensors")[THETA_D]


def test_a_run_writes_everything_a_reader_needs(runs: Path, config: RunConfig, capsys) -> None:
    folder = prepare(runs, config.to_json())
    assert train.main([str(folder)]) == 0
    result = read_json(folder / RESULT)
    assert result["config"] == json.loads(json.dumps(config.to_json()))
    assert result["rows"] == 48 and 0 <= result["score"] <= 1 and result["trained"] == 200
    assert result["isometry_error"] < 1e-12 and result["budget_error"] == 0.0
    assert result["adapter_bytes"] <= 4 * 200 + 4096 and result["head"] == 2 * 32 + 2
    assert result["step_ratio_low"] <= result["step_ratio"] <= result["step_ratio_high"]
    assert {"python", "torch", "peft"} <= result["provenance"]["versions"].keys()
    assert [line["step"] for line in losses(folder)] and not list(folder.glob("checkpoint-*"))
    # one line: what Trainer would print is in metrics.jsonl
    said = capsys.readouterr().out
    assert said == f"{folder} done: accuracy {result['score']} on test\n"
    row = load(runs).iloc[0]
    assert row["projection"] == "unilora" and row["trained"] == 200 and row["folder"] == str(folder)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, model: str, task: str) -> tuple[Path, Path]:
    """A run that ended after step 10 of 12, with the checkpoints of steps 6 and 10, and the same run to its end."""
    settings = {"task": task, "model": model, "projection": "unilora", "budget": 200, "seed": 0, "lr": 0.05}
    config = resolve({**settings, "evaluations": 2}).to_json()
    cut, whole = (prepare(tmp_path_factory.mktemp(name), config) for name in ("cut", "whole"))
    assert train_until(10, str(cut)) == INTERRUPTED
    assert train.main([str(whole)]) == 0
    assert sorted(checkpoints(cut)) == [6, 10] and len(losses(whole)) == 1
    return cut, whole


@pytest.mark.parametrize("step", [5, 9])  # within the first epoch and within the second
def test_an_interrupted_run_resumes_to_the_same_numbers(step: int, runs: Path, interrupted: tuple[Path, Path]) -> None:
    folder = prepare(runs, read_json(interrupted[1] / "config.json"))
    assert train_until(step, str(folder)) == INTERRUPTED
    assert not (folder / RESULT).exists() and (folder / f"checkpoint-{step}").is_dir()
    assert train.main([str(folder)]) == 0
    assert torch.equal(_theta(folder), _theta(interrupted[1]))


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def _nulls(path: Path) -> None:
    """What a power cut leaves of pages that were not written."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(64) + data[len(data) // 2 + 64 :])


DAMAGE = {
    "no state": lambda folder: (folder / "trainer_state.json").unlink(),
    "half a state": lambda folder: _truncated(folder / "trainer_state.json"),
    "zeros in the state": lambda folder: _nulls(folder / "trainer_state.json"),
    "the state of another step": lambda folder: folder.rename(folder.with_name("checkpoint-11")),
    "no optimiser": lambda folder: (folder / "optimizer.pt").unlink(),
    "half an optimiser": lambda folder: _truncated(folder / "optimizer.pt"),
    "zeros in the optimiser": lambda folder: _nulls(folder / "optimizer.pt"),
    "no random numbers": lambda folder: (folder / "rng_state.pth").unlink(),
    "half an adapter": lambda folder: _truncated(folder / "adapter_model.safetensors"),
    "zeros in the adapter": lambda folder: _nulls(folder / "adapter_model.safetensors"),
    "no configuration": lambda folder: (folder / "adapter_config.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(damage: str, interrupted: tuple[Path, Path], tmp_path: Path, capsys):
    folder = Path(shutil.copytree(interrupted[0], tmp_path / "run"))
    assert last_checkpoint(folder) == str(folder / "checkpoint-10") and capsys.readouterr().out == ""
    DAMAGE[damage](folder / "checkpoint-10")
    assert last_checkpoint(folder) == str(folder / "checkpoint-6")
    said = capsys.readouterr().out
    assert re.match(rf"train: {folder}/checkpoint-1[01] must be whole, got: .*The run goes on from an earlier", said)
    assert said.count("\n") == 1


def test_what_follows_a_best_checkpoint_that_is_damaged_is_passed_over(
    interrupted: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(interrupted[0], tmp_path / "run"))
    assert read_json(folder / "checkpoint-10" / "trainer_state.json")["best_global_step"] == 6
    (folder / "checkpoint-6" / "optimizer.pt").unlink()
    assert last_checkpoint(folder) is None


def test_the_best_checkpoint_is_scored_with_its_own_numbers(
    interrupted: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose scores may equal those of the last: here they are theta_d itself."""
    folder = Path(shutil.copytree(interrupted[0], tmp_path / "run"))
    run = Run.load(folder)
    run.trainer.state.best_global_step, run.trainer.state.global_step = 6, 10
    theta_d = adapter_of(run.model).theta_d
    monkeypatch.setattr(result, "_scores", lambda *_: {"score": theta_d.tolist(), "scores": {}})
    last = theta_d.tolist()
    found = result._tested(run)
    best = load_file(folder / "checkpoint-6" / "adapter_model.safetensors")[THETA_D].tolist()
    assert (found["score"], found["best"]["score"]) == (last, best) and theta_d.tolist() == last != best


@pytest.mark.parametrize("step", [6, 10])
def test_copies_of_checkpoints_and_a_damaged_log_are_no_hindrance(
    step: int, interrupted: tuple[Path, Path], tmp_path: Path
) -> None:
    runs, whole = tmp_path / "runs", interrupted[1]
    config = read_json(whole / "config.json")
    folder = prepare(runs, config)
    shutil.copytree(interrupted[0], folder, dirs_exist_ok=True)
    copies = ("checkpoint-1.old", "checkpoint-11 (copy)", "checkpoint-", "checkpoint-last", f"checkpoint-{'9' * 5000}")
    for name in copies:
        (folder / name[:200]).mkdir()
    (folder / "checkpoint-13").write_text("no folder")
    (tmp_path / "elsewhere").mkdir()
    (folder / "checkpoint-1").symlink_to(tmp_path / "elsewhere")
    (folder / LOSSES).write_bytes(bytes(512))
    if step == 6:
        DAMAGE["half an optimiser"](folder / "checkpoint-10")
    assert train.main([str(folder)]) == 0
    assert torch.equal(_theta(folder), _theta(whole))
    # every logged step once, also the one before the checkpoint that the damage took
    assert [line["step"] for line in losses(folder)] == [10]
    # Trainer's mean begins where it resumes
    assert step == 6 or losses(folder) == losses(whole)
    assert list(checkpoints(folder)) == [1] and all((folder / name[:200]).is_dir() for name in copies)


@pytest.mark.parametrize(("score_on", "labels"), [("validation", "classes"), ("test", "numbers")])
def test_a_run_that_diverges_did_not_train(
    score_on: str, labels: str, runs: Path, config: RunConfig, task: str, tmp_path: Path, capsys
) -> None:
    folder = Path(shutil.copytree(task, tmp_path / "own"))
    if labels == "numbers":
        for path in folder.glob("*.jsonl"):
            rows = pd.read_json(path, lines=True)
            rows.assign(label=rows["label"] + 0.5).to_json(path, orient="records", lines=True)
    own = replace(config, task=str(folder), lr=1e30, epochs=4, evaluations=4, score_on=score_on)
    place = prepare(runs, own.to_json())
    assert train.main([str(place)]) == 0
    result = read_json(place / RESULT)
    assert result["did_not_train"] == "it diverged: trained numbers were NaN or infinite at step 6"
    assert f"done: {result['did_not_train']}" in capsys.readouterr().out
    assert result["score"] is result["validation"] is result["validation_best"] is result["adapter_sha256"] is None
    assert result["loss_after"] is None and result["step"] == 6 and result["trained"] == 200
    assert result.get("rows") == (48 if score_on == "test" else None) and not (place / "adapter").exists()
    assert not checkpoints(place)
    # beside one that trained, it is in no mean
    found = load(runs).assign(sweep="mine", failed=None)
    cells = statistics.cells(pd.concat([found, found.assign(did_not_train=None, score=0.75, train_seed=1)]))
    assert cells[["status", "n", "did_not_train", "score"]].to_dict("records") == [
        {"status": "did not train", "n": 1, "did_not_train": 1, "score": 0.75}
    ]


def test_a_comparison_shows_what_diverged_without_a_rank(runs: Path, model: str, task: str, here, capsys) -> None:
    command = ["--model", model, "--task", task, "--projections", "lora", "unilora", "--budget", "200"]
    assert compare.main([*command, "--lr", "1e30", "--runs", str(runs)]) == 0
    said = capsys.readouterr().out
    assert "unilora did not train (train_seed 0: it diverged" in said and "lora did not train" in said


def test_a_rate_of_zero_is_marked_as_not_trained(runs: Path, config: RunConfig) -> None:
    folder = prepare(runs, replace(config, lr=0.0, head_lr=0.0, score_on="validation").to_json())
    assert train.main([str(folder)]) == 0
    assert read_json(folder / RESULT)["did_not_train"] == "no trained number changed"


def test_what_tells_whether_a_classifier_trained_is_the_loss_of_hundreds_of_rows(runs: Path, config: RunConfig) -> None:
    """All 96 here: of the first 32 alone the share of each class would decide it."""
    run = Run.load(prepare(runs, config.to_json()))
    run.model.eval()
    losses = []
    with torch.no_grad():
        for row in run.trainer.train_dataset:
            batch = run.family.collate([row])
            logits = run.model(**{key: batch[key] for key in ("input_ids", "attention_mask")}).logits
            losses.append(-logits.log_softmax(-1)[0, batch["labels"].item()].item())
    assert len(losses) == 96 and run.probe() == pytest.approx(sum(losses) / 96, rel=1e-4)
    assert run.probe() != pytest.approx(sum(losses[:32]) / 32, rel=1e-4)


@pytest.mark.parametrize(
    ("before", "after", "change", "reason"),
    [
        (0.7, 0.5, 0.1, None),
        (0.7, 0.5, 0.0, "no trained number changed"),
        (0.7, 0.699, 0.1, "the loss went from 0.700 to 0.699"),
        (0.7, float("nan"), 0.1, "the loss went from 0.700 to nan"),
    ],
)
def test_did_not_train(before: float, after: float, change: float, reason: str | None) -> None:
    assert did_not_train(before, after, change) == reason


def test_tuning_never_reads_the_test_split(runs: Path, config: RunConfig, monkeypatch) -> None:
    read = tasks.Task.split

    def guarded(self, name: str) -> pd.DataFrame:
        assert name != "test", "the test split was read"
        return read(self, name)

    monkeypatch.setattr(tasks.Task, "split", guarded)
    folder = prepare(runs, replace(config, score_on="validation").to_json())
    assert train.main([str(folder)]) == 0
    result = read_json(folder / RESULT)
    assert result["score"] == result["validation"] and not list(folder.glob("predictions*"))
    with pytest.raises(AssertionError, match="the test split was read"):
        train.main([str(prepare(runs, config.to_json()))])


def test_the_command_compares_skips_and_draws(runs: Path, model: str, task: str, here, capsys) -> None:
    command = ["--model", model, "--task", task, "--projections", "lora", "unilora", "--budget", "200"]
    command += ["--lr", "0.02", "--runs", str(runs)]
    assert compare.main(command) == 0
    out = capsys.readouterr().out
    (folder,) = runs.rglob("comparison-*")
    assert f"Table and picture: {folder}" in out and "unilora" in out and "majority class" in out
    table = pd.read_csv(folder / "table.csv")
    wanted = {"score", "trained", "budget_error", "isometry_error", "step_ratio", "adapter_bytes"}
    assert set(table["projection"]) == {"lora", "unilora"} and wanted <= set(table.columns)
    assert (folder / "table.png").read_bytes().startswith(b"\x89PNG")
    stamps = {path: path.stat().st_mtime_ns for path in runs.rglob(RESULT)}
    assert compare.main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in runs.rglob(RESULT)} == stamps and len(stamps) == 2


def test_a_dry_run_of_the_command_shows_what_its_options_decide(
    runs: Path, model: str, task: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    (tmp_path / "mine.py").write_text(CYCLIC.replace('"cyclic"', '"compared"'))
    monkeypatch.chdir(tmp_path)
    options = ["--projections", "lora", "compared", "--plugins", "mine.py", "--budget", "200", "--seeds", "0", "1"]
    options += ["--lr", "0.02", "--train-size", "40", "--epochs", "3", "--rank", "2"]
    assert compare.main(["--model", model, "--task", task, *options, "--runs", str(runs), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    # theta_D of four 32 x 32 modules at rank 2; 40 rows in batches of 16, three times
    assert re.search(r"lora +0.02 +2 +512\b", shown) and re.search(r"compared +0.02 +2 +200\b", shown)
    assert "4 runs of 9 steps, 0 done, 4 to train" in shown and "tuned" not in shown and not runs.exists()
    trained: list[Path] = []
    monkeypatch.setattr(launchers, "train_all", lambda folders, *_: trained.extend(folders) or {})
    assert compare.main(["--model", model, "--task", task, *options, "--runs", str(runs)]) == 0
    config = RunConfig.from_json(read_json(trained[-1] / "config.json"))
    assert (config.projection, config.r, config.d, config.train_size, config.epochs) == ("compared", 2, 200, 40, 3)
    # a run finds its plugin wherever it is started
    assert config.plugins == [str(tmp_path / "mine.py")]


@pytest.mark.parametrize(
    ("options", "other"),
    [
        ([], "model {model}, task {task}, budget 300: --lr auto"),
        (["--train-size", "32", "--rank", "2"], "budget 300, train_size 32, r 2: --lr auto"),
        (["--model", "minilm", "--task", "vader", "--budget", "4740"], None),
        (["--lr", "0.1"], None),
        (["--lr", "auto"], None),
    ],
)
def test_the_command_says_where_its_rates_come_from(
    options: list[str], other: str | None, runs: Path, model: str, task: str, capsys
) -> None:
    asked = ["--projections", "unilora", "--budget", "300", "--runs", str(runs), "--dry-run", *options]
    assert compare.main(["--model", model, "--task", task, *asked]) == 0
    shown = capsys.readouterr().out
    assert ("Learning rates were tuned at model minilm, task vader" in shown) == (other is not None)
    assert other is None or other.format(model=model, task=task) in shown
    assert ("tuned first" in shown) == ("auto" in options)


def test_endless_epochs_are_refused(runs: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        compare.main(["--epochs", "inf", "--runs", str(runs)])
    assert "--epochs: must be finite, got inf" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--rank", "0"], "r must be positive"),
        (["--train-size", "-1"], "train_size must be positive"),
        (["--epochs", "0"], "epochs must be positive"),
        (["--plugins", "none.py"], "none.py must be a Python file or module"),
        (["--projections", "uni"], "unknown entrant 'uni'"),
        (["--task", "glue/x"], "unknown task 'glue/x'. Known: vader"),
        (["--lr", "fast"], "--lr must be table, auto or a positive number, got 'fast'"),
        (["--lr", "nan"], "--lr must be table, auto or a positive number, got 'nan'"),
        (["--lr", "0"], "--lr must be table, auto or a positive number, got '0'"),
        (["--projections", "lora", "gaussian"], "got none for gaussian. Known: lora, unilora"),
        (["--seeds", "1", "1"], "--seeds must hold each value once, got 1 twice"),
        (["--projections", "lora", "lora"], "--projections must hold each value once"),
        (["--budget", "0"], "--budget must be at least 1"),
        (["--model", "no/such-model"], "must be one of minilm, smollm2"),
    ],
)
def test_a_bad_name_ends_the_command_before_anything_is_trained(
    runs: Path, extra, message: str, monkeypatch, capsys
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # a hub out of reach is asked again and again
    assert compare.main([*extra, "--runs", str(runs)]) == 2
    assert message in capsys.readouterr().err and not runs.exists()


@pytest.mark.slow
def test_a_gguf_language_model_trains_as_a_classifier(runs: Path, task: str) -> None:
    settings = {"task": task, "model": "smollm2", "projection": "unilora", "budget": 5000, "seed": 0, "lr": 0.01}
    config = resolve({**settings, "score_on": "validation", "train_size": 16, "epochs": 1})
    folder = prepare(runs, config.to_json())
    assert train.main([str(folder)]) == 0
    assert read_json(folder / RESULT)["trained"] == 5000
