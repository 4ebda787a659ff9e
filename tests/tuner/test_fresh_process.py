"""A saved adapter in a process that has not seen it: `import uniproj` is enough, and its model card shows it."""

from __future__ import annotations

import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import uniproj.format
from tests.tuner.models import base_model, batch, config, train_steps

ROOT = Path(__file__).parents[2]
EQUAL = """
import torch
torch.set_num_threads(1)  # as where the logits were made
x, expected = torch.load("inputs.pt"), torch.load("logits.pt")
assert torch.equal(model.eval()(**x).logits, expected)
print("equal")
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with a base model, an adapter of it, inputs and the logits of both together."""
    folder = tmp_path_factory.mktemp("saved")
    base_model("llama").save_pretrained(folder / "base")
    base = base_model("llama")
    base.config._name_or_path = base.name_or_path = str(folder / "base")
    model = get_peft_model(base, config("llama"))
    train_steps(model, "llama", 2)
    model.save_pretrained(folder / "adapter")
    with torch.no_grad():
        torch.save(model.eval()(**batch("llama")).logits, folder / "logits.pt")
    torch.save(batch("llama"), folder / "inputs.pt")
    return folder


def _run(code: str, folder: Path) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_import_uniproj_is_enough_and_imports_no_peft_before_it_is_needed(saved: Path) -> None:
    # PEFT imports the tuner, which would find a module of the format half made
    modules = ", ".join(f"uniproj.format.{module.name}" for module in pkgutil.iter_modules(uniproj.format.__path__))
    code = f"""
import importlib.util, sys, uniproj
import {modules}
from uniproj.cli import main
main(["list"])
assert not {{"peft", "transformers"}} & set(sys.modules)
importlib.util.find_spec("peft")  # as Transformers asks whether it is installed
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained("adapter")
"""
    assert "equal" in _run(code + EQUAL, saved)


@pytest.mark.system
def test_the_model_card_shows_code_that_loads_the_adapter(saved: Path) -> None:
    """In a process that has imported PEFT first."""
    card = (saved / "adapter" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    before = """
import importlib
importlib.import_module("peft.peft_model")
from transformers import AutoModelForCausalLM
"""
    # the base lies in a folder, whose name the card does not tell
    code = code.replace("base = ...", 'base = AutoModelForCausalLM.from_pretrained("base")')
    code = re.sub(r'"the folder of this file.*?"', '"adapter"', code)
    assert "equal" in _run(before + code + EQUAL, saved)
    assert "\n- uniproj\n" in card  # a tag


def test_a_card_of_ones_own_keeps_its_text_and_gets_the_code_once(tmp_path: Path) -> None:
    model = get_peft_model(base_model("llama"), config("llama"))
    (tmp_path / "README.md").write_text("# My adapter\n\nWritten by hand.\n")
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "Written by hand." in card and card.count("import uniproj") == 1


def test_a_card_is_not_written_through_a_link(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.md"
    theirs.write_text("private\n")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "README.md").symlink_to(theirs)
    get_peft_model(base_model("llama"), config("llama")).save_pretrained(tmp_path / "saved")
    assert theirs.read_text() == "private\n"
    card = tmp_path / "saved" / "README.md"
    assert "import uniproj" in card.read_text() and "private" not in card.read_text() and not card.is_symlink()


def test_the_card_of_a_lora_stays_as_peft_writes_it(tmp_path: Path) -> None:
    model: PeftModel = get_peft_model(base_model("llama"), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    assert "uniproj" not in (tmp_path / "README.md").read_text()
