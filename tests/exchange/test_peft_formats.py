"""UNILORA, VERA, VBLORA and TINYLORA, out and in: PEFT's logits are ours."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from tests.exchange.tools import SAME, difference, fields_of, loaded, logits, saved, trained_model
from tests.reference.peft_toys import CONFIGS
from tests.tuner.models import TARGETS, TASKS, base_model, config, train_steps
from uniproj import AdapterError
from uniproj.exchange import export, from_peft, import_adapter, registry
from uniproj.exchange.adapter import Adapter
from uniproj.exchange.formats._peft import PeftMethod
from uniproj.tuner import adapter_of

WEIGHTS = "adapter_model.safetensors"
OPTIONS: dict[str, dict[str, Any]] = {
    "UNILORA": {"theta_d_length": 60},
    "VERA": {},
    "VBLORA": {"num_vectors": 12, "vector_length": 8},
    "TINYLORA": {"r": 2, "u": 5, "weight_tying": 0.5},
}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
METHODS = [known.kind for known in registry.every() if isinstance(known, PeftMethod) and known.kind != "LORA"]


def peft_adapter(method: str, kind: str, dtype: torch.dtype = torch.float32, **fields: Any) -> PeftModel:
    """PEFT's own adapter after three steps, in eval mode."""
    options = {"r": 4, **OPTIONS[method], "target_modules": TARGETS[kind], "task_type": TASKS[kind], **fields}
    torch.manual_seed(1)
    model = get_peft_model(base_model(kind).to(dtype), CONFIGS[method][0](**options))
    train_steps(model, kind)
    return model.eval()


def _in(folder: Path, kind: str, out: Path) -> tuple[dict[str, Any], PeftModel]:
    report = import_adapter(folder, out, base=base_model(kind))
    return report, loaded(kind, out)


def _imported(model: PeftModel, kind: str, folder: Path) -> str:
    """The projection as which an adapter of PEFT comes in, with the same logits."""
    report, ours = _in(saved(model, folder / "theirs"), kind, folder / "ours")
    assert difference(logits(ours, kind), logits(model, kind)) <= SAME
    return report["projection"]


@pytest.mark.parametrize(
    ("kind", "projection", "method", "fields"),
    [
        ("bert", "unilora", "UNILORA", {}),
        ("gpt2", "unilora", "UNILORA", {"lora_alpha": 10}),
        ("llama", "unilora", "UNILORA", {"projection_kwargs": {"assignment": "peft"}}),
        ("bert", "unilora_local", "UNILORA", {}),
        ("gpt2", "unilora_nonuniform", "UNILORA", {"projection_seed": 7}),
        ("llama", "unilora_unnormalised", "UNILORA", {}),
        ("bert", "vera", "VERA", {"lora_alpha": 6}),
        ("gpt2", "vblora", "VBLORA", {"lora_alpha": 6}),
        ("llama", "tinylora", "TINYLORA", {"lora_alpha": 6, "projection_kwargs": {"u": 5}}),
        ("bert", "tinylora", "TINYLORA", {"r": 2, "projection_kwargs": {"u": 5, "weight_tying": 1.0, "side": "A"}}),
    ],
    ids=str,
)
def test_there_and_back(kind: str, projection: str, method: str, fields: dict[str, Any], tmp_path: Path) -> None:
    model = trained_model(kind, projection, **fields)
    wanted = logits(model, kind)
    folder, there, back = saved(model, tmp_path / "ours"), tmp_path / "there", tmp_path / "back"
    base = base_model(kind) if method == "TINYLORA" else None
    export(folder, there, to=method.lower(), base=base)
    assert fields_of(there)["peft_type"] == method
    assert difference(logits(loaded(kind, there), kind), wanted) <= SAME
    report, again = _in(there, kind, back)
    assert difference(logits(again, kind), wanted) <= SAME
    # its own method again, with as few numbers
    assert report["d"] == adapter_of(model).P.d and report["lost_energy"] == 0.0
    same = {"unilora_unnormalised": "unilora"}  # the scale is in theta_d by then
    if "side" not in fields.get("projection_kwargs", {}):
        assert report["projection"] == same.get(projection, projection)


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("method", METHODS)
def test_what_peft_trained_comes_in(kind: str, method: str, tmp_path: Path) -> None:
    model = peft_adapter(method, kind)
    # a frozen part that PEFT took from the SVD is its own: A and B are kept as they are
    assert _imported(model, kind, tmp_path) == ("lora" if method == "TINYLORA" else method.lower())
    P, ours = from_peft(model)[0], Adapter.of_file(tmp_path / "ours").projection
    assert ours.d == (P.D if method == "TINYLORA" else P.d)
    # and out again
    if method != "TINYLORA":
        export(tmp_path / "ours", tmp_path / "again", to=method.lower(), base=base_model(kind))
        assert difference(logits(loaded(kind, tmp_path / "again"), kind), logits(model, kind)) <= SAME
        assert fields_of(tmp_path / "again").keys() == fields_of(tmp_path / "theirs").keys()


def test_unilora_saves_its_indices_only_where_peft_would_draw_others(tmp_path: Path) -> None:
    _imported(peft_adapter("UNILORA", "llama"), "llama", tmp_path)
    for name, base in (("known", None), ("shown", base_model("llama"))):
        export(tmp_path / "ours", tmp_path / name, to="unilora", base=base)
        assert list(load_file(tmp_path / name / WEIGHTS)) == ["base_model.unilora_theta_d"]
        assert not fields_of(tmp_path / name)["save_indices"]
    # the same seed and rule, but not PEFT's order of modules
    other = trained_model("llama", "unilora", projection_kwargs={"assignment": "peft"})
    export(saved(other, tmp_path / "other"), tmp_path / "unknown", to="unilora")
    assert fields_of(tmp_path / "unknown")["save_indices"] and len(load_file(tmp_path / "unknown" / WEIGHTS)) > 1


def test_scales_that_peft_rounded_go_into_theta_d(tmp_path: Path) -> None:
    """PEFT keeps 1 / sqrt(n) in the dtype of the base: in bfloat16 it is off by up to 0.4 %."""
    model = peft_adapter("UNILORA", "llama", torch.bfloat16, save_indices=True)
    import_adapter(saved(model, tmp_path / "theirs"), tmp_path / "ours", base=base_model("llama"))
    P, theta_d = from_peft(model)
    ours = Adapter.of_file(tmp_path / "ours")
    with torch.no_grad():
        assert difference(ours.projection(ours.theta_d), P(theta_d)) <= SAME
        assert difference(ours.projection(theta_d), P(theta_d)) > 100 * SAME


def test_indices_of_no_known_rule_are_kept_as_lora(tmp_path: Path) -> None:
    model = peft_adapter("UNILORA", "llama", save_indices=True)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.unilora_indices_A["default"] = layer.unilora_indices_A["default"].flip(0)
    layer.unilora_scales_A["default"] = layer.unilora_scales_A["default"].flip(0)
    assert _imported(model, "llama", tmp_path) == "lora"


def test_vblora_with_its_top_logits_alone(tmp_path: Path) -> None:
    model = peft_adapter("VBLORA", "llama", topk=3, save_only_topk_weights=True)
    assert _imported(model, "llama", tmp_path) == "vblora"


def test_vera_without_its_matrices(tmp_path: Path) -> None:
    model = peft_adapter("VERA", "bert", save_projection=False, projection_prng_key=5)
    assert _imported(model, "bert", tmp_path) == "vera"
    assert fields_of(tmp_path / "ours")["projection_kwargs"] == {"draw": "peft"}


def test_a_rank_that_peft_cut_down_comes_in(tmp_path: Path) -> None:
    """TINYLORA's rank is at most that of the base weight: llama's v_proj has 16 rows here."""
    _imported(peft_adapter("TINYLORA", "llama", r=20), "llama", tmp_path)
    assert set(fields_of(tmp_path / "ours")["rank_pattern"].values()) == {16}


def test_a_compressed_import_tells_its_loss(tmp_path: Path) -> None:
    theirs = saved(peft_adapter("VERA", "llama"), tmp_path / "theirs")
    report = import_adapter(theirs, tmp_path / "ours", "unilora", d=300, base=base_model("llama"))
    assert 0.0 < report["lost_energy"] < 1.0 and report["d"] == 300
    loaded("llama", tmp_path / "ours")


def test_dropout_bias_and_places_come_along(tmp_path: Path) -> None:
    fields = {"lora_dropout": 0.1, "bias": "lora_only", "exclude_modules": ["layers.1.self_attn.v_proj"]}
    model = trained_model("llama", "vera", **fields)
    export(saved(model, tmp_path / "ours"), tmp_path / "there", to="vera")
    found = fields_of(tmp_path / "there")
    assert found["vera_dropout"] == 0.1 and found["bias"] == "vera_only" and len(found["target_modules"]) == 5
    assert difference(logits(loaded("llama", tmp_path / "there"), "llama"), logits(model, "llama")) <= SAME
    _, again = _in(tmp_path / "there", "llama", tmp_path / "back")
    assert fields_of(tmp_path / "back")["lora_dropout"] == 0.1
    assert difference(logits(again, "llama"), logits(model, "llama")) <= SAME


# ---- refusals ------------------------------------------------------------------------------------------


def test_what_a_format_cannot_say_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(AdapterError, match="VERA must get a VeRA projection, got 'unilora'"):
        export(trained_model("llama", "unilora"), out, to="vera")
    with pytest.raises(AdapterError, match=r"must be one positive number for all modules, got \[1\.0, 1\.75"):
        export(trained_model("llama", "unilora", alpha_pattern={"v_proj": 7}), out, to="unilora")
    with pytest.raises(AdapterError, match=r"must have .* by the projection's layout"):
        patterns = {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"v_proj": 3}}
        export(trained_model("llama", "unilora", **patterns), out, to="unilora")
    with pytest.raises(AdapterError, match="UNILORA has no trainable_token_indices"):
        export(trained_model("llama", "unilora", trainable_token_indices=[3]), out, to="unilora")
    folder = saved(trained_model("llama", "tinylora", projection_kwargs={"u": 5}), tmp_path / "ours")
    with pytest.raises(AdapterError, match=r"tinylora is made of its weights\. Pass --base"):
        export(folder, out, to="tinylora")
    assert not out.exists()


def test_bad_imports_are_refused(tmp_path: Path) -> None:
    theirs, out = saved(peft_adapter("TINYLORA", "llama"), tmp_path / "theirs"), tmp_path / "out"

    def refused(match: str, base: nn.Module | None) -> None:
        with pytest.raises(AdapterError, match=match):
            import_adapter(theirs, out, base=base)

    refused(r"of TINYLORA belongs to, .* the base model alone tells\. Pass --base", None)
    refused("must have modules called", base_model("bert"))
    base, longer = base_model("llama"), base_model("llama")
    longer.model.layers.append(copy.deepcopy(longer.model.layers[0]))
    refused("every tensor must belong to a module of the base model", longer)
    tensors = {key: tensor.clone() for key, tensor in load_file(theirs / WEIGHTS).items()}
    key = next(key for key in tensors if "tinylora_A" in key)
    for change, match in (
        ({key: tensors[key][:, 1:].contiguous()}, "must fit the base model"),
        ({key: tensors[key] * float("nan")}, "all numbers must be finite"),
        ({"base_model.model.x.tinylora_A": tensors[key].clone()}, "every tensor must belong"),
    ):
        save_file({**tensors, **change}, theirs / WEIGHTS)
        refused(match, base)
    (theirs / WEIGHTS).write_bytes(b"\x10")
    refused("must be a whole safetensors file", base)
    (theirs / WEIGHTS).rename(theirs / "adapter_model.bin")
    refused(r"got adapter_model\.bin, which can run code", base)
    with pytest.raises(AdapterError, match="must hold an adapter of PEFT type LORA or TINYLORA or UNILORA"):
        import_adapter(saved(get_peft_model(base_model("llama"), config("llama")), tmp_path / "ours"), out)
    assert not out.exists()
