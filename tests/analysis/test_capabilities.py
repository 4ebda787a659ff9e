"""The page of capabilities is what the probes give, and a probe tells right from wrong."""

from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn

from analysis.capabilities.__main__ import chosen, main
from analysis.capabilities.probe import Outcome, Probe, Wrong, check, run
from analysis.capabilities.table import markdown, read, without_figures
from uniproj.errors import AdapterError

PAGE = Path(__file__).parents[2] / "docs" / "capabilities.md"
PROBES = chosen([])
COMMITTED = read(PAGE.read_text())
IDS = {f"{p.section}: {p.name}": p for p in PROBES}


def test_the_page_lists_every_probe_and_nothing_else() -> None:
    assert list(COMMITTED) == [p.name for p in PROBES]
    assert len(PROBES) == len({p.name for p in PROBES}) >= 100


@pytest.mark.parametrize(
    "probe", [pytest.param(p, id=name, marks=[pytest.mark.slow] if p.slow else []) for name, p in IDS.items()]
)
def test_the_page_says_what_the_probe_gives(probe: Probe) -> None:
    assert without_figures([run(probe)]) == without_figures([COMMITTED[probe.name]])


def _raise(error: Exception):
    def act(folder: Path) -> None:
        raise error

    return act


def _of_peft(folder: Path) -> None:
    get_peft_model(nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))


@pytest.mark.parametrize(
    ("act", "answer", "remark"),
    [
        (lambda folder: "3 modules", "yes", "3 modules"),
        (lambda folder: None, "yes", ""),
        (_raise(AdapterError("no such thing.")), "refuses", "no such thing."),
        (_of_peft, "refuses", "PEFT: Target module ReLU() is not supported."),
        (_raise(Wrong("logits differ")), "no", "logits differ"),
        (_raise(ValueError("a fault of the probe's own")), "no", "ValueError: a fault of the probe's own"),
        (_raise(KeyError(2)), "no", "KeyError: 2"),
        (lambda folder: check(False, "it did not hold"), "no", "it did not hold"),
    ],
)
def test_answers(act, answer: str, remark: str) -> None:
    outcome = run(Probe("section", "name", False, act))
    assert outcome.answer == answer and outcome.remark.startswith(remark)


def test_a_folder_is_there_and_its_name_is_not_told() -> None:
    outcome = run(Probe("s", "n", False, lambda folder: check(not folder.is_dir(), f"{folder}/adapter")))
    assert outcome.remark == "FOLDER/adapter"


def test_a_page_is_read_as_it_was_written() -> None:
    outcomes = [Outcome("A", "`x | y`", "yes", ""), Outcome("B", "z", "refuses", "a: got 1.5 | 2. Do b.")]
    page = markdown(outcomes, "a processor")
    assert list(read(page).values()) == outcomes
    assert "2 capabilities: 1 yes, 1 refuses, 0 no" in page and "a processor" in page


def test_figures_do_not_count_but_words_do() -> None:
    one, two, three = (Outcome("s", "n", "refuses", f"got {x}") for x in ("1.5 times", "2e-3 times", "1.5 rows"))
    assert without_figures([one]) == without_figures([two]) != without_figures([three])


def test_a_part_can_be_probed_and_nothing_is_written(tmp_path, capsys) -> None:
    assert main(["add_weighted_adapter", "--out", str(tmp_path / "page.md")]) == 0
    assert capsys.readouterr().out.startswith("refuses `add_weighted_adapter`: add_weighted_adapter: the sum")
    assert not (tmp_path / "page.md").exists()
    assert main(["no such words"]) == 2
    assert "got none" in capsys.readouterr().err
