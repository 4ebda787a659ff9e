"""Runs and sweeps on the Hub: an adapter with its scores, another method's, and tables as a data set."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from huggingface_hub import DatasetCard, ModelCard
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from experiments import push
from experiments.errors import ExperimentError
from tests import sweeps
from tests.format.saved import save
from tests.tuner.models import base_model, logits
from tests.uploads import Hub, stand_in
from uniproj.format import CONFIG, WEIGHTS

TASK = "/home/ada/reviews"


@pytest.fixture
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    return stand_in(tmp_path / "cache", monkeypatch)


def _run(runs: Path, **more: Any) -> Path:
    """The folder of a finished run, without what it trained."""
    (values,) = sweeps.made_up([TASK], ["unilora"], seeds=1).to_dict("records")
    values |= {"model": "someone/base", "head_lr": 0.005, "adapter_sha256": None}
    values["scores"] = {"accuracy": values["score"], "macro F1": 0.5}
    return runs / sweeps.write_run(runs, {**values, **more})


def _finish(folder: Path, saved: Path) -> None:
    """Note in the result what was saved."""
    path = folder / "result.json"
    digest = hashlib.sha256((saved / WEIGHTS).read_bytes()).hexdigest()
    path.write_text(json.dumps({**json.loads(path.read_text()), "adapter_sha256": digest}))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = _run(tmp_path / "runs")
    save(folder / "adapter", base_model_name_or_path="someone/base", task_type="SEQ_CLS")
    _finish(folder, folder / "adapter")
    (folder / ".lock").touch()
    (folder / "checkpoint-9").mkdir()
    return folder


def test_a_run_goes_with_its_scores_and_without_its_place(run: Path, uploads: Hub) -> None:
    assert push.main([str(run), "someone/reviews"]) == 0
    files = uploads.files("someone/reviews")
    assert files.keys() == {CONFIG, WEIGHTS, "README.md"}
    found = json.loads((run / "result.json").read_text())
    text = files["README.md"].decode()
    assert "/home" not in text and "ada" not in re.findall(r"\w+", text)
    listed = {result.metric_type: result for result in ModelCard(text).data.eval_results}
    assert listed["accuracy"].metric_value == found["score"] and listed["f1"].metric_value == 0.5
    assert listed["accuracy"].dataset_name == "reviews" and listed["accuracy"].dataset_args == {"rows": 1000}
    assert f"| accuracy | {found['score']:.4f} | 1,000 |" in text and "| learning rate | 0.01 |" in text
    assert "projection 1, init 1, data 1, train 1" in text and "| learning rate of the head | 0.005 |" in text


def test_a_run_that_did_not_train_has_no_score(tmp_path: Path, uploads: Hub) -> None:
    folder = _run(tmp_path / "runs", did_not_train="the loss went from 0.693 to 0.692")
    save(folder / "adapter")
    done = push.push(folder, "someone/stuck", dry_run=True)
    assert "**It did not train**: the loss went" in done.card and ModelCard(done.card).data.eval_results is None
    assert not uploads.cache.exists()


def test_an_entrant_that_is_no_projection_has_a_card_of_what_is_known(tmp_path: Path, uploads: Hub) -> None:
    folder = _run(tmp_path / "runs", projection="peft-lora", model="/home/ada/base", D=None, budget=None)
    base = base_model("llama")
    base.name_or_path = "/home/ada/base"
    lora = LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")
    get_peft_model(base, lora).save_pretrained(folder / "adapter")
    _finish(folder, folder / "adapter")
    done = push.push(folder, "someone/lora")
    files = uploads.files("someone/lora")
    assert files.keys() == {CONFIG, WEIGHTS, "README.md"} and not any(b"/home" in each for each in files.values())
    data = ModelCard(done.card).data
    assert (data.library_name, data.base_model) == ("peft", None) and data.eval_results
    assert "| PEFT's type | LORA |" in done.card and "UNIPROJ" not in done.card and "None" not in done.card
    assert "base = ..." in done.card
    named = push.push(folder, "someone/lora", base_model="someone/base")
    assert 'from_pretrained("someone/base")\nmodel = PeftModel.from_pretrained(base, "someone/lora")' in named.card
    there = json.loads((uploads.folder("someone/lora") / CONFIG).read_text())
    assert there["base_model_name_or_path"] == "someone/base"


def test_weights_that_change_while_they_are_copied_stay_here(tmp_path: Path, uploads: Hub, monkeypatch) -> None:
    folder = _run(tmp_path / "runs", projection="peft/lora")
    lora = LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")
    get_peft_model(base_model("llama"), lora).save_pretrained(folder / "adapter")
    _finish(folder, folder / "adapter")

    def changing(source: Path, to: Path) -> None:
        to.write_bytes(source.read_bytes()[:-1] + b"x")

    monkeypatch.setattr(shutil, "copyfile", changing)
    with pytest.raises(ExperimentError, match=rf"adapter/{WEIGHTS} must be what the run was scored with, of SHA-256"):
        push.push(folder, "someone/x")
    assert not uploads.cache.exists()


def test_no_option_tells_a_place_and_the_hub_takes_the_name_of_a_task(tmp_path: Path, uploads: Hub) -> None:
    place = {"tokenizer_name_or_path": "/home/ada/words"}
    folder = _run(tmp_path / "runs", projection="peft/prompt_tuning", task="/home/ada/My reviews, 2nd")
    for path in (folder / "config.json", folder / "result.json"):
        found = json.loads(path.read_text())
        found.get("config", found)["hyperparameters"] = {**place, "deep": [{"file": "/home/ada/cache.pt"}]}
        path.write_text(json.dumps(found))
    folder = folder.rename(folder.with_name("renamed"))
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, **place)
    get_peft_model(base_model("llama"), prompts).save_pretrained(folder / "adapter")
    done = push.push(folder, "someone/prompts")
    assert "/home" not in done.card and "tokenizer_name_or_path = words, deep = " in done.card
    assert not any(b"/home" in each for each in uploads.files("someone/prompts").values())
    (first, *_) = ModelCard(done.card).data.eval_results
    # the pattern that the Hub demands of it
    assert re.fullmatch(r"(?:[\w-]+/)?[\w\-.]+", first.dataset_type, re.ASCII)
    assert first.dataset_name == "My reviews, 2nd"


def test_a_whole_model_goes_as_one_of_transformers(tmp_path: Path, uploads: Hub) -> None:
    folder = _run(tmp_path / "runs", projection="full", D=None, budget=None)
    base_model("llama").save_pretrained(folder / "adapter")
    done = push.push(folder, "someone/full")
    assert uploads.files("someone/full").keys() == {"config.json", "model.safetensors", "README.md"}
    assert ModelCard(done.card).data.library_name == "transformers"
    found: dict[str, Any] = {}
    exec("\n".join(re.findall(r"```python\n(.*?)\n```", done.card, flags=re.DOTALL)), found)
    assert torch.equal(logits(found["model"].eval()), logits(base_model("llama")))


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    records = sweeps.made_up([TASK, "glue/rte"], ["lora", "unilora"]).assign(score_on="test")
    folder = sweeps.write(tmp_path / "mine", records)
    records[["task", "model", "projection", "metric", "score"]].to_csv(folder / "summary.csv", index=False)
    (folder / "notes.txt").write_text("mine alone")
    return folder


def test_a_sweep_goes_as_a_data_set(exported: Path, uploads: Hub) -> None:
    assert push.main([str(exported), "someone/mine"]) == 0
    there = uploads.files("someone/mine", "dataset")
    assert there.keys() == {"records.csv", "summary.csv", "curves.csv", "provenance.json", "README.md"}
    assert not any(b"/home" in content for content in there.values())
    card, records = DatasetCard(there["README.md"].decode()), pd.read_csv(exported / "records.csv")
    assert [(c["config_name"], c["data_files"]) for c in card.data.configs] == [
        (name, f"{name}.csv") for name in ("records", "summary", "curves")
    ]
    assert f"| `records.csv` | {len(records)} | {len(records.columns)} |" in card.text
    for said in ("12 runs of `lora`, `unilora` on reviews, RTE", "python 3.11", "0123456789ab", "`train_seed`"):
        assert said in card.text
    assert 'load_dataset("someone/mine", "records", split="train")' in card.text


def test_no_failure_and_no_option_of_a_sweep_tells_a_place(exported: Path, uploads: Hub) -> None:
    records = pd.read_csv(exported / "records.csv", dtype=object)
    records.loc[0, "failed"] = "OSError: '/home/ada/.cache/hub/x.json' at https://hub/some/one: 3 it/s of /tmp"
    records["plugins"] = "['/home/ada/My code/mine.py']"
    records.loc[0, "plugins"] = None
    records.loc[1, "hyperparameters"] = '{"cache_file": "/home/ada/eva.pt"}'
    records.to_csv(exported / "records.csv", index=False)
    push.push(exported, "someone/mine")
    sent = pd.read_csv(uploads.folder("someone/mine", "dataset") / "records.csv")
    assert sent.loc[0, "failed"] == "OSError: 'x.json' at https://hub/some/one: 3 it/s of /tmp"
    assert sent.loc[1, "plugins"] == "['mine.py']"
    assert sent.loc[1, "hyperparameters"] == '{"cache_file": "eva.pt"}'


def test_a_table_of_a_sweep_that_is_none_or_a_link_stays_here(exported: Path, uploads: Hub) -> None:
    summary = exported / "summary.csv"
    for text, match in (("", "must be a table"), ("a,b", r"must have the columns \['model', 'task'\]")):
        summary.write_text(text)
        with pytest.raises(ExperimentError, match=match):
            push.push(exported, "someone/mine")
    summary.unlink()
    summary.symlink_to(exported / "notes.txt")
    with pytest.raises(ExperimentError, match="must be a file, got a link"):
        push.push(exported, "someone/mine")
    assert not uploads.cache.exists()


def test_what_is_no_run_and_no_sweep_or_was_changed_is_refused(run: Path, uploads: Hub, tmp_path: Path, capsys) -> None:
    with pytest.raises(ExperimentError, match=r"folder of a finished run, with result\.json, or of an exported sweep"):
        push.push(tmp_path, "someone/x")
    weights = run / "adapter" / WEIGHTS
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"x")
    with pytest.raises(ExperimentError, match="must be what the run was scored with, of SHA-256"):
        push.push(run, "someone/x")
    weights.write_bytes(whole[:-9])
    with pytest.raises(ExperimentError, match="must be a whole safetensors file"):
        push.push(run, "someone/x")
    weights.unlink()
    with pytest.raises(ExperimentError, match=r"must hold what was trained, adapter_config\.json and adapter_model"):
        push.push(run, "someone/x")
    assert push.main([str(run), "a/b/c"]) == 2 and len(capsys.readouterr().err.splitlines()) == 1
    assert not uploads.cache.exists()
