"""Architectures: an adapter's life on small models with random weights, whatever kinds of layers they have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from tests.compatibility import architectures
from tests.compatibility.architectures import ARCHITECTURES
from tests.compatibility.subjects import Remark, drift, projection, same
from uniproj.exchange import export

ROOT = Path(__file__).parents[2]
# of what the adapter changes of the output
SHARE = 1e-3


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of adapters, one for each architecture, trained by another process."""
    folder = tmp_path_factory.mktemp("trained")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", architectures.__name__, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.capability("Architectures", "{name}")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture(name: str, trained: Path, tmp_path: Path, remark: Remark) -> None:
    architecture, folder = ARCHITECTURES[name], trained / name
    expected = load_file(folder / "output.safetensors")["output"]
    first, *_, last = json.loads((folder / "losses.json").read_text())
    assert last < first
    lora = get_peft_model(architecture.base(), LoraConfig(**architecture.lora()))  # type: ignore[arg-type]
    layers = [m.get_base_layer() for m in lora.modules() if isinstance(m, LoraLayer)]
    with torch.no_grad():
        base = architecture.base()
        bare = architecture.output(base)
        model = PeftModel.from_pretrained(base, folder)
        same(architecture.output(model), expected, "output in another process")
        D = sum(p.numel() for p in lora.parameters() if p.requires_grad)
        assert projection(model).layout.D == D
        assert drift(architecture.output(model.merge_and_unload()), expected, bare) < SHARE
        export(folder, tmp_path / "lora", base=architecture.base())
        exported = PeftModel.from_pretrained(architecture.base(), tmp_path / "lora")
        assert drift(architecture.output(exported), expected, bare) < SHARE
    counts = Counter(type(layer).__name__ for layer in layers)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    remark(f"{kinds}; D = {D}; loss {1 - last / first:.1%} lower")
