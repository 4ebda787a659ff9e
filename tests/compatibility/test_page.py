"""The page lists what is tested, and the plugin that compares and writes it tells right from wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.compatibility import conftest
from tests.compatibility.page import NO, REFUSES, SECTIONS, YES, Row, markdown, read

pytest_plugins = ["pytester"]

TESTS = """
import peft
import pytest
from peft import LoraConfig, get_peft_model
from torch import nn

from uniproj.errors import AdapterError

capability = lambda name: pytest.mark.capability("TRL", name)

@capability("{x}: `a | b`")
@pytest.mark.parametrize("x", [1, 2])
def test_measured(x, remark):
    remark(f"{x} modules")

@capability("it works")
def test_works():
    pass

@capability("ours")
def test_ours(refuses, tmp_path):
    with refuses():
        raise AdapterError(f"{tmp_path}/adapter: got 1.5.  Do b.")

@capability("of PEFT")
def test_of_peft(refuses):
    with refuses(ValueError):
        get_peft_model(nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))

@capability("does not refuse")
def test_does_not_refuse(refuses):
    with refuses():
        pass

@capability("fails")
def test_fails():
    raise KeyError(2)

@capability("expected")
def test_expected():
    pytest.xfail("PEFT cannot either")

def test_beside():
    pass
"""
ROWS = [
    ("1: `a | b`", YES, "1 modules"),
    ("2: `a | b`", YES, "2 modules"),
    ("it works", YES, ""),
    ("ours", REFUSES, "FOLDER/adapter: got 1.5. Do b."),
    ("of PEFT", REFUSES, "PEFT: Target module ReLU() is not supported."),
    ("does not refuse", NO, "Failed: DID NOT RAISE"),
    ("fails", NO, "KeyError: 2"),
    ("expected", NO, "PEFT cannot either"),
]


def test_the_page_lists_what_is_tested_and_nothing_else(request: pytest.FixtureRequest) -> None:
    collected = request.config.stash[conftest.COLLECTED]
    if {section for section, _ in collected} != set(SECTIONS):
        pytest.skip("the whole folder must be collected")
    assert len(collected) == len({name for _, name in collected}) >= 100
    in_order = sorted(collected, key=lambda capability: SECTIONS.index(capability[0]))
    assert [(row.section, row.name) for row in read(conftest.PAGE.read_text()).values()] == in_order


@pytest.mark.parametrize("processes", ["0", pytest.param("2", marks=pytest.mark.system)])
def test_a_page_is_written_and_held_against_the_tests(
    processes: str, pytester: pytest.Pytester, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    pytester.makepyfile(TESTS)
    pytester.makeini("[pytest]\nmarkers = capability: a row")
    options = ("-p", "tests.compatibility.conftest", "-n", processes)
    pytester.runpytest_inprocess(*options, "--capabilities", page).assert_outcomes(passed=6, failed=2, xfailed=1)
    found = read(page.read_text()).values()
    assert [(row.section, row.name, row.answer) for row in found] == [("TRL", *row[:2]) for row in ROWS]
    assert all(row.remark.startswith(remark) for row, (_, _, remark) in zip(found, ROWS, strict=True))
    assert "8 capabilities: 3 yes, 2 refuses, 3 no" in page.read_text()

    monkeypatch.setattr(conftest, "PAGE", page)
    conftest._page.cache_clear()
    pytester.runpytest_inprocess(*options[:2]).assert_outcomes(passed=6, failed=2, xfailed=1)
    # a figure may differ, an answer and a sentence may not
    changed = {"1: `a": "yes", "2: `a": "2 modules", "it works": "yes", "ours": "Do b", "expected": "cannot either"}
    lines = page.read_text().splitlines()
    page.write_text(
        "\n".join(next((x.replace(was, "other") for key, was in changed.items() if key in x), x) for x in lines)
    )
    conftest._page.cache_clear()
    pytester.runpytest_inprocess(*options[:2]).assert_outcomes(passed=3, failed=6)
    conftest._page.cache_clear()


def test_figures_do_not_count_but_words_do() -> None:
    one, two, three = (
        Row("TRL", "n", REFUSES, f"got {x}").without_figures() for x in ("1.5 times", "2e-3 times", "1.5 rows")
    )
    assert one == two != three


def test_a_page_is_read_as_it_was_written() -> None:
    rows = [Row("TRL", "`x | y`", YES, ""), Row("Other formats", "z", REFUSES, "a: got 1.5 | 2. Do b.")]
    assert list(read(markdown(reversed(rows))).values()) == rows
