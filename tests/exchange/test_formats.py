"""A foreign format is one file: among ours, out of a package or a plugin, every command and function knows it."""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.format.saved import save
from uniproj import AdapterError
from uniproj.cli import main
from uniproj.exchange import export, formats, import_adapter, registry
from uniproj.format import file

# the numbers of theta_D, as lines of text
FORMAT = """
import torch
from uniproj import LoRALayout
from uniproj.exchange import Format, LoRAAdapter, register
from peft import LoraConfig

@register("lines")
class Lines(Format):
    def write(self, adapter, folder, rank):
        folder.mkdir()
        lora = adapter.lora()
        (folder / "layout").write_text(lora.layout.to_json())
        (folder / "lines").write_text("\\n".join(map(repr, lora.theta_D.tolist())))

    def reads(self, folder):
        return (folder / "lines").exists()

    def read(self, folder, base, trust_remote_code):
        layout = LoRALayout.from_json((folder / "layout").read_text())
        theta_D = torch.tensor([float(line) for line in (folder / "lines").read_text().split()])
        config = LoraConfig(r=3, lora_alpha=3, target_modules=["q", "v"])
        return LoRAAdapter(layout, theta_D, dict.fromkeys(layout.modules, 1.0), config, {})
"""


@pytest.fixture
def forgotten(monkeypatch) -> None:
    """What is registered in a test is unknown after it."""
    list(registry.every())  # of a module that is imported later nothing would be registered again
    monkeypatch.setattr(registry, "_formats", dict(registry._formats))


def _there_and_back(folder: Path, capsys) -> None:
    save(folder / "ours")
    assert main(["export", str(folder / "ours"), str(folder / "there"), "--to", "lines"]) == 0
    theta_D = [float(line) for line in (folder / "there" / "lines").read_text().split()]
    saved = file.read(folder / "ours")
    assert saved.header is not None
    assert theta_D == saved.header.build()(saved.theta_d).tolist()
    capsys.readouterr()
    assert main(["import", str(folder / "there"), str(folder / "back")]) == 0
    assert "lora" in capsys.readouterr().out
    assert file.read(folder / "back").theta_d.tolist() == theta_D


def test_a_file_among_the_formats_is_all_it_takes(tmp_path: Path, monkeypatch, capsys, forgotten) -> None:
    home = tmp_path / "formats"
    home.mkdir()
    (home / "lines.py").write_text(FORMAT)
    monkeypatch.setattr(registry, "_HOMES", [*registry._HOMES, str(home)])
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(home)])
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    assert " lines, lora, " in " ".join(capsys.readouterr().out.split())
    try:
        _there_and_back(tmp_path, capsys)
    finally:
        del sys.modules["uniproj.exchange.formats.lines"]


def test_a_package_brings_one(tmp_path: Path, monkeypatch, capsys, forgotten) -> None:
    (tmp_path / "somebodys_lines.py").write_text(FORMAT)
    monkeypatch.syspath_prepend(tmp_path)
    entry = importlib.metadata.EntryPoint("lines", "somebodys_lines:Lines", registry.ENTRY_POINTS)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    assert "lines" in registry.names() and "somebodys_lines" not in sys.modules
    _there_and_back(tmp_path, capsys)


def test_a_plugin_brings_one(tmp_path: Path, capsys, forgotten) -> None:
    save(tmp_path / "ours")
    (tmp_path / "mine.py").write_text(FORMAT)
    out = ["export", str(tmp_path / "ours"), str(tmp_path / "there"), "--to", "lines"]
    assert main(out) == 2 and "to must be one of diffusers, " in capsys.readouterr().err
    assert main([*out, "--plugins", str(tmp_path / "mine.py")]) == 0


@pytest.mark.parametrize(
    ("value", "said"),
    [("no_such_module:X", "No module named 'no_such_module'"), ("json:dumps", "no subclass of Format")],
)
def test_a_broken_package_is_a_sentence(value: str, said: str, tmp_path: Path, monkeypatch, forgotten) -> None:
    entry = importlib.metadata.EntryPoint("broken", value, registry.ENTRY_POINTS)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    save(tmp_path / "ours")
    with pytest.raises(AdapterError, match=f"format 'broken': {value} must be a class .*{said}.*Repair or remove"):
        export(tmp_path / "ours", tmp_path / "out", to="broken")
    export(tmp_path / "ours", tmp_path / "there")
    with pytest.warns(UserWarning, match="format 'broken'"):
        import_adapter(tmp_path / "there", tmp_path / "back")


def test_a_name_is_given_once(forgotten) -> None:
    with pytest.raises(AdapterError, match=r"'lora' is that of uniproj\.exchange\.formats\.lora\.LoRAFormat"):
        registry.register("lora")(type("Mine", (registry.Format,), {}))


def test_a_format_that_only_writes_or_reads_says_so(tmp_path: Path, forgotten) -> None:
    registry.register("deaf")(type("Deaf", (registry.Format,), {"reads": lambda self, folder: True}))
    save(tmp_path / "ours")
    with pytest.raises(AdapterError, match="a format that can be written, got 'deaf'"):
        export(tmp_path / "ours", tmp_path / "out", to="deaf")
    (tmp_path / "there").mkdir()
    with pytest.raises(AdapterError, match="deaf must be a format that can be read"):
        import_adapter(tmp_path / "there", tmp_path / "out")


def test_the_page_on_formats_shows_a_command_for_each() -> None:
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    commands = page.partition("In Python:")[0].lower()
    assert set(registry.names()) <= set(re.findall(r"\w+", commands))


def test_the_format_of_the_page_writes_the_updates_of_the_adapter(tmp_path: Path, forgotten) -> None:
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    exec(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)[-1], {})
    save(tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "npz", to="npz")
    export(tmp_path / "ours", tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / file.CONFIG).read_text())
    expected = load_file(tmp_path / "lora" / file.WEIGHTS)
    with np.load(tmp_path / "npz" / "adapter.npz") as found:
        modules = {name.rpartition(".")[0] for name in found}
        assert len([name for name in expected if ".lora_" in name]) == 2 * len(modules) == len(found)
        for module in modules:
            A, B = (expected[f"base_model.model.{module}.lora_{factor}.weight"].numpy() for factor in "AB")
            r, alpha = len(A), config["lora_alpha"]
            s = alpha / r**0.5 if config["use_rslora"] else alpha / r
            np.testing.assert_allclose(found[f"{module}.B"] @ found[f"{module}.A"], s * B @ A, rtol=1e-5, atol=1e-8)
