"""Gradient norms and losses on the real model, against gradients taken another way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from analysis.landscape import along, gradient_norms, landscape, measure
from analysis.landscape.__main__ import main
from analysis.spaces import build, defaults
from analysis.subject import Setting, Subject
from experiments.errors import ExperimentError


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject(Setting(max_length=8, batch_size=4))


def test_the_ratio_is_that_of_autograds_two_gradients(subject: Subject) -> None:
    P = build("unilora_unnormalised", {}, subject.layout, 128).P
    theta_d, head, batch = P.init_theta(0), subject.head, subject.batches(1)[0]
    small, large = theta_d.clone().requires_grad_(), P(theta_d).requires_grad_()
    by_theta_d = torch.autograd.grad(subject.loss(P(small), head, batch), small)[0]
    by_theta_D = torch.autograd.grad(subject.loss(large, head, batch), large)[0]
    ratio = gradient_norms(subject, P, theta_d, head, [batch])
    assert float(ratio[0]) == pytest.approx(float(by_theta_d.norm() / by_theta_D.norm()), rel=1e-4)


def test_an_isometry_keeps_at_most_the_gradient_and_lora_all_of_it(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "POINTS", 3)
    norms, losses = landscape(subject, defaults(["lora", "unilora"]), 128, steps=2, lr=1e-2)
    norms = norms.set_index("projection")
    assert norms.loc["lora", "mean"] == pytest.approx(1.0) and norms.loc["lora", "random"] == 1.0
    assert norms.loc["unilora", "largest"] <= 1.0 and norms["isometric"].all()
    middle = losses[losses["t"] == 0.0].groupby("projection")["loss"].nunique()
    # both directions pass through the same point
    assert (middle == 1).all()


def test_steps_have_the_length_that_is_stated(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    P = build("unilora_unnormalised", {}, subject.layout, 128).P
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(subject, "loss", lambda theta_D, head, batch: seen.append(theta_D) or torch.zeros(()))
    along(subject, P, P.init_theta(0), {}, [{}])
    here = P(P.init_theta(0).double())
    assert float((seen[0] - here).norm() / here.norm()) == pytest.approx(1.0)
    torch.testing.assert_close(seen[0] + seen[8], 2 * here)


def test_a_task_that_is_no_text_classification_is_a_sentence(tmp_path: Path, capsys) -> None:
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text('{"prompt": "1 + 1 =", "completion": " 2"}\n' * 20)
    with pytest.raises(ExperimentError, match="must classify text"):
        Subject(Setting(task=str(tmp_path)))
    assert main(["--task", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "family 'causal'" in capsys.readouterr().err
