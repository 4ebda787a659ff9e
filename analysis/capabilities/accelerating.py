"""Accelerate and torch.distributed: prepared models, states, two processes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from peft import PeftModel
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from analysis.capabilities.probe import check, probe
from analysis.capabilities.subjects import (
    IDS,
    adapted,
    gradient,
    llama,
    logits,
    same,
    steps,
    theta_d,
    trained,
)
from uniproj.tuner import shard_base

ACCELERATE = "Accelerate and torch.distributed"


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


@probe(ACCELERATE, "`prepare`, `backward`, `accumulate`, `clip_grad_norm_`")
def _(folder: Path) -> None:
    whole, parts = adapted(), adapted()
    _epoch(_accelerator(), whole, rows=3)
    _epoch(_accelerator(gradient_accumulation_steps=3), parts, rows=1)
    same(theta_d(parts), theta_d(whole), "theta_d after three parts of a batch", 1e-5)
    check(not torch.equal(theta_d(whole), theta_d(adapted())), "theta_d did not move")


@probe(ACCELERATE, "`save_state`, `load_state`")
def _(folder: Path) -> None:
    accelerator, model = _accelerator(), adapted()
    _epoch(accelerator, model, rows=3)
    expected = theta_d(model).detach().clone()
    accelerator.save_state(str(folder))
    with torch.no_grad():
        theta_d(model).zero_()
    accelerator.load_state(str(folder))
    same(theta_d(model), expected, "theta_d")


@probe(ACCELERATE, '`mixed_precision="bf16"`')
def _(folder: Path) -> None:
    accelerator = _accelerator(mixed_precision="bf16")
    model = accelerator.prepare(adapted())
    accelerator.backward(model(input_ids=IDS, labels=IDS).loss)
    grad = theta_d(accelerator.unwrap_model(model)).grad
    check(grad is not None and grad.any() and grad.dtype == torch.float32, "no float32 gradient")


@probe(ACCELERATE, "`unwrap_model`, `save_pretrained(state_dict=accelerator.get_state_dict(...))`")
def _(folder: Path) -> None:
    accelerator, model = _accelerator(), trained()
    prepared = accelerator.prepare(model)
    unwrapped = accelerator.unwrap_model(prepared)
    unwrapped.save_pretrained(folder, state_dict=accelerator.get_state_dict(prepared))
    same(logits(PeftModel.from_pretrained(llama(), folder)), logits(model), "logits")


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


@probe(ACCELERATE, "DDP: two processes (gloo)", slow=True)
def _(folder: Path) -> None:
    _two_processes(folder, "ddp")


@probe(ACCELERATE, "FSDP2: two processes, `uniproj.tuner.shard_base`", slow=True)
def _(folder: Path) -> None:
    _two_processes(folder, "fsdp2")


@probe(ACCELERATE, "`shard_base` without a process group")
def _(folder: Path) -> None:
    gradient(adapted())
    shard_base(adapted())
