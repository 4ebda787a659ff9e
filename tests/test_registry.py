"""Names, entry points, budgets, errors, the command line."""

import importlib.metadata
import json

import numpy as np
import pytest
import torch

import uniproj
from uniproj import LoRALayout, Projection, ProjectionError, build, get, names, register, registry
from uniproj.algebra import BlockDiagonal, Compose, ConcatColumns, Select
from uniproj.budget import TOLERANCE
from uniproj.cli import main
from uniproj.projections._partition import Partition

LAYOUT = LoRALayout.from_shapes({f"h.{i}.{m}": (8, 4) for i in range(2) for m in "qv"}, r=2)
METHODS = {
    "lora", "gaussian", "gaussian_orthonormal", "nola", "vera", "tied_lora", "vblora", "lora_xs", "fastfood",
    "fastfood_sign", "unilora", "unilora_local", "unilora_nonuniform", "unilora_unnormalised", "sparse", "tinylora",
    "unilora_sparse", "unilora_block",
}  # fmt: skip


class Third(Partition):
    """Somebody else's projection."""

    def __init__(self, layout: LoRALayout, d: int, seed: int = 0):
        super().__init__(layout, d, seed, torch.arange(layout.D) % d)


def test_all_methods_are_registered() -> None:
    assert set(names()) >= METHODS


def test_entry_points_bring_third_parties_in_and_broken_ones_are_named(monkeypatch) -> None:
    values = {"third": f"{__name__}:Third", "broken": "no_such_module:P"}
    entries = [importlib.metadata.EntryPoint(*item, registry.ENTRY_POINTS) for item in values.items()]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries)
    registry._load.cache_clear()
    try:
        with pytest.warns(UserWarning, match="'broken' of no_such_module:P cannot be loaded"):
            assert {"third", "unilora"} <= set(names())
        assert build("third", D=10, d=3).name == "third"
    finally:
        registry._load.cache_clear()


def test_global_defaults_of_torch_do_not_reach_P() -> None:
    expected = {name: build(name, 2000, 8) for name in ("unilora", "fastfood", "sparse", "gaussian")}
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = {name: build(name, 2000, 8) for name in expected}
        sums = {name: P.checksum() for name, P in found.items()}
        starts = {P.init_theta().dtype for P in found.values()}
    finally:
        torch.set_default_dtype(torch.float32)
    assert sums == {name: P.checksum() for name, P in expected.items()} and starts == {torch.float32}


def test_sparse_coordinates_always_hold_a_row_of_B() -> None:
    layout = LoRALayout.from_shapes({"a": (2, 50)}, 1)
    for seed in range(40):
        P = build("sparse", layout=layout, d=1, seed=seed)
        assert int(P.rows[0]) < 2


def test_layers_are_told_apart_by_whole_numbers() -> None:
    shapes = {f"layers.{i}.{m}": (4, 4) for i in range(2) for m in ("q_proj", "fc1", "fc2")}
    P = build("unilora_local", layout=LoRALayout.from_shapes(shapes, 2), d=12)
    columns = {m: set(P.index[P.layout.rows([m])].tolist()) for m in P.layout.modules}
    assert columns["layers.0.fc1"] & columns["layers.0.q_proj"]
    assert not columns["layers.0.fc1"] & columns["layers.1.fc1"]


def test_forward_mode_and_hessian() -> None:
    P = build("unilora", 30, 5)
    x = torch.randn(5, dtype=torch.float64)
    torch.testing.assert_close(torch.func.jacfwd(P)(x), P.to_dense())
    hessian = torch.func.hessian(lambda t: P(t).square().sum())(x)
    torch.testing.assert_close(hessian, 2 * torch.eye(5, dtype=torch.float64))


def test_a_taken_name_is_refused(monkeypatch) -> None:
    with pytest.raises(ProjectionError, match="'unilora' is taken by"):
        register("unilora")(Third)


@pytest.mark.parametrize("name", sorted(n for n in METHODS if get(n).free_d and not get(n).needs_modules))
def test_flat_layouts(name: str) -> None:
    P = build(name, 40, 8, seed=1)
    assert P.shape == (40, 8) and P(torch.ones(8)).shape == (40,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build("uniloar", 10, 2), r"unknown projection 'uniloar'. Did you mean 'unilora'.*Known: fastfood"),
        (lambda: build("unilora"), "either D= or layout="),
        (lambda: build("unilora", 10, 2, layout=LAYOUT), "either D= or layout="),
        (lambda: build("unilora", 10), "d is free"),
        (lambda: build("unilora", 10, 11), r"d must lie in \[1, D\] = \[1, 10\], got 11"),
        (lambda: build("unilora", 10, 0), r"got 0"),
        (lambda: build("unilora", 10, 2.0), "d must be an integer, got 2.0"),
        (lambda: build("unilora", 10, 2, seed=-1), r"seed must lie in \[0, 2\^64\), got -1"),
        (lambda: build("vera", layout=LAYOUT, d_initial=0.0), "d_initial must not be 0"),
        (lambda: build("unilora", 10, 2, topk=3), r"unknown hyperparameters \['topk'\]; this method knows \['assign"),
        (lambda: build("unilora", 10, 2, assignment="x"), "assignment must be"),
        (lambda: build("unilora", 10, 9, assignment="iid"), "every column needs a row"),
        (lambda: build("unilora", 10, 2, assignment="peft", module_order=["x"]), "module_order must list every module"),
        (lambda: build("vera", 10), "needs module structure|flat layout has no modules"),
        (lambda: build("vera", layout=LAYOUT, d=3), r"d = sum\(out \+ r\) = 40 on this layout, got d=3"),
        (lambda: build("lora_xs", layout=LAYOUT, base_weights={}), "h.0.q needs a base weight of shape"),
        (lambda: build("lora_xs", layout=LAYOUT, base_weights={}, side="C"), "side must be"),
        (lambda: build("tinylora", layout=LAYOUT, base_weights={}, u=0), "u >= 1"),
        (lambda: build("vblora", layout=LAYOUT, vector_length=3), "vector_length must divide every in and out"),
        (lambda: build("vblora", layout=LAYOUT, num_vectors=2, topk=3), "topk must lie in"),
        (lambda: build("tied_lora", layout=LAYOUT, trained="xy"), "non-empty subset of 'uvAB'"),
        (lambda: build("tied_lora", layout=LAYOUT, group="x"), "group must be"),
        (
            lambda: build("vera", layout=LoRALayout.from_shapes({"a": (2, 2), "b": (2, 2)}, {"a": 1, "b": 2})),
            "one rank.* give a convolution of g groups",
        ),
        (lambda: build("unilora_local", layout=LAYOUT, d=3), r"d must lie in \[4, D\]"),
        (lambda: build("unilora_local", layout=LAYOUT, d=9, per="x"), "per must be"),
        (lambda: build("unilora_nonuniform", layout=LAYOUT, d=9, share_B=2), "share_B must lie"),
        (lambda: build("unilora_sparse", 30, 9, ratio=0), "ratio"),
        (lambda: Compose(build("unilora", 10, 4), build("unilora", 5, 2)), "outer.d must equal inner.D, got 4 and 5"),
        (lambda: ConcatColumns([build("unilora", 10, 4), build("unilora", 5, 2)]), "must share D"),
        (lambda: BlockDiagonal([build("unilora", 10, 4)], LAYOUT), "10 rows together, the layout has 96"),
        (lambda: Select(LoRALayout.flat(4), torch.tensor([1, 1])), "rows must be distinct"),
    ],
)
def test_errors_say_what_to_do(make, message: str) -> None:
    with pytest.raises(ProjectionError, match=message):
        make()


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda P: P(torch.ones(9)), r"theta_d must have shape \(\.\.\., d\) = \(\.\.\., 4\), got \(9,\)"),
        (lambda P: P(torch.tensor(1.0)), r"got \(\)"),
        (lambda P: P.adjoint(torch.ones(4)), r"theta_D must have shape"),
        (lambda P: P(torch.ones(4, dtype=torch.int64)), "float tensor, got torch.int64"),
        (lambda P: P(np.ones(4)), "float tensor, got ndarray"),
        (lambda P: build("gaussian", 10, 4).to_sparse(), "no sparse form"),
    ],
)
def test_bad_input_is_refused(use, message: str) -> None:
    with pytest.raises(ProjectionError, match=message):
        use(build("unilora", 10, 4))


def test_integers_of_numpy_are_integers() -> None:
    P = build("fastfood", np.int64(10), np.int32(3), seed=np.int32(5))
    assert torch.equal(P.to_dense(), build("fastfood", 10, 3, seed=5).to_dense())
    assert LoRALayout.from_shapes({"a": (np.int64(3), 2)}, np.int64(1)) == LoRALayout.from_shapes({"a": (3, 2)}, 1)


def test_a_dense_matrix_too_large_to_hold_is_refused_or_regenerated(monkeypatch) -> None:
    whole = build("gaussian", 50, 7, seed=2)
    for home in ("_random", "gaussian_orthonormal"):
        monkeypatch.setattr(f"uniproj.projections.{home}.RESIDENT", 100)
    monkeypatch.setattr("uniproj.projections._random.TILE", 30)
    tiled = build("gaussian", 50, 7, seed=2)
    x, y = torch.randn(2, 7, dtype=torch.float64), torch.randn(2, 50, dtype=torch.float64)
    assert tiled.P is None
    torch.testing.assert_close(tiled(x), whole(x), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(tiled.adjoint(y), whole.adjoint(y), rtol=1e-13, atol=1e-13)
    assert torch.equal(tiled.to_dense(), whole.to_dense())
    with pytest.raises(ProjectionError, match="must be held whole"):
        build("gaussian_orthonormal", 50, 7)


MINILM = {f"encoder.layer.{i}.attention.self.{m}": (384, 384) for i in range(6) for m in ("query", "value")}


@pytest.mark.parametrize("name", names())
def test_budget_counts_what_is_built(name: str) -> None:
    """for_budget's count equals the trained numbers of the projection it describes."""
    cls = get(name)
    found = cls.for_budget(MINILM, 4740, 4)
    layout = LoRALayout.from_shapes(MINILM, found.r)
    extra = dict(found.hyperparameters)
    if cls.needs_base_weights:
        extra["base_weights"] = {m: torch.zeros(shape) + torch.eye(384) for m, shape in MINILM.items()}
    if name in ("gaussian", "gaussian_orthonormal", "nola"):  # a gigabyte to build; d is free and met exactly
        assert found.trained == found.d == 4740
        return
    P: Projection = build(name, layout=layout, d=found.d, **extra)
    assert P.trained == found.trained
    if name != "lora":  # its smallest rank has 9,216 numbers
        assert abs(found.error(4740)) <= TOLERANCE


def test_list_and_check_on_the_command_line(capsys) -> None:
    assert main(["list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows.keys() >= METHODS and rows["unilora"]["source"] == "arXiv 2506.00799"
    assert all(row["theta_D"] and row["d"] and row["claims"] and row["source"] for row in rows.values())
    assert main(["list"]) == 0
    assert "isometric if n' divides D" in capsys.readouterr().out
    assert main(["check", "unilora", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["failed"] == 0 and len(report["variants"]) == 3
    assert main(["check", "vera"]) == 0
    assert "ok   claim:orthogonal" in capsys.readouterr().out
    assert main(["check", "nothing"]) == 2
    assert "Known:" in capsys.readouterr().err


def test_check_reports_a_failure(capsys, monkeypatch) -> None:
    monkeypatch.setattr(get("unilora"), "init_bound", 0.0)
    assert main(["check", "unilora"]) == 1
    assert "FAIL start_is_not_the_saddle" in capsys.readouterr().out


def test_version_is_that_of_the_package() -> None:
    assert uniproj.__version__ == importlib.metadata.version("uniproj")


@pytest.mark.parametrize(
    ("name", "r", "options", "got", "remedy"),
    [
        ("unilora", None, {"d": 11}, "d must lie in [1, D] = [1, 10], got 11", "Lower d or raise D."),
        ("unilora", None, {"d": 0}, "got 0", "Raise d."),
        ("fastfood", 2, {"d": 97}, "got 97", "Lower d, raise r or adapt more modules."),
        ("nola", 2, {"d": 7}, "d must lie in [8, D] = [8, 96], got 7", "Raise d."),
        ("tinylora", 2, {"u": 25}, "got 100", "Lower what decides d = u * groups."),
        # D grows with r and d with its square: a higher r is no remedy, and nor is another d
        ("lora_xs", 500, {}, "r must be at most min(out, in) = 4 of h.0.q, got 500", "Lower r."),
        ("tinylora", 5, {}, "r must be at most min(out, in) = 4 of h.0.q, got 5", "Lower r."),
    ],
)
def test_a_bound_is_told_with_the_way_back_into_it(
    name: str, r: int | None, options: dict, got: str, remedy: str
) -> None:
    layout = LoRALayout.flat(10) if r is None else LoRALayout.from_shapes(LAYOUT.shapes(), r)
    weights = {"base_weights": {m: torch.ones(8, 4) for m in layout.modules}} if get(name).needs_base_weights else {}
    with pytest.raises(ProjectionError) as refused:
        build(name, layout=layout, **weights, **options)
    assert got in str(refused.value) and str(refused.value).endswith(f". {remedy}")
