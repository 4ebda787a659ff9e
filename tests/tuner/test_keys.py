"""Keys of state dicts: wrapped models, names of adapters that stand inside other keys, and the method's prefix."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from torch import nn
from torch.optim.swa_utils import AveragedModel

from tests.format.fixtures import ROOT
from tests.tuner.models import base_model, config, logits, train_steps
from uniproj import AdapterError, names
from uniproj.exchange import export
from uniproj.format import file
from uniproj.format.keys import plain
from uniproj.registry import get
from uniproj.tuner import UniProjConfig, UniProjModel, adapter_of

LEARNED = ("vblora", "tied_lora")


@pytest.fixture(autouse=True)
def _nothing_is_compiled() -> Iterator[None]:
    """torch.compile changes keys by what it puts around a module, whether that ever compiles or not."""
    with torch.compiler.set_stance("force_eager"):
        yield


def _config(projection: str = "unilora", **fields: Any) -> UniProjConfig:
    d = 60 if get(projection).free_d else None
    return config("llama", projection, d, modules_to_save=["lm_head"], **fields)


def _trained_model(projection: str = "unilora", **fields: Any) -> PeftModel:
    model = get_peft_model(base_model("llama"), _config(projection, **fields))
    train_steps(model, "llama", 2)
    return model.eval()


def _weights(folder: Path) -> bytes:
    return (folder / file.WEIGHTS).read_bytes()


# ---- state dicts of wrapped models --------------------------------------------------------------


@pytest.fixture(scope="module", params=["unilora", "vblora"])
def trained_model(request: pytest.FixtureRequest) -> PeftModel:
    return _trained_model(request.param)


@pytest.fixture(scope="module")
def expected(trained_model: PeftModel, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("plain")
    trained_model.save_pretrained(folder)
    return _weights(folder)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", "_orig_mod."),
        ("", "module."),
        ("", "_orig_mod.module."),
        ("", "module._orig_mod."),
        ("", "module.module."),
        ("", "_fsdp_wrapped_module._orig_mod."),
        ("base_model.", "base_model._orig_mod."),
        ("base_model.", "module.base_model.module."),
        ("base_model.model.", "base_model.model._orig_mod."),
        ("model.layers.0.", "model.layers.0._checkpoint_wrapped_module."),
    ],
)
def test_a_state_dict_of_a_wrapped_model_is_saved_as_that_of_the_model(
    old: str, new: str, trained_model: PeftModel, expected: bytes, tmp_path: Path
) -> None:
    wrapped = {
        key.replace(old, new, 1) if old else new + key: value for key, value in trained_model.state_dict().items()
    }
    given = dict(wrapped)
    trained_model.save_pretrained(tmp_path, state_dict=wrapped)
    assert _weights(tmp_path) == expected
    assert wrapped.keys() == given.keys()  # the caller's dictionary stays his


@pytest.mark.parametrize("wrap", [torch.compile, AveragedModel, lambda model: AveragedModel(torch.compile(model))])
def test_real_wrappers(wrap: Any, trained_model: PeftModel, expected: bytes, tmp_path: Path) -> None:
    trained_model.save_pretrained(tmp_path, state_dict=wrap(trained_model).state_dict())
    assert _weights(tmp_path) == expected


def test_a_model_that_is_compiled_inside_is_saved_and_loaded_by_plain_names(
    trained_model: PeftModel, expected: bytes, tmp_path: Path
) -> None:
    model = copy.deepcopy(trained_model)
    model.base_model.model = torch.compile(model.base_model.model)
    model.save_pretrained(tmp_path)
    assert _weights(tmp_path) == expected
    for parameter in model.parameters():
        parameter.data.mul_(2.0 if parameter.requires_grad else 1.0)
    model.load_adapter(tmp_path, "default")
    again = get_peft_model_state_dict(model)
    assert all(torch.equal(tensor, again[key]) for key, tensor in get_peft_model_state_dict(trained_model).items())


def test_a_model_whose_blocks_were_compiled_is_exported_as_before(trained_model: PeftModel, tmp_path: Path) -> None:
    model = copy.deepcopy(trained_model)
    layers = model.base_model.model.model.layers
    layers[0] = torch.compile(layers[0])
    layers[1].self_attn.q_proj = torch.compile(layers[1].self_attn.q_proj)  # an adapted layer itself
    for source, name in ((trained_model, "before"), (model, "after")):
        export(source, tmp_path / name)
    assert _weights(tmp_path / "before") == _weights(tmp_path / "after")


class _WithHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(8, 8), nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.fc(x))  # type: ignore[no-any-return]


def _with_head(compiled: str) -> nn.Module:
    torch.manual_seed(0)
    model = _WithHead()
    if compiled == "head":
        model.head = torch.compile(model.head)
    elif compiled == "head.1":
        model.head[1] = torch.compile(model.head[1])
    return torch.compile(model) if compiled == "all" else model


def _attached(compiled: str) -> PeftModel:
    adapter_config = UniProjConfig(r=2, d=16, target_modules=["fc"], modules_to_save=["head"])
    return get_peft_model(_with_head(compiled), adapter_config).eval()


@pytest.mark.parametrize("compiled", ["head", "head.1", "all"])
def test_a_base_with_compiled_parts_takes_the_trained_head_back(compiled: str, tmp_path: Path) -> None:
    model, x = _attached(compiled), torch.ones(2, 8)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 if p.requires_grad else 0.0)
    model.save_pretrained(tmp_path)
    head = {"head.0.weight", "head.0.bias", "head.1.weight", "head.1.bias"}
    of_file = {key.removeprefix("base_model.model.") for key in file.read(tmp_path).tensors}
    assert head <= of_file and not any("_orig_mod" in key for key in of_file)
    again, other = PeftModel.from_pretrained(_with_head(compiled), tmp_path).eval(), _attached(compiled)
    again.load_adapter(tmp_path, "second")
    other.load_adapter(tmp_path, "default")
    for loaded in (again, other):
        assert torch.equal(loaded(x), model(x))
    again.set_adapter("second")
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("where", ["wrapper", "head", "head.1"])
def test_a_head_that_was_compiled_after_attaching_is_saved_and_loaded(where: str, tmp_path: Path) -> None:
    plain_model, model = _attached(""), _attached("")
    inner = model.base_model.model
    if where == "wrapper":
        inner.head = torch.compile(inner.head)
    elif where == "head":
        inner.head.modules_to_save["default"] = torch.compile(inner.head.modules_to_save["default"])
    else:
        inner.head.modules_to_save["default"][1] = torch.compile(inner.head.modules_to_save["default"][1])
    for source, name in ((plain_model, "plain"), (model, "compiled")):
        source.save_pretrained(tmp_path / name)
    assert _weights(tmp_path / "plain") == _weights(tmp_path / "compiled")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 if p.requires_grad else 0.0)
    model.load_adapter(tmp_path / "plain", "default")
    x = torch.ones(2, 8)
    assert torch.equal(model(x), plain_model(x))


def test_numbers_reach_a_compiled_model() -> None:
    source = get_peft_model(base_model("llama"), config("llama"))
    target = get_peft_model(base_model("llama"), config("llama", init_seed=3))
    set_peft_model_state_dict(torch.compile(target), get_peft_model_state_dict(source))
    assert torch.equal(adapter_of(target).theta_d, adapter_of(source).theta_d)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: {}, "got 0 entries without it"),
        (lambda s: {f"student.{k}": v for k, v in s.items()}, r"such as student\.base_model\.uniproj_theta_d\.default"),
        (lambda s: {k: v for k, v in s.items() if "uniproj_" not in k}, "entries without it"),
        (lambda s: {**s, "base_model.uniproj_theta_d.default": torch.empty(0)}, r"got shape \(0,\)"),
        (lambda s: {k.replace("default", "other"): v for k, v in s.items()}, "uniproj_theta_d.default of shape"),
    ],
    ids=["empty", "unknown prefix", "base weights alone", "not gathered", "another adapter"],
)
def test_what_would_save_no_theta_d_is_refused(
    change: Any, message: str, trained_model: PeftModel, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=f"saving 'default': the state dict must hold .*{message}"):
        trained_model.save_pretrained(tmp_path, state_dict=change(trained_model.state_dict()))
    assert not (tmp_path / file.WEIGHTS).exists()


def test_numbers_of_another_P_are_not_saved_under_this_one(tmp_path: Path) -> None:
    models = [get_peft_model(base_model("llama"), config("llama", projection_seed=seed)) for seed in (0, 7)]
    with pytest.raises(AdapterError, match="projection_seed must be another, got 0"):
        models[0].save_pretrained(tmp_path, state_dict=models[1].state_dict())
    assert not (tmp_path / file.WEIGHTS).exists()


def test_a_process_that_gathered_nothing_saves_nothing(trained_model: PeftModel, tmp_path: Path, monkeypatch) -> None:
    """Under FSDP all processes call save_pretrained, and the first alone has the state dict."""
    model = get_peft_model(base_model("llama"), config("llama"))
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    model.save_pretrained(tmp_path, state_dict={}, is_main_process=False)
    assert not (tmp_path / file.WEIGHTS).exists()


# ---- names of adapters --------------------------------------------------------------------------

# names that are in the keys of a method, of the tuner, of heads and of the base
NAMES = ["logits", "projections", "model", "uniproj_theta_d", "uniproj_", "modules_to_save", "weight", "module", "0"]
NAMES += ["defaul", "default2", "a/b", "a(1", "x[0]", "back\\slash"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of two adapters of each method, each saved from a model that holds no other."""
    found = {}
    for projection in ("tied_lora", "vblora"):
        for seed in (0, 7):
            folder = tmp_path_factory.mktemp(projection)
            model = get_peft_model(base_model("llama"), _config(projection, init_seed=seed))
            model.save_pretrained(folder)
            found[f"{projection} {seed}"] = _weights(folder)
    return found


@pytest.mark.parametrize(("projection", "name"), [("tied_lora", "u"), *(("vblora", name) for name in NAMES)])
def test_the_name_of_an_adapter_takes_no_tensor_of_another(
    projection: str, name: str, alone: dict[str, bytes], tmp_path: Path
) -> None:
    model = get_peft_model(base_model("llama"), _config(projection))
    model.add_adapter(name, _config(projection, init_seed=7))
    model.save_pretrained(tmp_path)
    assert _weights(tmp_path) == alone[f"{projection} 0"]
    assert _weights(tmp_path / name) == alone[f"{projection} 7"]
    first, again = get_peft_model_state_dict(model), get_peft_model(base_model("llama"), _config(projection))
    result = again.load_adapter(tmp_path / name, name)
    assert result.missing_keys == result.unexpected_keys == []
    again.load_adapter(tmp_path, "default")
    second = get_peft_model_state_dict(again, adapter_name=name)
    assert all(torch.equal(t, get_peft_model_state_dict(again)[key]) for key, t in first.items())
    for key, tensor in get_peft_model_state_dict(model, adapter_name=name).items():
        assert torch.equal(second[key], tensor)
    again.delete_adapter(name)
    assert get_peft_model_state_dict(again).keys() == first.keys()


@pytest.mark.parametrize("name", ["", "default.x", ".", "keys", "training", "get", "_extra_state", "_orig_mod"])
def test_a_name_that_is_no_component_of_a_key_is_refused(name: str) -> None:
    base = base_model("llama")
    before = {key: p.requires_grad for key, p in base.named_parameters()}
    with pytest.raises(AdapterError, match=rf"one component of a key.*got '{name}'"):
        get_peft_model(base, config("llama"), adapter_name=name)
    assert {key: p.requires_grad for key, p in base.named_parameters()} == before
    model = get_peft_model(base, config("llama")).eval()
    expected = logits(model)
    with pytest.raises(AdapterError, match="one component of a key"):
        model.add_adapter(name, config("llama", init_seed=3))
    assert list(model.peft_config) == ["default"] and torch.equal(logits(model), expected)


def test_a_name_that_peft_would_take_for_a_head_is_refused() -> None:
    model = get_peft_model(base_model("llama"), _config())
    with pytest.raises(AdapterError, match=r"must not end like .* got 'my_lm_head' and modules_to_save = 'lm_head'"):
        model.add_adapter("my_lm_head", _config())
    assert list(model.peft_config) == ["default"] and logits(model).isfinite().all()
    model = get_peft_model(base_model("bert"), config("bert"))
    with pytest.raises(AdapterError, match="got 'classifier' and modules_to_save = 'classifier'"):
        model.add_adapter("classifier", config("bert"))


# ---- the prefix ---------------------------------------------------------------------------------


@pytest.mark.parametrize("projection", names())
def test_all_that_the_method_owns_begins_with_its_prefix(projection: str, tmp_path: Path) -> None:
    base = base_model("llama")
    theirs = {name for name, _ in base.named_parameters()}
    model = get_peft_model(base, config("llama", projection, 60 if get(projection).free_d else None))
    assert model.prefix == PEFT_TYPE_TO_PREFIX_MAPPING["UNIPROJ"] == "uniproj_"
    # as TRL lists the weights of a merged model for vLLM
    sent = [name.removeprefix("base_model.model.").replace(".base_layer", "") for name, _ in model.named_parameters()]
    assert {name for name in sent if model.prefix not in name} == theirs
    own = [key for key in model.state_dict() if not key.startswith("base_model.model.")]
    assert own and all(key.startswith("base_model.uniproj_") for key in own)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(name.startswith("base_model.uniproj_") for name in trainable)
    model.save_pretrained(tmp_path)
    assert all(key.startswith("base_model.uniproj_") for key in get_peft_model_state_dict(model))
    tuner = model.base_model
    assert adapter_of(model).P is tuner.projections["default"] is tuner.uniproj_projections["default"]


@pytest.mark.parametrize("projection", ["unilora", *LEARNED])
def test_only_the_adapter_is_updated(projection: str) -> None:
    """By PEFT's own rule for what belongs to an adapter."""
    model = get_peft_model(base_model("llama"), _config(projection))
    before = copy.deepcopy(dict(model.named_parameters()))
    train_steps(model, "llama", lr=0.5)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if UniProjModel.prefix in name or "modules_to_save" in name}


def test_an_adapter_leaves_modules_that_bear_the_prefix() -> None:
    base = nn.Sequential()
    base.add_module("uniproj_block", nn.Linear(8, 8))
    adapter_config = UniProjConfig(r=2, d=8, target_modules=["uniproj_block"])
    model = get_peft_model(base, adapter_config)
    model.add_adapter("second", UniProjConfig(r=2, d=8, target_modules=["uniproj_block"]))
    model.delete_adapter("second")
    assert list(model.base_model.model.uniproj_block.r) == ["default"]


def test_the_names_in_old_files_are_those_of_before() -> None:
    """What the fixtures of the loader's tests hold, so that these keep on testing it."""
    from safetensors.torch import load_file

    old = load_file(ROOT / "v2" / "vblora" / file.WEIGHTS)
    assert set(old) == {"base_model.uniproj_theta_d", "base_model.projections.logits"}


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("module._orig_mod.base_model.uniproj_theta_d.default", "base_model.uniproj_theta_d.default"),
        ("base_model.model.module.fc._orig_mod.weight", "base_model.model.module.fc.weight"),
        ("module.weight", "module.weight"),
        ("base_model.model.my_orig_mod.weight", "base_model.model.my_orig_mod.weight"),
    ],
)
def test_only_what_a_wrapper_added_is_taken_away(key: str, expected: str) -> None:
    assert plain(key) == expected
