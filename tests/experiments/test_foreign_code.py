"""A record names no code that a reader runs, and no reader writes to it: only a sweep file and words name plugins."""

from __future__ import annotations

import io
import json
import os
import runpy
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from transformers import BertConfig

from analysis.sharing.__main__ import main as sharing_main
from experiments import compare, export, harness, models, mt_bench, sweep, train
from experiments.errors import ExperimentError
from experiments.files import read_json, write_json
from experiments.models import BaseModel, load_tokenizer, model_config, trust, unloaded
from experiments.models.text import TextClassifier
from experiments.records.reading import CHOICE, load, row
from experiments.runs.config import RunConfig
from experiments.runs.folder import LOCK, RESULT, is_locked, lock, prepare
from experiments.runs.resolve import resolve
from experiments.sweeps.file import read
from paper_figures.__main__ import main as figures_main
from paper_figures.report.__main__ import main as report_main
from uniproj import registry

ROOT = Path(__file__).parents[2]
CYCLIC = (ROOT / "examples" / "cyclic.py").read_text()


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


@pytest.fixture
def plugin(tmp_path: Path, marker: Path) -> str:
    """Registers `mine`, and leaves a marker wherever it is imported."""
    path = tmp_path / "planted.py"
    path.write_text(f"import pathlib\npathlib.Path({str(marker)!r}).write_text('ran')\n")
    with path.open("a") as file:
        file.write(CYCLIC.replace('"cyclic"', '"mine"'))
    return str(path)


def _listing(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in [folder, *sorted(folder.rglob("*"))]}


def _planted(runs: Path, config: RunConfig, plugin: str, **changes: object) -> Path:
    """The folder of a run as a stranger would hand it over, which names code of the stranger's."""
    return prepare(runs, replace(config, projection="mine", plugins=[plugin], **changes).to_json())


def _result(config: Mapping[str, object]) -> dict[str, object]:
    return {"config": dict(config), "score": 0.5, "did_not_train": None, "metric": "accuracy", "trained": 3}


def test_no_reader_imports_what_a_record_names(
    runs: Path, tmp_path: Path, config: RunConfig, plugin: str, marker: Path, capsys
) -> None:
    folder = _planted(runs, config, plugin)
    write_json(folder / RESULT, _result(read_json(folder / "config.json")))
    (folder / "metrics.jsonl").write_text('{"step": 1, "of": 2, "loss": 0.5}\n')
    unfinished = _planted(runs, config, plugin, init_seed=5)
    (unfinished / LOCK).touch()
    table = pd.DataFrame([{"cell": "0", **row(folder), "failed": None, "best": None}])
    (runs / "sweeps" / "theirs").mkdir(parents=True)
    table.to_csv(runs / "sweeps" / "theirs" / "records.csv", index=False)
    before = _listing(runs)
    assert report_main([str(runs), "--out", str(tmp_path / "report.html")]) == 0
    assert "mine" in (tmp_path / "report.html").read_text()
    load(runs)
    for command in (
        lambda: export.main(["theirs", "--runs", str(runs), "--out", str(tmp_path / "kept")]),
        lambda: figures_main(["--results", str(runs), "--out", str(tmp_path / "figures"), "--only", "ablations"]),
        lambda: harness.main([str(folder), "--tasks", "gsm8k"]),
        lambda: mt_bench.main([str(folder)]),
    ):
        try:
            command()
        except Exception as error:  # of what a record lacks: that is another test's
            print(repr(error))
    assert _listing(runs) == before and not marker.exists()
    said = capsys.readouterr().err
    assert said.count("commands do that by --plugins FILE") == 2  # harness and mt_bench, which need P
    assert train.main([str(unfinished)]) == 1
    assert "commands do that by --plugins FILE" in capsys.readouterr().out and not marker.exists()


def test_the_choice_of_a_sweep_names_no_code(
    swept: tuple[Path, Path], runs: Path, plugin: str, marker: Path, capsys
) -> None:
    file = swept[0]
    shutil.copytree(swept[1], runs)
    path = runs / "sweeps" / "mine" / CHOICE
    whole = read_json(path)
    chosen = whole["choices"][0]["chosen"]
    for tampered in ({**chosen, "plugins": [plugin]}, {**chosen, "lr": 0.02}, {"plugins": [plugin]}, None):
        whole["choices"][0]["chosen"] = tampered
        write_json(path, whole)
        assert sweep.main([str(file), "--runs", str(runs)]) == 2
        assert "It was edited" in capsys.readouterr().err
    assert not marker.exists()


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.system)])
def test_a_launcher_hands_on_the_plugins_of_its_sweep(
    processes: int, tmp_path: Path, runs: Path, task: str, model: str, plugin: str, marker: Path, monkeypatch
) -> None:
    content = {
        "settings": {"task": task, "model": model, "d": 64, "lr": 0.05, "train_size": 32, "epochs": 1},
        "axes": {"projection": ["mine"]},
        "launcher": {"local": {"processes": processes}},
    }
    (tmp_path / "s.yaml").write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    words = ["s.yaml", f"+settings.plugins=[{plugin}]", "--runs", str(runs)]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["python -m experiments.sweep", *words])
        patch.setattr(registry, "_classes", dict(registry._classes))
        runpy.run_module("experiments.sweep", run_name="__main__")
    assert ended.value.code == 0
    for module in [name for name in sys.modules if name.startswith("uniproj_plugin_planted")]:
        del sys.modules[module]  # as in a new process
    assert load(runs)["projection"].tolist() == ["mine"]
    # the folder alone is not enough to train it anew
    folder = Path(load(runs)["folder"].item())
    (folder / RESULT).unlink()
    marker.unlink()
    assert train.main([str(folder)]) == 1 and not marker.exists()
    assert train.main([str(folder), "--plugins", plugin]) == 0 and marker.exists()


def test_the_words_for_a_child(plugin: str, monkeypatch) -> None:
    assert trust.words() == []
    monkeypatch.setattr(trust, "_trusted", False)
    monkeypatch.chdir(Path(plugin).parent)
    args = compare.parse(["--plugins", Path(plugin).name, "statistics", "--trust-remote-code"])
    trust.apply(args)
    assert trust.words() == [f"--plugins={plugin}", "--plugins=statistics", "--trust-remote-code"]
    assert sweep.parse(["s.yaml", "--trust-remote-code"]).trust_remote_code
    assert "trust_remote_code" not in RunConfig.__dataclass_fields__


FOREIGN = """
import pathlib
pathlib.Path({marker!r}).write_text("ran")
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

class Config(BertConfig):
    model_type = "foreign"

class Model(BertForSequenceClassification):
    config_class = Config
"""


@pytest.fixture
def foreign(model: str, tmp_path: Path, marker: Path, monkeypatch) -> str:
    """The folder of a model that brings its own code."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "foreign"
    load_tokenizer(model).save_pretrained(folder)
    BertConfig.from_pretrained(model).save_pretrained(folder)
    (folder / "foreign_code.py").write_text(FOREIGN.format(marker=str(marker)))
    fields = json.loads((folder / "config.json").read_text())
    named = {"AutoConfig": "foreign_code.Config", "AutoModelForSequenceClassification": "foreign_code.Model"}
    (folder / "config.json").write_text(json.dumps({**fields, "model_type": "foreign", "auto_map": named}))
    tokens = json.loads((folder / "tokenizer_config.json").read_text())
    tokens |= {"auto_map": {"AutoTokenizer": ["foreign_code.Tokens", None]}, "tokenizer_class": "Tokens"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    return str(folder)


def test_code_of_a_model_runs_on_request_alone(
    foreign: str, task: str, runs: Path, tmp_path: Path, config: RunConfig, marker: Path, monkeypatch, capsys
) -> None:
    content = {
        "settings": {"task": task, "model": foreign, "budget": 200, "lr": 0.05},
        "axes": {"projection": ["lora"]},
    }
    (tmp_path / "s.yaml").write_text(json.dumps(content))
    folder = prepare(runs, replace(config, model=foreign).to_json())
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 99))
    for main, words in (
        (sweep.main, [str(tmp_path / "s.yaml"), "--dry-run"]),
        (train.main, [str(folder)]),
        (compare.main, ["--model", foreign, "--task", task, "--dry-run"]),
        (sharing_main, ["--layout", foreign]),
    ):
        assert main(words) in (1, 2) and not marker.exists(), main
        said = capsys.readouterr()
        assert "if you trust it pass --trust-remote-code" in said.out + said.err
    for load_it in (load_tokenizer, model_config, lambda name: BaseModel(name).load(TextClassifier.auto)):
        with pytest.raises(ExperimentError, match="--trust-remote-code"):
            load_it(foreign)
    assert not marker.exists()
    monkeypatch.setattr(trust, "_trusted", False)
    models.trust_remote_code(True)
    assert type(unloaded(TextClassifier.auto, foreign)).__name__ == "Model" and marker.exists()


def test_a_sweep_spells_its_values_out(tmp_path: Path, task: str) -> None:
    settings, axes = {"task": task, "model": "minilm", "lr": 0.1, "d": 8}, {"projection": ["unilora"]}
    plain, secret = {"settings": settings, "axes": axes}, "${oc.env:HOME}"
    texts = (secret, f"a{secret}b", "${settings.task}", "${oc.decode:5}", "${now:%Y}", "\\${x}")
    for content in (
        *({**plain, "settings": {**settings, "model": text}} for text in texts),
        {**plain, "axes": {"projection": ["unilora", secret]}},
        {**plain, "published": {"x": {"y": [secret]}}},
        {**plain, "seeds": secret},
    ):
        (tmp_path / "s.yaml").write_text(json.dumps(content))
        with pytest.raises(ExperimentError, match="must spell its values out, got"):
            read(tmp_path / "s.yaml")
    (tmp_path / "s.yaml").write_text(json.dumps(plain))
    assert read(tmp_path / "s.yaml").settings["model"] == "minilm"
    with pytest.raises(ExperimentError, match="must spell its values out, got"):
        read(tmp_path / "s.yaml", [f"settings.model='{secret}'"])


def test_a_lock_is_looked_at_and_never_written(runs: Path, tmp_path: Path, config: RunConfig) -> None:
    folder = prepare(runs, config.to_json())
    assert not is_locked(folder) and not (folder / LOCK).exists()
    precious = tmp_path / "precious"
    precious.write_text("of the user")
    (folder / LOCK).symlink_to(precious)
    before = _listing(runs)
    assert not is_locked(folder)
    assert report_main([str(runs), "--out", str(tmp_path / "report.html")]) == 0
    with pytest.raises(ExperimentError, match="must be writable"):
        lock(folder)
    assert precious.read_text() == "of the user" and _listing(runs) == before
    (folder / LOCK).unlink()
    os.mkfifo(folder / LOCK)
    assert not is_locked(folder)
    (folder / LOCK).unlink()
    (folder / LOCK).write_text("of another program")
    held = lock(folder)
    assert held is not None and is_locked(folder) and lock(folder) is None
    held.close()
    assert not is_locked(folder) and (folder / LOCK).read_text() == "of another program"


def test_a_link_to_another_file_is_not_committed(runs: Path, tmp_path: Path, capsys) -> None:
    tables = runs / "sweeps" / "theirs"
    tables.mkdir(parents=True)
    config = resolve({"task": "vader", "model": "minilm", "projection": "lora", "seed": 0, "lr": 0.05}).to_json()
    record = {"cell": "0", **config, "score": 0.5, "metric": "accuracy", "did_not_train": None, "trained": 3}
    record |= {"failed": "not run", "folder": "a/b", "best": None}
    pd.DataFrame([record]).to_csv(tables / "records.csv", index=False)
    (tmp_path / "secret.json").write_text('{"key": "hidden"}')
    (tables / CHOICE).symlink_to(tmp_path / "secret.json")
    assert export.main(["theirs", "--runs", str(runs), "--out", str(tmp_path / "kept")]) == 2
    assert "must be a file, got a link" in capsys.readouterr().err and not (tmp_path / "kept").exists()
