"""PEFT: the life of adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    save_as_lora,
    set_peft_model_state_dict,
)
from peft.helpers import rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter
from transformers import AutoModelForCausalLM

from analysis.capabilities.probe import check, probe
from analysis.capabilities.subjects import (
    IDS,
    ROUNDING,
    D,
    adapted,
    config,
    gradient,
    llama,
    logits,
    moved,
    same,
    saved,
    saved_llama,
    steps,
    theta_d,
    trained,
)

PEFT = "PEFT: adapters"
TINY_LAYERS = 3


def _pair() -> Any:
    """A model with two adapters, the second untrained."""
    model = trained()
    model.add_adapter("other", config(projection="vera", d=None, r=2))
    with torch.no_grad():
        theta_d(model, "other").normal_(generator=torch.Generator().manual_seed(0))
    return model.eval()


@probe(PEFT, "`get_peft_model`; theta_d alone is trained")
def _(folder: Path) -> str:
    model = adapted()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    check(names == ["base_model.uniproj_theta_d.default"], f"trained are {names}")
    check(model.get_nb_trainable_parameters()[0] == D, "the count of trained numbers is not d")
    losses = steps(model)
    return f"loss {losses[0]:.2f} to {losses[-1]:.2f} in 3 steps"


@probe(PEFT, "`save_pretrained`, `PeftModel.from_pretrained`")
def _(folder: Path) -> str:
    path, expected = saved(folder)
    same(logits(PeftModel.from_pretrained(llama(), path)), expected, "logits")
    return "logits equal to the last bit"


@probe(PEFT, "`from_pretrained(is_trainable=True)`: training goes on")
def _(folder: Path) -> None:
    path, _ = saved(folder)
    steps(PeftModel.from_pretrained(llama(), path, is_trainable=True))


@probe(PEFT, "`from_pretrained(low_cpu_mem_usage=True)`")
def _(folder: Path) -> None:
    path, expected = saved(folder, projection="vblora", d=None)
    same(logits(PeftModel.from_pretrained(llama(), path, low_cpu_mem_usage=True)), expected, "logits")


@probe(PEFT, "`AutoPeftModelForCausalLM.from_pretrained`")
def _(folder: Path) -> None:
    path, expected = saved(folder, AutoModelForCausalLM.from_pretrained(saved_llama(folder), trust_remote_code=False))
    same(logits(AutoPeftModelForCausalLM.from_pretrained(path, trust_remote_code=False)), expected, "logits")


@probe(PEFT, "`get_peft_model_state_dict`, `set_peft_model_state_dict`")
def _(folder: Path) -> None:
    model, twin = trained(), adapted(init_seed=5).eval()
    set_peft_model_state_dict(twin, get_peft_model_state_dict(model))
    same(logits(twin), logits(model), "logits", 1e-6)


@probe(PEFT, "`load_adapter` beside another, and over one of the same name")
def _(folder: Path) -> None:
    path, expected = saved(folder)
    model = adapted(init_seed=7).eval()
    model.load_adapter(path, "second")
    model.set_adapter("second")
    same(logits(model), expected, "logits of the second adapter")
    model.load_adapter(path, "default")
    model.set_adapter("default")
    same(logits(model), expected, "logits of the one that was replaced")


@probe(PEFT, "an adapter file of another architecture")
def _(folder: Path) -> None:
    path, _ = saved(folder)
    PeftModel.from_pretrained(llama().__class__(llama().config.__class__(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=TINY_LAYERS,
        num_key_value_heads=2)), path)  # fmt: skip


@probe(PEFT, "`add_adapter`, `set_adapter`")
def _(folder: Path) -> None:
    model = _pair()
    first = logits(model)
    model.set_adapter("other")
    moved(logits(model), first, "logits")
    model.set_adapter("default")
    same(logits(model), first, "logits after switching back")


@probe(PEFT, "several active adapters (`base_model.set_adapter([...])`)")
def _(folder: Path) -> None:
    model = _pair()
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    same(logits(model.merge_and_unload(adapter_names=["default", "other"])), both, "logits merged", ROUNDING)


@probe(PEFT, "`add_adapter` with the configuration object of a trained adapter")
def _(folder: Path) -> None:
    model = trained()
    model.add_adapter("other", model.peft_config["default"])


@probe(PEFT, "`delete_adapter`")
def _(folder: Path) -> None:
    model = _pair()
    first = logits(model)
    model.delete_adapter("other")
    check(list(model.base_model.projections) == ["default"], "its P is still there")
    same(logits(model), first, "logits of the other adapter")


@probe(PEFT, "`disable_adapter`")
def _(folder: Path) -> None:
    model = trained()
    with model.disable_adapter():
        same(logits(model), logits(llama()), "logits without the adapter")
    moved(logits(model), logits(llama()), "logits")


@probe(PEFT, "`set_requires_grad`")
def _(folder: Path) -> None:
    model = adapted()
    model.set_requires_grad("default", False)
    check(not any(p.requires_grad for p in model.parameters()), "something is still trained")
    model.set_requires_grad("default", True)
    gradient(model)


@probe(PEFT, "`adapter_names=` in one batch, forward")
def _(folder: Path) -> None:
    model = _pair()
    with torch.no_grad():
        mixed = model(input_ids=IDS, adapter_names=["default", "other", "__base__"]).logits
    for row, name in enumerate(("default", "other")):
        model.set_adapter(name)
        same(mixed[row], logits(model)[row], f"row {row}", ROUNDING)
    same(mixed[2], logits(llama())[2], "row of the bare model", ROUNDING)


@probe(PEFT, "`adapter_names=` in one batch, `generate`")
def _(folder: Path) -> None:
    model = _pair()
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    mixed = model.generate(input_ids=IDS, adapter_names=["default", "other", "__base__"], **options)
    model.set_adapter("other")
    same(mixed[1], model.generate(input_ids=IDS, **options)[1], "tokens of the second row")


@probe(PEFT, "`merge_and_unload`, also `safe_merge=True`")
def _(folder: Path) -> None:
    for safe in (False, True):
        model = trained()
        expected = logits(model)
        same(logits(model.merge_and_unload(safe_merge=safe)), expected, "logits merged", ROUNDING)


@probe(PEFT, "`merge_adapter`, `unmerge_adapter`")
def _(folder: Path) -> None:
    model = trained()
    expected = logits(model)
    model.merge_adapter()
    same(logits(model), expected, "logits merged", ROUNDING)
    model.unmerge_adapter()
    same(logits(model), expected, "logits unmerged", ROUNDING)


@probe(PEFT, "`unload`")
def _(folder: Path) -> None:
    same(logits(trained().unload()), logits(llama()), "logits of the bare model")


@probe(PEFT, "`add_weighted_adapter`")
def _(folder: Path) -> None:
    _pair().add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum")


@probe(PEFT, "`hotswap_adapter`")
def _(folder: Path) -> None:
    path, _ = saved(folder)
    hotswap_adapter(adapted(), str(path), adapter_name="default")


@probe(PEFT, "`inject_adapter_in_model`")
def _(folder: Path) -> None:
    inject_adapter_in_model(config(), llama())


@probe(PEFT, "`get_peft_model(mixed=True)`")
def _(folder: Path) -> None:
    get_peft_model(llama(), config(), mixed=True)


@probe(PEFT, "a second `get_peft_model` on the same base")
def _(folder: Path) -> None:
    base = llama()
    get_peft_model(base, config())
    get_peft_model(base, config())


@probe(PEFT, "`rescale_adapter_scale`")
def _(folder: Path) -> None:
    model = trained()
    expected = logits(model)
    with rescale_adapter_scale(model, 0.0):
        same(logits(model), logits(llama()), "logits at scale 0", ROUNDING)
    same(logits(model), expected, "logits afterwards")


@probe(PEFT, "`get_model_status`, `get_layer_status`")
def _(folder: Path) -> None:
    model = trained()
    status = model.get_model_status()
    check(status.peft_types == {"default": "UNIPROJ"}, f"the type is told as {status.peft_types}")
    check(status.trainable_params == D and status.num_adapter_layers == 6, f"got {status}")
    check(len(model.get_layer_status()) == 6, "not every layer is told")


@probe(PEFT, "`save_as_lora` (PEFT's conversion by SVD)")
def _(folder: Path) -> str:
    model = trained()
    save_as_lora(folder / "lora", model, rank=4)
    same(logits(PeftModel.from_pretrained(llama(), folder / "lora")), logits(model), "logits", ROUNDING)
    return "at full rank within rounding"


@probe(PEFT, "`save_pretrained(safe_serialization=False)`: a pickle, loaded again")
def _(folder: Path) -> None:
    trained().save_pretrained(folder, safe_serialization=False)
    PeftModel.from_pretrained(llama(), folder)


@probe(PEFT, "`save_embedding_layers=True` after `resize_token_embeddings`")
def _(folder: Path) -> None:
    def wider() -> Any:
        base = llama()
        base.resize_token_embeddings(70)
        return base

    model = trained(wider())
    model.save_pretrained(folder, save_embedding_layers=True)
    again, ids = PeftModel.from_pretrained(wider(), folder), torch.arange(60, 70)[None]
    same(logits(again, ids), logits(model, ids), "logits of new tokens")


@probe(PEFT, "`adapter_config.json` names the method and the base")
def _(folder: Path) -> None:
    path, _ = saved(folder, AutoModelForCausalLM.from_pretrained(saved_llama(folder), trust_remote_code=False))
    written = json.loads((path / "adapter_config.json").read_text())
    check(written["peft_type"] == "UNIPROJ" and written["base_model_name_or_path"], f"got {written['peft_type']}")
