"""The model part: what an adapter costs a whole model, beside PEFT's LoRA of the same rank on the same base.

One measurement is one adapter on one base, in a process of its own: first its memory, alone; then the LoRA model is
made beside it, and steps, generations and inferences of the two are timed in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from analysis.overhead import adapters
from analysis.overhead.bases import BASES, load
from analysis.overhead.memory import Peak, give_back_at_once, tensor_bytes
from experiments.timing import compare_steps, interleave, median_interval, now, training_step
from uniproj import LoRALayout

# Turns of training steps and of generations, and of steps with checkpointing.
PAIRS = {"cpu": (9, 6), "cuda": (25, 25)}
WARM_UP = 1
WEIGHTS = "adapter_model.safetensors"


def jobs(bases: Iterable[str], methods: Iterable[str], device: str) -> list[dict[str, Any]]:
    """The configuration of every measurement of this part."""
    methods = list(methods)
    return [
        {
            "part": "model",
            "base": base,
            "method": method,
            "r": adapters.RANK,
            "d": BASES[base].d,
            "batch": list(BASES[base].batch),
            "new_tokens": BASES[base].new_tokens,
            "pairs": PAIRS[device][0],
            "pairs_checkpointing": PAIRS[device][1],
        }
        for base in bases
        for method in methods
    ]


def measure(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row: the adapter's sizes in bytes, times in s, and ratios of times to PEFT's LoRA."""
    base, device = BASES[config["base"]], torch.device(config["device"])
    give_back_at_once(True)
    _load_on_tiny(config["method"], device)
    plain, other = load(config["base"], device)
    batch, prompt = base.training_batch(device), base.prompt(device)
    layout = LoRALayout.from_shapes(base.shapes(plain), adapters.RANK)
    peak = Peak(device)
    before, tensors = peak.reset(), tensor_bytes(device)
    give_back_at_once(False)
    started = now(device)
    model = adapters.attach(plain, base, config["method"])
    attach_seconds = now(device) - started
    give_back_at_once(True)
    row = {
        "base": config["base"],
        "method": config["method"],
        "D": layout.D,
        "modules": len(layout.modules),
        "attach_seconds": attach_seconds,
        **_sizes(model, prompt, device, tensors),
    }
    for checkpointing in (False, True):
        _set_checkpointing(model, checkpointing)
        key = "checkpointing_peak_bytes" if checkpointing else "peak_bytes"
        row[key] = _peak(model, batch, device, peak) - before
    give_back_at_once(False)
    reference = adapters.attach(other, base, adapters.REFERENCE)
    for checkpointing in (False, True):
        for each in (model, reference):
            _set_checkpointing(each, checkpointing)
        pairs = config["pairs_checkpointing" if checkpointing else "pairs"]
        found = compare_steps(model, reference, batch, adapters.optimizer, device.type == "cuda", pairs, WARM_UP)
        row |= {f"checkpointing_{key}" if checkpointing else key: value for key, value in found.items()}
    for each in (model, reference):
        _set_checkpointing(each, False)
    row |= _inference(model, reference, prompt, base.new_tokens, config["pairs"])
    return [row | _on_disk(model, device)]


def _load_on_tiny(method: str, device: torch.device) -> None:
    """Use the method once on a tiny model: what is loaded on first use is neither its memory nor its time."""
    base = BASES["tiny"]
    model = adapters.attach(load("tiny", device)[0], base, method)
    batch = base.training_batch(device)
    training_step(model, batch, adapters.optimizer(model), device.type == "cuda")()


def _autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def _sizes(model: PeftModel, prompt: Mapping[str, Tensor], device: torch.device, before: int) -> dict[str, int]:
    """Trained numbers, their bytes, and the bytes of what else the adapter holds after a forward pass.

    The head's copy is a part of every adapter's state that no method decides: it is left out.
    """
    model.eval()
    with torch.no_grad(), _autocast(device):
        model(**prompt)
    own = adapters.trained(model)
    head = sum(p.nbytes for name, p in model.named_parameters() if adapters.HEAD in name)
    trained_bytes = sum(p.nbytes for p in own)
    return {
        "trained": sum(p.numel() for p in own),
        "trained_bytes": trained_bytes,
        "state_bytes": tensor_bytes(device) - before - trained_bytes - head,
    }


def _set_checkpointing(model: PeftModel, enabled: bool) -> None:
    inner = model.get_base_model()
    if enabled:
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        inner.gradient_checkpointing_disable()
        # left behind by the library: with it every later step goes back through the embeddings, and takes 2 % longer
        inner.disable_input_require_grads()


def _peak(model: nn.Module, batch: Mapping[str, Tensor], device: torch.device, peak: Peak) -> int:
    """The most bytes in use during two training steps after a first one, which makes the optimiser's state."""
    step = training_step(model, batch, adapters.optimizer(model), device.type == "cuda")
    step()
    peak.reset()
    step()
    step()
    return peak.read()


def _inference(
    model: PeftModel, reference: PeftModel, prompt: Mapping[str, Tensor], new_tokens: int, pairs: int
) -> dict[str, float]:
    """Time per generated token (or of one forward pass of an encoder) relative to LoRA's, and in s."""
    actions = []
    for each in (model, reference):
        each.eval()
        actions.append(_generation(each, prompt, new_tokens) if new_tokens else _forward(each, prompt))
    seconds: np.ndarray = np.array(interleave(actions, pairs, WARM_UP))
    ratio, low, high = median_interval(seconds[:, 0] / seconds[:, 1])
    return {
        "inference_ratio": ratio,
        "inference_ratio_low": low,
        "inference_ratio_high": high,
        "inference_seconds": float(np.median(seconds[:, 0])),
    }


def _generation(model: PeftModel, prompt: Mapping[str, Tensor], new_tokens: int) -> Callable[[], float]:
    device = prompt["input_ids"].device

    def timed() -> float:
        started = now(device)
        with torch.no_grad(), _autocast(device):
            model.generate(
                **prompt, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0
            )
        return (now(device) - started) / new_tokens

    return timed


def _forward(model: PeftModel, prompt: Mapping[str, Tensor]) -> Callable[[], float]:
    device = prompt["input_ids"].device

    def timed() -> float:
        started = now(device)
        with torch.no_grad(), _autocast(device):
            model(**prompt)
        return now(device) - started

    return timed


def _on_disk(model: PeftModel, device: torch.device) -> dict[str, float]:
    """Seconds to save the adapter and to load it onto its bare base, and bytes of its weights file."""
    with TemporaryDirectory() as folder:
        started = now(device)
        model.save_pretrained(folder)
        save_seconds = now(device) - started
        bare = model.unload()
        started = now(device)
        PeftModel.from_pretrained(bare, folder)
        load_seconds = now(device) - started
        file_bytes = (Path(folder) / WEIGHTS).stat().st_size
    return {"save_seconds": save_seconds, "load_seconds": load_seconds, "file_bytes": file_bytes}
