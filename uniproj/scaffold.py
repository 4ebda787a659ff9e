"""`python -m uniproj scaffold NAME`: the file of a new projection, and what the tests of a checkout want of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from uniproj import registry
from uniproj.errors import ProjectionError

_ROOT = Path(__file__).parents[1]
_PROJECTIONS = _ROOT / "uniproj" / "projections"
# what a checkout keeps of every projection: golden checksums, and an adapter as it was saved
_KEEPERS = ("tests.test_golden", "tests.format.fixtures")

_TEMPLATE = '''"""{title}: row i of theta_D copies number i mod d of theta_d, scaled so that P is an isometry."""

from __future__ import annotations

import torch
from torch import Tensor

from uniproj.layout import LoRALayout
from uniproj.projection import Projection
from uniproj.registry import register


@register("{name}")
class {title}(Projection):
    """theta_D[i] = theta_d[i mod d] / sqrt(n_j), where n_j rows copy number j."""

    formula = "theta_D[i] = theta_d[i mod d] / sqrt(n)"
    source = "ours"
    claims = frozenset({{"linear", "orthogonal", "isometric", "uniform"}})

    def __init__(self, layout: LoRALayout, d: int, seed: int = 0):
        super().__init__(layout, d, seed)
        self.index = torch.arange(self.D) % d
        self.scale = torch.bincount(self.index).double().rsqrt()

    def _matvec(self, theta_d: Tensor) -> Tensor:
        """(n, d) -> (n, D): P theta_d."""
        return (theta_d * self.scale.to(theta_d.dtype))[:, self.index]

    def _rmatvec(self, theta_D: Tensor) -> Tensor:
        """(n, D) -> (n, d): P^T theta_D."""
        sums = theta_D.new_zeros(len(theta_D), self.d).index_add(1, self.index, theta_D)
        return sums * self.scale.to(theta_D.dtype)

    def to_dense(self) -> Tensor:
        """P (D, d), from its definition and not from `_matvec`: the tests compare the two."""
        hit = torch.nn.functional.one_hot(self.index, self.d).double()
        return hit / hit.sum(0).sqrt()
'''


def scaffold(name: str) -> Path:
    """Write the file of a projection that works, to be changed into a method of one's own.

    In a checkout the file is `uniproj/projections/NAME.py`, and its golden checksums and a saved adapter are added to
    the tests; a second call makes these two anew, as long as the file is not committed. Elsewhere it is NAME.py in the
    working directory, for `--plugins NAME.py`. Returns the path of the file.

    Raises ProjectionError for a name that is no lower-case identifier or belongs to another projection, and for a
    projection that is committed: its P is part of results, and another one needs another `version`.
    """
    checkout = (_ROOT / "tests").is_dir()
    path = _PROJECTIONS / f"{name}.py" if checkout else Path(f"{name}.py")
    if not name.isidentifier() or name != name.lower() or name.startswith("_"):
        raise ProjectionError(f"scaffold: the name must be a lower-case Python identifier, got {name!r}. Take another.")
    if checkout and _is_committed(path):
        raise ProjectionError(
            f"scaffold: {path} is committed, so its P is part of results. Raise its version to change it, or take "
            "another name."
        )
    if not path.exists():
        if name in registry.names():
            raise ProjectionError(f"scaffold: {name!r} is the name of another projection. Take another.")
        title = "".join(word.capitalize() for word in name.split("_"))
        path.write_text(_TEMPLATE.format(name=name, title=title))
    if checkout:
        for keeper in _KEEPERS:
            subprocess.run([sys.executable, "-m", keeper, name], cwd=_ROOT, check=True)
    return path


def _is_committed(path: Path) -> bool:
    shown = subprocess.run(["git", "ls-files", str(path)], cwd=_ROOT, capture_output=True, text=True, check=False)
    return bool(shown.stdout.strip())
