"""A tiny BERT and a tiny Llama with real tokenizers, and a few rows of the real packaged data, as folders of a user."""

import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path

import nltk
import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from experiments import sweep, tasks, train
from experiments.models import load_tokenizer
from experiments.runs.config import RunConfig
from experiments.runs.resolve import resolve
from experiments.sweeps import launchers, protocol

# a package that carries NLTK's sentence splitter, which is otherwise downloaded
NLTK = importlib.metadata.distribution("llama-index-core").locate_file("llama_index/core/_static/nltk_cache")
nltk.data.path.append(str(NLTK))


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tiny-bert")
    tokenizer = load_tokenizer("minilm")
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)  # fmt: skip  # noqa: E501
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = load_tokenizer("smollm2")
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size, tie_word_embeddings=True)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def task(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("reviews")
    rows = tasks.get("vader")
    for split, count in (("train", 96), ("validation", 32), ("test", 48)):
        rows.split(split).head(count).to_json(folder / f"{split}.jsonl", orient="records", lines=True)
    return str(folder)


@pytest.fixture
def config(model: str, task: str) -> RunConfig:
    return resolve(
        {"task": task, "model": model, "projection": "unilora", "budget": 200, "seed": 0, "lr": 0.05, "timing": True}
    )


@pytest.fixture
def file(tmp_path: Path, task: str, model: str) -> Path:
    return _sweep_file(tmp_path, task, model)


def _sweep_file(folder: Path, task: str, model: str) -> Path:
    path = folder / "mine.yaml"
    settings = {"task": task, "model": model, "budget": 200, "epochs": 2, "evaluations": 2}
    content = {
        "settings": settings,
        "axes": {"projection": ["lora", "unilora"]},
        "tune": {"seeds": [0], "lr": [0.01, 0.05]},
        "seeds": [1, 2],
    }
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="session")
def swept(tmp_path_factory, task: str, model: str) -> tuple[Path, Path]:
    """A sweep's file and the folder of its runs, tuned on its grid alone; a test that changes them takes a copy."""
    folder = tmp_path_factory.mktemp("swept")
    path = _sweep_file(folder, task, model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "MOST_BEYOND", 0)
        patch.setattr(launchers, "train_all", _train_here)
        assert sweep.main([str(path), "--runs", str(folder / "runs")]) == 0
    return path, folder / "runs"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of sweeps train in this process, which saves the seconds that a process takes to start."""
    monkeypatch.setattr(launchers, "train_all", _train_here)


def _train_here(folders: Sequence[Path], *_: object) -> dict[Path, str]:
    return {folder: "failed" for folder in folders if train.main([str(folder)])}


@pytest.fixture(scope="session")
def shared_data() -> str:
    """The folder of benchmark data beside the checkout; tests that need it are skipped where it is missing."""
    folder = Path(__file__).parents[3] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist: the benchmark data come from the hub elsewhere")
    return str(folder)
