"""Tiny models of real architectures, a batch for them, and what is asked of an adapter again and again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from tests.tuner.models import VOCABULARY, base_model, make
from uniproj.projection import Projection
from uniproj.tuner import UniProjConfig, adapter_of

D = 60
TARGETS = ["q_proj", "v_proj", "down_proj"]
IDS = torch.randint(0, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(1))
ROUNDING = 1e-4

# the fixtures of conftest.py
Remark = Callable[[str], None]
Refuses = Callable[..., AbstractContextManager[None]]


def llama(**fields: Any) -> Any:
    return base_model("llama", **fields)


def bert() -> Any:
    return base_model("bert")


def gpt2() -> Any:
    return base_model("gpt2")


def t5() -> Any:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return make(T5ForConditionalGeneration, T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes))


def saved_llama(folder: Path, **options: Any) -> str:
    """The folder of a base model, as a user would download it."""
    llama(**options).save_pretrained(folder / "base")
    return str(folder / "base")


def config(**fields: Any) -> UniProjConfig:
    common: dict[str, Any] = {"r": 4, "d": D, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    return UniProjConfig(**{**common, **fields})


def adapted(base: nn.Module | None = None, **fields: Any) -> Any:
    """A base model (the small Llama) with an adapter."""
    return get_peft_model(llama() if base is None else base, config(**fields))  # type: ignore[arg-type]


def trained_model(base: nn.Module | None = None, **fields: Any) -> Any:
    """The same after a few steps, in eval mode."""
    model = adapted(base, **fields)
    steps(model)
    return model.eval()


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def theta_d(model: Any, name: str = "default") -> nn.Parameter:
    return adapter_of(model, name).theta_d


def modules(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules()]


def projection(model: Any) -> Projection:
    return adapter_of(model).P


def gradient(model: Any, ids: Tensor = IDS) -> Tensor:
    """Of the loss on theta_d."""
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return _received(model).clone()


def _received(model: Any) -> Tensor:
    grad = theta_d(model).grad
    assert grad is not None and grad.any(), "theta_d received no gradient"
    return grad


def steps(model: nn.Module, count: int = 3, lr: float = 0.05) -> list[float]:
    """A few steps of Adam on one batch; the losses, which must fall."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(count):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    return losses


def saved(folder: Path, base: nn.Module | None = None, **fields: Any) -> tuple[Path, Tensor]:
    """A trained adapter in a folder, and its logits."""
    model = trained_model(base, **fields)
    model.save_pretrained(folder / "adapter")
    return folder / "adapter", logits(model)


def same(left: Tensor, right: Tensor, what: str, tolerance: float = 0.0) -> None:
    """Equal to the last bit, or within a tolerance relative to the largest entry."""
    far = (left.float() - right.float()).abs().max() / right.float().abs().max()
    assert far <= tolerance, f"{what}: differs by {far:.1e}"


def moved(left: Tensor, right: Tensor, what: str) -> None:
    assert not torch.allclose(left, right, rtol=1e-4, atol=1e-4), f"{what}: nothing changed"


def drift(merged: Tensor, adapter: Tensor, bare: Tensor) -> float:
    """How far logits are off after merging, in units of what the adapter changes of them."""
    return float((merged - adapter).float().norm() / (adapter - bare).float().norm())


def life(base: nn.Module, call: Callable[[nn.Module], Tensor], **fields: Any) -> str:
    """Attach to an architecture: the output moves, theta_d gets a gradient, merging keeps the output."""
    with torch.no_grad():
        before = call(base)
    model = adapted(base, **fields)
    with torch.no_grad():
        theta_d(model).mul_(20.0)
    model.eval()
    output = call(model)
    output.float().square().sum().backward()
    _received(model)
    moved(output.detach(), before, "output")
    merged = model.merge_and_unload()
    with torch.no_grad():
        same(call(merged), output.detach(), "output after merging", ROUNDING)
    return f"{len(projection(model).layout.modules)} modules"
