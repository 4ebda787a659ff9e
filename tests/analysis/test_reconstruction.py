"""What of a LoRA that was trained on real reviews is left in each subspace, against dense linear algebra."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import uniproj
from analysis import compress
from analysis.landscape.__main__ import main as landscape_main
from analysis.reconstruction import measure, reconstruct
from analysis.reconstruction.__main__ import main as reconstruction_main
from analysis.spaces import build, defaults
from analysis.subject import HEAD, Setting, Subject, named_factors
from analysis.training import train_lora
from experiments.errors import ExperimentError
from paper_figures.figures.reconstruction import edge
from uniproj import AdapterError, LoRALayout
from uniproj.exchange.formats.lora import read
from uniproj.exchange.nearest import balanced, captured, captured_delta_W, least_squares
from uniproj.tuner import UniProjConfig

SMALL = LoRALayout.from_shapes({"layer.0.query": (12, 8), "layer.1.query": (12, 8)}, r=4)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject(Setting(test_size=16, max_length=16, batch_size=8))


@pytest.fixture(scope="module")
def lora(subject: Subject) -> tuple[Tensor, dict[str, Tensor]]:
    """A rank-4 LoRA after five steps on the packaged reviews."""
    theta_D, head = train_lora(subject, steps=5, lr=1e-2)
    return theta_D, dict(head)


@pytest.fixture(scope="module")
def folder(subject: Subject, lora: tuple[Tensor, dict[str, Tensor]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same LoRA as PEFT saves it."""
    theta_D, head = lora
    parts = named_factors(subject.layout, theta_D)
    before = {name: value.clone() for name, value in subject.model.state_dict().items() if name in {**parts, **head}}
    subject.model.load_state_dict({**parts, **head}, strict=False)
    path = tmp_path_factory.mktemp("lora")
    subject.model.save_pretrained(path)
    subject.model.load_state_dict(before, strict=False)
    return path


def test_captured_energy_is_that_of_the_dense_projection(subject: Subject, lora) -> None:
    target = balanced(subject.layout, lora[0])
    P = build("unilora", {}, subject.layout, 256).P
    found = least_squares(P, target)
    M = P.to_dense()
    assert found.method == "closed form"
    assert captured(target, found.theta_D) == pytest.approx(float((M.T @ target).norm() ** 2 / target.norm() ** 2))
    # the update is real: a trained B is not 0
    assert target.norm() > 0 and 0 < captured(target, found.theta_D) < 1


def test_the_dense_energy_tells_a_wrong_fit_apart(subject: Subject, lora) -> None:
    target = balanced(subject.layout, lora[0])
    P, other = (build("unilora", {}, subject.layout, 256, seed).P for seed in (0, 1))
    M = P.to_dense()
    dense = float((M.T @ target).norm() ** 2 / target.norm() ** 2)
    best, elsewhere, unbalanced = least_squares(P, target), least_squares(other, target), least_squares(P, lora[0])
    for wrong in (P(1.01 * best.theta_d), elsewhere.theta_D, unbalanced.theta_D):
        assert captured(target, wrong) != pytest.approx(dense)


@pytest.mark.parametrize("name", uniproj.names())
def test_every_fixed_projection_reaches_the_least_squares_solution(name: str) -> None:
    P = build(name, uniproj.get(name).variants[0], SMALL, 24).P
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(SMALL.D, generator=generator, dtype=torch.float64)
    found = least_squares(P, target)
    M, c = P.to_dense().detach(), P.offset if P.offset is not None else torch.zeros(SMALL.D).double()
    dense = M @ torch.linalg.lstsq(M, (target - c).unsqueeze(1), driver="gelsd").solution.squeeze(1) + c
    torch.testing.assert_close(found.theta_D.detach(), dense, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in uniproj.names() if uniproj.get(name).learned])
def test_a_learned_projection_moves_towards_the_target(name: str) -> None:
    fixed, moved = (build(name, uniproj.get(name).variants[0], SMALL, 24).P for _ in range(2))
    target = moved(moved.init_theta(3) + 0.1).detach().double() + 0.05 * torch.arange(SMALL.D).remainder(7)
    fixed.requires_grad_(False)
    c = fixed.offset if fixed.offset is not None else 0.0
    M = fixed.to_dense().detach()
    start = M @ torch.linalg.lstsq(M, (target - c).unsqueeze(1), driver="gelsd").solution.squeeze(1) + c
    assert captured(target, least_squares(moved, target).theta_D.detach()) > captured(target, start)


def test_weights_decide_what_is_fitted() -> None:
    P = build("gaussian", {}, SMALL, 24).P
    target = torch.linspace(-1, 1, SMALL.D, dtype=torch.float64)
    weights = torch.linspace(0, 1, SMALL.D, dtype=torch.float64) ** 4
    w = weights.sqrt().unsqueeze(1)
    M = P.to_dense()
    dense = M @ torch.linalg.lstsq(w * M, w * target.unsqueeze(1)).solution.squeeze(1)
    found = least_squares(P, target, weights).theta_D
    torch.testing.assert_close(found, dense, rtol=0, atol=1e-6)
    assert captured(target, found, weights) > captured(target, least_squares(P, target).theta_D, weights)


def test_balancing_changes_no_update_and_makes_factors_equally_long() -> None:
    theta_D = torch.linspace(-1, 3, SMALL.D, dtype=torch.float64)
    even = balanced(SMALL, theta_D)
    before, after = SMALL.split(theta_D), SMALL.split(even)
    for k in range(2):
        torch.testing.assert_close(after[2 * k] @ after[2 * k + 1], before[2 * k] @ before[2 * k + 1])
        assert after[2 * k].norm() == pytest.approx(after[2 * k + 1].norm())


def test_the_energy_of_updates_is_that_of_dense_updates() -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, SMALL.D, generator=generator, dtype=torch.float64)
    scales = {"layer.0.query": 2.0, "layer.1.query": 0.5}

    def updates(theta_D: Tensor) -> Tensor:
        parts = SMALL.split(theta_D)
        return torch.cat([s * (parts[2 * k] @ parts[2 * k + 1]) for k, s in enumerate(scales.values())])

    dense = 1 - float((updates(a) - updates(b)).norm() ** 2 / updates(a).norm() ** 2)
    assert captured_delta_W(SMALL, scales, a, b) == pytest.approx(dense)


def test_the_table_has_every_projection_and_whole_lora_loses_nothing(subject: Subject, lora, monkeypatch) -> None:
    monkeypatch.setattr(measure, "FISHER_ROWS", 4)
    table = reconstruct(subject, *lora, defaults(["lora", "unilora", "sparse"]), [64, 256])
    whole = table[table["projection"] == "lora"]
    assert len(whole) == 1 and whole["random"].item() == 1.0
    for key in ("factor", "delta_W", "fisher"):
        assert whole[key].item() == pytest.approx(1.0)
    assert whole["score"].item() == whole["score_lora"].item()
    assert list(table[table["projection"] == "unilora"]["d"]) == [64, 256]
    # c is LoRA's random start: what is reached depends on how long the trained A is
    assert "gauge" in table[table["projection"] == "sparse"]["note"].iloc[0]


def test_compressed_adapters_load_and_answer_as_the_reconstruction(
    subject: Subject, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compress.main([str(folder), str(tmp_path / "out"), "--projection", "unilora", "--d", "512", "--json"]) == 0
    adapter = read(folder)
    P = build("unilora", {}, adapter.layout, 512).P
    target = balanced(adapter.layout, adapter.theta_D)
    reached = least_squares(P, target).theta_D
    dense = (P.to_dense().T @ target).norm() ** 2 / target.norm() ** 2
    assert json.loads(capsys.readouterr().out)["captured_factor"] == pytest.approx(float(dense), rel=1e-6)
    loaded = PeftModel.from_pretrained(subject._base(), str(tmp_path / "out")).eval()
    batch = subject.batches(1)[0]
    head = {name: p for name, p in loaded.named_parameters() if HEAD in name}
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, subject.logits(reached, head, batch), rtol=1e-4, atol=1e-5)
    # the head came along
    again = Subject(subject.setting, folder)
    for name, value in again.head.items():
        torch.testing.assert_close(head[name].detach(), value)
    torch.testing.assert_close(
        Subject(subject.setting, tmp_path / "out").theta_D, reached.float(), rtol=1e-4, atol=1e-6
    )


def test_an_adapter_of_other_layers_is_refused(subject: Subject, tmp_path: Path) -> None:
    config = UniProjConfig(d=64, r=4, target_modules=["query", "word_embeddings"], task_type="SEQ_CLS")
    get_peft_model(subject._base(), config).save_pretrained(str(tmp_path))
    with pytest.raises(ExperimentError, match=r"must adapt linear layers alone, got .*word_embeddings\.lora_B"):
        Subject(subject.setting, tmp_path)


def test_a_projection_made_of_base_weights_needs_the_model(folder: Path, tmp_path: Path, capsys) -> None:
    asked = [str(folder), str(tmp_path / "out"), "--projection", "lora_xs"]
    assert compress.main(asked) == 2
    assert "Pass --base" in capsys.readouterr().err
    assert compress.main([*asked, "--base", "minilm"]) == 0


def test_an_untrained_lora_and_options_that_are_no_object_are_a_sentence(tmp_path: Path, capsys) -> None:
    get_peft_model(nn.Sequential(nn.Linear(6, 5)), LoraConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path)
    command = [str(tmp_path), str(tmp_path / "out"), "--projection", "unilora", "--d", "4"]
    for more, message in (([], "delta W = 0 in every module"), (["--options", "[1]"], "options must be an object")):
        assert compress.main([*command, *more]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_energies_that_are_none_above_zero_have_an_edge() -> None:
    assert edge(pd.Series([-1.0, 0.0])) == 0.1 and edge(pd.Series([-1.0, 0.02, 0.5])) == pytest.approx(0.01)


@pytest.mark.parametrize("main", [landscape_main, reconstruction_main])
def test_counts_are_positive(main, capsys) -> None:
    for option in ("--steps", "--batch-size", "--test-size"):
        with pytest.raises(SystemExit, match="2"):
            main([option, "0"])
        assert f"argument {option}: must be at least 1, got 0" in capsys.readouterr().err


def test_a_missing_adapter_is_a_sentence(tmp_path: Path, capsys) -> None:
    assert reconstruction_main(["--adapter", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert "none must be a folder with an adapter, got no adapter_config.json" in capsys.readouterr().err


def test_what_is_no_plain_lora_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"adapter_config\.json, got none"):
        read(tmp_path)
    text = (folder / "adapter_config.json").read_text()
    for name, edit, message in (
        ("dora", text.replace('"use_dora": false', '"use_dora": true'), "use_dora"),
        ("type", text.replace('"peft_type": "LORA"', '"peft_type": "VERA"'), "PEFT type LORA"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(edit)
        with pytest.raises(AdapterError, match=message):
            read(tmp_path / name)
