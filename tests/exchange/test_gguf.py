"""Export to GGUF: the file is read by llama.cpp's rules, which `tests/engines` asks llama.cpp itself."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tests.exchange.tools import SAME, difference, saved, trained_model
from tests.tuner.models import SIZES, base_model, config
from uniproj import AdapterError
from uniproj.cli import main
from uniproj.exchange import export
from uniproj.exchange.formats.gguf import ARCHITECTURES
from uniproj.tuner import UniProjConfig

HEADS, KV_HEADS, SIZE, WIDTH = 4, 2, 8, 32
# llama_model_rope_type in llama.cpp's src/llama-model.cpp: which coordinates of a head RoPE turns together
NEIGHBOURS = {"llama": "llama", "mistral": "llama", "smollm3": "smollm3", "granite": "granite"}
HALVES = {
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "olmo2": "olmo2",
}
ODD = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 7}, "lora_alpha": 6}


def _adapted(kind: str, tied: bool = False, **fields: Any) -> PeftModel:
    """A Uni-LoRA of every linear layer of a small model of this type of Transformers; tied: its embeddings."""
    sizes = {**SIZES, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "intermediate_size": 48}
    described = AutoConfig.for_model(kind, **sizes, head_dim=SIZE, pad_token_id=0, tie_word_embeddings=tied)
    given = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", **fields}
    torch.manual_seed(0)
    return get_peft_model(
        AutoModelForCausalLM.from_config(described), UniProjConfig(projection="unilora", d=60, r=4, **given)
    ).eval()


def _deltas(path: Path) -> dict[str, Tensor]:
    """delta W by the tensor of the base model: alpha / r B A, r the pair's own (llama-adapter.h, get_scale)."""
    reader = GGUFReader(path)
    alpha = reader.fields["adapter.lora.alpha"].contents()
    numbers = {tensor.name: torch.from_numpy(np.array(tensor.data)).double() for tensor in reader.tensors}
    names = {name.removesuffix(".lora_a").removesuffix(".lora_b") for name in numbers}
    assert len(numbers) == 2 * len(names)
    pairs = {name: (numbers[f"{name}.lora_b"], numbers[f"{name}.lora_a"]) for name in names}
    return {name: alpha / B.shape[1] * B @ A for name, (B, A) in pairs.items()}


def _of_the_model(model: PeftModel) -> dict[str, Tensor]:
    layers = dict(model.base_model.model.named_modules())
    return {n: m.get_delta_weight("default").double().detach() for n, m in layers.items() if hasattr(m, "lora_A")}


def _turned(rows: Tensor, position: int, neighbours: bool) -> Tensor:
    """(heads, size) at a position, by rotary embeddings of pairs of coordinates."""
    half = SIZE // 2
    first, second = (slice(0, None, 2), slice(1, None, 2)) if neighbours else (slice(0, half), slice(half, None))
    angle = position * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    x, y, turned = rows[:, first], rows[:, second], torch.empty_like(rows)
    turned[:, first], turned[:, second] = x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()
    return turned


def _scores(query: Tensor, key: Tensor, neighbours: bool) -> Tensor:
    """What two tokens at positions 5 and 2 give each head, by delta W of q and k alone."""
    one, other = torch.randn(2, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q = _turned((query @ one).view(HEADS, SIZE), 5, neighbours)
    k = _turned((key @ other).view(KV_HEADS, SIZE), 2, neighbours).repeat_interleave(HEADS // KV_HEADS, 0)
    return (q * k).sum(-1)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_attention_sees_the_same_q_and_k_and_other_tensors_are_the_same(kind: str, tmp_path: Path) -> None:
    model = _adapted(kind)
    export(model, tmp_path / "out.gguf", to="gguf")
    fields = {name: field.contents() for name, field in GGUFReader(tmp_path / "out.gguf").fields.items()}
    assert fields["general.architecture"] == (NEIGHBOURS | HALVES)[kind]
    assert (fields["general.type"], fields["adapter.type"], fields["adapter.lora.alpha"]) == ("adapter", "lora", 4.0)
    found, wanted = _deltas(tmp_path / "out.gguf"), _of_the_model(model)
    assert len(found) == len(wanted)
    attention = "model.layers.1.self_attn"
    if kind == "phi3":
        same = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
        parts = [HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE]
        q, k, _ = wanted[f"{attention}.qkv_proj"].split(parts)
        their_q, their_k, _ = found["blk.1.attn_qkv.weight"].split(parts)
    else:
        same = {"attn_v": "self_attn.v_proj", "ffn_up": "mlp.up_proj", "ffn_gate": "mlp.gate_proj"}
        q, k = (wanted[f"{attention}.{name}_proj"] for name in "qk")
        their_q, their_k = (found[f"blk.1.attn_{name}.weight"] for name in "qk")
    for theirs, ours in {**same, "attn_output": "self_attn.o_proj", "ffn_down": "mlp.down_proj"}.items():
        assert difference(found[f"blk.1.{theirs}.weight"], wanted[f"model.layers.1.{ours}"]) <= SAME, ours
    scores = _scores(q, k, neighbours=False)
    assert difference(_scores(their_q, their_k, kind in NEIGHBOURS), scores) <= SAME
    assert difference(_scores(their_q, their_k, kind not in NEIGHBOURS), scores) > 1e-3  # else the order says nothing


@pytest.mark.parametrize("fields", [ODD, {**ODD, "use_rslora": True}, {"lora_alpha": 0.3}], ids=str)
@pytest.mark.parametrize(("to", "bound"), [("gguf", SAME), ("gguf_f16", 2e-3)])
def test_ranks_and_scales_of_each_module(to: str, bound: float, fields: dict[str, Any], tmp_path: Path) -> None:
    model = _adapted("qwen2", **fields)
    export(model, tmp_path / "out.gguf", to=to)
    found, wanted = _deltas(tmp_path / "out.gguf"), _of_the_model(model)
    for name in "qkv":
        ours = wanted[f"model.layers.0.self_attn.{name}_proj"]
        assert difference(found[f"blk.0.attn_{name}.weight"], ours) <= bound, name
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "out.gguf").tensors}
    assert {tensor.tensor_type.name for tensor in tensors.values()} == {"F32" if to == "gguf" else "F16"}
    assert all(tensor.data_offset % 32 == 0 for tensor in tensors.values())
    # GGUF lists the fastest axis first
    assert tensors["blk.0.attn_q.weight.lora_a"].shape.tolist() == [WIDTH, 3 if "rank_pattern" in fields else 4]
    assert tensors["blk.0.attn_v.weight.lora_b"].shape.tolist() == [4, KV_HEADS * SIZE]


@pytest.mark.parametrize("alpha", [1e9, 1e-6])
def test_half_precision_loses_no_factor(alpha: float, tmp_path: Path) -> None:
    """float16 ends at 65,504, and below 2^-14 it has ever fewer bits."""
    model = trained_model("llama", "unilora", lora_alpha=4, alpha_pattern={"v_proj": alpha})
    said = r"v_proj must lie in \[6\.1e-05, 65504\], where float16 has all its bits, got .*e[+-]0\d\. Export to gguf\."
    with pytest.raises(AdapterError, match=said):
        export(model, tmp_path / "out.gguf", to="gguf_f16")
    export(model, tmp_path / "out.gguf", to="gguf")
    found, layers = _deltas(tmp_path / "out.gguf"), _of_the_model(model)
    assert difference(found["blk.1.attn_v.weight"], layers["model.layers.1.self_attn.v_proj"]) <= SAME


def test_a_factor_of_zeros_is_written(tmp_path: Path) -> None:
    """As every B of a LoRA is before it is trained."""
    model = get_peft_model(base_model("llama"), config("llama", "lora", None, lora_alpha=6))
    export(model, tmp_path / "out.gguf", to="gguf_f16")
    assert all(not delta.any() for delta in _deltas(tmp_path / "out.gguf").values())


def test_numbers_stay_as_they_are_where_scales_agree(tmp_path: Path) -> None:
    model = trained_model("llama", "unilora", lora_alpha=6)
    export(model, tmp_path / "out.gguf", to="gguf")
    numbers = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "out.gguf").tensors}
    for module, name in (("self_attn.v_proj", "attn_v"), ("mlp.down_proj", "ffn_down")):
        layer = model.get_submodule(f"base_model.model.model.layers.1.{module}")
        for factor, half in (("a", layer.lora_A), ("b", layer.lora_B)):
            ours = half["default"].weight.detach().numpy()
            assert np.array_equal(numbers[f"blk.1.{name}.weight.lora_{factor}"], ours)


def test_a_file_finds_its_base_by_name_or_by_the_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base"
    base_model("llama").config.save_pretrained(base)  # no weights
    model, named = (get_peft_model(base_model("llama"), config("llama")) for _ in range(2))
    named.peft_config["default"].base_model_name_or_path = str(base)
    model.peft_config["default"].base_model_name_or_path = None
    out = tmp_path / "out.gguf"
    export(model, out, to="gguf")
    wanted = out.read_bytes()
    out.unlink()
    assert main(["export", str(saved(named, tmp_path / "named")), str(out), "--to", "gguf", "--json"]) == 0
    assert out.read_bytes() == wanted
    assert f'"bytes": {len(wanted)}' in (said := capsys.readouterr().out) and f'"file": "{out}"' in said
    assert f"FROM {base}\nADAPTER ./out.gguf\n" in (tmp_path / "out.Modelfile").read_text()
    with pytest.raises(AdapterError, match=r"calls a module the base model's configuration tells, got none.*--base"):
        export(saved(model, tmp_path / "ours"), out, to="gguf")
    export(tmp_path / "ours", out, to="gguf", base=str(base))
    assert out.read_bytes() == wanted
    named.peft_config["default"].base_model_name_or_path = str(tmp_path / "gone")
    with pytest.raises(AdapterError, match=r"gone: must be a model that Transformers loads.* Or pass --base"):
        export(saved(named, tmp_path / "named"), out, to="gguf")
    assert out.read_bytes() == wanted


def test_what_a_modelfile_says_is_one_line_each(tmp_path: Path) -> None:
    model = _adapted("llama")
    model.get_base_model().config.name_or_path = "ours\nSYSTEM lie"
    export(model, tmp_path / "out.gguf", to="gguf")
    assert (tmp_path / "out.Modelfile").read_text().splitlines()[1:] == [r"FROM ours\nSYSTEM lie", "ADAPTER ./out.gguf"]


def test_what_gguf_cannot_say_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(model: PeftModel, match: str, name: str = "out.gguf", to: str = "gguf") -> None:
        with pytest.raises(AdapterError, match=match):
            export(model, tmp_path / name, to=to)
        assert not list(tmp_path.iterdir())

    llama = trained_model("llama", "unilora")
    refused(trained_model("gpt2", "unilora"), r"of a type whose conversion is known, gemma, .*, got gpt2\. Export to")
    refused(
        _adapted("llama", tied=True, target_modules=["lm_head"]),
        "tensor of its own for every module, got lm_head, which is tied to the input embedding",
    )
    untied = _adapted("llama", target_modules=["lm_head"])
    export(untied, tmp_path / "out.gguf", to="gguf")
    assert _deltas(tmp_path / "out.gguf").keys() == {"output.weight"}
    for path in tmp_path.iterdir():
        path.unlink()
    other = _adapted("llama")
    other.get_base_model().config.num_hidden_layers = 1
    refused(other, r"got model\.layers\.1\.mlp\.down_proj, which it has no tensor for")
    other.get_base_model().config.num_hidden_layers = 2
    other.get_base_model().config.num_key_value_heads = HEADS
    refused(other, r"layers\.0\.self_attn\.k_proj must have a row for each of 4 heads of 8, .* got 16\. Pass")
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(llama, r"needs the package gguf, got .*\. Run pip install 'uniproj.gguf.'")
