"""Accelerate and torch.distributed: prepared models, states, two processes."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from peft import PeftModel
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from tests.compatibility.subjects import (
    IDS,
    Refuses,
    adapted,
    llama,
    logits,
    same,
    steps,
    theta_d,
    trained,
)
from uniproj.tuner import shard_base

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
    accelerator, model = _accelerator(), trained()
    prepared = accelerator.prepare(model)
    unwrapped = accelerator.unwrap_model(prepared)
    unwrapped.save_pretrained(tmp_path, state_dict=accelerator.get_state_dict(prepared))
    same(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model), "logits")


def _worker(rank: int, folder: str, way: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = adapted()
    parallel: torch.nn.Module = model
    if way == "ddp":
        parallel = DistributedDataParallel(model)
    else:
        shard_base(model)
    steps(parallel)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(theta_d(model).tolist()))
    dist.destroy_process_group()


def _two_processes(folder: Path, way: str) -> None:
    spawn(_worker, (str(folder), way), nprocs=2)
    alone = adapted()
    steps(alone)
    for rank in range(2):
        there = torch.tensor(json.loads((folder / f"{rank}.json").read_text()))
        same(there, theta_d(alone), f"theta_d of process {rank}", 1e-4)


@capability("DDP: two processes (gloo)")
@pytest.mark.slow
def test_ddp_two_processes_gloo(tmp_path: Path) -> None:
    _two_processes(tmp_path, "ddp")


@capability("FSDP2: two processes, `uniproj.tuner.shard_base`")
@pytest.mark.slow
def test_fsdp2_two_processes_uniproj_tuner_shard_base(tmp_path: Path) -> None:
    _two_processes(tmp_path, "fsdp2")


@capability("`shard_base` without a process group")
def test_shard_base_without_a_process_group(refuses: Refuses) -> None:
    with refuses():
        shard_base(adapted())
