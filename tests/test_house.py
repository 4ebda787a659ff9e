"""The house rules, read from the syntax trees: imports point one way, every projection registers."""

from __future__ import annotations

import ast
import importlib
import json
import re
from collections import Counter
from functools import cache
from pathlib import Path

import uniproj
from uniproj import names
from uniproj.projections import __path__ as projections_path
from uniproj.registry import get

ROOT = Path(__file__).parent.parent
FOLDERS = ("uniproj", "analysis", "experiments", "paper_figures")
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]

# a part imports from lower floors alone, and from itself without a cycle; docs/design.md says what each holds
FLOORS: list[set[str]] = [
    {"uniproj.errors", "uniproj.atomic", "uniproj.budget", "uniproj.kernels"},
    {"uniproj.console", "uniproj.layout", "uniproj.limits", "uniproj.plugins"},
    {"uniproj.projection"},
    {"uniproj.algebra", "uniproj.claims"},
    {"uniproj.registry"},
    {"uniproj.projections", "uniproj.testing", "uniproj.scaffold", "uniproj"},
    {"uniproj.format"},
    {"uniproj.hub"},
    {"uniproj.tuner"},
    {"uniproj.exchange", "uniproj.bank"},
    {"uniproj.cli", "uniproj.vllm"},
    {"uniproj.__main__"},
    {
        "experiments.errors",
        "experiments.names",
        "experiments.orphans",
        "experiments.processes",
        "experiments.provenance",
        "experiments.timing",
    },
    {"experiments.checks", "experiments.files", "experiments.packaged", "experiments"},
    {"experiments.tasks"},
    {"experiments.models"},
    {"experiments.runs"},
    {"experiments.records"},
    {"experiments.sweeps", "experiments.evaluate"},
    {
        f"experiments.{command}"
        for command in ("compare", "export", "harness", "method_comparison", "mt_bench", "push", "sweep", "train")
    },
    {"analysis"},
    {"paper_figures"},
    {"commands of analysis"},  # they measure, and then draw
]
FLOOR = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}


def _part(module: str) -> str:
    names = module.split(".")
    if names[0] == "analysis":
        return "commands of analysis" if names[-1] == "__main__" or names[1:] == ["report"] else "analysis"
    return names[0] if names[0] == "paper_figures" else ".".join(names[:2])


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(_tree(path)):
        modules = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        # `from experiments import models` imports a module by its name alone
        modules += [f"{m}.{alias.name}" for m in modules if m in FOLDERS[1:] for alias in node.names]
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {m for m in modules if m}
    return found


def _names(path: Path) -> str:
    """The module of a file; that of a package's `__init__` is the package."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def _graph() -> dict[str, set[str]]:
    """{module: the modules of the checkout that it imports}, whether at its beginning, in a function or for types."""
    modules = {_names(path): path for path in SOURCES}
    graph = {}
    for name, path in modules.items():
        found = set()
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.ImportFrom) and node.module:
                whole = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {module if module in modules else node.module for module in whole}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        graph[name] = found & modules.keys() - {name}
    return graph


def _reached(graph: dict[str, set[str]], start: str) -> set[str]:
    """All that a module imports, and what that imports, and so on."""
    found, ahead = set(), [start]
    while ahead:
        more = graph[ahead.pop()] - found
        found |= more
        ahead += more
    return found


def test_no_import_cycle() -> None:
    graph = _graph()
    assert [name for name in graph if name in _reached(graph, name)] == []


def test_imports_point_down() -> None:
    """Every part of the checkout has a floor, and imports nothing from its own floor or above but its own files."""
    graph = _graph()
    assert {_part(name) for name in graph} == FLOOR.keys()
    up = [
        (name, other)
        for name, found in graph.items()
        for other in found
        if _part(name) != _part(other) and FLOOR[_part(name)] <= FLOOR[_part(other)]
    ]
    assert up == []


def test_who_draws_and_who_computes() -> None:
    for path in SOURCES:
        part, imported = _part(_names(path)), _imports(path)
        assert part != "analysis" or "matplotlib" not in {m.split(".")[0] for m in imported}, path
        # drawn from records and analysis tables: the library is asked for the names of its projections alone
        assert part != "paper_figures" or {m for m in imported if m.startswith("uniproj.")} <= {"uniproj.console"}, path


PUBLIC = re.findall(r"^ +(uniproj\.[\w.]+)  ", uniproj.__doc__ or "", re.M)


def test_what_runs_beside_the_library_imports_what_packages_export() -> None:
    """A file of another folder takes what `__init__` of a package names, or a module that `uniproj.__doc__` lists."""
    packages = {_names(path) for path in SOURCES if path.name == "__init__.py"} - set(FOLDERS)
    inside = [
        f"{path.relative_to(ROOT)}: {node.module}"
        for path in SOURCES
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("uniproj", "experiments")
        for package, _, name in [node.module.rpartition(".")]
        if package in packages and path.relative_to(ROOT).parts[0] != package.split(".")[0]
        if node.module not in PUBLIC and name not in getattr(importlib.import_module(package), "__all__", ())
    ]
    assert inside == []


def test_what_no_other_file_uses_is_private() -> None:
    """Operators are found by their names, commands and what registers itself by others. A module that `uniproj.__doc__`
    lists is public whole.
    """
    others = [path for folder in ("docs", "examples", "tests") for path in (ROOT / folder).rglob("*")]
    files = [*SOURCES, *(path for path in others if path.suffix in {".py", ".md"}), *ROOT.glob("*.md")]
    words = {path: set(re.findall(r"\w+", path.read_text())) for path in files}
    used = Counter(word for found in words.values() for word in found)
    open_ones = []
    for path in SOURCES:
        if path.stem == "__init__" or path.stem.endswith(("_numba", "_triton")) or _names(path) in PUBLIC:
            continue
        for node in _tree(path).body:
            names = [target.id for target in getattr(node, "targets", ()) if isinstance(target, ast.Name)]
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.decorator_list:
                names = [node.name]
            open_ones += [f"{path.relative_to(ROOT)}: {name}" for name in names if used[name] == 1 and name[0] != "_"]
    assert open_ones == []


def test_no_page_or_file_holds_both_sides_of_a_merge() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "results").rglob("*.md")]
    tests = [path for folder in ("tests", "examples") for path in (ROOT / folder).rglob("*.py")]
    both = re.compile(r"^(<{7}|>{7}) ", re.MULTILINE)
    assert [path for path in (*SOURCES, *tests, *pages) if both.search(path.read_text())] == []


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
    # LoRA itself is what others are compared with; of the rest, these measure the library, not a P
    beside = {"overhead", "bank", "prediction"}
    own = [p for p in SOURCES if p.is_relative_to(ROOT / "analysis") and not beside & set(p.parts)]
    for path in own:
        constants = {n.value for n in ast.walk(_tree(path)) if isinstance(n, ast.Constant)}
        assert not (constants & set(names())) - {"lora"}, path


BESIDE = [*sorted((ROOT / "paper_figures" / "notebooks").glob("*.ipynb")), *sorted((ROOT / "examples").glob("*.py"))]
LOADERS = ("from_pretrained", "from_config", "load_dataset", "pipeline", "HFLM")
# PEFT's own, which read adapters and run no code of theirs
ADAPTERS = ("PeftModel.", "PeftConfig.", "UniProjConfig.", "super().")


def test_what_loads_a_model_says_whether_its_code_may_run() -> None:
    for path in (*SOURCES, *BESIDE):
        text = path.read_text()
        if path.suffix == ".ipynb":
            cells = [cell["source"] for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
            text = "\n".join(line for lines in cells for line in lines if not line.startswith("%"))
        for call in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)):
            called = ast.unparse(call.func)
            if called.split(".")[-1] in LOADERS and not called.startswith(ADAPTERS):
                says = "trust_remote_code" in {keyword.arg for keyword in call.keywords}
                assert says, f"{path.relative_to(ROOT)}, line {call.lineno}: {called}"
