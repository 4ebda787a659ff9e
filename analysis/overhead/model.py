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
from peft import LoraConfig, PeftModel, UniLoraConfig, VBLoRAConfig, VeraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

import uniproj
from analysis.overhead import entrants
from analysis.overhead.memory import Peak, give_back_at_once, tensor_bytes
from analysis.overhead.shapes import sub_vectors
from analysis.overhead.workloads import WORKLOADS, Workload, greedy, load
from experiments.timing import compare_steps, interleave, now, ratio, training_step
from uniproj import LoRALayout
from uniproj.tuner import UniProjConfig

RANK = 4
REFERENCE = "PEFT LORA"
PEFT = (REFERENCE, "PEFT UNILORA", "PEFT VERA", "PEFT VBLORA")
# Methods that hold a dense P get the largest d at which it has at most this many entries.
_DENSE = ("gaussian", "gaussian_orthonormal", "nola")
_MOST_ENTRIES = 2**26
HEAD = "modules_to_save"
# Turns of training steps, of steps with checkpointing, and of generations, whose interval should tell 1 % apart.
PAIRS = {"cpu": (9, 6, 41), "cuda": (25, 25, 25)}
WARM_UP = 1
WEIGHTS = "*.safetensors"


def names() -> list[str]:
    """PEFT's methods, then uniproj's."""
    return [*PEFT, *uniproj.names()]


def size(name: str, layout: LoRALayout, work: Workload) -> int | None:
    """d of a projection of uniproj on this layout, None where the method decides it."""
    cls = uniproj.get(name)
    if not cls.free_d:
        return None
    wanted = _MOST_ENTRIES // layout.D if name in _DENSE else work.d
    return min(max(wanted, cls.min_d(layout)), layout.D)


def attach(model: nn.Module, work: Workload, name: str) -> Any:
    """The model with this adapter, its alpha chosen so that the scale alpha / r is 1; itself for full fine-tuning."""
    layout = LoRALayout.from_shapes(work.shapes(model), RANK)
    common: dict[str, Any] = {"r": RANK, "target_modules": list(work.targets), "task_type": work.task_type}
    if name == "PEFT LORA":
        config = LoraConfig(**common, lora_alpha=RANK)
    elif name == "PEFT UNILORA":
        config = UniLoraConfig(**common, theta_d_length=work.d)
    elif name == "PEFT VERA":
        config = VeraConfig(**common)
    elif name == "PEFT VBLORA":
        config = VBLoRAConfig(**common, **sub_vectors(layout))
    elif entrants.is_entrant(name):
        return entrants.attach(model, work, name, RANK)
    else:
        hyperparameters = sub_vectors(layout) if name == "vblora" else {}
        d = size(name, layout, work)
        config = UniProjConfig(**common, projection=name, d=d, projection_kwargs=hyperparameters)
    return get_peft_model(model, config)


def parameters(model: nn.Module) -> list[Tensor]:
    """The trained numbers of the adapter, without the classification head."""
    return [p for name, p in model.named_parameters() if p.requires_grad and HEAD not in name]


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW on everything trained, at a rate that leaves the model where it is: only its time matters."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, weight_decay=0.0)


def jobs(bases: Iterable[str], methods: Iterable[str], device: str) -> list[dict[str, Any]]:
    """The configuration of every measurement of this part."""
    methods = list(methods)
    return [
        {
            "part": "model",
            "base": base,
            "method": method,
            "r": RANK,
            "d": WORKLOADS[base].d,
            "batch": list(WORKLOADS[base].batch),
            "new_tokens": WORKLOADS[base].new_tokens,
            "pairs": PAIRS[device][0],
            "pairs_checkpointing": PAIRS[device][1],
            "pairs_inference": PAIRS[device][2],
        }
        for base in bases
        for method in methods
    ]


def measure(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row: the adapter's sizes in bytes, times in s, and ratios of times to PEFT's LoRA."""
    work, device = WORKLOADS[config["base"]], torch.device(config["device"])
    give_back_at_once(True)
    plain, other = load(config["base"], device)
    batch, prompt = work.training_batch(device), work.prompt(device)
    other, attach_seconds = _used_before(other, work, config["method"], batch, prompt)
    layout = LoRALayout.from_shapes(work.shapes(plain), RANK)
    peak = Peak(device)
    peak.reset()  # which collects what is used no more, and is then given back
    give_back_at_once(True)
    before, tensors = peak.reset(), tensor_bytes(device)
    model = attach(plain, work, config["method"])
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
    reference = attach(other, work, REFERENCE)
    for checkpointing in (False, True):
        for each in (model, reference):
            _set_checkpointing(each, checkpointing)
        pairs = config["pairs_checkpointing" if checkpointing else "pairs"]
        found = compare_steps(model, reference, batch, optimizer, device.type == "cuda", pairs, WARM_UP)
        row |= {f"checkpointing_{key}" if checkpointing else key: value for key, value in found.items()}
    for each in (model, reference):
        _set_checkpointing(each, False)
    row |= _inference(model, reference, prompt, config["new_tokens"], config["pairs_inference"])
    return [row | _on_disk(model, device)]


def _used_before(
    base: nn.Module, work: Workload, method: str, batch: Mapping[str, Tensor], prompt: Mapping[str, Tensor]
) -> tuple[nn.Module, float]:
    """The base as it was, after a forward pass and training steps with the method; then the seconds of attaching it.

    What is loaded on first use, some 15 MB for any model and up to 10 for a method, is neither its memory nor its time,
    and what the C library keeps from attaching is not its memory either.
    """
    device = prompt["input_ids"].device
    model = attach(base, work, method)
    _evaluate(model, prompt)
    _peak(model, batch, device, Peak(device))
    base = _bare(model)
    give_back_at_once(False)
    started = now(device)
    model = attach(base, work, method)
    seconds = now(device) - started
    return _bare(model), seconds


def _bare(model: nn.Module) -> nn.Module:
    """The base without its adapter."""
    if not isinstance(model, PeftModel):
        return model
    # tokens before a prompt change nothing in the model
    return model.unload() if isinstance(model.base_model, BaseTuner) else model.get_base_model()


def _autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def _evaluate(model: Any, prompt: Mapping[str, Tensor]) -> None:
    model.eval()
    with torch.no_grad(), _autocast(prompt["input_ids"].device):
        model(**prompt)


def _sizes(model: Any, prompt: Mapping[str, Tensor], device: torch.device, before: int) -> dict[str, int]:
    """Trained numbers, their bytes, and the bytes of what else the adapter holds after a forward pass.

    The head's copy is a part of every adapter's state that no method decides: it is left out. Full fine-tuning holds
    nothing besides the base.
    """
    _evaluate(model, prompt)
    own = parameters(model)
    head = sum(p.nbytes for name, p in model.named_parameters() if HEAD in name)
    trained_bytes = sum(p.nbytes for p in own)
    added = trained_bytes + head if isinstance(model, PeftModel) else 0
    return {
        "trained": sum(p.numel() for p in own),
        "trained_bytes": trained_bytes,
        "state_bytes": tensor_bytes(device) - before - added,
    }


def _set_checkpointing(model: Any, enabled: bool) -> None:
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if enabled:
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        inner.gradient_checkpointing_disable()
        # left behind by the library: with it every later step goes back through the embeddings, and takes 2 % longer
        inner.disable_input_require_grads()


def _peak(model: nn.Module, batch: Mapping[str, Tensor], device: torch.device, peak: Peak) -> int:
    """The most bytes in use during two training steps after a first one, which makes the optimiser's state."""
    step = training_step(model, batch, optimizer(model), device.type == "cuda")
    step()
    peak.reset()
    step()
    step()
    return peak.read()


def _inference(
    model: Any, reference: Any, prompt: Mapping[str, Tensor], new_tokens: int, pairs: int
) -> dict[str, float]:
    """Time per generated token (or of one forward pass of an encoder) relative to LoRA's, and in s."""
    actions = [_answer(each.eval(), prompt, new_tokens) for each in (model, reference)]
    seconds: np.ndarray = np.array(interleave(actions, pairs, WARM_UP))
    found = ratio("inference_ratio", seconds[:, 0], seconds[:, 1])
    return {**found, "inference_seconds": float(np.median(seconds[:, 0]))}


def _answer(model: Any, prompt: Mapping[str, Tensor], new_tokens: int) -> Callable[[], float]:
    device = prompt["input_ids"].device

    def timed() -> float:
        started = now(device)
        with torch.no_grad(), _autocast(device):
            model.generate(**prompt, **greedy(new_tokens)) if new_tokens else model(**prompt)
        return (now(device) - started) / (new_tokens or 1)

    return timed


def _on_disk(model: Any, device: torch.device) -> dict[str, float]:
    """Seconds to save the adapter and to load it onto its bare base, and bytes of its weights."""
    with TemporaryDirectory() as folder:
        started = now(device)
        model.save_pretrained(folder)
        save_seconds = now(device) - started
        bare = _bare(model)
        started = now(device)
        if isinstance(model, PeftModel):
            PeftModel.from_pretrained(bare, folder)
        else:
            type(model).from_pretrained(folder, trust_remote_code=False)
        load_seconds = now(device) - started
        file_bytes = sum(file.stat().st_size for file in Path(folder).glob(WEIGHTS))
    return {"save_seconds": save_seconds, "load_seconds": load_seconds, "file_bytes": file_bytes}
