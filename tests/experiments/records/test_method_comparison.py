"""PEFT's benchmark as records: three of its result files (huggingface/peft), cut to what is read."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from experiments import method_comparison
from experiments.records import gather, statistics
from tests.sweeps import made_up, write_run

SHARED = {"task_type": "CAUSAL_LM", "revision": None, "inference_mode": False, "target_modules": ["v_proj", "q_proj"]}
LORA = {"peft_type": "LORA", "r": 32, "lora_alpha": 64, "lora_dropout": 0.0, "bias": "none", "loftq_config": {}}
UNILORA = {"peft_type": "UNILORA", "r": 4, "theta_d_length": 131072, "init_theta_d_bound": 0.02}
# name: configuration, rate, trained, bytes, seconds and losses of the first and the last interval, accuracy
FILES = {
    "lora--rank32": (LORA, 1e-4, 9175040, 36715216, (31.395, 30.737), (0.98270, 0.60691), 636 / 1319),
    "unilora--r4": (UNILORA, 2e-3, 131072, 524416, (31.836, 31.720), (1.02220, 0.64045), 538 / 1319),
    "unilora--default": ({**UNILORA, "r": 32, "theta_d_length": 256}, 1e-4, 256, 1152, (31.638, 31.646),
                         (1.32679, 1.34125), 2 / 1319),
}  # fmt: skip


def _content(name: str) -> dict:
    peft, lr, trained, size, seconds, losses, accuracy = FILES[name]
    steps = [
        {"step": step, "valid accuracy": 0.3, "train loss": loss, "train samples": 4 * step, "train time": time}
        for step, loss, time in zip((250, 5000), losses, seconds, strict=True)
    ]
    test = {"step": 5000, "test accuracy": accuracy, "train loss": losses[1], "train samples": 20000}
    return {
        "run_info": {
            "created_at": "2026-09-16T01:39:11+00:00", "total_time": 1236.7, "error_msg": "", "peft_branch": "main",
            "experiment_name": name.replace("--", "/"), "peft_config": {**SHARED, **peft},
            "train_config": {"model_id": "meta-llama/Llama-3.2-3B", "dtype": "bfloat16", "max_seq_length": 768,
                             "batch_size": 4, "seed": 0, "optimizer_kwargs": {"lr": lr}},
        },
        "train_info": {
            "status": "success", "num_trainable_params": trained, "file_size": size, "train_time": 1025.9,
            "accelerator_memory_max": 22168993792, "metrics": [*steps, {**test, "train total tokens": 4198051}],
        },
        "meta_info": {
            "package_info": {"peft-version": "0.21.0", "peft-commit-hash": "514b9e6d", "torch-version": "2.13.0"},
            "system_info": {"accelerator": "NVIDIA L40S"},
        },
    }  # fmt: skip


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    folder.mkdir()
    for name in FILES:
        (folder / f"{name}.json").write_text(json.dumps(_content(name)))
    return folder


def test_pefts_results_are_records_beside_ours(results: Path, tmp_path: Path, capsys) -> None:
    assert method_comparison.main(["read", str(results), "--out", str(tmp_path / "sweeps")]) == 0
    shown = capsys.readouterr().out
    records = gather.read(tmp_path / "sweeps")
    runs = records.runs.set_index("projection")
    lora, unilora = runs.loc["peft/lora"], runs.loc["peft/unilora"]
    assert (lora["score"], lora["trained"], lora["alpha"], lora["hyperparameters"]) == (636 / 1319, 9175040, 64, "{}")
    assert lora["cost_train_seconds"] == pytest.approx(31.395 + 30.737) and lora["adapter_bytes"] == 36715216
    tuned, default = (unilora[unilora["trained"] == size].iloc[0] for size in (131072, 256))
    assert json.loads(tuned["hyperparameters"])["theta_d_length"] == 131072 and tuned["lr"] == 2e-3
    # its loss rose, and PEFT calls it a success
    assert default["did_not_train"] == "the loss went from 1.327 to 1.341" and tuned.isna()["did_not_train"]
    cells = statistics.cells(records.runs)
    assert sorted(cells["status"]) == ["complete", "complete", "did not train"]
    (origin,) = records.origins.values()
    assert origin["commits"] == ["514b9e6d"] and origin["hardware"] == [{"device": "NVIDIA L40S"}]
    # the best first, what did not train last and without a score
    places = [shown.index(text) for text in ("48.2", "40.8", "did not train")]
    assert places == sorted(places)


def test_full_fine_tuning_and_what_failed(results: Path, tmp_path: Path) -> None:
    whole = _content("lora--rank32")
    whole["run_info"]["peft_config"] = None
    (results / "full.json").write_text(json.dumps(whole))
    ended = _content("unilora--r4")
    ended["train_info"] |= {"status": "canceled"}
    ended["run_info"]["error_msg"] = "out of memory"
    (results / "ended.json").write_text(json.dumps(ended))
    files = [str(results / name) for name in ("full.json", "ended.json")]
    assert method_comparison.main(["read", *files, "--out", str(tmp_path / "sweeps")]) == 0
    runs = gather.read(tmp_path / "sweeps").runs.set_index("projection")
    assert runs.loc["full", "score"] == 636 / 1319 and runs.loc["peft/unilora", "failed"] == "canceled: out of memory"


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        (("train_info", "num_trainable_params"), "many", "num_trainable_params must be an integer, got 'many'"),
        (("run_info", "train_config", "optimizer_kwargs"), {}, "optimizer_kwargs.lr must be there, got keys none"),
        (("run_info", "peft_config", "peft_type"), 7, "peft_config.peft_type must be text, got 7"),
        (("run_info", "peft_config", "r"), "<b>", "peft_config.r must be an integer or null, got '<b>'"),
        (("run_info", "total_time"), 10**400, "total_time must be a finite number, got"),
        (("train_info", "accelerator_memory_max"), 10**400, "accelerator_memory_max must be an integer or null, got"),
        (("train_info", "metrics"), [], "list index out of range"),
        (("train_info", "metrics"), [{"step": 1, "train samples": 4, "test accuracy": 40.8}], "that accuracy can have"),
        (("meta_info",), None, "meta_info must be a mapping, got None"),
    ],
)
def test_another_file_is_said(part: tuple, value: object, message: str, tmp_path: Path, capsys) -> None:
    content = copy.deepcopy(_content("lora--rank32"))
    place = content
    for key in part[:-1]:
        place = place[key]
    place[part[-1]] = value
    (tmp_path / "mine.json").write_text(json.dumps(content))
    out = tmp_path / "sweeps"
    assert method_comparison.main(["read", str(tmp_path / "mine.json"), "--out", str(out)]) == 2
    assert message in capsys.readouterr().err and not out.exists()


def test_a_result_is_counted_once(results: Path, tmp_path: Path, capsys) -> None:
    words = ["read", str(results), str(results / "lora--rank32.json"), "--out", str(tmp_path / "sweeps")]
    assert method_comparison.main(words) == 2 and not (tmp_path / "sweeps").exists()
    assert "must hold each value once, got 'lora-rank32' twice" in capsys.readouterr().err


def test_an_empty_folder_and_an_unfinished_run_are_said(tmp_path: Path, capsys) -> None:
    assert method_comparison.main(["read", str(tmp_path)]) == 2
    assert "must be JSON files, got none" in capsys.readouterr().err
    assert method_comparison.main(["write", str(tmp_path)]) == 2
    assert "must be a finished run" in capsys.readouterr().err


def test_runs_of_another_task_are_refused(tmp_path: Path, capsys) -> None:
    (row,) = made_up(["gsm8k"], ["unilora"], seeds=1).to_dict("records")
    folder = tmp_path / write_run(tmp_path, row)
    assert method_comparison.main(["write", str(folder)]) == 2
    assert "must be a run of metamath/gsm8k that was scored on its test, got gsm8k" in capsys.readouterr().err


def test_a_run_that_kept_no_adapter_is_not_written_as_full_fine_tuning(tmp_path: Path, capsys) -> None:
    (row,) = made_up(["metamath/gsm8k"], ["unilora"], seeds=1).assign(did_not_train="it diverged").to_dict("records")
    folder = tmp_path / write_run(tmp_path, row)
    assert method_comparison.main(["write", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert "adapter_config.json must be there" in capsys.readouterr().err and not (tmp_path / "out").exists()
