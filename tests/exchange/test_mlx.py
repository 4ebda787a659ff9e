"""Export to MLX: the written folder, read by mlx-lm's rules and without it, has the updates of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import FalconH1Config

from tests.exchange.tools import SAME, difference, fields_of, saved, trained_model
from tests.tuner.models import base_model, config
from uniproj import AdapterError
from uniproj.exchange import export
from uniproj.tuner import UniProjConfig

WEIGHTS = "adapters.safetensors"
RANKS = {"rank_pattern": {"layers.0.self_attn.q_proj": 3}, "r": 4, "lora_alpha": 6}
SCALES = {"alpha_pattern": {"v_proj": 7}, **RANKS}


@torch.no_grad()
def _by_mlx_lms_rules(folder: Path, base: nn.Module) -> dict[str, Tensor]:
    """delta W (out, in) by module, as `load_adapters` and `LoRALinear` of mlx-lm 0.32.2 make it.

    A module gets lora_a (in, rank) and lora_b (rank, out) if its name is one of `keys`, or its name within one of the
    last `num_layers` layers is; a tensor of the file that no such module has, or has in another shape, is an error.
    """
    found = fields_of(folder)
    assert found["fine_tune_type"] == "lora"
    given, layers = found["lora_parameters"], [*base.model.layers]
    rank, scale = given["rank"], given["scale"]
    assert type(rank) is int and type(scale) is float and given["dropout"] == 0.0
    shapes = {}
    for i, layer in [*enumerate(layers)][-max(found["num_layers"], 0) :]:
        shapes |= {f"model.layers.{i}.{k}": m.weight.shape for k, m in layer.named_modules() if k in given["keys"]}
    shapes |= {k: m.weight.shape for k, m in base.named_modules() if k in given["keys"]}
    tensors = load_file(folder / WEIGHTS)
    assert tensors.keys() == {f"{name}.{factor}" for name in shapes for factor in ("lora_a", "lora_b")}
    for name, (out, in_) in shapes.items():
        assert tensors[f"{name}.lora_a"].shape == (in_, rank) and tensors[f"{name}.lora_b"].shape == (rank, out)
    pairs = {name: [tensors[f"{name}.lora_{factor}"].double() for factor in "ba"] for name in shapes}
    # x lora_a lora_b = (lora_a lora_b)^T x
    return {name: scale * (a @ b).T for name, (b, a) in pairs.items()}


@pytest.mark.parametrize(
    ("fields", "rank", "scale"),
    [({"lora_alpha": 6}, 4, 1.5), ({"lora_alpha": 6, "use_rslora": True}, 4, 3.0), (RANKS, 4, 1.0), (SCALES, 4, 1.0)],
    ids=["one", "rslora", "ranks", "scales"],
)
def test_the_updates_are_those_of_the_model(fields: dict[str, Any], rank: int, scale: float, tmp_path: Path) -> None:
    model = trained_model("llama", "unilora", **fields)
    export(saved(model, tmp_path / "ours"), tmp_path / "mlx", to="mlx")
    given = fields_of(tmp_path / "mlx")["lora_parameters"]
    assert (given["rank"], given["scale"]) == (rank, scale)
    found = _by_mlx_lms_rules(tmp_path / "mlx", base_model("llama"))
    layers = {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert found.keys() == layers.keys()
    for name, delta in found.items():
        assert difference(delta, layers[name].get_delta_weight("default")) <= SAME, name


def test_one_scale_leaves_every_bit(tmp_path: Path) -> None:
    model = trained_model("llama", "unilora", lora_alpha=6)
    export(model, tmp_path / "mlx", to="mlx")
    export(model, tmp_path / "lora")
    theirs = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for name, tensor in load_file(tmp_path / "mlx" / WEIGHTS).items():
        module, factor = name.rsplit(".lora_", 1)
        assert torch.equal(tensor, theirs[f"base_model.model.{module}.lora_{factor.upper()}.weight"].T)


def test_some_modules_of_some_layers_and_the_output(tmp_path: Path) -> None:
    model = get_peft_model(base_model("llama"), config("llama", target_modules=r".*layers\.0\..*v_proj|lm_head"))
    export(model, tmp_path, to="mlx")
    assert [*_by_mlx_lms_rules(tmp_path, base_model("llama"))] == ["model.layers.0.self_attn.v_proj", "lm_head"]


def test_a_model_whose_weights_mlx_lm_changes_is_refused(tmp_path: Path) -> None:
    """`mlx_lm.models.falcon_h1`, `sanitize`: `attention_in_multiplier` goes into q_proj, and so on."""
    model = get_peft_model(base_model("llama"), config("llama"))
    model.get_base_model().config = FalconH1Config(num_hidden_layers=2)
    with pytest.raises(AdapterError, match=r"got a Falcon-H1, .* Export to lora and merge it into the base model"):
        export(model, tmp_path / "out", to="mlx")
    assert not (tmp_path / "out").exists()


def test_modules_that_mlx_lm_calls_otherwise_are_refused(tmp_path: Path) -> None:
    for kind, name in (("gpt2", r"transformer\.h\.0\.attn\.c_attn"), ("bert", r"bert\.encoder\.layer\.0\.")):
        model = get_peft_model(base_model(kind), config(kind, task_type=None))
        with pytest.raises(AdapterError, match=f"must be called model.layers.N.NAME, or lm_head, .*, got {name}"):
            export(model, tmp_path / "out", to="mlx")
    stacked = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.Linear(4, 4)})})
    model = get_peft_model(stacked, UniProjConfig(d=8, r=2, target_modules=["layers"]))
    with pytest.raises(AdapterError, match=r"got model\.layers\. Export to lora and merge it into the base model"):
        export(model, tmp_path / "out", to="mlx")
    assert not (tmp_path / "out").exists()
