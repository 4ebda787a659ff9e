"""Bases that bitsandbytes, torchao, HQQ and AQLM quantise, on the CPU where there is no GPU."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora import LoraLayer
from torch import Tensor

from tests.compatibility.quantised import KINDS, MERGED, ROUNDED_INPUT, aqlm_layer, ordinary, quantised
from tests.compatibility.subjects import (
    Refuses,
    Remark,
    adapted,
    drift,
    gradient,
    logits,
    same,
    steps,
    theta_d,
    trained_model,
)
from uniproj.tuner import UniProjConfig
from uniproj.tuner.merging import merge_drift
from uniproj.tuner.quantised import dequantised

capability = partial(pytest.mark.capability, "Quantised bases")


def _scale(model: Any, size: float) -> None:
    """Such that ||s B A|| = size ||W|| over all adapted layers."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    with torch.no_grad():
        weights = sum(dequantised(layer.get_base_layer()).double().square().sum() for layer in layers)
        changes = sum(layer.get_delta_weight("default").double().square().sum() for layer in layers)
        theta_d(model).mul_((size**2 * weights / changes) ** 0.25)  # s B A is quadratic in theta_d


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the base model that `quantised` reads."""
    return tmp_path_factory.mktemp("quantised")


each_merged = pytest.mark.parametrize("kind", MERGED)


@capability("{kind}: training, saving, loading")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != ROUNDED_INPUT])
def test_training_saving_loading(kind: str, folder: Path, tmp_path: Path, remark: Remark) -> None:
    model, bare = trained_model(quantised(folder, kind)), quantised(folder, kind)
    model.save_pretrained(tmp_path)
    expected = gradient(adapted(ordinary(bare)))
    cosine = torch.cosine_similarity(gradient(adapted(bare)), expected, dim=0)
    assert cosine > 0.98  # 8-bit layers quantise their input too, and bfloat16 layers round it
    again = PeftModel.from_pretrained(quantised(folder, kind), tmp_path)
    same(logits(again), logits(model), "logits")
    with again.disable_adapter(), model.disable_adapter():
        same(logits(again), logits(model), "logits of the base")
    remark(f"cosine of the gradient with that of an ordinary base of the same weights {cosine:.4f}")


@capability(f"{ROUNDED_INPUT}: training")
def test_training_through_a_rounded_input(folder: Path, remark: Remark) -> None:
    with pytest.warns(UserWarning, match="q_proj: a layer must pass a gradient back to its input"):
        model = adapted(quantised(folder, ROUNDED_INPUT))
    expected = gradient(adapted(ordinary(quantised(folder, ROUNDED_INPUT))))
    cosine = torch.cosine_similarity(gradient(model), expected, dim=0)
    assert cosine < 0.9
    steps(model)
    remark(f"warns; cosine of the gradient with that of an ordinary base of the same weights {cosine:.4f}")


@capability(f"{ROUNDED_INPUT}: an adapter trained elsewhere")
def test_an_adapter_trained_elsewhere(folder: Path, tmp_path: Path, remark: Remark) -> None:
    """Is loaded without a warning, as it is not trained there."""
    model = trained_model(quantised(folder, "torchao, 8 bits"))
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*must pass a gradient back")
        again = PeftModel.from_pretrained(quantised(folder, ROUNDED_INPUT), tmp_path)
    _alike(model, again, remark)


@capability("{kind}: merging an adapter of half the norm of the weights, unmerging")
@each_merged
def test_merging_an_adapter_of_half_the_norm_of_the_weights(kind: str, folder: Path, remark: Remark) -> None:
    model = adapted(quantised(folder, kind)).eval()
    _scale(model, 0.5)
    with model.disable_adapter():
        bare = logits(model)
    adapter, weights = logits(model), merge_drift(model.base_model.model, ["default"])
    model.merge_adapter()
    merged = drift(logits(model), adapter, bare)
    model.unmerge_adapter()
    unmerged = drift(logits(model), adapter, bare)
    assert merged < 1
    remark(
        f"the weights are off by {weights:.2f} of the adapter's change, the logits by {merged:.2f} of theirs, "
        f"unmerged again by {unmerged:.2f}"
    )


@capability("{kind}: merging an adapter of 0.02 % of their norm")
@each_merged
def test_merging_an_adapter_that_the_grid_would_swallow(kind: str, folder: Path, refuses: Refuses) -> None:
    model = adapted(quantised(folder, kind)).eval()
    _scale(model, 0.0002)
    before = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with refuses():
            merge()
        same(logits(model), before, "logits")


@capability("AQLM: merging")
def test_merging_codes(folder: Path, refuses: Refuses) -> None:
    model = adapted(quantised(folder, "AQLM")).eval()
    before = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with refuses():
            merge()
        same(logits(model), before, "logits")


@capability("AQLM, codes of 8 bits: training on the CPU")
def test_training_on_codes_of_8_bits(refuses: Refuses, monkeypatch: pytest.MonkeyPatch) -> None:
    """As AQLM's kernel gives a view, which PEFT's layer writes into."""
    plain = SimpleNamespace(njit=lambda **_: lambda kernel: kernel, prange=range)  # compiling takes seconds
    monkeypatch.setattr("aqlm.inference_kernels.numba_kernel.numba", plain)
    base = torch.nn.Sequential(aqlm_layer(torch.nn.Linear(8, 8), bits=8))
    model = get_peft_model(base, UniProjConfig(d=8, r=2, target_modules=["0"]))
    with refuses(RuntimeError):
        model(torch.ones(1, 8))


@capability("drift of a merge by the size of the adapter")
def test_drift_of_a_merge_by_the_size_of_the_adapter(folder: Path, remark: Remark) -> None:
    """The smallest sizes are refused, so the drift is measured and nothing merged."""
    sizes, remarks = (0.0002, 0.02, 0.15, 1.5), []
    for kind in MERGED:
        model, drifts = adapted(quantised(folder, kind)).eval(), []
        for size in sizes:
            _scale(model, size)
            drifts.append(f"{merge_drift(model.base_model.model, ['default']):.2f}")
        remarks.append(f"{kind} {', '.join(drifts)}")
    remark(f"for an adapter of {', '.join(map(str, sizes))} times the norm of the weights: {'; '.join(remarks)}")


@capability("`prepare_model_for_kbit_training`, gradient checkpointing")
def test_prepare_model_for_kbit_training_gradient_checkpointing(folder: Path) -> None:
    base = prepare_model_for_kbit_training(
        quantised(folder, "bitsandbytes, 4 bits (NF4)"), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    steps(adapted(base).train())


@capability("methods made of base weights (LoRA-XS), dequantised one at a time")
def test_methods_made_of_base_weights_lora_xs_dequantised_one_at_a_time(folder: Path, remark: Remark) -> None:
    kinds = ("bitsandbytes, 8 bits", "bitsandbytes, 4 bits (NF4)", "torchao, 8 bits", "HQQ, 4 bits (bfloat16)", "AQLM")
    for kind in kinds:
        bare, changes = quantised(folder, kind), []
        for base in (ordinary(bare), bare):
            model = adapted(base, projection="lora_xs", d=None)
            with torch.no_grad():
                theta_d(model).fill_(0.1)
            gradient(model)
            changes.append(_change(model))
        assert torch.cosine_similarity(*changes, dim=0) > 0.98, kind
    remark("; ".join(kinds))


@capability("bitsandbytes, 4 bits: an adapter trained on the unquantised base")
def test_4_bits_an_adapter_trained_on_the_unquantised_base(folder: Path, tmp_path: Path, remark: Remark) -> None:
    model = trained_model()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(quantised(folder, "bitsandbytes, 4 bits (NF4)"), tmp_path)
    _alike(model, again, remark)


def _alike(model: Any, other: Any, remark: Remark) -> None:
    """Does one adapter change the logits of two bases alike?"""
    cosine = torch.cosine_similarity(_change(model), _change(other), dim=0)
    assert cosine > 0.5
    remark(f"cosine of the changes of the logits {cosine:.2f}")


def _change(model: Any) -> Tensor:
    """What the adapter changes of the logits."""
    with model.disable_adapter():
        bare = logits(model)
    return (logits(model) - bare).float().flatten()
