"""What each of two processes sees when it trains a small model; started by torchrun, writes one JSON file per process.

Every case takes three steps of Adam, each process on its half of a batch, and then the same steps alone on the whole.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.tuner.models import base_model, batch, config
from uniproj.errors import AdapterError
from uniproj.format.keys import THETA_D, in_model
from uniproj.tuner import shard_base

ROWS, STEPS = 4, 3
CASES = [
    (kind, wrapped, projection, checkpointing)
    for kind, projection, checkpointing in (
        ("bert", "unilora", None),  # with a head
        ("bert", "lora_xs", "non-reentrant"),  # a P of base weights
        ("llama", "vblora", "non-reentrant"),  # a learned P
        ("llama", "unilora", "reentrant"),
    )
    for wrapped in ("ddp", "fsdp2")
]


def _model(kind: str, projection: str, checkpointing: str | None) -> PeftModel:
    d = None if projection in ("vblora", "lora_xs") else 60
    model = get_peft_model(base_model(kind), config(kind, projection, d)).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()
    return model


def _train(model: nn.Module, kind: str, part: slice) -> list[float]:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(STEPS):
        loss = model(**{name: values[part] for name, values in batch(kind, ROWS).items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def _saved_difference(model: PeftModel, kind: str, inputs: dict[str, torch.Tensor]) -> float:
    """Of the logits after saving the adapter and loading it on a whole base in this process alone."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        expected = model.eval()(**inputs).logits
        model.save_pretrained(folder)
        return float((PeftModel.from_pretrained(base_model(kind), folder)(**inputs).logits - expected).abs().max())


def _case(kind: str, wrapped: str, projection: str, checkpointing: str | None) -> dict:
    rank, world = dist.get_rank(), dist.get_world_size()
    model = _model(kind, projection, checkpointing)
    alone = _model(kind, projection, None)
    parallel: nn.Module = model
    if wrapped == "ddp":
        parallel = DistributedDataParallel(model)
    else:
        shard_base(model)
    losses = torch.tensor(_train(parallel, kind, slice(rank * ROWS // world, (rank + 1) * ROWS // world)))
    dist.all_reduce(losses)
    expected = torch.tensor(_train(alone, kind, slice(None)))
    ours, theirs = _trainable(model), _trainable(alone)
    everywhere: list = [None] * world
    dist.all_gather_object(everywhere, ours)
    return {
        "loss_difference": float((losses / world - expected).abs().max()),
        "trained_difference": max(float((ours[name] - theirs[name]).abs().max()) for name in theirs),
        "trained_change": float((theirs[THETA] - _trainable(_model(kind, projection, None))[THETA]).abs().max()),
        "replicated": all(torch.equal(value, other[name]) for other in everywhere for name, value in ours.items()),
        "sharded": sum(isinstance(p, DTensor) for p in model.parameters()),
        "whole": [name for name, p in model.named_parameters() if not isinstance(p, DTensor)],
        "adapter_difference": _saved_difference(model, kind, batch(kind, ROWS)),
    }


THETA = in_model(THETA_D, "default")


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    found = {}
    for case in CASES:
        try:
            found[" ".join(map(str, case))] = _case(*case)
        except AdapterError as error:
            found[" ".join(map(str, case))] = {"refused": str(error)}
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
