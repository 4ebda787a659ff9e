"""What is installed: the wheel, the source distribution, an editable clone, their metadata and their links."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import uniproj

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\]\(([^)\s]+)\)")


def _python(*args: str, cwd: Path, interpreter: Path | str = sys.executable, **environment: str) -> str:
    run = subprocess.run([interpreter, *args], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """The two files of `python -m build`, by their ending, and the wheel of an editable install of a clone."""
    folder = tmp_path_factory.mktemp("built")
    clone = folder / "above" / "uniproj"
    shutil.copytree(ROOT / "uniproj", clone / "uniproj", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"):
        shutil.copy(ROOT / name, clone)
    (clone / "tests").mkdir()
    (clone / "tests" / "test_stray.py").touch()
    _python("-m", "build", "--no-isolation", "--outdir", str(folder), cwd=clone, **os.environ)
    editable = "import hatchling.build, sys; hatchling.build.build_editable(sys.argv[1])"
    _python("-c", editable, str(folder / "editable"), cwd=clone, **os.environ)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return {"sdist": sdist, "wheel": wheel, "editable": next((folder / "editable").glob("*.whl")), "clone": clone}


def _install(wheel: Path, folder: Path) -> Path:
    """The interpreter of a new environment with this wheel, which borrows all other packages from ours."""
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    borrowed = [path for path in sys.path if path and Path(path).resolve() != ROOT.resolve()]
    (site / "borrowed.pth").write_text("\n".join(borrowed))
    return folder / "bin" / "python"


def _metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("METADATA")]
        return email.message_from_bytes(archive.read(name))


def test_a_wheel_works_in_a_new_environment(built, tmp_path: Path) -> None:
    python = _install(built["wheel"], tmp_path / "venv")
    assert "unilora_nonuniform" in _python("-m", "uniproj", "list", cwd=tmp_path, interpreter=python)


USER = """
from typing import assert_type
import torch
from torch import Tensor
from uniproj import LoRALayout, build
from uniproj.tuner import UniProjConfig

def there_and_back(layout: LoRALayout) -> Tensor:
    P = build("unilora", layout=layout, d=5)
    theta_D = assert_type(P(torch.ones(P.d)), Tensor)
    P("theta_d")  # type: ignore[arg-type]
    return P.adjoint(theta_D)

assert_type(UniProjConfig(projection="unilora", d=5, r=2, target_modules=["q"]).d, int | None)
UniProjConfig(projection=5)  # type: ignore[arg-type]
"""


@pytest.mark.system  # mypy reads all of PyTorch
def test_a_user_sees_the_types(built, tmp_path: Path) -> None:
    """Under --strict an `ignore` that silences nothing is an error, as it would be if the package had no types."""
    python = _install(built["wheel"], tmp_path / "venv")
    (tmp_path / "user.py").write_text(USER)
    options = ["--strict", "--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(tmp_path / "cache")]
    assert "Success" in _python("-m", "mypy", *options, "user.py", cwd=tmp_path, interpreter=python)


def test_a_script_beside_an_editable_clone_of_this_name_finds_the_package(built, tmp_path: Path) -> None:
    python, clone = _install(built["editable"], tmp_path / "venv"), built["clone"]
    script = clone.parent / "script.py"
    script.write_text("import uniproj\nprint(uniproj.__version__, uniproj.__file__, uniproj.build('unilora', 9, 3).d)")
    expected = f"{uniproj.__version__} {clone / 'uniproj' / '__init__.py'} 3\n"
    assert _python("script.py", cwd=clone.parent, interpreter=python) == expected


def test_only_the_library_is_packed(built) -> None:
    with tarfile.open(built["sdist"]) as archive:
        sources = {Path(*Path(name).parts[1:]) for name in archive.getnames()}
    with zipfile.ZipFile(built["wheel"]) as archive:
        installed = {Path(name) for name in archive.namelist() if ".dist-info" not in name}
    modules = {path.relative_to(ROOT) for path in (ROOT / "uniproj").rglob("*.py")} | {Path("uniproj/py.typed")}
    assert installed == modules
    beside = {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "pyproject.toml", "PKG-INFO"}
    assert sources == modules | set(map(Path, beside))


def test_the_metadata_are_complete_and_rendered(built) -> None:
    _python("-m", "twine", "check", "--strict", str(built["sdist"]), str(built["wheel"]), cwd=ROOT, **os.environ)
    fields = _metadata(built["wheel"])
    assert fields["Version"] == uniproj.__version__
    assert all(
        fields.get_all(name) for name in ("Author", "Keywords", "Classifier", "Project-URL", "License-Expression")
    )


def test_the_version_stands_in_one_place() -> None:
    beside = ("pyproject.toml", "CITATION.cff", "docs/conf.py")
    assert [name for name in beside if uniproj.__version__ in (ROOT / name).read_text()] == []
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["title"].startswith("uniproj")


def test_the_lowest_versions_that_are_declared_are_those_that_are_tested(built) -> None:
    pins = (Requirement(line) for line in (ROOT / "constraints-lowest.txt").read_text().splitlines())
    tested = {pin.name: Version(next(iter(pin.specifier)).version) for pin in pins}
    required = map(Requirement, _metadata(built["wheel"]).get_all("Requires-Dist"))
    declared = {need.name: need.specifier for need in required if need.marker is None}
    lowest = {name: [Version(bound.version) for bound in of if bound.operator == ">="] for name, of in declared.items()}
    assert lowest == {name: [tested[name]] for name in declared}
    assert "numba" not in tested


def test_links_work_in_the_checkout_and_where_the_package_is_published(built) -> None:
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        inside = [link.split("#")[0] for link in LINK.findall(page.read_text()) if "://" not in link]
        assert [link for link in inside if not (page.parent / link).exists()] == [], page
    repository = dict(url.split(", ") for url in _metadata(built["wheel"]).get_all("Project-URL"))["Repository"]
    published = LINK.findall(_metadata(built["wheel"]).get_payload())
    ours = [link for link in LINK.findall((ROOT / "README.md").read_text()) if "://" not in link]
    # a picture is shown from where its bytes are, not from the page about them
    wanted = {f"{repository}/{'raw' if link.endswith('.png') else 'blob'}/main/{link}" for link in ours}
    assert wanted <= set(published)
    assert all(link.startswith("https://") for link in published)
