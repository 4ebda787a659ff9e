"""Export to LoRA: PEFT, vLLM's rules and our own import make the same updates of it, at any rank that holds them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.exchange.tools import SAME, difference, fields_of, loaded, logits, saved, trained_model
from tests.tuner.models import base_model, batch, config
from uniproj import AdapterError, get, names
from uniproj.exchange import export, import_adapter, peft_folder
from uniproj.exchange.adapter import Adapter
from uniproj.format import file
from uniproj.tuner import UniProjConfig, adapter_of

WEIGHTS = "adapter_model.safetensors"
ODD = {"rank_pattern": {"layers.0.self_attn.q_proj": 3}, "alpha_pattern": {"v_proj": 7}, "lora_alpha": 6}


@pytest.mark.parametrize(
    ("kind", "projection"),
    [
        *(("gpt2", projection) for projection in names()),
        *((kind, projection) for kind in ("bert", "llama") for projection in ("unilora", "vblora", "lora_xs")),
    ],
)
def test_peft_gives_the_same_logits_and_it_comes_back(kind: str, projection: str, tmp_path: Path) -> None:
    model = trained_model(kind, projection, projection_seed=5, lora_alpha=6)
    wanted, theta_d = logits(model, kind), adapter_of(model).theta_d.detach()
    base = base_model(kind) if get(projection).needs_base_weights else None
    export(saved(model, tmp_path / "ours"), tmp_path / "lora", base=base)
    assert fields_of(tmp_path / "lora")["peft_type"] == "LORA"
    assert difference(logits(loaded(kind, tmp_path / "lora"), kind), wanted) <= SAME
    # a live model needs no file, and no base for any projection
    export(model, tmp_path / "live")
    ours, theirs = load_file(tmp_path / "live" / WEIGHTS), load_file(tmp_path / "lora" / WEIGHTS)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    if projection == "vblora":  # what it has trained of P is no function of the seed
        return
    d = 60 if get(projection).free_d else None
    report = import_adapter(tmp_path / "lora", tmp_path / "back", projection, d=d, seed=5, base=base)
    assert abs(report["lost_energy"]) < 1e-12 and report["captured_factor"] == pytest.approx(1.0, abs=1e-12)
    assert difference(logits(loaded(kind, tmp_path / "back"), kind), wanted) <= 10 * SAME
    if projection not in ("tied_lora", "tinylora"):  # of which several theta_d, or factors, give one theta_D
        assert torch.allclose(file.read(tmp_path / "back").theta_d, theta_d, rtol=1e-5, atol=1e-6)


def test_the_numbers_are_those_of_theta_D(tmp_path: Path) -> None:
    model = trained_model("llama", "unilora", **ODD)
    export(model, tmp_path)
    P, theta_d = adapter_of(model)
    tensors = load_file(tmp_path / WEIGHTS)
    for block, factor in zip(P.layout.blocks, P.layout.split(P(theta_d)), strict=True):
        assert torch.equal(tensors.pop(f"base_model.model.{block.module}.lora_{block.factor}.weight"), factor)
    assert not tensors


@pytest.mark.parametrize(
    "fields", [{}, {"lora_alpha": 10, "use_rslora": True}, ODD, {**ODD, "use_rslora": True}], ids=str
)
def test_padding_keeps_scale_and_logits(fields: dict[str, Any], tmp_path: Path) -> None:
    model = trained_model("llama", "unilora", **fields)
    folder, wanted = saved(model, tmp_path / "ours"), logits(model, "llama")
    for rank in (None, 4, 16):
        export(folder, tmp_path / "lora", rank=rank)
        assert difference(logits(loaded("llama", tmp_path / "lora"), "llama"), wanted) <= SAME, rank
        if rank is None:
            continue
        found = fields_of(tmp_path / "lora")
        assert (found["r"], found["rank_pattern"], found["alpha_pattern"]) == (rank, {}, {})
        assert isinstance(found["lora_alpha"], int)
        assert {t.shape[0] for n, t in load_file(tmp_path / "lora" / WEIGHTS).items() if "lora_A" in n} == {rank}
        if not fields:
            assert found["lora_alpha"] == rank  # alpha follows r: s = 1


@torch.no_grad()
def _by_vllms_rules(folder: Path) -> dict[str, Tensor]:
    """delta W by module as vLLM's documentation describes its reading of a LoRA folder, independent of PEFT."""
    found = fields_of(folder)
    r, alpha = found["r"], found["lora_alpha"]
    assert type(r) is int and type(alpha) is int and found["target_modules"]
    assert r in (1, 8, 16, 32, 64, 128, 256, 320, 512)
    assert found["bias"] == "none" and not found["modules_to_save"] and not found["use_dora"]
    scale = alpha / (r**0.5 if found["use_rslora"] else r)
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
        assert match is not None, f"{name} is unsupported LoRA weight"
        pairs.setdefault(match[1], {})[match[2]] = tensor.double()
    assert all(pair["A"].shape[0] == pair["B"].shape[1] == r for pair in pairs.values())
    return {module: scale * pair["B"] @ pair["A"] for module, pair in pairs.items()}


def test_vllm_gets_a_rank_it_knows(tmp_path: Path) -> None:
    model = trained_model("llama", "unilora", **ODD)
    for rank in (1, 12, 1024):
        with pytest.raises(AdapterError, match=rf"rank must be one of vLLM's 1, 8, .* and at least 4, got {rank}"):
            export(model, tmp_path, to="vllm", rank=rank)
        assert not list(tmp_path.iterdir())
    wanted = {name: module for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")}
    for rank, written in ((None, 8), (8, 8), (64, 64)):
        export(model, tmp_path, to="vllm", rank=rank)
        assert fields_of(tmp_path)["r"] == written
        found = _by_vllms_rules(tmp_path)
        assert found.keys() == wanted.keys()
        for name, delta in found.items():
            assert difference(delta, wanted[name].get_delta_weight("default")) <= SAME, name


def test_biases_and_tokens_come_along(tmp_path: Path) -> None:
    for kind, fields in (("gpt2", {"bias": "all"}), ("llama", {"trainable_token_indices": [3, 5]})):
        model = trained_model(kind, "unilora", **fields)
        export(saved(model, tmp_path / f"{kind}-ours"), tmp_path / kind)
        assert difference(logits(loaded(kind, tmp_path / kind), kind), logits(model, kind)) <= SAME


def test_refusals(tmp_path: Path) -> None:
    model = trained_model("llama", "lora_xs")
    folder = saved(model, tmp_path / "ours")
    with pytest.raises(AdapterError, match=r"must be given, as lora_xs is made of its weights\. Pass --base"):
        export(folder, tmp_path / "out")
    other = base_model("llama")
    other.model.layers[0].self_attn.q_proj.weight.data.add_(1.0)
    with pytest.raises(AdapterError, match="must have the checksum"):
        export(folder, tmp_path / "out", base=other)
    with pytest.raises(AdapterError, match="rank must be at least that of every module, 4, got 2"):
        export(model, tmp_path / "out", rank=2)
    with pytest.raises(AdapterError, match=r"to must be one of .*lora, .*tinylora, unilora"):
        export(model, tmp_path / "out", to="dora")
    with pytest.raises(AdapterError, match="rank must be left out for vera"):
        export(model, tmp_path / "out", to="vera", rank=8)
    with pytest.raises(AdapterError, match=r"must hold a uniproj adapter 'x', got \['default'\]"):
        export(model, tmp_path / "out", adapter_name="x")
    assert not (tmp_path / "out").exists()


def test_a_file_from_before_the_header_needs_the_base(tmp_path: Path) -> None:
    model = trained_model("llama", "unilora", **ODD)
    folder = saved(model, tmp_path / "ours")
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {"format": "pt"})
    text = (folder / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text(re.sub(r'"format_version": \d+', '"format_version": null', text))
    with pytest.raises(AdapterError, match="written before format 1 and does not list its modules"):
        export(folder, tmp_path / "out")
    export(folder, tmp_path / "out", base=base_model("llama"))
    assert difference(logits(loaded("llama", tmp_path / "out"), "llama"), logits(model, "llama")) <= SAME
    with pytest.raises(AdapterError, match="base model must have the modules, shapes and weights"):
        smaller = base_model("llama")
        del smaller.model.layers[1]
        export(folder, tmp_path / "out", base=smaller)


def test_renamed_modules_are_exported_under_their_new_names(tmp_path: Path) -> None:
    model = trained_model("llama", "unilora", **ODD)
    model.save_pretrained(tmp_path / "ours")
    base = base_model("llama")
    base.model.stack = base.model.layers
    del base.model.layers
    config_now = UniProjConfig.from_pretrained(tmp_path / "ours", remap={"layers": "stack"})
    again = PeftModel.from_pretrained(base, str(tmp_path / "ours"), config=config_now)
    again.save_pretrained(tmp_path / "renamed")
    export(again, tmp_path / "live")
    export(tmp_path / "renamed", tmp_path / "lora")
    before = model.base_model.model.get_submodule("model.layers.0.self_attn.q_proj").get_delta_weight("default")
    for folder in ("live", "lora"):
        tensors = load_file(tmp_path / folder / WEIGHTS)
        B, A = (tensors[f"base_model.model.model.stack.0.self_attn.q_proj.lora_{f}.weight"] for f in "BA")
        assert not any("layers" in name for name in tensors)
        assert difference(6 / 3 * B @ A, before) <= SAME


def test_a_second_adapter_is_exported_by_its_name(tmp_path: Path) -> None:
    model = get_peft_model(base_model("gpt2"), config("gpt2"))
    model.add_adapter("other", config("gpt2", "fastfood", d=100))
    model.set_adapter("other")
    export(model, tmp_path, adapter_name="other")
    assert difference(logits(loaded("gpt2", tmp_path), "gpt2"), logits(model.eval(), "gpt2")) <= SAME


def test_tensors_are_written_one_at_a_time(tmp_path: Path) -> None:
    size, seen = 2**18, []

    def tensors() -> Iterator[Tensor]:
        for i in range(4):
            seen.append(sum(path.stat().st_size for path in tmp_path.glob(".uniproj-*.part")))
            yield torch.full((size,), float(i))

    peft_folder.write(tmp_path, {}, {f"t{i}": (torch.float32, (size,)) for i in range(4)}, tensors())
    assert [after - before for before, after in pairwise(seen[1:])] == [4 * size] * 2
    assert {name: tensor.unique().tolist() for name, tensor in load_file(tmp_path / WEIGHTS).items()} == {
        f"t{i}": [float(i)] for i in range(4)
    }


def test_an_export_that_breaks_off_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained_model("llama", "unilora")
    export(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def breaks(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", breaks)
    with pytest.raises(AdapterError, match="No space left on device"):
        export(model, tmp_path, rank=8)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_half_precision_bases(tmp_path: Path) -> None:
    """The factors are exported in float32, whatever the dtype of the base."""
    model = get_peft_model(base_model("llama").to(torch.bfloat16), config("llama")).eval()
    export(model, tmp_path)
    again = PeftModel.from_pretrained(base_model("llama").to(torch.bfloat16), str(tmp_path)).eval()
    with torch.no_grad():
        assert torch.equal(again(**batch("llama")).logits, model(**batch("llama")).logits)


def test_of_model_and_of_file_are_the_same_adapter(tmp_path: Path) -> None:
    model = trained_model("bert", "vblora")
    live, read = Adapter.of_model(model), Adapter.of_file(saved(model, tmp_path))
    assert torch.equal(live.theta_d, read.theta_d) and live.scales == read.scales
    assert all(torch.equal(mine, read.other[name]) for name, mine in live.other.items())
    assert torch.equal(live.projection.logits, read.projection.logits)
