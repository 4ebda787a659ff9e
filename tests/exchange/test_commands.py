"""`python -m uniproj export` and `import`, on folders alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.exchange.tools import SAME, difference, loaded, logits, saved, trained_model
from tests.tuner.models import TARGETS, TASKS, base_model, train_steps
from uniproj.cli import main
from uniproj.exchange.adapter import Adapter
from uniproj.exchange.formats.lora import read


def test_export_and_import_of_lora(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = trained_model("bert", "unilora")
    ours, there, back = (str(tmp_path / name) for name in ("ours", "there", "back"))
    saved(model, tmp_path / "ours")
    assert main(["export", ours, there, "--rank", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "lora"
    # without a projection nothing is lost
    assert main(["import", there, back, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["projection"] == "lora" and report["d"] == report["D"] and abs(report["lost_energy"]) < 1e-12
    assert difference(logits(loaded("bert", tmp_path / "back"), "bert"), logits(model, "bert")) <= SAME


@pytest.mark.parametrize("to", ["lora", "vllm", "openvino", "sglang", "mlx", "diffusers"])
def test_the_bytes_of_what_was_written_are_told(to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, out = saved(trained_model("llama", "unilora"), tmp_path / "ours"), tmp_path / "out"
    assert main(["export", str(ours), str(out), "--to", to, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (numbers,) = (path for path in out.iterdir() if path.suffix == ".safetensors")
    assert report == {"format": to, "bytes": numbers.stat().st_size, "folder": str(out)} and report["bytes"] > 1000


def test_a_trained_lora_is_compressed_with_its_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS["llama"], task_type=TASKS["llama"], use_rslora=True)
    model = get_peft_model(base_model("llama"), lora)
    train_steps(model, "llama")
    model.save_pretrained(tmp_path / "lora")
    out = tmp_path / "ours"
    assert main(["import", str(tmp_path / "lora"), str(out), "--projection", "unilora", "--d", "400", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    # by the dense updates of what was written
    adapter, ours = read(tmp_path / "lora"), Adapter.of_file(out)
    with torch.no_grad():
        reached = ours.projection(ours.theta_d).double()
    lost = whole = 0.0  # s is one for all modules
    theirs, mine = adapter.layout.split(adapter.theta_D), adapter.layout.split(reached)
    for k in range(0, len(theirs), 2):
        wanted, found = theirs[k] @ theirs[k + 1], mine[k] @ mine[k + 1]
        lost, whole = lost + (wanted - found).square().sum(), whole + wanted.square().sum()
    assert report["lost_energy"] == pytest.approx(float(lost / whole), abs=1e-6) and 0.0 < report["lost_energy"] < 1.0
    loaded("llama", out)


def test_bases_are_named_by_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("bert", "gpt2"):
        base_model(kind).save_pretrained(tmp_path / kind)
        model = trained_model(kind, "tinylora", projection_kwargs={"u": 5})
        folder = saved(model, tmp_path / f"{kind}-ours")
        asked = ["export", str(folder), str(tmp_path / f"{kind}-there"), "--to", "tinylora"]
        assert main(asked) == 2 and "Pass --base" in capsys.readouterr().err
        assert main([*asked, "--base", str(tmp_path / kind)]) == 0
        asked = ["import", str(tmp_path / f"{kind}-there"), str(tmp_path / f"{kind}-back")]
        assert main(asked) == 2 and "Pass --base" in capsys.readouterr().err
        assert main([*asked, "--base", str(tmp_path / kind)]) == 0
        assert "tinylora" in capsys.readouterr().out
        assert difference(logits(loaded(kind, tmp_path / f"{kind}-back"), kind), logits(model, kind)) <= SAME


def test_errors_are_one_sentence_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for asked in (["export", str(tmp_path), "x"], ["import", str(tmp_path), "x"]):
        assert main(asked) == 2
        assert re.search("must (hold|be a folder with) adapter_config.json", capsys.readouterr().err)
    folder = saved(trained_model("llama", "lora_xs"), tmp_path / "ours")
    asked = ["export", str(folder), str(tmp_path / "out"), "--base", str(tmp_path / "nothing")]
    assert main(asked) == 2 and "must be a model that Transformers loads" in capsys.readouterr().err
