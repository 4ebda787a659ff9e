"""The README, the page on projections and the examples are run as printed; their tables are complete."""

import importlib
import re
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from peft import PeftModel, get_peft_model

from experiments.names import method
from tests.tuner.models import base_model, batch, config, train_steps
from uniproj import LoRALayout, ProjectionError, build, get, names
from uniproj.claims import CHECKS
from uniproj.testing import check_projection, sample

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PROJECTIONS = (ROOT / "docs" / "projections.md").read_text()
METHODS = (ROOT / "docs" / "methods.md").read_text()
EXAMPLES = {"cyclic": "linear", "frozen_a": "affine", "module_gain": "learned"}
SHAPES = {"h.0.q": (8, 6), "h.0.v": (4, 6), "h.1.q": (8, 6)}


def _forgetting_examples(monkeypatch) -> None:
    """What a test imports and registers is forgotten after it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in EXAMPLES:
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.fixture
def _registered(monkeypatch) -> None:
    """The examples' projections have names for one test."""
    _forgetting_examples(monkeypatch)
    monkeypatch.syspath_prepend(ROOT / "examples")
    for name in EXAMPLES:
        importlib.import_module(name)


example = pytest.mark.usefixtures("_registered")
each_example = pytest.mark.parametrize("name", EXAMPLES)


def _run(page: str) -> None:
    found: dict = {}  # a block may go on with what an earlier one made
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(compile(block, "page", "exec"), found)
    assert found


@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md"])
def test_python_blocks_run(page: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    _run((ROOT / page).read_text())


def test_the_table_of_the_readme_is_that_of_the_recorded_run() -> None:
    record = pd.read_csv(ROOT / "results" / "compare-minilm-vader" / "table.csv")
    columns = [
        record.projection.map(method),
        *(record[count].map("{:,}".format) for count in ("trained", "adapter_bytes")),
        (100 * record.score).map("{:.1f}".format),
        record.step_ratio.map("{:.2f}".format),
    ]
    rows = [f"| {' | '.join(cells)} |" for cells in zip(*columns, strict=True)]
    assert "\n".join(rows) in README


def test_python_blocks_of_the_page_on_projections_run(monkeypatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    _forgetting_examples(monkeypatch)
    _run(PROJECTIONS)
    assert "claim:affine" in capsys.readouterr().out


def test_the_page_on_projections_shows_the_example_as_it_is() -> None:
    assert (ROOT / "examples" / "cyclic.py").read_text().strip() in PROJECTIONS
    assert len((ROOT / "examples" / "cyclic.py").read_text().splitlines()) <= 40


def test_the_table_of_methods_is_complete() -> None:
    for name in names():
        (row,) = re.findall(rf"^\| `{name}` \|.*$", METHODS, flags=re.MULTILINE)
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert get(name).d_formula in cells[2] and get(name).source in cells[-1], name


def test_the_table_of_claims_is_complete() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", PROJECTIONS.split("## Claims")[1], flags=re.MULTILINE)
    assert sorted(rows) == sorted(CHECKS)


@example
def test_every_file_among_the_examples_is_tested_here_as_the_kind_it_shows() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == EXAMPLES.keys()
    for name, kind in EXAMPLES.items():
        P = sample(name, LoRALayout.from_shapes(SHAPES, 2), 6)
        assert ("learned" if P.learned else "linear" if P.offset is None else "affine") == kind


@example
@each_example
@pytest.mark.parametrize(("ranks", "d"), [(2, 6), ({"h.0.q": 1, "h.0.v": 2, "h.1.q": 3}, 1)])
def test_an_example_passes_the_battery(name: str, ranks, d: int) -> None:
    P = sample(name, LoRALayout.from_shapes(SHAPES, ranks), d)
    assert {"gradcheck", *(f"claim:{claim}" for claim in P.claims)} <= {c.name for c in check_projection(P)}


@example
@each_example
@pytest.mark.parametrize("budget", [4, 20, 10_000])
def test_an_example_says_what_it_trains_at_a_budget(name: str, budget: int) -> None:
    found = get(name).for_budget(SHAPES, budget, 2)
    P = build(name, layout=LoRALayout.from_shapes(SHAPES, found.r), d=found.d, **found.hyperparameters)
    assert P.trained == found.trained and (found.trained == budget or budget == 10_000)


@example
@each_example
def test_an_example_trains_through_peft(name: str, tmp_path: Path) -> None:
    model = get_peft_model(base_model("llama"), config("llama", name, d=30))
    before = {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}
    train_steps(model, "llama", 2)
    assert all(not torch.equal(p, before[key]) for key, p in model.named_parameters() if key in before)
    assert len(before) == 1 + (EXAMPLES[name] == "learned")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model("llama"), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**batch("llama")).logits, model.eval()(**batch("llama")).logits)


@example
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("frozen_a", lambda cls: cls(LoRALayout.from_shapes(SHAPES, 1), 21)),
        ("frozen_a", lambda cls: cls(LoRALayout.from_shapes(SHAPES, 1), 0)),
        ("frozen_a", lambda cls: build("frozen_a", D=100, d=5)),
        ("module_gain", lambda cls: cls.for_budget(SHAPES, 3, 2)),
    ],
)
def test_the_examples_refuse_what_cannot_be_built(name: str, make) -> None:
    with pytest.raises(ProjectionError, match=r"got \d|needs module structure"):
        make(get(name))
