"""bitsandbytes: 4-bit and 8-bit bases, on the CPU backend where there is no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, prepare_model_for_kbit_training
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from analysis.capabilities.probe import check, probe
from analysis.capabilities.subjects import (
    adapted,
    drift,
    gradient,
    llama,
    logits,
    same,
    saved_llama,
    steps,
    theta_d,
    trained,
)
from uniproj.tuner.merging import merge_drift
from uniproj.tuner.quantised import dequantised

QUANTISED = "bitsandbytes"
KINDS: dict[str, dict[str, Any]] = {
    "8 bits": {"load_in_8bit": True},
    "4 bits (NF4)": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "4 bits (FP4, double quantisation, bfloat16)": {
        "load_in_4bit": True,
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
}


def quantised(folder: Path, kind: str) -> Any:
    path = folder / "base"
    name = str(path) if path.exists() else saved_llama(folder)
    return AutoModelForCausalLM.from_pretrained(
        name, quantization_config=BitsAndBytesConfig(**KINDS[kind]), device_map="cpu", trust_remote_code=False
    )


def _ordinary(model: Any) -> Any:
    """The weights that a quantised base stands for, unquantised."""
    base = llama()
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.weight.data = dequantised(model.get_submodule(name)).detach().float()
    return base


def scaled(folder: Path, kind: str, size: float) -> tuple[Any, torch.Tensor]:
    """A model with ||s B A|| = size ||W|| over all adapted layers, and the logits of the bare base."""
    model = adapted(quantised(folder, kind)).eval()
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    with torch.no_grad():
        weights = sum(dequantised(layer.get_base_layer()).double().square().sum() for layer in layers)
        changes = sum(layer.get_delta_weight("default").double().square().sum() for layer in layers)
        theta_d(model).mul_((size**2 * weights / changes) ** 0.25)  # s B A is quadratic in theta_d
    with model.disable_adapter():
        return model, logits(model)


for _kind in KINDS:

    @probe(QUANTISED, f"{_kind}: training, saving, loading", slow=True)
    def _(folder: Path, kind: str = _kind) -> str:
        model = trained(quantised(folder, kind))
        model.save_pretrained(folder / "adapter")
        again = PeftModel.from_pretrained(quantised(folder, kind), folder / "adapter")
        same(logits(again), logits(model), "logits")
        ordinary = adapted(_ordinary(quantised(folder, kind)))
        cosine = torch.cosine_similarity(gradient(adapted(quantised(folder, kind))), gradient(ordinary), dim=0)
        check(cosine > 0.98, f"the gradient points elsewhere than on the weights it stands for: cosine {cosine:.3f}")
        return f"cosine of the gradient with that of an ordinary base of the same weights {cosine:.4f}"

    @probe(QUANTISED, f"{_kind}: merging an adapter of half the norm of the weights, unmerging", slow=True)
    def _(folder: Path, kind: str = _kind) -> str:
        model, bare = scaled(folder, kind, 0.5)
        adapter, weights = logits(model), merge_drift(model.base_model.model, ["default"])
        model.merge_adapter()
        merged = drift(logits(model), adapter, bare)
        model.unmerge_adapter()
        unmerged = drift(logits(model), adapter, bare)
        check(merged < 1, f"the merged logits are further off than the bare ones: {merged:.2f}")
        return (
            f"the weights are off by {weights:.2f} of the adapter's change, the logits by {merged:.2f} of theirs, "
            f"unmerged again by {unmerged:.2f}"
        )

    @probe(QUANTISED, f"{_kind}: merging an adapter of 0.02 % of their norm", slow=True)
    def _(folder: Path, kind: str = _kind) -> str:
        model, bare = scaled(folder, kind, 0.0002)
        adapter = logits(model)
        return f"logits off by {drift(logits(model.merge_and_unload()), adapter, bare):.2f} of the adapter's change"


@probe(QUANTISED, "drift of a merge by the size of the adapter", slow=True)
def _(folder: Path) -> str:
    """The smallest sizes are refused, so the drift is measured and nothing merged."""
    sizes, remarks = (0.0002, 0.02, 0.15, 1.5), []
    for kind in KINDS:
        models = (scaled(folder, kind, size)[0] for size in sizes)
        drifts = ", ".join(f"{merge_drift(model.base_model.model, ['default']):.2f}" for model in models)
        remarks.append(f"{kind} {drifts}")
    return f"for an adapter of {', '.join(map(str, sizes))} times the norm of the weights: {'; '.join(remarks)}"


@probe(QUANTISED, "`prepare_model_for_kbit_training`, gradient checkpointing", slow=True)
def _(folder: Path) -> None:
    base = prepare_model_for_kbit_training(
        quantised(folder, "4 bits (NF4)"), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    steps(adapted(base).train())


@probe(QUANTISED, "methods made of base weights (LoRA-XS), dequantised one at a time", slow=True)
def _(folder: Path) -> str:
    kinds = ("8 bits", "4 bits (NF4)")
    for kind in kinds:
        model = adapted(quantised(folder, kind), projection="lora_xs", d=None)
        with torch.no_grad():
            theta_d(model).fill_(0.1)
        gradient(model)
        unquantised = adapted(projection="lora_xs", d=None)
        check(theta_d(model).shape == theta_d(unquantised).shape, "theta_d has another length")
    return ", ".join(kinds)


@probe(QUANTISED, "4 bits: an adapter trained on the unquantised base", slow=True)
def _(folder: Path) -> str:
    model = trained()
    model.save_pretrained(folder / "adapter")
    again = PeftModel.from_pretrained(quantised(folder, "4 bits (NF4)"), folder / "adapter")
    with again.disable_adapter():
        bare = logits(again)
    change, there = logits(model) - logits(llama()), logits(again) - bare
    cosine = torch.cosine_similarity(change.flatten(), there.flatten(), dim=0)
    check(cosine > 0.5, f"it changes the logits otherwise: cosine {cosine:.2f}")
    return f"cosine of the changes of the logits {cosine:.2f}"
