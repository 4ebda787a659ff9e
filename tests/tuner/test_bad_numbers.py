"""Numbers that no loading takes are not saved: nothing is written, and the good adapter that lies there stays."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.format.saved import save
from tests.tuner.models import base_model, batch, config, train_steps
from uniproj import AdapterError
from uniproj.exchange import export
from uniproj.exchange.adapter import Adapter
from uniproj.format import file
from uniproj.format.keys import OF_P, THETA_D
from uniproj.tuner import adapter_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
HEAD = {"modules_to_save": ["lm_head"]}


def _model(projection: str = "unilora", **fields: Any) -> PeftModel:
    d = None if projection in ("vblora", "tied_lora") else 60
    model = get_peft_model(base_model("llama"), config("llama", projection, d, **fields))
    train_steps(model, "llama", 1)
    return model


def _lies(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _number(model: PeftModel, where: str, name: str = "default") -> Tensor:
    tuner = model.base_model
    if where == "head":
        return tuner.model.lm_head.modules_to_save[name].weight
    P, theta_d = adapter_of(tuner, name)
    return P.logits if where == "P" else theta_d


BAD: dict[str, tuple[str, dict[str, Any], str, Callable[[Tensor], object], str]] = {
    "NaN": ("unilora", {}, "theta_d", lambda x: x[7].fill_(math.nan), "theta_d: all numbers must be finite, got NaN"),
    "inf": ("unilora", {}, "theta_d", lambda x: x[7].fill_(-math.inf), "theta_d: all numbers must be finite"),
    "zeros": ("unilora", {}, "theta_d", lambda x: x.zero_(), r"theta_d = 0 is a saddle"),
    "zeros of a tied P": ("tied_lora", {}, "theta_d", lambda x: x.zero_(), r"theta_d = 0 is a saddle"),
    "head": (
        "unilora",
        HEAD,
        "head",
        lambda x: x[3, 3].fill_(math.nan),
        r"lm_head\.weight: all numbers must be finite",
    ),
    "P": ("vblora", {}, "P", lambda x: x.view(-1)[3].fill_(math.inf), r"logits: all numbers must be finite"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_numbers_are_not_saved_by_any_way(case: str, tmp_path: Path) -> None:
    projection, fields, where, spoil, said = BAD[case]
    model, there, new = _model(projection, **fields), tmp_path / "there", tmp_path / "new"
    model.save_pretrained(there)
    before = _lies(there)
    with torch.no_grad():
        spoil(_number(model, where))
    ways: list[Callable[[Path], object]] = [
        lambda out: model.save_pretrained(out),
        lambda out: model.save_pretrained(out, state_dict=model.state_dict()),
        lambda out: model.save_pretrained(out, selected_adapters=["default"], save_embedding_layers=False),
        lambda out: export(model, out),
        lambda out: export(model, out, to="vllm"),
        lambda out: Adapter.of_model(model).save(out),
    ]
    for way in ways:
        for out in (there, new):
            with pytest.raises(AdapterError, match=said):
                way(out)
        assert _lies(there) == before and not new.exists()
    numbers = get_peft_model_state_dict(model)  # still gives what there is
    assert any(not t.isfinite().all() for t in numbers.values()) or not numbers[THETA_D].any()
    PeftModel.from_pretrained(base_model("llama"), there)


@pytest.mark.parametrize("bad", ["default", "second"])
def test_of_several_adapters_all_are_good_or_none_is_saved(bad: str, tmp_path: Path) -> None:
    model = _model()
    model.add_adapter("second", config("llama", d=50))
    model.save_pretrained(tmp_path)
    before = _lies(tmp_path)
    model.set_adapter("second")
    train_steps(model, "llama", 1)
    with torch.no_grad():
        _number(model, "theta_d", bad).fill_(math.nan)
    with pytest.raises(
        AdapterError, match=r"nothing was saved, and what lies there stays as it was: .* must be finite"
    ):
        model.save_pretrained(tmp_path)
    assert _lies(tmp_path) == before
    good = "second" if bad == "default" else "default"
    model.save_pretrained(tmp_path, selected_adapters=[good])
    PeftModel.from_pretrained(base_model("llama"), tmp_path if good == "default" else tmp_path / good)


def test_a_given_state_dict_is_judged_by_its_own_numbers(tmp_path: Path) -> None:
    model = _model()
    state = {
        key: tensor.clone() if isinstance(tensor, Tensor) else tensor for key, tensor in model.state_dict().items()
    }
    state[f"{THETA_D}.default"][3] = math.nan
    with pytest.raises(AdapterError, match="must be finite"):
        model.save_pretrained(tmp_path, state_dict=state)
    assert not _lies(tmp_path)
    model.save_pretrained(tmp_path)


def test_zeros_are_saved_where_c_is_not_zero(tmp_path: Path) -> None:
    model = _model("sparse")
    with torch.no_grad():
        _number(model, "theta_d").zero_()
    model.save_pretrained(tmp_path / "ours")
    PeftModel.from_pretrained(base_model("llama"), tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "lora")


def test_a_file_is_not_written_with_what_cannot_be_read(tmp_path: Path) -> None:
    saved = save(tmp_path)
    before = _lies(tmp_path)
    assert saved.header is not None
    theta_d = saved.theta_d
    for tensors, said in (
        ({THETA_D: theta_d * math.nan}, "must be finite"),
        ({THETA_D: theta_d * 0}, "saddle"),
        ({THETA_D: theta_d[1:]}, r"shape \(40,\), got \(39,\)"),
        ({}, "got none"),
        ({THETA_D: theta_d, f"{OF_P}logits": theta_d}, "does not have"),
        ({THETA_D: theta_d, "base_model.model.norm.weight": theta_d}, "must be what the configuration trains"),
    ):
        with pytest.raises(AdapterError, match=said):
            file.write(tmp_path, tensors, saved.header, saved.config)
        assert _lies(tmp_path) == before


@pytest.mark.parametrize(("to", "rank"), [("unilora", None), ("lora", 8)])
def test_an_export_beyond_float32_leaves_what_lies_there(to: str, rank: int | None, tmp_path: Path) -> None:
    """Finite numbers that are not once the scale is in them."""
    model = _model()
    export(model, tmp_path, to=to)
    before = _lies(tmp_path)
    with torch.no_grad():
        _number(model, "theta_d").fill_(3e38)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers if to == "unilora" else layers[-1:]:  # where scales differ, the rest of one goes into B
        layer.scaling["default"] = 1e6
    with pytest.raises(AdapterError, match=r"as it would be saved: all numbers must be finite"):
        export(model, tmp_path, to=to, rank=rank)
    assert _lies(tmp_path) == before


class _Diverge(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, model: PeftModel, **_: Any) -> None:
        if state.global_step == 6:
            with torch.no_grad():
                _number(model, "theta_d").fill_(math.nan)


def test_a_checkpoint_of_a_run_that_diverged_is_refused_and_the_last_good_one_stays(tmp_path: Path) -> None:
    arguments = TrainingArguments(
        str(tmp_path), max_steps=8, per_device_train_batch_size=4, learning_rate=0.01, save_steps=4,
        report_to=[], seed=1, disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    model = get_peft_model(base_model("bert"), config("bert"))
    data = Dataset.from_dict({name: values.tolist() for name, values in batch("bert", rows=24).items()})
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[_Diverge()])
    with pytest.raises(AdapterError, match=r"checkpoint-8: nothing was saved.* must be finite"):
        trainer.train()
    PeftModel.from_pretrained(base_model("bert"), tmp_path / "checkpoint-4")
    assert not _lies(tmp_path / "checkpoint-8")
    before = _lies(tmp_path / "checkpoint-4")
    with pytest.raises(AdapterError, match="nothing was saved"):
        trainer.save_model(str(tmp_path / "checkpoint-4"))
    assert _lies(tmp_path / "checkpoint-4") == before
