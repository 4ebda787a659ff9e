"""LoRA folders in: exact where P is the identity, compressed into any P, refused where the update is another's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, UniLoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests.exchange.tools import fields_of, loaded, logits
from tests.tuner.models import TARGETS, base_model, train_steps
from uniproj import AdapterError
from uniproj.exchange import export, import_adapter
from uniproj.format import file


def _lora(folder: Path, steps: int = 3, **fields: Any) -> Path:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS["llama"], "task_type": "CAUSAL_LM", **fields}
    model = get_peft_model(base_model("llama"), LoraConfig(**settings))
    train_steps(model, "llama", steps)
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def trained_lora(tmp_path_factory) -> Path:
    return _lora(tmp_path_factory.mktemp("trained") / "lora")


@pytest.fixture
def lora(trained_lora: Path, tmp_path: Path) -> Path:
    """A copy, which a test may change."""
    return Path(shutil.copytree(trained_lora, tmp_path / "lora"))


def test_out_and_in_keeps_every_bit(lora: Path, tmp_path: Path) -> None:
    import_adapter(lora, tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (lora, tmp_path / "back"))
    assert before.keys() == after.keys() and all((before[name] == after[name]).all() for name in before)


def test_a_learned_projection_is_moved_to_it(lora: Path, tmp_path: Path) -> None:
    options = {"num_vectors": 8, "vector_length": 4}
    report = import_adapter(lora, tmp_path / "ours", "vblora", options=options)
    assert report["method"] == "gradient descent" and report["captured_factor"] > 0
    assert logits(loaded("llama", tmp_path / "ours"), "llama").isfinite().all()


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_that_change_the_base_are_refused(start: str, tmp_path: Path) -> None:
    """On such a folder PEFT subtracts A and B from the base weights when it loads it; a uniproj adapter would not."""
    folder = _lora(tmp_path / "lora", steps=0, init_lora_weights=start)
    with pytest.raises(AdapterError, match=f"init_lora_weights = '{start}'.*path_initial_model_for_weight_conversion"):
        import_adapter(folder, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_alpha": None}, "lora_alpha must be a finite number"),
        ({"lora_alpha": "16"}, "lora_alpha must be a finite number"),
        ({"lora_alpha": float("nan")}, "must be JSON, got the number nan"),
        ({"alpha_pattern": {"(": 3}}, "alpha_pattern: every pattern must be a regular expression"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern: every pattern must be a regular expression"),
        ({"rank_pattern": {"q_proj": 1}}, "must have the rank of the configuration, 1, got 4"),
        ({"alpha_pattern": [1]}, "alpha_pattern must be patterns of names with finite numbers"),
        ({"alpha_pattern": {"q": "x"}}, "alpha_pattern must be patterns of names with finite numbers"),
    ],
)
def test_a_scale_that_is_none_is_refused(fields: dict[str, Any], message: str, lora: Path, tmp_path: Path) -> None:
    (lora / "adapter_config.json").write_text(json.dumps(fields_of(lora) | fields))
    with pytest.raises(AdapterError, match=message):
        import_adapter(lora, tmp_path / "ours")


def test_heads_of_odd_dtypes_and_numbers_beyond_float32(tmp_path: Path) -> None:
    folder = _lora(tmp_path / "lora", steps=1, modules_to_save=["lm_head"])
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    head = "base_model.model.lm_head.weight"
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        save_file({**tensors, head: torch.ones(64, 32).to(dtype)}, weights)
        import_adapter(folder, tmp_path / "ours")
        export(tmp_path / "ours", tmp_path / "back")
        assert load_file(tmp_path / "back" / weights.name)[head].dtype == dtype
    for dtype in (torch.float8_e4m3fn, torch.complex64, torch.uint16, torch.int8):
        save_file({**tensors, head: torch.ones(64, 32).to(dtype)}, weights)
        with pytest.raises(AdapterError, match=r"lm_head\.weight must be of dtype float32 .* got "):
            import_adapter(folder, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    name = next(name for name in tensors if "lora_A" in name)
    save_file({**tensors, name: tensors[name].double() * 1e300}, weights)
    with pytest.raises(AdapterError, match="finite"):
        import_adapter(folder, tmp_path / "far")
    assert not (tmp_path / "far").exists()


def test_the_arguments_are_checked(tmp_path: Path) -> None:
    model = get_peft_model(base_model("llama"), UniLoraConfig(target_modules=TARGETS["llama"], theta_d_length=64))
    model.save_pretrained(str(tmp_path / "unilora"))
    with pytest.raises(AdapterError, match="projection to compress into"):
        import_adapter(tmp_path / "unilora", tmp_path / "out", d=7, base=base_model("llama"))
    with pytest.raises(AdapterError, match="got Linear"):
        export(torch.nn.Linear(2, 2), tmp_path / "out")  # type: ignore[arg-type]
    for function in (export, import_adapter):
        with pytest.raises(AdapterError, match="must be a folder"):
            function("x" * 300, tmp_path / "out")


def _linked(out: Path, source: Path, link: Callable[[Path, Path], object]) -> Path:
    out.mkdir()
    link(source / file.WEIGHTS, out / file.WEIGHTS)
    return out


def _moved_into(out: Path, source: Path) -> Path:
    """The numbers lie in `out`; the source has links to them."""
    out.mkdir()
    for name in (file.CONFIG, file.WEIGHTS):
        (source / name).rename(out / name)
        (source / name).symlink_to(out / name)
    return out


def _bound(out: Path, source: Path) -> Path:
    out.mkdir()
    if not hasattr(os, "geteuid") or os.geteuid() or subprocess.run(["mount", "--bind", source, out]).returncode:
        pytest.skip("no mounts here")
    return out


PLACES = {
    "itself": lambda out, source: source,
    "through a missing folder": lambda out, source: out / ".." / source.name,
    "through a folder": lambda out, source: out.mkdir() or out / ".." / source.name,
    "link": lambda out, source: out.symlink_to(source) or out,
    "link to a link": lambda out, source: (out.with_name("m").symlink_to(source), out.symlink_to("m"), out)[2],
    "relative link": lambda out, source: out.symlink_to(source.name) or out / ".",
    "link to its weights": lambda out, source: _linked(out, source, lambda old, new: new.symlink_to(old)),
    "hard link": lambda out, source: _linked(out, source, lambda old, new: new.hardlink_to(old)),
    "links of the source": _moved_into,
    "bind mount": _bound,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("function", [export, import_adapter])
def test_what_is_read_is_never_replaced(
    function: Callable[..., Any], place: str, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = lora
    if function is export:
        import_adapter(source, source := tmp_path / "ours")
    before = {name: (source / name).read_bytes() for name in (file.CONFIG, file.WEIGHTS)}
    given = tmp_path / "out"
    out = PLACES[place](given, source)
    try:
        for spelling in (out, os.path.relpath(out) if place == "itself" else str(out)):
            with pytest.raises(AdapterError, match="must be another folder"):
                function(source, spelling)
    finally:
        if place == "bind mount":
            subprocess.run(["umount", given], check=True)
    assert {name: (source / name).read_bytes() for name in before} == before


def test_another_folder_behind_a_link_is_written(lora: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    (tmp_path / "link").symlink_to(there)
    import_adapter(lora, tmp_path / "link")
    model = loaded("llama", there)
    model.save_pretrained(str(tmp_path / "live"))
    export(model, tmp_path / "live")  # a live model reads no file
    assert fields_of(tmp_path / "live")["peft_type"] == "LORA" and (tmp_path / "link").is_symlink()
