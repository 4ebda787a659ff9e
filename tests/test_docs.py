"""The README and the example are run: their code works as printed, their table lists every method."""

import importlib.util
import re
from pathlib import Path

import pytest

from uniproj import LoRALayout, get, names, registry
from uniproj.testing import check_projection, sample

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_python_blocks_of_the_readme_run(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 2
    names: dict = {}  # a block may go on with what an earlier one made
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)


def test_the_readme_shows_the_example_as_it_is() -> None:
    assert (ROOT / "examples" / "cyclic.py").read_text().strip() in README


@pytest.mark.parametrize("name", names())
def test_the_table_of_methods_is_complete(name: str) -> None:
    (row,) = re.findall(rf"^\| `{name}` \|.*$", README, flags=re.MULTILINE)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert get(name).d_formula in cells[2] and get(name).source in cells[-1]


def test_the_example_passes_the_battery(monkeypatch) -> None:
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    spec = importlib.util.spec_from_file_location("cyclic", ROOT / "examples" / "cyclic.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    layout = LoRALayout.from_shapes({"a": (5, 4), "b": (3, 7)}, r=2)
    assert {c.name for c in check_projection(sample("cyclic", layout, 6))} >= {"claim:isometric", "gradgradcheck"}
    assert len((ROOT / "examples" / "cyclic.py").read_text().splitlines()) <= 40
