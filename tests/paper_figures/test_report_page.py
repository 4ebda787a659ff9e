"""The report in a real browser: it sorts, filters, answers the pointer, and can be read wide, narrow and dark."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

import uniproj
from experiments.names import method
from paper_figures.report.__main__ import main
from paper_figures.report.collect import looks
from tests.sweeps import made_up, write

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
TASKS, SHOWN = ["glue/sst2", "glue/stsb"], ["SST-2", "STS-B"]
NO_RANK = "\u2013"
METHODS = ["lora", "unilora", "vera", "nola"]


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    found = made_up(TASKS, METHODS)
    found.loc[(found["projection"] == "nola") & (found["train_seed"] == 1), "failed"] = "out of <b>memory</b>"
    stuck = (found["projection"] == "vera") & (found["train_seed"] == 2) & (found["task"] == TASKS[1])
    found.loc[stuck, "did_not_train"] = "the loss went from 0.7 to 0.7"
    return found


@pytest.fixture(scope="module")
def report(table: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write(folder / "results" / "mine", table)
    assert main([str(folder / "results"), "--out", str(folder / "report.html")]) == 0
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium or Chrome is installed: the report was not opened (Debian: apt-get install chromium)")
    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


def _open(browser: Browser, report: Path, width: int = 1280, scheme: str = "light") -> tuple[Page, list[str]]:
    """The page, and everything it complains about or fetches."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    trouble: list[str] = []
    page.on("console", lambda message: trouble.append(message.text))
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else trouble.append(r.url))
    page.goto(report.as_uri())
    return page, trouble


@pytest.fixture
def page(browser: Browser, report: Path) -> Iterator[Page]:
    opened, trouble = _open(browser, report)
    yield opened
    opened.close()
    assert trouble == []


def _column(page: Page, number: int, table: str = "#leaderboard-table") -> list[str]:
    return page.locator(f"{table} tbody td:nth-child({number})").all_inner_texts()


def test_a_click_on_a_heading_sorts_and_another_turns_the_order(page: Page) -> None:
    heading = page.locator("#leaderboard-table th", has_text="score")
    button = heading.locator("button")
    for order in ("descending", "ascending"):
        button.click()
        assert heading.get_attribute("aria-sort") == order
        shown = [float(text.split()[0]) for text in _column(page, 3)]
        ranked = [rank != NO_RANK for rank in _column(page, 2)]
        kept = [score for score, own in zip(shown, ranked, strict=True) if own]
        assert kept == sorted(kept, reverse=order == "descending") and len(kept) == 5
        # what is not ranked stays below
        assert ranked == sorted(ranked, reverse=True)
    page.locator("#leaderboard-table th button", has_text="method").click()
    assert _column(page, 1) == sorted(_column(page, 1))


def test_ranks_are_those_of_complete_cells_of_one_task(page: Page, table: pd.DataFrame) -> None:
    page.locator("#task").select_option(SHOWN[0])
    means = table[table["task"] == TASKS[0]].groupby("projection")["score"].mean().drop("nola").sort_values()
    expected = {method(name): str(rank) for rank, name in enumerate(reversed(means.index), start=1)} | {"NOLA": NO_RANK}
    assert dict(zip(_column(page, 1), _column(page, 2), strict=True)) == expected


def test_filters_narrow_tables_and_panels(page: Page) -> None:
    assert page.locator("#budget-panels .panel").count() == len(TASKS)
    page.locator("#task").select_option(SHOWN[1])
    assert set(_column(page, 6)) == {SHOWN[1]} and page.locator("#shown").inner_text() == "4 of 8 cells"
    assert page.locator("#budget-panels .panel").count() == page.locator("#curve-panels .panel").count() == 1
    # by the name in settings, and by the one that is shown
    for words in ("unilora", "uni-lora"):
        page.locator("#search").fill(words)
        assert _column(page, 1) == ["Uni-LoRA"] and _column(page, 1, "#cost-table") == ["Uni-LoRA"]
    page.locator("#search").fill("no such thing")
    assert "No cell passes" in page.locator("#leaderboard-table").inner_text()


def test_a_point_tells_its_numbers_under_the_pointer_and_to_the_keyboard(page: Page, table: pd.DataFrame) -> None:
    tip = page.locator("#tip")
    assert not tip.is_visible()
    point = page.locator(".panel", has_text=SHOWN[0]).first.locator('.point[data-projection="unilora"]')
    point.locator(".shape").hover()
    own = table[(table["task"] == TASKS[0]) & (table["projection"] == "unilora")]["score"]
    assert tip.is_visible() and f"accuracy {100 * own.mean():.1f} [" in tip.inner_text()
    assert (
        "n = 3" in tip.inner_text()
        and "4,741 trained" in tip.inner_text()
        and "points to LoRA with 36,864 trained" in tip.inner_text()
    )
    page.mouse.move(2, 2)
    assert not tip.is_visible()
    point.focus()
    assert tip.is_visible() and "Uni-LoRA" in tip.inner_text()


def test_the_nearest_curve_tells_its_loss(page: Page) -> None:
    chart = page.locator("#curve-panels svg").first
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 0.5 * box["height"])
    assert re.search(r"step \d+: loss 0\.\d{3}, mean of n = \d", page.locator("#tip").inner_text())
    assert chart.locator(".near").count() == 1


def test_the_budget_axis_can_be_chosen_and_a_projection_hidden(page: Page) -> None:
    page.locator("#x").select_option("adapter_bytes")
    assert "stored bytes" in (page.locator("#budget-panels svg").first.text_content() or "")
    page.locator('#legend button[data-projection="lora"]').click()
    assert page.locator('.point[data-projection="lora"]').count() == 0
    assert page.locator('.point[data-projection="unilora"]').count() == len(TASKS)


def test_curves_have_markers_dashes_and_a_legend_that_hides_them(page: Page) -> None:
    legend = page.locator("#curve-legend button")
    assert sorted(legend.all_inner_texts()) == sorted(method(name) for name in METHODS)
    chart = page.locator("#curve-panels svg").first
    curve = chart.locator('.curve[data-projection="unilora"]')
    assert curve.locator("path").count() == 1 and curve.locator(".shape").count() >= 1
    colours = chart.locator(".curve path").evaluate_all("all => all.map(path => getComputedStyle(path).stroke)")
    assert len(set(colours)) == len(colours) == len(METHODS)
    page.locator('#curve-legend button[data-projection="unilora"]').click()
    assert chart.locator('.curve[data-projection="unilora"]').count() == 0
    for place in ("#legend", "#curve-legend"):
        assert page.locator(f'{place} button[data-projection="unilora"]').get_attribute("aria-pressed") == "false"


def test_a_curve_is_the_mean_of_the_runs_that_trained(page: Page, table: pd.DataFrame, report: Path) -> None:
    logged = pd.read_csv(report.parent / "results" / "mine" / "curves.csv")
    own = table[(table["task"] == TASKS[1]) & (table["projection"] == "vera") & table["did_not_train"].isna()]
    wanted = logged[logged["folder"].isin(own["folder"])].groupby("step")["loss"].mean()
    found = page.evaluate(
        """() => { const data = JSON.parse(document.getElementById("data").textContent);
        const cell = data.cells.find(c => c.projection === "vera" && c.task === "STS-B");
        return data.curves.find(c => c.cell === cell.id); }"""
    )
    assert found["n"] == 2 and dict(found["points"]) == pytest.approx(dict(wanted), abs=1e-4)
    status = page.locator("#leaderboard-table tr", has_text="did not train").locator("td").last.inner_text()
    assert status == "1 of 3 did not train"


def test_a_plugin_that_is_not_loaded_has_a_colour_of_its_own() -> None:
    found = looks([*uniproj.names(), "mine", "yours"])
    for kind in ("light", "dark"):
        assert len({look[kind] for look in found.values()}) == len(found)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_there_is_a_way_back_from_everywhere(browser: Browser, report: Path, width: int, scheme: str) -> None:
    page, trouble = _open(browser, report, width, scheme)
    for place in ("cost", "provenance"):
        page.evaluate(f"document.getElementById('{place}').scrollIntoView()")
        assert page.evaluate("scrollY") > 0
        back = page.locator("nav a", has_text="Top")
        box = back.bounding_box()
        assert box is not None and 0 <= box["y"] < 60 and 0 <= box["x"] < width
        heading = page.locator(f"#{place} h2").bounding_box()
        assert heading is not None and (heading["y"] >= box["y"] + box["height"] or place == "provenance")
        back.click()
        assert page.evaluate("scrollY") == 0
    page.close()
    assert trouble == []


def test_what_failed_is_told_and_cannot_write_into_the_page(page: Page) -> None:
    reasons = _column(page, 5, "#failed-table")
    assert sorted(reasons) == ["out of <b>memory</b>"] * 2 + ["the loss went from 0.7 to 0.7"]
    assert page.locator("#failed b").count() == 0


def test_every_projection_of_the_registry_has_a_card_with_verdicts(page: Page) -> None:
    cards = page.locator("#cards .card")
    assert cards.evaluate_all("all => all.map(card => card.dataset.projection)") == uniproj.names()
    own = page.locator('#cards [data-projection="vera"]')
    assert uniproj.get("vera").formula in own.inner_text()
    assert re.search(r"isometric\s+does not hold", own.inner_text()) and "✓ claimed" in own.inner_text()
    assert page.locator("#cards .bad").count() == 0
    widths = page.locator("#cards img").evaluate_all("all => all.map(image => image.naturalWidth)")
    assert min(widths) > 0 and len(widths) == 2 * len(uniproj.names())


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_it_can_be_read_wide_and_narrow_light_and_dark(browser: Browser, report: Path, width: int, scheme: str) -> None:
    page, trouble = _open(browser, report, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    cut = "all => all.filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
    assert page.locator("h1, h2, h3, p, label, select, input, .panel, .card, .scroll").evaluate_all(cut) == []
    for table in ("#leaderboard-table", "#cost-table", "#failed-table"):
        # the column that stays in sight leaves room for others
        widths = page.locator(f"{table} td:first-child").evaluate_all(
            "all => all.map(cell => cell.getBoundingClientRect().width)"
        )
        assert max(widths) <= 0.42 * width, table
    sizes = page.locator("p, td, th, code, figcaption").evaluate_all(
        "all => all.map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(sizes) >= 12
    chart = page.locator("#budget-panels svg text").first.evaluate("e => e.getBoundingClientRect().height")
    assert chart >= 9
    back = _rgb(page, "body", "backgroundColor")
    assert (sum(back) < 150) == (scheme == "dark")
    for place in ("#summary", "h2", "td", ".good", ".bad", "a", ".card code", "dd"):
        assert _contrast(_rgb(page, place, "color"), back) >= 4.5, place
    page.close()
    assert trouble == []


def _rgb(page: Page, place: str, what: str) -> tuple[int, ...]:
    text = page.locator(place).first.evaluate(f"e => getComputedStyle(e).{what}")
    return tuple(int(n) for n in re.findall(r"\d+", text)[:3])


def _contrast(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """The ratio of WCAG 2.1, which asks for 4.5 of text."""

    def luminance(colour: tuple[int, ...]) -> float:
        parts = [c / 255 for c in colour]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_the_page_is_one_file_and_the_same_each_time(report: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.html"
    assert main([str(report.parent / "results"), "--out", str(again)]) == 0
    assert again.read_bytes() == report.read_bytes()
    outside = re.findall(r'(?:src|href)="(?!#|data:)[^"]*"|@import|url\(', report.read_text())
    assert outside == [] and "<!--" not in report.read_text()


def test_every_committed_sweep_is_on_the_page_of_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uniproj, "names", lambda: ["lora"])
    results = Path(__file__).parents[2] / "results"
    assert main([str(results), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    sweeps = [path.parent.name for path in results.glob("sweeps/*/records.csv")]
    assert sweeps and all(f'"sweep":"{name}"' in page for name in sweeps)


def test_nothing_to_report_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(tmp_path), "--out", str(tmp_path / "report.html")]) == 2
    assert "Train something first" in capsys.readouterr().err and not (tmp_path / "report.html").exists()
