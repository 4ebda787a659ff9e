"""A test marked with a capability is a row of docs/capabilities.md, which is held against the tests or written by them.

`@pytest.mark.capability(section, name)`; parameters of the test stand in braces in the name. The answer is "yes" where
the test passes, "refuses" where it passes and something in it `refuses()`, "no" where it fails, or is an `xfail`.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from experiments.files import write_text
from tests.compatibility.page import NO, REFUSES, YES, Row, markdown, read
from uniproj.errors import AdapterError, ProjectionError

PAGE = Path(__file__).parents[2] / "docs" / "capabilities.md"
COLLECTED = pytest.StashKey[list[tuple[str, str]]]()
LIBRARIES = {"peft": "PEFT", "transformers": "Transformers", "trl": "TRL", "accelerate": "Accelerate"}
LONGEST = 400
# Transformers repeats other errors with all their lines, which name the folders of a machine
_TRACE = ": Traceback (most recent call last)"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # offloading to disk leaves files in the working folder


@pytest.fixture
def remark(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Note what was measured, for the right column of the page."""
    return lambda text: record_property("remark", text)


@pytest.fixture
def refuses(tmp_path: Path, record_property: Callable[[str, object], None]) -> Callable:
    """`with refuses():` must raise, an error of uniproj's or the one that is given; its sentence goes on the page."""

    @contextmanager
    def refused(*errors: type[Exception]) -> Iterator[None]:
        with pytest.raises(errors or (AdapterError, ProjectionError)) as caught:
            yield
        record_property(REFUSES, _sentence(caught.value).replace(str(tmp_path), "FOLDER")[:LONGEST])

    return refused


def _sentence(error: Exception) -> str:
    """In one line, after the name of the library that raised it, if it is not uniproj."""
    said = " ".join(str(error).split()).partition(_TRACE)[0]
    if isinstance(error, AdapterError | ProjectionError):
        return said
    parts = Path(traceback.extract_tb(error.__traceback__)[-1].filename).parts
    return f"{next((LIBRARIES[part] for part in parts if part in LIBRARIES), type(error).__name__)}: {said}"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--capabilities", type=Path, metavar="FILE", help="write the page of what works to this file")


@pytest.hookimpl(tryfirst=True)  # before some are left out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    marked = {item: capability for item in items if (capability := _capability(item))}
    config.stash[COLLECTED] = list(marked.values())
    for item in marked:
        item.add_marker(pytest.mark.filterwarnings("ignore"))


def _capability(item: pytest.Item) -> tuple[str, str] | None:
    """Section and name, of a test that is marked."""
    marker = item.get_closest_marker("capability")
    if marker is None:
        return None
    section, name = marker.args
    return section, name.format(**item.callspec.params) if hasattr(item, "callspec") else name


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    report = yield
    capability = _capability(item)
    if capability is None or report.when == "teardown" or (report.when == "setup" and report.passed):
        return report
    noted = dict(report.user_properties)
    if report.passed:
        row = Row(*capability, REFUSES if REFUSES in noted else YES, noted.get(REFUSES, noted.get("remark", "")))
    elif hasattr(report, "wasxfail"):
        row = Row(*capability, NO, call.excinfo.value.msg)
    else:
        row = Row(*capability, NO, " ".join(f"{call.excinfo.typename}: {call.excinfo.value}".split())[:LONGEST])
    # its place first: with several processes, the reports come in any order
    place = item.config.stash[COLLECTED].index(capability)
    report.user_properties.append(("capability", [place, row.section, row.name, row.answer, row.remark]))
    if not _file(item.config) and not report.failed:
        page = _page().get(row.name)
        if page is None or page.without_figures() != row.without_figures():
            report.outcome, report.longrepr = "failed", f"{PAGE.name} says {page}, the test gave {row}"
    return report


def _file(config: pytest.Config) -> Path | None:
    """Where the page is to be written, if anywhere; where another folder's tests are named, the option is not there."""
    return config.getoption("--capabilities", None)


@cache
def _page() -> dict[str, Row]:
    return read(PAGE.read_text())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config) -> None:
    if (file := _file(config)) and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        reports = (report for reports in terminalreporter.stats.values() for report in reports)
        noted = (pair for report in reports for pair in getattr(report, "user_properties", ()))
        rows = sorted(value for name, value in noted if name == "capability")
        write_text(file, markdown(Row(*row) for _, *row in rows))
