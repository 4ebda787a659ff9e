"""Projections of one's own on the command line: `--plugins` of every command of `python -m uniproj`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from tests.format.fixtures import base
from uniproj import ProjectionError, plugins, registry
from uniproj.cli import main
from uniproj.tuner import UniProjConfig

CYCLIC = (Path(__file__).parents[1] / "examples" / "cyclic.py").read_text()


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file that registers `mine`, which this process does not know."""
    path = tmp_path / "projection.py"
    path.write_text(CYCLIC.replace('"cyclic"', '"mine"'))
    return str(path)


def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a fresh process."""
    monkeypatch.delitem(registry._classes, "mine")
    for name in [name for name in sys.modules if name.startswith("uniproj_plugin_projection")]:
        monkeypatch.delitem(sys.modules, name)


def test_list_and_check_know_a_file_and_a_module(mine: str, tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "another_one.py").write_text(CYCLIC.replace('"cyclic"', '"another"'))
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["list", "--json", "--plugins", mine, "--plugins", "another_one"]) == 0
    assert {"mine", "another", "unilora"} <= {row["name"] for row in json.loads(capsys.readouterr().out)}
    _forget(monkeypatch)
    # the option before and after the name
    for words in (["--plugins", mine, "mine"], ["mine", "--plugins", mine]):
        assert main(["check", *words, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["failed"] == 0
    assert main(["check", "min"]) == 2
    assert "--plugins FILE" in capsys.readouterr().err


def test_every_command_on_adapters_takes_them(mine: str, tmp_path: Path, monkeypatch, capsys) -> None:
    plugins.load([mine])
    modules = ["q_proj", "v_proj"]
    ours, lora, base_folder = (str(tmp_path / name) for name in ("ours", "lora", "base"))
    base().save_pretrained(base_folder)
    get_peft_model(base(), UniProjConfig(projection="mine", d=40, r=4, target_modules=modules)).save_pretrained(ours)
    trained = get_peft_model(base(), LoraConfig(r=4, target_modules=modules, init_lora_weights=False))
    trained.save_pretrained(lora)
    commands = [
        ["inspect", ours],
        ["verify", ours, "--base", base_folder],
        ["restore", ours],
        ["export", ours, str(tmp_path / "exported")],
        ["import", lora, str(tmp_path / "imported"), "--projection", "mine", "--d", "40"],
    ]
    for command in commands:
        _forget(monkeypatch)
        assert main([*command, "--plugins", mine]) == 0, capsys.readouterr().err
    assert "mine" in registry._classes


@pytest.mark.parametrize("content", ["import nothing_of_this_name", "raise SystemExit(3)", None])
def test_a_plugin_that_cannot_be_imported_is_a_sentence(content: str | None, tmp_path: Path, capsys) -> None:
    path = tmp_path / "broken.py"
    if content is not None:
        path.write_text(content)
    assert main(["list", "--plugins", str(path)]) == 2
    assert f"plugins: {path} must be a Python file or module that can be imported" in capsys.readouterr().err


PARTLY = """
from uniproj import get, register


@register("partly")
class Partly(get("unilora")):
    variants = ({"assignment": "balanced"}, {"assignment": "iid"})

    def __init__(self, layout, d, seed=0, assignment="balanced"):
        if assignment == "balanced":
            raise ValueError("no luck")
        super().__init__(layout, d, seed)
"""


def test_check_goes_on_after_a_variant_that_cannot_be_built(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "partly.py").write_text(PARTLY)
    assert main(["check", "partly", "--json", "--plugins", str(tmp_path / "partly.py")]) == 1
    broken, whole = json.loads(capsys.readouterr().out)["variants"]
    assert [(c["name"], c["note"]) for c in broken["checks"]] == [("builds", "raised ValueError: no luck")]
    assert len(whole["checks"]) > 10 and [c for c in whole["checks"] if not c["passed"]] == []


def test_a_class_without_variants_is_refused_when_it_is_registered(monkeypatch) -> None:
    with pytest.raises(ProjectionError, match="`variants` of none must hold one choice at least"):
        registry.register("none")(type("Nothing", (registry.get("unilora"),), {"variants": ()}))
    assert "none" not in registry._classes
