"""A file holds what its own configuration trains and nothing else: the base and the adapters beside it stay."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    UniLoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    peft_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.format.saved import rewrite
from tests.tuner.models import base_model, config, logits, train_steps
from uniproj import AdapterError
from uniproj.exchange import export, import_adapter, inspect
from uniproj.exchange.verify import verify
from uniproj.format import file
from uniproj.format.keys import OF_P, THETA_D
from uniproj.tuner import UniProjConfig

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
BASE = "base_model.model."
Q = f"{BASE}model.layers.0.self_attn.q_proj."
HEAD = {"modules_to_save": ["lm_head"]}
NO_WEIGHTS = (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.complex64)  # the second is that of packed weights


def _trained_model(kind: str = "llama", projection: str = "unilora", **fields: Any) -> PeftModel:
    model = get_peft_model(base_model(kind), config(kind, projection, None if projection == "vblora" else 60, **fields))
    train_steps(model, kind, 2)
    return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[PeftModel, Path]]:
    """A trained model with some fields and the folder it was saved in, made once: neither may be changed."""
    made: dict[str, tuple[PeftModel, Path]] = {}

    def of(*what: str, **fields: Any) -> tuple[PeftModel, Path]:
        key = repr((what, fields))
        if key not in made:
            made[key] = _trained_model(*what, **fields), tmp_path_factory.mktemp("saved")
            made[key][0].save_pretrained(made[key][1])
        return made[key]

    return of


def _all_outputs(model: PeftModel) -> list[Tensor]:
    """What every adapter gives, and the base under disable_adapter()."""
    active, found = model.active_adapter, []
    for name in model.peft_config:
        model.set_adapter(name)
        found.append(logits(model))
    model.set_adapter(active)
    with model.disable_adapter():
        found.append(logits(model))
    return found


def _same(before: Any, after: Any) -> bool:
    state, now = before[0], after[0]
    same = state.keys() == now.keys() and all(torch.equal(state[key], now[key]) for key in state)
    return same and all(torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True))


def _of(model: PeftModel) -> tuple[dict[str, Tensor], list[Tensor]]:
    return copy.deepcopy(dict(model.state_dict())), _all_outputs(model)


UNENTITLED = "must be what the configuration trains"
NORM, OUTPUT, EMBEDDING = (f"{BASE}{name}" for name in ("model.norm", "lm_head", "model.embed_tokens"))
TOKENS = "token_adapter.trainable_tokens_delta"
# name -> (fields of the adapter's configuration, key of the forged tensor, its shape)
ADDED: dict[str, tuple[dict[str, Any], str, tuple[int, ...]]] = {
    "norm": ({}, f"{NORM}.weight", (32,)),
    "output": ({}, f"{OUTPUT}.weight", (64, 32)),
    "embedding": ({}, f"{EMBEDDING}.weight", (64, 32)),
    "beside a head": (HEAD, f"{NORM}.weight", (32,)),
    "base layer": ({}, f"{Q}base_layer.weight", (32, 32)),
    "base layer under bias": ({"bias": "all"}, f"{Q}base_layer.weight", (32, 32)),
    "frozen head": (HEAD, f"{OUTPUT}.original_module.weight", (64, 32)),
    "another's head": (HEAD, f"{OUTPUT}.modules_to_save.default.weight", (64, 32)),
    "factor": ({}, f"{Q}lora_A.default.weight", (4, 32)),
    "tokens": ({}, f"{EMBEDDING}.{TOKENS}", (2, 32)),
    "all tokens": ({"trainable_token_indices": [3]}, f"{EMBEDDING}.token_adapter.base_layer.weight", (64, 32)),
    "others' tokens": ({"trainable_token_indices": {"embed_tokens": [3]}}, f"{OUTPUT}.{TOKENS}", (1, 32)),
    "bias": ({}, f"{Q}base_layer.bias", (32,)),
    "bias without adapter": ({"bias": "lora_only"}, f"{BASE}model.layers.0.self_attn.k_proj.bias", (16,)),
    "wrapper": ({}, f"{BASE}_orig_mod.model.norm.weight", (32,)),
    "no prefix": ({}, "model.norm.weight", (32,)),
    "P's numbers": ({}, f"{OF_P}logits", (3,)),
    "another's theta_d": ({}, f"{THETA_D}.default", (60,)),
    **{str(dtype): (HEAD, f"{OUTPUT}.weight", (64, 32)) for dtype in NO_WEIGHTS},
}


@pytest.mark.parametrize("case", ADDED)
def test_a_tensor_to_which_no_configuration_entitles_is_refused_by_its_name(case: str, saved, tmp_path: Path) -> None:
    fields, key, shape = ADDED[case]
    dtype = next((dtype for dtype in NO_WEIGHTS if str(dtype) == case), torch.float32)
    folder = shutil.copytree(saved(**fields)[1], tmp_path / "forged")
    rewrite(folder, lambda tensors: {**tensors, key: torch.full(shape, 7.0).to(dtype)})
    if dtype in NO_WEIGHTS:
        said = f"must be of dtype .* got {dtype}"
    else:
        said = "which projection 'unilora' does not have" if "uniproj_" in key else UNENTITLED
    said = f"{re.escape(key.removeprefix(BASE))}.*{said}"
    model, _ = saved(**HEAD)
    before = _of(model)
    ways: list[Callable[[], object]] = [
        lambda: model.load_adapter(folder, "second"),
        lambda: model.load_adapter(folder, "default"),
        lambda: set_peft_model_state_dict(model, peft_model.load_peft_weights(str(folder))),
        lambda: PeftModel.from_pretrained(base_model("llama"), folder),
        lambda: inspect.describe(folder),
        lambda: verify(folder),
        lambda: export(folder, tmp_path / "lora"),
    ]
    for way in ways:
        with pytest.raises(AdapterError, match=said):
            way()
    assert _same(before, _of(model)) and list(model.peft_config) == ["default"]
    assert not (tmp_path / "lora").exists()


def _without(key: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {k: t for k, t in tensors.items() if k != key}


WRONG: dict[str, tuple[dict[str, Any], Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "shape of a head": (
        *(HEAD, lambda tensors: {**tensors, f"{BASE}lm_head.weight": torch.ones(50, 32)}),
        r"lm_head\.weight: .* shape \(50, 32\), this model has \(64, 32\)",
    ),
    "missing head": (HEAD, _without(f"{BASE}lm_head.weight"), r"lm_head\.weight"),
    "rows of tokens": (
        {"trainable_token_indices": [3, 5]},
        lambda tensors: {k: torch.ones(3, 32) if k.endswith("delta") else t for k, t in tensors.items()},
        r"trainable_tokens_delta.*: must have shape \(2, 32\) as in this model, got \(3, 32\)",
    ),
    "missing tokens": (
        {"trainable_token_indices": [3, 5]},
        lambda tensors: {k: t for k, t in tensors.items() if not k.endswith("delta")},
        r"trainable_tokens_delta",
    ),
    "a tensor that the head has not": (
        *(HEAD, lambda tensors: {**tensors, f"{BASE}lm_head.inner.weight": torch.ones(3)}),
        r"lm_head\.inner\.weight: .* has none",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_or_missing_tensor_leaves_the_model_bit_for_bit(case: str, saved, tmp_path: Path) -> None:
    fields, change, said = WRONG[case]
    model, folder = saved(**fields)
    folder = shutil.copytree(folder, tmp_path / "forged")
    before = _of(model)
    rewrite(folder, change)
    for name in ("second", "default"):
        with pytest.raises(AdapterError, match=said):
            model.load_adapter(folder, name)
    with pytest.raises((AdapterError, KeyError), match=said.partition(":")[0]):  # PEFT's own, where one is missing
        set_peft_model_state_dict(model, peft_model.load_peft_weights(str(folder)))
    assert _same(before, _of(model)) and list(model.peft_config) == ["default"]
    base = base_model("llama")
    state = copy.deepcopy(base.state_dict())
    with pytest.raises(AdapterError, match=said):
        PeftModel.from_pretrained(base, folder)
    assert all(torch.equal(tensor, state[key]) for key, tensor in base.state_dict().items())


def test_what_another_configuration_trains_does_not_reach_the_base(saved) -> None:
    """Over an adapter of the same P that trains less: its own configuration decides, not the file's."""
    model, folder = saved()[0], saved(modules_to_save=["model.norm"])[1]
    before = _of(model)
    for load in (
        lambda: model.load_adapter(folder, "default"),
        lambda: set_peft_model_state_dict(model, peft_model.load_peft_weights(str(folder))),
    ):
        with pytest.raises(AdapterError, match=r"model\.norm\.weight: must be what 'default' trains in this model"):
            load()
    assert _same(before, _of(model))


def test_a_learned_P_has_its_own_numbers_and_no_more(tmp_path: Path) -> None:
    _trained_model(projection="vblora").save_pretrained(tmp_path / "ours")
    folder, more = tmp_path / "ours", f"{OF_P}more"
    rewrite(folder, lambda tensors: {**tensors, more: torch.ones(3)})
    for way in (
        lambda: PeftModel.from_pretrained(base_model("llama"), folder),
        lambda: verify(folder),
        lambda: export(folder, tmp_path / "lora"),
    ):
        with pytest.raises(AdapterError, match=rf"^{more}: .* which projection 'vblora' does not have"):
            way()
    rewrite(folder, _without(more))
    rewrite(folder, _without(f"{OF_P}logits"))
    for way in (lambda: PeftModel.from_pretrained(base_model("llama"), folder), lambda: verify(folder)):
        with pytest.raises(AdapterError, match=r"logits: the file must hold a tensor of shape .* got none"):
            way()


# ---- what is legitimate -------------------------------------------------------------------------------

TRAINED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "head": ("llama", "unilora", HEAD),
    "head by its task": ("bert", "unilora", {}),
    "several heads": ("bert", "unilora", {"modules_to_save": ["pooler", "LayerNorm"]}),
    "embedding": ("llama", "unilora", {"modules_to_save": ["embed_tokens"]}),
    "biases": ("bert", "unilora", {"bias": "all", "modules_to_save": ["pooler"]}),
    "biases of adapted layers": ("bert", "unilora", {"bias": "lora_only"}),
    "biases of Conv1D": ("gpt2", "unilora", {"bias": "lora_only"}),
    "tokens": ("llama", "unilora", {"trainable_token_indices": [1, 60]}),
    "tokens by name": ("llama", "unilora", {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2, 3]}}),
    "tokens and a head": (
        *("llama", "unilora"),
        {"modules_to_save": ["embed_tokens"], "trainable_token_indices": {"lm_head": [3]}},
    ),
    "learned P and a head": ("llama", "vblora", HEAD),
    "biases and tokens of one layer": ("gpt2", "unilora", {"bias": "all", "trainable_token_indices": [3]}),
}


def _beside(tensors: dict[str, Tensor]) -> set[str]:
    """By PEFT's keys, what is no factor of a method; of the copies that PEFT makes of a head's biases one."""
    copies = (".original_module.", ".modules_to_save.")
    return {k for k in tensors if "uniproj_" not in k and ".lora_" not in k and not any(c in k for c in copies)}


@pytest.mark.parametrize("case", TRAINED)
def test_what_is_trained_comes_back_exactly_under_the_keys_of_LORA(case: str, saved, tmp_path: Path) -> None:
    kind, projection, fields = TRAINED[case]
    model, folder = saved(kind, projection, **fields)
    given = {key: getattr(config(kind), key) for key in ("r", "target_modules", "task_type")}
    lora = get_peft_model(base_model(kind), LoraConfig(**given, **fields))
    tensors = file.read(folder).tensors
    assert _beside(tensors) == _beside(get_peft_model_state_dict(lora)) != set()
    assert not any(".original_module." in key or ".modules_to_save." in key for key in tensors)
    state = model.state_dict()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    again = PeftModel.from_pretrained(base_model(kind), folder).eval()
    now = again.state_dict()
    assert now.keys() == state.keys()
    assert all(torch.equal(now[key], state[key]) for key in trainable if ".original_module." not in key)
    assert torch.equal(logits(again, kind), logits(model, kind))
    verify(folder)
    other = get_peft_model(base_model(kind), copy.deepcopy(model.peft_config["default"])).eval()
    set_peft_model_state_dict(other, get_peft_model_state_dict(model, save_embedding_layers=False))
    assert torch.equal(logits(other, kind), logits(model, kind))
    if "trainable_token_indices" not in fields:
        export(folder, tmp_path / "lora")
        theirs = PeftModel.from_pretrained(base_model(kind), tmp_path / "lora").eval()
        assert torch.allclose(logits(theirs, kind), logits(model, kind), atol=1e-4)


def test_a_head_beside_another_adapters_head(tmp_path: Path) -> None:
    first, second = _trained_model(**HEAD), _trained_model(**HEAD, projection_seed=3)
    second.save_pretrained(tmp_path)
    before = logits(first)
    first.load_adapter(tmp_path, "second")
    assert torch.equal(logits(first), before)
    first.set_adapter("second")
    assert torch.equal(logits(first), logits(second))


def test_copies_of_biases_in_earlier_files_are_passed_over(tmp_path: Path) -> None:
    """Written by uniproj before, and by PEFT; whatever they hold, the base and other adapters do not get it."""
    model = _trained_model("bert", bias="all")
    model.save_pretrained(tmp_path)
    copies = {
        f"{BASE}classifier.original_module.bias": torch.full((3,), 9.0),
        f"{BASE}classifier.modules_to_save.other.bias": torch.full((3,), 9.0),
    }
    rewrite(tmp_path, lambda tensors: {**tensors, **copies})
    again = PeftModel.from_pretrained(base_model("bert"), tmp_path).eval()
    assert torch.equal(logits(again, "bert"), logits(model, "bert"))
    assert not torch.equal(again.base_model.model.classifier.original_module.bias, torch.full((3,), 9.0))
    assert not copies.keys() & file.read(tmp_path).tensors.keys()


def test_biases_are_found_whatever_adapters_wrap_their_layers(tmp_path: Path) -> None:
    model = get_peft_model(base_model("bert"), config("bert", bias="all", target_modules=["query"]))
    model.add_adapter("second", config("bert", target_modules=["value"]))
    train_steps(model, "bert", 2)
    model.eval().save_pretrained(tmp_path, selected_adapters=["default"])
    keys = {key for key in file.read(tmp_path).tensors if key.endswith("0.attention.self.value.base_layer.bias")}
    assert len(keys) == 1
    again = PeftModel.from_pretrained(base_model("bert"), tmp_path).eval()
    assert torch.equal(logits(again, "bert"), logits(model, "bert"))
    one = get_peft_model(base_model("bert"), config("bert", bias="all", target_modules=["query"]))
    one.save_pretrained(tmp_path / "one")
    model.load_adapter(tmp_path / "one", "default")
    assert torch.equal(logits(model, "bert"), logits(one.eval(), "bert"))


# ---- embeddings, which PEFT adds ------------------------------------------------------------------------


def _base_with_more_tokens(folder: Path) -> nn.Module:
    base = base_model("llama")
    base.save_pretrained(folder)
    base = type(base).from_pretrained(folder)
    base.resize_token_embeddings(70)
    return base.eval()


def test_embeddings_of_the_base_are_not_saved_with_an_adapter(tmp_path: Path) -> None:
    """An adapted output layer has the weights of any base; those of new tokens would be lost."""
    model = _trained_model(target_modules=["q_proj", "lm_head"])
    model.save_pretrained(tmp_path / "ours")
    assert not _beside(file.read(tmp_path / "ours").tensors)
    again = PeftModel.from_pretrained(base_model("llama"), tmp_path / "ours").eval()
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(AdapterError, match=r"not embeddings of the base, got save_embedding_layers=True"):
        model.save_pretrained(tmp_path / "new", save_embedding_layers=True)
    wider = get_peft_model(_base_with_more_tokens(tmp_path / "base"), config("llama"))
    for save in (
        lambda: wider.save_pretrained(tmp_path / "new"),
        lambda: export(wider, tmp_path / "new"),
    ):
        with pytest.raises(AdapterError, match=r"got 6 tokens more than the base was loaded with\. Nothing was saved"):
            save()
    assert not (tmp_path / "new").exists()
    wider.save_pretrained(tmp_path / "new", save_embedding_layers=False)
    assert not _beside(file.read(tmp_path / "new").tensors)


@pytest.mark.parametrize(
    "fields",
    [
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": {"embed_tokens": [2, *range(64, 70)], "lm_head": list(range(64, 70))}},
    ],
    ids=["modules", "tokens"],
)
def test_new_tokens_that_are_trained_come_back(fields: dict[str, Any], tmp_path: Path) -> None:
    model = get_peft_model(_base_with_more_tokens(tmp_path / "base"), config("llama", **fields))
    train_steps(model, "llama", 2)
    model.eval().save_pretrained(tmp_path / "ours")
    again = PeftModel.from_pretrained(_base_with_more_tokens(tmp_path / "base"), tmp_path / "ours").eval()
    ids = torch.arange(60, 70)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_base_weights_among_numbers_in_memory_must_be_the_models_own() -> None:
    model = _trained_model(target_modules=["q_proj", "lm_head"])
    numbers, key = get_peft_model_state_dict(model), f"{BASE}lm_head.base_layer.weight"
    assert key in numbers  # PEFT adds it
    other = get_peft_model(base_model("llama"), config("llama", target_modules=["q_proj", "lm_head"])).eval()
    set_peft_model_state_dict(other, numbers)
    assert torch.equal(logits(other), logits(model))
    before = _of(other)
    with pytest.raises(AdapterError, match=r"lm_head\.base_layer\.weight: must be what 'default' trains"):
        set_peft_model_state_dict(other, {**numbers, key: numbers[key] + 1})
    assert _same(before, _of(other))


# ---- folders of PEFT's methods ---------------------------------------------------------------------------


def _foreign(kind: str, **fields: Any) -> PeftModel:
    given = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **fields}
    made = LoraConfig(**given) if kind == "LORA" else UniLoraConfig(theta_d_length=64, **given)
    return get_peft_model(base_model("llama"), made)


@pytest.mark.parametrize("kind", ["LORA", "UNILORA"])
def test_an_import_takes_no_weight_of_the_base_along(kind: str, tmp_path: Path) -> None:
    _foreign(kind).save_pretrained(tmp_path / "theirs")
    path, base = tmp_path / "theirs" / file.WEIGHTS, base_model("llama")
    tensors = load_file(path)
    for key in (f"{BASE}model.norm.weight", f"{BASE}lm_head.weight", f"{Q}base_layer.weight", THETA_D):
        save_file({**tensors, key: torch.ones(32)}, path)
        with pytest.raises(AdapterError, match=rf"{key} must be what the configuration trains"):
            import_adapter(tmp_path / "theirs", tmp_path / "ours", base=base)
        with pytest.raises(AdapterError, match=rf"{key} must be what the configuration trains"):
            import_adapter(tmp_path / "theirs", tmp_path / "ours", projection="unilora", d=60, base=base)
    assert not (tmp_path / "ours").exists()


def test_heads_and_biases_of_a_LORA_come_along_and_back(tmp_path: Path) -> None:
    given = {"r": 4, "target_modules": ["query"], "task_type": "SEQ_CLS", "bias": "all", "modules_to_save": ["pooler"]}
    lora = get_peft_model(base_model("bert"), LoraConfig(**given))
    train_steps(lora, "bert", 2)
    lora.eval().save_pretrained(tmp_path / "theirs")
    import_adapter(tmp_path / "theirs", tmp_path / "ours")
    ours = PeftModel.from_pretrained(base_model("bert"), tmp_path / "ours").eval()
    assert torch.allclose(logits(ours, "bert"), logits(lora, "bert"), atol=1e-5)
    export(tmp_path / "ours", tmp_path / "back")
    back = PeftModel.from_pretrained(base_model("bert"), tmp_path / "back").eval()
    assert torch.equal(logits(back, "bert"), logits(lora, "bert"))


def test_a_configuration_that_would_train_everything_trains_copies(tmp_path: Path) -> None:
    """modules_to_save may name what it will: PEFT trains copies of it, and the base stays."""
    adapter_config = UniProjConfig(d=60, r=4, target_modules=["q_proj"], modules_to_save=["norm", "mlp", "lm_head"])
    model = get_peft_model(base_model("llama"), adapter_config)
    train_steps(model, "llama", 1)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_model("llama"), tmp_path).eval()
    with again.disable_adapter():
        assert torch.equal(logits(again), logits(base_model("llama")))
