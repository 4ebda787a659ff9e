"""One run over two processes (gloo): the losses, theta_d, scores and checkpoints of one process."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from experiments import train
from experiments.errors import ExperimentError
from experiments.files import read_json
from experiments.models import load_tokenizer
from experiments.processes import Processes
from experiments.records.reading import losses
from experiments.runs.config import RunConfig
from experiments.runs.distributed import share
from experiments.runs.folder import RESULT, prepare
from experiments.runs.resolve import resolve
from experiments.runs.training import last_checkpoint
from experiments.sweeps import workers
from tests.experiments.processes import ROOT, training_processes

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
    for here, there in zip(losses(together), losses(alone), strict=True):
        assert here["step"] == there["step"] and here["of"] == there["of"]
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-4)
        assert here["grad_norm"] == pytest.approx(there["grad_norm"], rel=1e-3)
    one, other = read_json(together / RESULT), read_json(alone / RESULT)
    assert one["cost"]["processes"] == 2 and other["cost"]["processes"] == 1
    for key in ("score", "validation", "validation_best", "loss_before", "loss_after"):
        assert one[key] == pytest.approx(other[key], rel=1e-4), key
    assert one["rows"] == other["rows"] and one["trained"] == other["trained"]


@pytest.mark.system
@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_two_processes_train_what_one_trains(kind: str, tmp_path: Path, settings: dict) -> None:
    config = resolve(settings)
    _assert_equal_runs(_together(tmp_path, config, kind), _alone(tmp_path, config))


@pytest.mark.slow
def test_accelerate_launch_trains_what_one_process_trains(tmp_path: Path, settings: dict) -> None:
    config = resolve(settings)
    together = prepare(tmp_path / "together", config.to_json())
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*launch, "-m", "experiments.train", str(together)], cwd=ROOT, env=environment, check=True)
    _assert_equal_runs(together, _alone(tmp_path, config))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("projection", ["unilora", "vblora"])
def test_completions_accumulated_and_checkpointed(kind: str, projection: str, tmp_path: Path, llama: str) -> None:
    """A causal model, whose loss is a mean over tokens: of all rows of a step, on whichever process they lie."""
    rows = pd.DataFrame(
        {"prompt": [f"{i} + {i % 7}" + " and so on" * (i % 5) for i in range(32)],
         "completion": [str(i + i % 7) for i in range(32)]}
    )  # fmt: skip
    (tmp_path / "sums").mkdir()
    for split in ("train", "validation", "test"):
        rows.to_json(tmp_path / "sums" / f"{split}.jsonl", orient="records", lines=True)
    config = resolve({
        "task": str(tmp_path / "sums"), "model": llama, "projection": projection, "seed": 0, "lr": 0.01,
        "batch_size": 4, "accumulation": 2, "epochs": 2, "max_new_tokens": 4, "gradient_checkpointing": True,
        **({"d": 64} if projection == "unilora" else {"budget": 2000}),
    })  # fmt: skip
    _assert_equal_runs(_together(tmp_path, config, kind), _alone(tmp_path, config))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_resumes_to_the_numbers_of_one_process(kind: str, tmp_path: Path, settings: dict) -> None:
    config = resolve({**settings, "epochs": 12, "evaluations": 3, "lr": 0.01})
    folder = prepare(tmp_path / kind, config.to_json())
    stopped = workers.start(folder, KINDS[kind])
    while not losses(folder):
        assert stopped.poll() is None, workers.last_words(folder)
        time.sleep(0.05)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait() != 0 and not (folder / RESULT).exists()
    checkpoint = last_checkpoint(folder)
    assert checkpoint is not None
    # one format: what two processes wrote, one resumes
    alone = tmp_path / "resumed alone"
    shutil.copytree(folder, alone)
    assert workers.start(folder, KINDS[kind]).wait() == 0, workers.last_words(folder)
    assert train.main([str(alone)]) == 0
    whole = _alone(tmp_path, config)
    for resumed in (folder, alone):
        for name, value in _trained(whole).items():
            torch.testing.assert_close(_trained(resumed)[name], value, rtol=1e-2, atol=1e-3)
    assert [line["step"] for line in losses(folder)] == [line["step"] for line in losses(whole)]


@pytest.mark.slow
def test_a_kill_of_one_process_ends_the_run_and_the_next_start_finishes_it(tmp_path: Path, settings: dict) -> None:
    config = resolve({**settings, "epochs": 24, "evaluations": 4})
    folder = prepare(tmp_path / "killed", config.to_json())
    run = workers.start(folder, KINDS["ddp"])
    while last_checkpoint(folder) is None:
        assert run.poll() is None, workers.last_words(folder)
        time.sleep(0.05)
    os.kill(max(training_processes(folder)), signal.SIGKILL)
    assert run.wait() != 0 and not (folder / RESULT).exists()
    assert workers.start(folder, KINDS["ddp"]).wait() == 0, workers.last_words(folder)
    assert read_json(folder / RESULT)["cost"]["processes"] == 2


@pytest.mark.slow
def test_two_nodes_train_what_one_process_trains(tmp_path: Path, settings: dict) -> None:
    config = resolve(settings)
    together = prepare(tmp_path / "nodes", config.to_json())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    nodes = [workers.start(together, Processes(1, nodes=2, node=n, address=address)) for n in range(2)]
    assert [node.wait() for node in nodes] == [0, 0], workers.last_words(together)
    _assert_equal_runs(together, _alone(tmp_path, config))


def test_a_batch_that_cannot_be_shared_out_is_refused(settings: dict, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ExperimentError, match="multiple of the 3 processes, got 1 and 8"):
        share(resolve(settings))
    assert share(resolve({**settings, "accumulation": 6})) == (8, 2)
    assert share(resolve({**settings, "batch_size": 9})) == (3, 1)


def test_a_failure_is_told_by_the_run_and_not_by_torchrun(tmp_path: Path) -> None:
    old, new = "failed: out of memory", "failed: config: d must be positive."
    (tmp_path / workers.LOG).write_text(f"{workers.STARTED}\n{old}\n{workers.STARTED}\n{new}\ntorchrun\n=====\n")
    assert workers.last_words(tmp_path) == "config: d must be positive."
