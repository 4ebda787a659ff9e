"""Saved adapters and models that differ from those they were trained on: renamed, resized, another base."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from tests.format.saved import reconfigure
from tests.tuner.models import TARGETS, base_model, batch, config, logits, train_steps
from uniproj import AdapterError
from uniproj.format import file
from uniproj.tuner import UniProjConfig


class Renamed(nn.Module):
    """A Llama whose `self_attn` became `attention`, whose `layers` became `blocks`, or whose head got another name."""

    def __init__(self, *renames: tuple[str, str]):
        super().__init__()
        inner = base_model("llama")
        self.config, self.inner = inner.config, inner
        for old, new in renames:
            for module in list(inner.modules()):
                if old in module._modules:
                    module._modules[new] = module._modules.pop(old)
                    alias = property(lambda self, new=new: self._modules[new])  # for the forward, which is as before
                    module.__class__ = type(type(module).__name__, (type(module),), {old: alias})

    def forward(self, **inputs):
        return self.inner(**inputs)


def _trained_model(folder: Path, projection: str = "unilora", **fields) -> PeftModel:
    """An adapter on Renamed() under the original names, moved off its start."""
    model = get_peft_model(Renamed(), config("llama", projection, task_type=None, **fields))
    train_steps(model, "llama", 2)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("projection", ["unilora", "lora_xs"])
def test_a_remap_table_heals_renamed_modules(projection: str, tmp_path: Path) -> None:
    d = None if projection == "lora_xs" else 60
    fields = (
        {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"self_attn.q_proj": 12}} if projection == "unilora" else {}
    )
    model = _trained_model(tmp_path, projection, d=d, **fields)
    renames = ("self_attn", "attention"), ("q_proj", "query")
    with pytest.raises(AdapterError, match=r"Target modules|is missing"):
        PeftModel.from_pretrained(Renamed(*renames), tmp_path)
    renamed = {"self_attn": "attention", "q_proj": "query"}
    healed = PeftModel.from_pretrained(Renamed(*renames), tmp_path, remap=renamed)
    assert torch.equal(logits(healed), logits(model))
    scaling = healed.base_model.model.inner.model.layers[0].attention.query.scaling["default"]
    assert scaling == model.base_model.model.inner.model.layers[0].self_attn.q_proj.scaling["default"]

    healed.save_pretrained(tmp_path / "again")  # the table is kept, and so is the list of the saved names
    again = PeftModel.from_pretrained(Renamed(*renames), tmp_path / "again")
    assert torch.equal(logits(again), logits(model))
    headers = [file.read(folder).header for folder in (tmp_path, tmp_path / "again")]
    assert headers[0].layout == headers[1].layout
    third = PeftModel.from_pretrained(
        Renamed(("self_attn", "mixer"), ("q_proj", "query")), tmp_path / "again", remap={"attention": "mixer"}
    )
    assert torch.equal(logits(third), logits(model))


def test_a_renamed_head_moves_with_its_module(tmp_path: Path) -> None:
    model = _trained_model(tmp_path, modules_to_save=["lm_head"])
    base = Renamed(("lm_head", "output"), ("layers", "blocks"))
    healed = PeftModel.from_pretrained(base, tmp_path, remap={"layers": "blocks", "lm_head": "output"})
    assert torch.equal(logits(healed), logits(model))


def test_the_first_renamed_module_and_the_table_are_named(tmp_path: Path) -> None:
    _trained_model(tmp_path)
    base = Renamed(("self_attn", "attention"))
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(AdapterError, match=r"layers\.0\.self_attn\.q_proj is missing.* --remap self_attn=attention"):
        PeftModel.from_pretrained(base, tmp_path)
    assert [name for name, _ in base.named_modules()] == names


class _Attention(nn.Module):
    def __init__(self, name: str):
        super().__init__()
        torch.manual_seed(0)
        self.name = name
        self.add_module(name, nn.MultiheadAttention(8, 2, batch_first=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.get_submodule(self.name)(x, x, x)[0]


def test_a_renamed_attention_is_named_once_for_both_of_its_projections(tmp_path: Path) -> None:
    adapter_config = UniProjConfig(
        r=4, d=20, target_modules=["attn"], rank_pattern={"attn": 2}, alpha_pattern={"attn": 6}
    )
    model = get_peft_model(_Attention("attn"), adapter_config).eval()
    model.save_pretrained(tmp_path)
    x = torch.randn(2, 3, 8)
    healed = PeftModel.from_pretrained(_Attention("mixer"), tmp_path, remap={"attn": "mixer"}).eval()
    assert torch.equal(healed(x), model(x)) and not torch.equal(healed(x), _Attention("attn")(x))
    assert healed.peft_config["default"].target_modules == {"mixer"}


@pytest.mark.parametrize(
    ("remap", "message"),
    [
        ({"nothing": "x"}, "remap: 'nothing' must be a run of whole components"),
        ({"attn": "x"}, "remap: 'attn' must be a run of whole components"),
        ({"q_proj": "v_proj"}, "must get a name of its own"),
        ({"": "x"}, "must be a pair old=new"),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused(tmp_path: Path, remap, message: str) -> None:
    _trained_model(tmp_path)
    with pytest.raises(AdapterError, match=message):
        UniProjConfig.from_pretrained(tmp_path, remap=remap)


def test_the_first_difference_of_another_architecture_is_named(tmp_path: Path) -> None:
    get_peft_model(base_model("llama"), config("llama")).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=r"layers\.1\.mlp\.down_proj is missing in this model"):
        PeftModel.from_pretrained(base_model("llama", num_hidden_layers=1), tmp_path)
    with pytest.raises(
        AdapterError, match=r"layers\.0\.mlp\.down_proj must have \(out, in\) = \(32, 48\), got \(32, 40\)"
    ):
        PeftModel.from_pretrained(base_model("llama", intermediate_size=40), tmp_path)


def test_another_rank_is_named(tmp_path: Path) -> None:
    get_peft_model(base_model("llama"), config("llama")).save_pretrained(tmp_path)
    chosen = UniProjConfig.from_pretrained(tmp_path)
    chosen.r = 2
    with pytest.raises(AdapterError, match=r"down_proj must have \(rank\) = \(4\), got \(2\)"):
        PeftModel.from_pretrained(base_model("llama"), tmp_path, config=chosen)


def test_another_base_of_the_same_architecture_warns_once_with_both_names(tmp_path: Path) -> None:
    base = base_model("llama")
    base.config._name_or_path = base.name_or_path = "first/base"
    get_peft_model(base, config("llama")).save_pretrained(tmp_path)
    other = base_model("llama")
    other.config._name_or_path = other.name_or_path = "second/base"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PeftModel.from_pretrained(other, tmp_path)
    said = [str(w.message) for w in caught if "was trained on" in str(w.message)]
    assert len(said) == 1 and "first/base (now second/base)" in said[0]


def test_a_foreign_configuration_beside_our_weights_is_refused(tmp_path: Path) -> None:
    get_peft_model(base_model("llama"), config("llama")).save_pretrained(tmp_path)
    model = get_peft_model(base_model("llama"), config("llama"))
    for text in ('{"peft_type": "LORA"}', "{", "[]"):
        (tmp_path / file.CONFIG).write_text(text)
        for load in (
            lambda: PeftModel.from_pretrained(base_model("llama"), tmp_path),
            lambda: model.load_adapter(tmp_path, "default"),
        ):
            with pytest.raises(AdapterError, match=r"adapter_config\.json"):
                load()


def test_an_adapter_that_can_run_code_is_neither_opened_nor_written(tmp_path: Path, monkeypatch) -> None:
    model = get_peft_model(base_model("llama"), config("llama"))
    with pytest.raises(AdapterError, match=r"must not hold adapter_model\.bin.*safe_serialization=True"):
        model.save_pretrained(tmp_path / "bin", safe_serialization=False)
    assert not (tmp_path / "bin").exists()
    model.save_pretrained(tmp_path / "safe")
    (tmp_path / "bin").mkdir()
    shutil.copy(tmp_path / "safe" / file.CONFIG, tmp_path / "bin" / file.CONFIG)
    torch.save({}, tmp_path / "bin" / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"must not hold adapter_model\.bin"):
        model.save_pretrained(tmp_path / "bin")
    assert not (tmp_path / "bin" / file.WEIGHTS).exists()
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("opened"))
    for load in (
        lambda: PeftModel.from_pretrained(base_model("llama"), tmp_path / "bin"),
        lambda: model.load_adapter(tmp_path / "bin", "default"),
    ):
        with pytest.raises(AdapterError, match=r"got adapter_model\.bin, which can run code"):
            load()


def test_files_from_before_the_header_load_on_a_model(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = get_peft_model(base_model("llama"), config("llama")).eval()
    model.save_pretrained(tmp_path)
    save_file(load_file(tmp_path / file.WEIGHTS), tmp_path / file.WEIGHTS, metadata={"format": "pt"})
    reconfigure(tmp_path, format_version=None)
    again = PeftModel.from_pretrained(base_model("llama"), tmp_path)
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(AdapterError, match="remap needs a file with the list of its modules"):
        UniProjConfig.from_pretrained(tmp_path, remap={"self_attn": "attention"})
    with pytest.raises(AdapterError, match=r"modules, shapes or ranks"):
        PeftModel.from_pretrained(base_model("llama", num_hidden_layers=1), tmp_path)


def test_a_configuration_without_weights_is_a_template(tmp_path: Path) -> None:
    config("llama").save_pretrained(tmp_path)
    assert UniProjConfig.from_pretrained(tmp_path).d == 60
    get_peft_model(base_model("llama"), config("llama")).save_pretrained(tmp_path)
    (tmp_path / file.WEIGHTS).unlink()
    with pytest.raises(AdapterError, match=r"got no adapter_model\.safetensors"):
        UniProjConfig.from_pretrained(tmp_path)


def test_the_order_of_patterns_is_kept(tmp_path: Path) -> None:
    """PEFT takes the first pattern that fits: sorted, the second of these would hide the first."""
    fields = {"alpha_pattern": {"self_attn.v_proj": 8, ".*v_proj": 2}}
    model = get_peft_model(base_model("llama"), config("llama", **fields)).eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_model("llama"), tmp_path)
    assert again.base_model.model.model.layers[0].self_attn.v_proj.scaling["default"] == 2.0
    assert torch.equal(logits(again), logits(model))


def test_adapters_of_peft_are_saved_and_loaded_as_before(tmp_path: Path) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(base_model("llama"), lora).eval()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / file.CONFIG).read_text())["peft_type"] == "LORA"
    assert torch.equal(logits(PeftModel.from_pretrained(base_model("llama"), tmp_path)), logits(model))
    model.save_pretrained(tmp_path / "bin", safe_serialization=False)
    assert torch.equal(logits(PeftModel.from_pretrained(base_model("llama"), tmp_path / "bin")), logits(model))


def test_the_header_notes_the_base_it_was_trained_on(tmp_path: Path) -> None:
    base = base_model("llama")
    base.name_or_path, base.config._commit_hash = "an/organisation", "abc123"
    get_peft_model(base, config("llama")).save_pretrained(tmp_path)
    header = file.read(tmp_path).header
    assert (header.base_model, header.base_revision, header.base_quantisation) == ("an/organisation", "abc123", None)
    again = base_model("llama")
    again.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    with pytest.warns(UserWarning, match=r"quantisation none \(now bitsandbytes 8-bit\)"):
        PeftModel.from_pretrained(again, tmp_path)


def test_a_full_disk_under_save_pretrained_leaves_the_old_adapter(tmp_path: Path, monkeypatch) -> None:
    model = get_peft_model(base_model("llama"), config("llama")).eval()
    model.save_pretrained(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in (file.CONFIG, file.WEIGHTS)}
    train_steps(model, "llama")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(AdapterError, match=r"got No space left on device. What was saved there before is intact"):
        model.save_pretrained(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("changed", ["after training", "before training"])
@pytest.mark.parametrize("between", ["attach another", "nothing"])
def test_a_file_says_what_was_trained_whatever_becomes_of_the_configuration(
    changed: str, between: str, tmp_path: Path
) -> None:
    """One object for a loop over seeds, or changed after use: the header is of the P that the numbers belong to."""
    given = config("llama")
    model = get_peft_model(base_model("llama"), given)
    if changed == "after training":
        train_steps(model, "llama")
    given.projection_seed, given.lora_alpha = 5, 32
    if between == "attach another":
        get_peft_model(base_model("bert"), config("bert"))
        get_peft_model(base_model("llama"), given)
    if changed == "before training":
        train_steps(model, "llama")
    model.eval().save_pretrained(tmp_path)
    assert file.read(tmp_path).header.projection_seed == 0
    again = PeftModel.from_pretrained(base_model("llama"), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**batch("llama")).logits, model(**batch("llama")).logits)


def test_a_configuration_of_another_P_is_told_by_its_field(tmp_path: Path) -> None:
    model = get_peft_model(base_model("llama"), config("llama"))
    train_steps(model, "llama")
    model.save_pretrained(tmp_path)
    other = UniProjConfig.from_pretrained(tmp_path)
    other.projection_seed = 5
    with pytest.raises(AdapterError, match="projection_seed must be 0 as in the adapter's file, got 5"):
        PeftModel.from_pretrained(base_model("llama"), tmp_path, config=other)
    with pytest.raises(AdapterError, match="remap must be a dict"):
        PeftModel.from_pretrained(base_model("llama"), tmp_path, remap=[("a", "b")])


WITH_PATTERNS = {
    "target_modules": {"target_modules": r".*layers\.\d+\.(self_attn\.[qv]_proj|mlp\.down_proj)"},
    "rank_pattern": {"rank_pattern": {r"layers\.1\..*": 3, "v_proj": 2, r"^.*\.0\..*down_proj": 5}},
    "alpha_pattern": {"alpha_pattern": {r"(q|v)_proj": 8, r".*\.mlp\..*": 3}, "use_rslora": True},
    "exclude_modules": {"exclude_modules": r".*\.0\..*v_proj"},
    "layers_to_transform": {"layers_to_transform": [1], "layers_pattern": ["blocks", "la[xy]ers"]},
    "all-linear": {"target_modules": "all-linear", "exclude_modules": ["up_proj"], "rank_pattern": {"[kq]_proj": 1}},
}


@pytest.mark.parametrize("fields", WITH_PATTERNS.values(), ids=WITH_PATTERNS)
def test_an_adapter_with_patterns_is_that_of_peft_and_comes_back_whole(fields, tmp_path: Path) -> None:
    plain = {"r": 4, "lora_alpha": 4, "target_modules": TARGETS["llama"]}
    theirs = get_peft_model(base_model("llama"), LoraConfig(**plain | fields))
    model = get_peft_model(base_model("llama"), config("llama", **fields))
    layers = [
        {n: (m.r["default"], m.scaling["default"]) for n, m in each.named_modules() if isinstance(m, LoraLayer)}
        for each in (theirs, model)
    ]
    assert layers[0] == layers[1]
    train_steps(model, "llama", 2)
    model.save_pretrained(tmp_path / "first")
    loaded = PeftModel.from_pretrained(base_model("llama"), tmp_path / "first")
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**batch("llama")).logits, model.eval()(**batch("llama")).logits)
    loaded.save_pretrained(tmp_path / "second")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    for field, value in fields.items():
        if value != "all-linear":
            saved = getattr(loaded.peft_config["default"], field)
            assert saved == (set(value) if field == "exclude_modules" and not isinstance(value, str) else value)
