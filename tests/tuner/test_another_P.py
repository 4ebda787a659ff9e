"""Numbers reach a model in many ways, and by each of them only the model whose P and scale they were trained with."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor

from tests.format.fixtures import ROOT, base
from tests.format.saved import reconfigure
from tests.tuner.models import base_model, config, train_steps
from uniproj import AdapterError
from uniproj.format import file, identity
from uniproj.format.keys import IDENTITY, THETA_D
from uniproj.tuner import adapter_of

# what ties theta_d to other updates, with the word by which the error names it
OTHERS = {
    "projection_seed": {"projection_seed": 7},
    "scale": {"lora_alpha": 16},
    "projection_kwargs": {"projection_kwargs": {"assignment": "iid"}},
    "projection must": {"projection": "unilora_unnormalised"},
}


def _model(**fields: Any) -> PeftModel:
    return get_peft_model(base_model("llama"), config("llama", **fields)).eval()


@pytest.fixture(scope="module")
def trained_model() -> PeftModel:
    model = _model()
    train_steps(model, "llama")
    return model.eval()


@pytest.fixture(scope="module")
def folder(trained_model: PeftModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("seed 0")
    trained_model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def others() -> dict[str, PeftModel]:
    return {word: _model(**fields) for word, fields in OTHERS.items()}


def _through_torch(tensors: dict[str, Tensor], place: Path) -> dict[str, Tensor]:
    torch.save(tensors, place)
    return torch.load(place)  # weights_only, as Accelerate reads what it saved under FSDP


WAYS: dict[str, Callable[[PeftModel, Path, Path], dict[str, Tensor]]] = {
    "load_peft_weights": lambda model, folder, _: load_peft_weights(folder),
    "safetensors": lambda model, folder, _: load_file(folder / file.WEIGHTS),
    "copies of a file's": lambda model, folder, _: {k: t.clone() for k, t in load_peft_weights(folder).items()},
    "a live model's": lambda model, *_: get_peft_model_state_dict(model),
    "copies of a live model's": lambda model, *_: copy.deepcopy(get_peft_model_state_dict(model)),
    "torch.save": lambda model, _, place: _through_torch(get_peft_model_state_dict(model), place),
    "bfloat16": lambda model, *_: {k: t.bfloat16() for k, t in get_peft_model_state_dict(model).items()},
    "an average": lambda model, *_: {k: 0.1 * t + 0.9 * t for k, t in get_peft_model_state_dict(model).items()},
    **{f"{c} times": lambda model, *_, c=c: _combined(model, c, 0.0) for c in (-1.0, 0.5, 2.0)},
}


def _combined(model: PeftModel, a: float, b: float, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """a x + b y of the adapter's tensors x = y, each product and the sum rounded to `dtype`."""
    tensors = {k: t.to(dtype) for k, t in get_peft_model_state_dict(model).items()}
    return {k: a * t + b * t for k, t in tensors.items()}


@pytest.mark.parametrize("way", WAYS)
def test_numbers_of_another_P_or_scale_are_refused(
    way: str, trained_model: PeftModel, folder: Path, others: dict[str, PeftModel], tmp_path: Path
) -> None:
    tensors = WAYS[way](trained_model, folder, tmp_path / "copy")
    for word, model in others.items():
        before = adapter_of(model).theta_d.clone()
        with pytest.raises(AdapterError, match=f"the adapter 'default' of this model must be as .*({word}|lora_alpha)"):
            set_peft_model_state_dict(model, tensors)
        assert torch.equal(adapter_of(model).theta_d, before)


def test_a_file_of_another_P_or_scale_is_not_loaded_over_an_adapter(folder: Path, others: dict[str, PeftModel]) -> None:
    """As the Trainer loads a checkpoint: into the adapter that is there, by its name."""
    for word, model in others.items():
        before = adapter_of(model).theta_d.clone()
        with pytest.raises(AdapterError, match=f"the adapter 'default' of this model must be as .*({word}|lora_alpha)"):
            model.load_adapter(folder, "default")
        assert torch.equal(adapter_of(model).theta_d, before)


@pytest.mark.parametrize("way", WAYS)
def test_numbers_of_the_same_P_are_taken(way: str, trained_model: PeftModel, folder: Path, tmp_path: Path) -> None:
    model = _model(init_seed=3)
    result = set_peft_model_state_dict(model, WAYS[way](trained_model, folder, tmp_path / "copy"))
    found, theta_d = (adapter_of(m).theta_d for m in (model, trained_model))
    factor = float(way.removesuffix(" times")) if way.endswith(" times") else 1.0
    assert torch.allclose(found, factor * theta_d, rtol=1e-2 if way == "bfloat16" else 1e-6)
    assert result.unexpected_keys == [] and not any("uniproj_" in key for key in result.missing_keys)


@pytest.mark.parametrize("where", ["Accelerate's tensors", "torch", "safetensors"])
def test_a_state_dict_of_a_whole_model_is_of_one_P(
    where: str, trained_model: PeftModel, others: dict[str, PeftModel], tmp_path: Path
) -> None:
    same = _model(init_seed=3)

    def load(model: PeftModel) -> None:
        if where == "safetensors":
            save_model(trained_model, str(tmp_path / "model"))
            load_model(model, str(tmp_path / "model"))
        else:
            state = trained_model.state_dict()
            model.load_state_dict(_through_torch(state, tmp_path / "model") if where == "torch" else state)

    for word, model in others.items():
        before = {name: p.clone() for name, p in model.named_parameters()}
        next(iter(before.values())).zero_()
        next(model.parameters()).data.zero_()  # a base weight, which would be copied first
        with pytest.raises(AdapterError, match=f"must be as that of the state dict: ({word}|scale)"):
            load(model)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    load(same)
    assert all(torch.equal(p, same.get_parameter(name)) for name, p in trained_model.named_parameters())


def test_what_says_nothing_of_itself_is_only_taken_where_pytorch_takes_it(
    trained_model: PeftModel, tmp_path: Path
) -> None:
    theta_d = adapter_of(trained_model).theta_d.detach()
    model = _model(init_seed=3)
    with pytest.raises(AdapterError, match=rf"must include {IDENTITY}.*load_adapter.*adapter_of"):
        set_peft_model_state_dict(model, {THETA_D: theta_d})
    with pytest.raises(AdapterError, match=r"the identity must be of shape \(2,\)"):
        set_peft_model_state_dict(model, {THETA_D: theta_d, IDENTITY: torch.ones(2)})
    model.load_state_dict({f"{THETA_D}.default": theta_d}, strict=False)
    assert torch.equal(adapter_of(model).theta_d, theta_d)


def _loads(model: PeftModel, tensors: dict[str, Tensor]) -> None:
    set_peft_model_state_dict(model, tensors)
    assert torch.equal(adapter_of(model).theta_d, tensors[THETA_D].float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weighted_sums_in_half_precision_are_of_the_same_P(dtype: torch.dtype, trained_model: PeftModel) -> None:
    model = _model()
    for i in range(1, 20):
        _loads(model, _combined(trained_model, i / 20, 1 - i / 20, dtype))
        _loads(model, _combined(trained_model, i / 7, 0.3, dtype))


def test_arithmetic_after_which_the_identity_tells_nothing_is_refused_with_the_remedy(
    trained_model: PeftModel, others: dict[str, PeftModel]
) -> None:
    own = get_peft_model_state_dict(trained_model)
    another = get_peft_model_state_dict(others["projection_seed"])
    generator = torch.Generator().manual_seed(0)
    changed = {
        "noise": {k: t + 9 * torch.randn(t.shape, generator=generator) for k, t in own.items()},
        "two Ps": {k: 0.3 * t + 0.7 * another[k] for k, t in own.items()},
        "a difference": {k: (t - t if k == IDENTITY else t.clone()) for k, t in own.items()},
    }
    model = _model()
    before = adapter_of(model).theta_d.clone()
    for tensors in changed.values():
        with pytest.raises(AdapterError, match=rf"^{IDENTITY}: .*no longer tell a P.*copy it from one of the adapters"):
            set_peft_model_state_dict(model, tensors)
        assert torch.equal(adapter_of(model).theta_d, before)
    _loads(model, {**changed["noise"], IDENTITY: own[IDENTITY]})


def test_a_checkpoint_of_a_whole_model_from_before_format_3_loads() -> None:
    source, target = _model(projection="vblora", d=None), _model(projection="vblora", d=None, init_seed=3)
    old = {k.replace("uniproj_projections", "projections"): t for k, t in source.state_dict().items()}
    del old[f"{IDENTITY}.default._extra_state"]
    with torch.no_grad():
        for own in adapter_of(source).P.parameters():
            own.add_(1.0)
    target.load_state_dict(old)
    assert all(torch.equal(p, target.get_parameter(name)) for name, p in source.named_parameters())


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("name", ["unilora", "vblora"])
def test_old_files_pass_the_same_check(version: str, name: str, tmp_path: Path) -> None:
    path = ROOT / version / name
    model = PeftModel.from_pretrained(base(), path)
    with torch.no_grad():
        adapter_of(model).theta_d.add_(1.0)
    set_peft_model_state_dict(model, load_peft_weights(path))
    assert torch.equal(adapter_of(model).theta_d, file.read(path).theta_d)
    adapter_config = copy.deepcopy(model.peft_config["default"])
    adapter_config.header = adapter_config.layout_fingerprint = adapter_config.projection_checksum = None
    adapter_config.projection_seed = 5
    other = get_peft_model(base(), adapter_config)
    with pytest.raises(AdapterError, match="projection_seed must be 11, got 5"):
        set_peft_model_state_dict(other, load_peft_weights(path))
    with pytest.raises(AdapterError, match=rf"must include {IDENTITY}, .* as .* got none"):
        set_peft_model_state_dict(model, load_file(path / file.WEIGHTS))


@pytest.mark.parametrize("projection", ["unilora", "vblora"])
def test_files_from_before_the_header_pass_it_too(projection: str, tmp_path: Path) -> None:
    d = 60 if projection == "unilora" else None
    for name, fields in {"same": {}, "seed": {"projection_seed": 5}, "scale": {"lora_alpha": 16}}.items():
        _model(projection=projection, d=d, **fields).save_pretrained(tmp_path / name)
        tensors = load_file(tmp_path / name / file.WEIGHTS)
        del tensors[IDENTITY]
        old = {key.replace("uniproj_projections", "projections"): t for key, t in tensors.items()}
        save_file(old, tmp_path / name / file.WEIGHTS, metadata={"format": "pt"})
        reconfigure(tmp_path / name, format_version=None)
    model = _model(projection=projection, d=d)
    train_steps(model, "llama")  # so that a learned P is no longer the one that it was made as
    for name, word in {"seed": "projection_seed must be 5, got 0", "scale": "lora_alpha must be 16, got 4"}.items():
        with pytest.raises(AdapterError, match=word):
            model.load_adapter(tmp_path / name, "default")
    model.load_adapter(tmp_path / "same", "default")
    assert torch.equal(adapter_of(model).theta_d, file.read(tmp_path / "same").theta_d)


def test_a_configuration_of_one_folder_with_the_weights_of_another_is_refused(folder: Path, tmp_path: Path) -> None:
    other = _model(projection_seed=7)
    other.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="projection_seed must be 0, got 7"):
        PeftModel.from_pretrained(base_model("llama"), folder, config=other.peft_config["default"])


def test_weights_without_a_configuration_are_read_as_from_the_hub(folder: Path, tmp_path: Path) -> None:
    """`load_peft_weights` of a name on the hub puts the weights alone into the cache."""
    shutil.copy(folder / file.WEIGHTS, tmp_path)
    assert torch.equal(load_peft_weights(tmp_path)[THETA_D], file.read(folder).theta_d)


def test_the_identity_is_made_of_what_the_header_says(folder: Path) -> None:
    header = file.read(folder).header
    assert header is not None
    found = load_file(folder / file.WEIGHTS)[IDENTITY]
    assert found.shape == (len(header.identity), 5) and torch.equal(found, identity.encode(header))
    assert identity.difference(found, header) is None
