"""Adapters that each format's version wrote, kept for ever; `python -m tests.format.fixtures` adds missing ones.

Those of the projections that it is called with, which are new and not part of any result yet, are made anew.

v<format>/<name>/ holds an adapter as PEFT saved it and `expected.safetensors`: its trained numbers and theta_D then.
Nothing that is there is ever written again; manifest.json holds the digest of every file.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from uniproj import get, names
from uniproj.format.header import FORMAT_VERSION, PLAIN_VERSION
from uniproj.kernels.random import uniform
from uniproj.tuner import UniProjConfig, adapter_of

ROOT = Path(__file__).parents[1] / "fixtures" / "adapters"
MANIFEST, BASE, EXPECTED = ROOT / "manifest.json", ROOT / "base.json", "expected.safetensors"
WITH_HEAD, ON_KINDS = "unilora_with_head", "unilora_on_kinds"
KINDS = {
    "target_modules": ["embedding", "convolution", "grouped", "picture", "volume", "attention", "head"],
    "target_parameters": ["experts.up", "experts.down"],
}
SIZES = {"vocab_size": 24, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def base() -> LlamaForCausalLM:
    """The base model: its sizes from base.json, its weights from the library's own streams."""
    return copy.deepcopy(_base())


@cache
def _base() -> LlamaForCausalLM:
    return _drawn(LlamaForCausalLM(LlamaConfig(**json.loads(BASE.read_text()))))


def kinds() -> nn.Module:
    """A base with every kind of module that PEFT's LoRA adapts."""
    return copy.deepcopy(_kinds())


@cache
def _kinds() -> nn.Module:
    return _drawn(_Kinds())


def _drawn(model: Any) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(uniform(3, f"fixture.{name}", parameter.numel()).view(parameter.shape))
    return model.eval()


class _Experts(nn.Module):
    """Three experts as two parameters, and a linear layer within."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.empty(3, 6, 8)), nn.Parameter(torch.empty(3, 8, 6))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        """x (tokens, 8) -> (tokens, 5)."""
        inner = torch.einsum("ti,eoi->teo", x, self.up).tanh()
        return self.head(torch.einsum("teo,eio->ti", inner, self.down))


class _Kinds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.convolution = nn.Conv1d(8, 8, 3, padding=1)
        self.grouped = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.picture = nn.Conv2d(8, 8, (1, 3), padding=(0, 1))
        self.volume = nn.Conv3d(8, 8, (1, 1, 2), padding=(0, 0, 1))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.experts = _Experts()

    def forward(self, ids: Tensor) -> Tensor:
        """ids (n, tokens) -> (n tokens, 5)."""
        x = self.grouped(self.convolution(self.embedding(ids).mT).tanh()).tanh()
        x = self.picture(x[:, :, None]).tanh()
        x = self.volume(x[:, :, None])[:, :, 0, 0, 1:].tanh().mT
        return self.experts((x + self.attention(x, x, x)[0]).flatten(0, 1))


def wanted() -> list[str]:
    """One adapter per projection of the library, one with a head, and one on every kind of module."""
    return [*(name for name in names() if get(name).__module__.startswith("uniproj.")), WITH_HEAD, ON_KINDS]


def place(name: str) -> str:
    """The folder of the adapter of this name, as this version writes it."""
    return f"v{FORMAT_VERSION if name == ON_KINDS else PLAIN_VERSION}/{name}"


def numbers(model: PeftModel) -> dict[str, Tensor]:
    """theta_d, P's own Parameters, and theta_D."""
    tuner = model.base_model
    P, theta_d = adapter_of(tuner)
    with torch.no_grad():
        own = {f"projections.{name}": p.detach() for name, p in P.named_parameters()}
        return {"theta_d": theta_d.detach(), **own, "theta_D": P(theta_d)}


def write(name: str, folder: Path) -> None:
    """Save the adapter of this name, moved off its start as training would."""
    projection = "unilora" if name in (WITH_HEAD, ON_KINDS) else name
    of_kinds = {**KINDS, "task_type": None} if name == ON_KINDS else {}
    fields: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **of_kinds}
    config = UniProjConfig(
        projection=projection,
        d=40 if get(projection).free_d else None,
        r=4,
        lora_alpha=8,
        projection_seed=11,
        projection_kwargs=dict(get(projection).variants[0]),
        modules_to_save=["lm_head"] if name == WITH_HEAD else None,
        **fields,
    )
    model = get_peft_model(kinds() if name == ON_KINDS else base(), config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * uniform(5, f"fixture.{key}", parameter.numel()).view(parameter.shape))
    model.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in numbers(model).items()}, folder / EXPECTED)


def main() -> int:
    """Add what is missing, and nothing else but the projections that are named."""
    ROOT.mkdir(parents=True, exist_ok=True)
    renewed = [f"{place(name)}/" for name in sys.argv[1:]]
    for old in renewed:
        shutil.rmtree(ROOT / old, ignore_errors=True)
    if not BASE.exists():
        BASE.write_text(json.dumps(SIZES, indent=2) + "\n")
    for name in wanted():
        folder = ROOT / place(name)
        if not folder.exists():
            write(name, folder)
    known = json.loads(MANIFEST.read_text()) if MANIFEST.exists() else {}
    known = {path: digest for path, digest in known.items() if not path.startswith(tuple(renewed))}
    MANIFEST.write_text(json.dumps({**digests(), **known}, indent=1, sort_keys=True) + "\n")
    return 0


def digests() -> dict[str, str]:
    """{path below ROOT: SHA-256}, without the manifest."""
    files = [path for path in sorted(ROOT.rglob("*")) if path.is_file() and path != MANIFEST]
    return {path.relative_to(ROOT).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


if __name__ == "__main__":
    sys.exit(main())
