"""One run over two processes (gloo): the losses, theta_d, scores and checkpoints of one process."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from experiments import train, workers
from experiments.config import RunConfig, resolve
from experiments.models import load_tokenizer
from experiments.results import RESULT, metrics, prepare, read_json
from experiments.workers import Processes

KINDS = {"ddp": Processes(2), "fsdp2": Processes(2, sharded=True)}
# sums in another order: a few float32 roundings, grown by Adam's division in the first steps
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(scope="session")
def encoder(tmp_path_factory) -> str:
    """Without dropout, whose random numbers no other number of processes draws alike."""
    folder = tmp_path_factory.mktemp("sure-bert")
    tokenizer = load_tokenizer("minilm")
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    BertModel(BertConfig(vocab_size=len(tokenizer), **size, **off)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def decoder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = load_tokenizer("smollm2")
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size, tie_word_embeddings=True)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def settings(encoder: str, task: str) -> dict:
    return {
        "task": task, "model": encoder, "projection": "unilora", "budget": 200, "seed": 0, "lr": 0.05,
        "batch_size": 8, "epochs": 2, "evaluations": 2,
    }  # fmt: skip


def _alone(folder: Path, config: RunConfig) -> Path:
    alone = prepare(folder / "alone", config.to_json())
    assert train.main([str(alone)]) == 0
    return alone


def _together(folder: Path, config: RunConfig, kind: str) -> Path:
    together = prepare(folder / kind, config.to_json())
    assert workers.start(together, KINDS[kind]).wait() == 0, workers.last_words(together)
    return together


def _trained(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def _assert_equal_runs(together: Path, alone: Path) -> None:
    ours, theirs = _trained(together), _trained(alone)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, **CLOSE)
    for here, there in zip(metrics(together), metrics(alone), strict=True):
        assert here["step"] == there["step"] and here["of"] == there["of"]
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-4)
        assert here["grad_norm"] == pytest.approx(there["grad_norm"], rel=1e-3)
    one, other = read_json(together / RESULT), read_json(alone / RESULT)
    assert one["cost"]["processes"] == 2 and other["cost"]["processes"] == 1
    for key in ("score", "validation", "validation_best", "loss_before", "loss_after"):
        assert one[key] == pytest.approx(other[key], rel=1e-4), key
    assert one["rows"] == other["rows"] and one["trained"] == other["trained"]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_what_one_trains(kind: str, tmp_path: Path, settings: dict) -> None:
    config = resolve(settings)
    _assert_equal_runs(_together(tmp_path, config, kind), _alone(tmp_path, config))
