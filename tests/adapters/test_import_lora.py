"""LoRA folders in: exact where P is the identity, compressed into any P, refused where the update is another's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from tests.adapters.tools import loaded, logits
from tests.tuner.models import TARGETS, base_model, train_steps
from uniproj import AdapterError
from uniproj.adapters.exchange import export, import_adapter


def _lora(folder: Path, steps: int = 3, **fields: Any) -> Path:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS["llama"], "task_type": "CAUSAL_LM", **fields}
    model = get_peft_model(base_model("llama"), LoraConfig(**settings))
    train_steps(model, "llama", steps)
    model.save_pretrained(str(folder))
    return folder


def test_out_and_in_keeps_every_bit(tmp_path: Path) -> None:
    import_adapter(_lora(tmp_path / "lora"), tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back")
    before, after = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("lora", "back"))
    assert before.keys() == after.keys() and all((before[name] == after[name]).all() for name in before)


@pytest.mark.parametrize(
    ("projection", "options"), [("vblora", {"num_vectors": 8, "vector_length": 4}), ("tied_lora", {})]
)
def test_a_learned_projection_is_moved_to_it(projection: str, options: dict[str, Any], tmp_path: Path) -> None:
    report = import_adapter(_lora(tmp_path / "lora"), tmp_path / "ours", projection, options=options)
    assert report["method"] == "gradient descent" and report["captured_factor"] > 0
    assert logits(loaded("llama", tmp_path / "ours"), "llama").isfinite().all()


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_that_change_the_base_are_refused(start: str, tmp_path: Path) -> None:
    """On such a folder PEFT subtracts A and B from the base weights when it loads it; a uniproj adapter would not."""
    folder = _lora(tmp_path / "lora", init_lora_weights=start)
    with pytest.raises(AdapterError, match=f"init_lora_weights = '{start}'.*path_initial_model_for_weight_conversion"):
        import_adapter(folder, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
