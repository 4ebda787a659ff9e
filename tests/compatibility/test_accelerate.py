"""Accelerate and torch.distributed: prepared models, states, two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from peft import LoraConfig, PeftModel, get_peft_model
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from tests.compatibility import two_processes
from tests.compatibility.subjects import (
    IDS,
    TARGETS,
    Refuses,
    adapted,
    llama,
    logits,
    same,
    theta_d,
    trained_model,
)
from tests.compatibility.two_processes import CASES
from uniproj.errors import AdapterError
from uniproj.tuner import shard_base

ROOT = Path(__file__).parents[2]
capability = partial(pytest.mark.capability, "Accelerate and torch.distributed")


def _accelerator(**options: object) -> Accelerator:
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    return Accelerator(cpu=True, **options)


def _epoch(accelerator: Accelerator, model: torch.nn.Module, rows: int) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(IDS, batch_size=rows))  # type: ignore[arg-type]
    for ids in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=ids, labels=ids).loss)
            accelerator.clip_grad_norm_(model.parameters(), 100.0)
            optimizer.step()
            optimizer.zero_grad()
    return optimizer


@capability("`prepare`, `backward`, `accumulate`, `clip_grad_norm_`")
def test_prepare_backward_accumulate_clip_grad_norm_() -> None:
    whole, parts = adapted(), adapted()
    _epoch(_accelerator(), whole, rows=3)
    _epoch(_accelerator(gradient_accumulation_steps=3), parts, rows=1)
    same(theta_d(parts), theta_d(whole), "theta_d after three parts of a batch", 1e-5)
    assert not torch.equal(theta_d(whole), theta_d(adapted()))


@capability("`save_state`, `load_state`")
def test_save_state_load_state(tmp_path: Path) -> None:
    accelerator, model = _accelerator(), adapted()
    _epoch(accelerator, model, rows=3)
    expected = theta_d(model).detach().clone()
    accelerator.save_state(str(tmp_path))
    with torch.no_grad():
        theta_d(model).zero_()
    accelerator.load_state(str(tmp_path))
    same(theta_d(model), expected, "theta_d")


@capability('`mixed_precision="bf16"`')
def test_mixed_precision_bf16() -> None:
    accelerator = _accelerator(mixed_precision="bf16")
    model = accelerator.prepare(adapted())
    accelerator.backward(model(input_ids=IDS, labels=IDS).loss)
    grad = theta_d(accelerator.unwrap_model(model)).grad
    assert grad is not None and grad.any() and grad.dtype == torch.float32


@capability("`unwrap_model`, `save_pretrained(state_dict=accelerator.get_state_dict(...))`")
def test_unwrap_model_save_pretrained_state_dict_accelerator_get_state_dict(tmp_path: Path) -> None:
    accelerator, model = _accelerator(), trained_model()
    prepared = accelerator.prepare(model)
    unwrapped = accelerator.unwrap_model(prepared)
    unwrapped.save_pretrained(tmp_path, state_dict=accelerator.get_state_dict(prepared))
    same(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model), "logits")


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found, by case."""
    folder = tmp_path_factory.mktemp("seen")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", two_processes.__name__]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *torchrun, str(folder)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def _that_train(seen: list[dict[str, Any]], way: str) -> list[dict[str, Any]]:
    """What both processes found in the cases that train."""
    cases = [case for case in CASES if case[1] == way and case[-1] != "reentrant"]
    return [process[" ".join(map(str, case))] for case in cases for process in seen]


def _train_what_one_process_trains(found: dict[str, Any]) -> None:
    assert found["loss_difference"] < 1e-5 and found["trained_difference"] < 1e-4 < 0.1 < found["trained_change"]
    assert found["replicated"] and found["adapter_difference"] < 1e-5


@capability("DDP: two processes (gloo)")
@pytest.mark.system
def test_ddp_two_processes_gloo(seen: list[dict[str, Any]]) -> None:
    for found in _that_train(seen, "ddp"):
        _train_what_one_process_trains(found)
        assert found["sharded"] == 0


@capability("FSDP2: two processes, `uniproj.tuner.shard_base`")
@pytest.mark.system
def test_fsdp2_two_processes_uniproj_tuner_shard_base(seen: list[dict[str, Any]]) -> None:
    whole = ("uniproj_theta_d", "projections", "modules_to_save", "original_module")
    for found in _that_train(seen, "fsdp2"):
        _train_what_one_process_trains(found)
        assert found["sharded"] > 20  # the base, and nothing else
        assert all(any(part in name for part in whole) for name in found["whole"])


@pytest.mark.system
def test_reentrant_checkpointing_is_refused_with_several_processes(seen: list[dict[str, Any]]) -> None:
    for found in (process[" ".join(map(str, case))] for case in CASES if case[-1] == "reentrant" for process in seen):
        assert "need the non-reentrant kind, got use_reentrant=True" in found["refused"]


@capability("`shard_base` without a process group")
def test_shard_base_without_a_process_group(refuses: Refuses) -> None:
    with refuses():
        shard_base(adapted())
    lora = get_peft_model(llama(), LoraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM"))
    with pytest.raises(AdapterError, match="must hold a uniproj adapter, got a LoraModel"):
        shard_base(lora)


@pytest.mark.usefixtures("one_process")
def test_shard_base_takes_the_model_inside_a_peft_model() -> None:
    """As `adapter_of` does: what is trained beside theta_d stays whole too."""
    model = adapted(modules_to_save=["lm_head"])
    shard_base(model.base_model)
    whole = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
    assert any("theta_d" in name for name in whole) and any("lm_head" in name for name in whole)
    assert all("theta_d" in name or "lm_head" in name for name in whole)
