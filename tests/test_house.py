"""The house rules, read from the syntax trees: imports point one way, every projection registers."""

from __future__ import annotations

import ast
import importlib
import json
from pathlib import Path

import pytest

from uniproj import names
from uniproj.projections import __path__ as projections_path
from uniproj.registry import get

ROOT = Path(__file__).parent.parent
FOLDERS = ("uniproj", "analysis", "experiments", "paper_figures")
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]

# what a part of the library may import of the library; the tuner and the command line may import everything
ALLOWED = {
    "errors": set(),
    "atomic": set(),
    "layout": {"errors"},
    "limits": {"errors"},
    "plugins": {"errors"},
    "console": {"errors"},
    "kernels": {"kernels"},
    "budget": set(),
    "projection": {"budget", "errors", "kernels", "layout"},
    "registry": {"claims", "errors", "layout", "projection", "projections"},
    "claims": {"errors", "kernels", "projection"},
    "algebra": {"errors", "layout", "projection"},
    "projections": {"algebra", "budget", "errors", "kernels", "layout", "projection", "projections", "registry"},
    "testing": {"claims", "errors", "kernels", "layout", "projection", "registry"},
}
# of the experiments: what all share, then the packages, each of which imports those before it; last the commands
SHARED = {"checks", "errors", "files", "names", "orphans", "packaged", "processes", "timing"}
PACKAGES = ("tasks", "models", "runs", "records", "sweeps", "evaluate")


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        modules = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        # `from experiments import models` imports a module by its name alone
        modules += [f"{m}.{alias.name}" for m in modules if m in FOLDERS[1:] for alias in node.names]
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {m for m in modules if m}
    return found


def _of_experiments(modules: set[str]) -> set[str]:
    return {m.split(".")[1] for m in modules if m.startswith("experiments.")}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    own = {m for m in _imports(path) if m.split(".")[0] in FOLDERS}
    roots = {m.split(".")[0] for m in own}
    # a command of analysis measures and then draws: it stands above both
    is_command = parts[0] == "analysis" and (parts[-1] == "__main__" or parts[1:] == ("report",))
    assert parts[0] == "paper_figures" or is_command or "paper_figures" not in roots
    if parts[0] == "paper_figures":
        # drawn from records and analysis tables: the library is asked for the names of its projections alone
        assert _of_experiments(own) <= {"errors", "files", "names", "records", "runs"}
        assert not [m for m in own if m.startswith("uniproj.")]
    if parts[0] == "experiments":
        assert "analysis" not in roots
        if parts[1] in SHARED:
            assert _of_experiments(own) <= SHARED
            assert {m for m in own if m.split(".")[0] == "uniproj"} <= {"uniproj.errors", "uniproj.atomic"}
        if parts[1] in PACKAGES:
            assert _of_experiments(own) <= SHARED | set(PACKAGES[: PACKAGES.index(parts[1]) + 1])
    if parts[0] == "analysis":
        assert not [m for m in _imports(path) if m.split(".")[0] == "matplotlib"]
        assert _of_experiments(own) <= SHARED | {"tasks", "models", "runs", "records"}
    if parts[0] == "uniproj":
        assert roots <= {"uniproj"}
        if parts[1] in ALLOWED:
            used = {m.split(".")[1] for m in own if "." in m}
            assert used <= ALLOWED[parts[1]], f"{parts[1]} may not import {used - ALLOWED[parts[1]]}"


def test_every_file_of_projections_registers_or_is_a_base() -> None:
    package = "uniproj.projections."
    homes = {get(name).__module__.removeprefix(package) for name in names() if get(name).__module__.startswith(package)}
    assert homes == {p.stem for p in Path(projections_path[0]).glob("*.py") if not p.stem.startswith("_")}
    assert homes <= set(names())


def test_the_shortest_projection_has_at_most_40_lines() -> None:
    files = {Path(importlib.import_module(get(name).__module__).__file__ or "") for name in names()}
    assert min(len(f.read_text().splitlines()) for f in files) <= 40


def test_the_library_draws_nothing_from_a_global_generator() -> None:
    banned = ("torch.manual_seed", "cuda.manual_seed", "torch.rand", "np.random.seed", "random.seed", "hash(", "pickle")
    for path in sorted((ROOT / "uniproj").rglob("*.py")):
        text = path.read_text()
        # the battery copies P by pickle, and reads none
        allowed = {"hash(" if "__hash__" in text else "", "pickle" if path.name == "testing.py" else ""}
        assert not any(word in text for word in banned if word not in allowed), path


def test_analyses_take_every_projection_from_the_registry_and_name_none() -> None:
    # LoRA itself is what others are compared with; of the rest, these measure the library beside PEFT, not a P
    beside = {"overhead", "capabilities", "bank"}
    own = [p for p in SOURCES if p.is_relative_to(ROOT / "analysis") and not beside & set(p.parts)]
    for path in own:
        constants = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
        assert not (constants & set(names())) - {"lora"}, path


BESIDE = [*sorted((ROOT / "paper_figures" / "notebooks").glob("*.ipynb")), *sorted((ROOT / "examples").glob("*.py"))]
LOADERS = ("from_pretrained", "from_config", "load_dataset", "pipeline", "HFLM")
# PEFT's own, which read adapters and run no code of theirs
ADAPTERS = ("PeftModel.", "PeftConfig.", "UniProjConfig.", "super().")


@pytest.mark.parametrize("path", [*SOURCES, *BESIDE], ids=lambda p: str(p.relative_to(ROOT)))
def test_what_loads_a_model_says_whether_its_code_may_run(path: Path) -> None:
    text = path.read_text()
    if path.suffix == ".ipynb":
        cells = [cell["source"] for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        text = "\n".join(line for lines in cells for line in lines if not line.startswith("%"))
    for call in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)):
        called = ast.unparse(call.func)
        if called.split(".")[-1] in LOADERS and not called.startswith(ADAPTERS):
            assert "trust_remote_code" in {keyword.arg for keyword in call.keywords}, f"line {call.lineno}: {called}"
