"""Small files that ask for much: each is refused by a sentence, before the memory or the time is spent."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.format.costs import costs
from tests.format.saved import joined, parts, reconfigure, relabel, save
from uniproj import AdapterError, LoRALayout, ProjectionError, build, get, limits, names
from uniproj.format import file
from uniproj.format.header import Header, beyond_P, pack
from uniproj.format.keys import OF_P, THETA_D
from uniproj.format.remap import new_names
from uniproj.tuner import UniProjConfig

SQUARE = {"layers.0.q": (20_000, 20_000)}


def forge(folder: Path, projection: str, layout: LoRALayout, d: int, own: Any = (), **hyperparameters: Any) -> Path:
    """An adapter whose digest, fingerprint, identity and configuration agree; its P was never made."""
    size = {"d": d} if get(projection).free_d else {}
    config = UniProjConfig(
        projection=projection,
        r=layout.blocks[0].shape[1],
        target_modules=["q"],
        projection_kwargs=hyperparameters,
        **size,
    )
    version = get(projection).version
    header = Header(projection, version, hyperparameters, d, 0, layout, "0" * 64)
    header = Header.from_metadata({**header.to_metadata(), "uniproj.settings": pack(beyond_P(config.to_dict()))})
    assert header is not None
    file.write(folder, {THETA_D: torch.ones(d), **dict(own)}, header, config.to_dict())
    return folder


def one_module(D: int, r: int = 8) -> LoRALayout:
    return LoRALayout.from_shapes({"layers.0.q": (D // r // 2, D // r // 2)}, r)


def test_a_P_that_its_file_does_not_hold_or_that_is_too_large_is_refused_before_it_is_made(tmp_path: Path) -> None:
    forged = {
        # its logits would take 3.2 GB, and their draw three times as much
        "vblora": forge(tmp_path / "a", "vblora", one_module(1_600_000), 500, num_vectors=500, vector_length=1),
        "unilora_sparse": forge(tmp_path / "b", "unilora_sparse", one_module(1_000_000_000), 4, exclusive=True),
        "gaussian_orthonormal": forge(tmp_path / "c", "gaussian_orthonormal", one_module(2**17), 2048),
        "gaussian": forge(tmp_path / "d", "gaussian", one_module(2**27), 2**12),
        "nola": forge(tmp_path / "e", "nola", one_module(2**27), 2**12),
        "lora": forge(tmp_path / "f", "fastfood", LoRALayout.from_shapes({"layers.0.q": (10**9, 10**9)}, 10**9), 4),
    }
    wanted = [
        r"must hold a tensor of shape \(1600000, 500\), got none",
        r"D must be at most 134,217,728, got 1,000,000,000\. .* UNIPROJ_MAX_ROWS",
        r"random numbers that gaussian_orthonormal takes must be at most 17,179,869,184, got 68,719,476,736",
        "random numbers that gaussian takes must be at most",
        "random numbers that nola takes must be at most",
        "D must be at most 134,217,728, got 2,000,000,000,000,000,000",
    ]
    asked = [(action, folder) for folder in forged.values() for action in ("verify", "export")]
    for cost, message in zip(costs(*asked), [m for m in wanted for _ in range(2)], strict=True):
        assert pytest.approx(0, abs=64) == cost.megabytes and cost.seconds < 5, cost
        with pytest.raises(AssertionError, match=f"^AdapterError: .*{message}"):
            raise AssertionError(cost.said)


def test_random_numbers_that_a_P_of_base_weights_holds_are_counted_before_it_is_made(tmp_path: Path) -> None:
    header = file.read(forge(tmp_path / "a", "tinylora", one_module(2**26, 2**12), 64, u=64)).header
    assert header is not None  # 64 matrices of 2^12 x 2^12, 4 GiB in float32
    with pytest.raises(AdapterError, match="random numbers that tinylora takes must be at most"):
        header.build({"layers.0.q": torch.empty(2**13, 2**13, device="meta")})
    header = file.read(forge(tmp_path / "b", "tinylora", one_module(2**22, 2**8), 64, u=64)).header
    assert header is not None
    header.check_cost()


def test_what_is_allowed_takes_memory_and_time_linear_in_D(tmp_path: Path) -> None:
    """Every method with a free d at D = 2^22, from a file of a few kB: at most 80 bytes a row."""
    D = 2**22
    asked = []
    for name in names():
        cls = get(name)
        for k, variant in enumerate(cls.variants) if not cls.needs_base_weights and cls.free_d else ():
            d = max(4, cls.min_d(one_module(D)))
            asked.append(("verify", forge(tmp_path / f"{name}{k}", name, one_module(D), d, **variant)))
    for cost, (_, folder) in zip(costs(*asked, most=4096), asked, strict=True):
        assert "P must have the checksum 000000000000.." in cost.said, (folder.name, cost)
        assert cost.megabytes < 32 + 80 * D / 2**20 and cost.seconds < 60, (folder.name, cost)


def _sparse(folder: Path, size: int, entries: dict[str, Any]) -> Path:
    """The file of an adapter of which only the header takes room on the disk."""
    save(folder)
    path = folder / file.WEIGHTS
    header, _ = parts(path.read_bytes())
    path.write_bytes(joined({"__metadata__": header["__metadata__"], **entries}, b""))
    os.truncate(path, path.stat().st_size + size)
    return folder


def test_a_sparse_file_is_judged_by_its_header(tmp_path: Path) -> None:
    def theta_d(numbers: int) -> dict[str, Any]:
        return {THETA_D: {"dtype": "F32", "shape": [numbers], "data_offsets": [0, 4 * numbers]}}

    two, hundred = 2 * 10**9, 100 * 10**9
    asked = [
        ("read", _sparse(tmp_path / "a", two, theta_d(two // 4))),
        ("read", _sparse(tmp_path / "b", two, theta_d(40))),
        ("read", _sparse(tmp_path / "c", hundred, theta_d(hundred // 4))),
        ("verify", _sparse(tmp_path / "d", hundred, theta_d(40))),
    ]
    (tmp_path / "e").mkdir()
    for name in (file.WEIGHTS, file.CONFIG):
        (tmp_path / "e" / name).touch()
        os.truncate(tmp_path / "e" / name, hundred)
    asked.append(("read", tmp_path / "e"))
    weight = {"dtype": "F32", "shape": [two // 4], "data_offsets": [160, 160 + two]}
    entries = theta_d(40) | {"base_model.model.norm.weight": weight}
    asked.append(("read", _sparse(tmp_path / "f", 160 + two, entries)))
    found = costs(*asked, most=512)
    wanted = [r"shape (40,), got (500000000,)", "must be a whole safetensors file"]
    wanted += 2 * ["its bytes must be at most 8,589,934,592, got 100,000,0"]
    wanted += ["its bytes must be at most 4,194,304, got 100,000,000,000"]
    wanted += ["base_model.model.norm.weight must be what the configuration trains"]
    for cost, message in zip(found, wanted, strict=True):
        assert cost.said.startswith("AdapterError: ") and message in cost.said, cost
        assert cost.megabytes < 32 and cost.seconds < 5, cost


def test_long_lines_and_headers_are_refused_before_they_are_parsed(tmp_path: Path) -> None:
    lists = f'{{"a":[{",".join(["[]"] * 20_000_000)}]}}'
    for name in "abcd":
        save(tmp_path / name)
    relabel(tmp_path / "a", lambda metadata: {**metadata, "uniproj.projection_kwargs": lists})
    relabel(tmp_path / "b", lambda metadata: {**metadata, "uniproj.projection_kwargs": lists[: 5 * 2**20]})
    relabel(tmp_path / "c", lambda metadata: {**metadata, "uniproj.layout": pack([["q", 1, 1, 1]] * 900_000)})
    (tmp_path / "d" / file.CONFIG).write_text(lists)
    found = costs(*[("read", tmp_path / name) for name in "abcd"], most=512)
    wanted = [
        "the bytes of its header must be at most 16,777,216, got 60,",
        "the letters of the header's projection_kwargs must be at most 4,194,304, got 5,242,880",
        "modules must be at most 131,072, got 900,000",
        "its bytes must be at most 4,194,304, got 60,",
    ]
    for cost, message in zip(found, wanted, strict=True):
        assert cost.said.startswith("AdapterError: ") and message in cost.said, cost
        assert cost.megabytes < 128 and cost.seconds < 5, cost


def test_a_mixture_of_experts_is_verified_in_seconds(tmp_path: Path) -> None:
    shapes = {f"model.layers.{i}.mlp.experts.{j}.{m}": (8, 6) for i in range(57) for j in range(256) for m in "qvo"}
    layout = LoRALayout.from_shapes(shapes, 1)
    assert len(layout.modules) > 43_000
    tried: list[tuple[str, dict[str, Any]]] = [
        ("unilora", {"assignment": "peft"}),
        ("unilora_local", {"per": "module"}),
        ("tied_lora", {}),
    ]
    for name, hyperparameters in tried:
        P = build(name, layout=layout, seed=3, **({"d": 50_000} if get(name).free_d else {}), **hyperparameters)
        config = UniProjConfig(projection=name, projection_seed=3, r=1, target_modules=["q", "v", "o"], d=P.d)
        config.projection_kwargs = hyperparameters
        own = {f"{OF_P}{key}": p.detach() for key, p in P.named_parameters()}
        file.write(tmp_path / name, {THETA_D: torch.ones(P.d), **own}, Header.of(config.to_dict(), P), config.to_dict())
    for cost in costs(*[("verify", tmp_path / name) for name, _ in tried]):
        assert "has its checksum" in cost.said and cost.megabytes < 512 and cost.seconds < 30, cost


def test_a_table_of_renamed_modules_costs_no_more_than_it_may(tmp_path: Path) -> None:
    """A header packs each in kilobytes: rows that rename nothing, and one whose new name is long for many modules."""
    layout = LoRALayout.from_shapes({f"layers.{i}.q": (1, 1) for i in range(2**12)}, 1)
    asked = []
    for name, table in {"many": [[f"a{i}", ""] for i in range(2**17)], "long": [["q", "b" * 3_000_000]]}.items():
        folder = forge(tmp_path / name, "unilora", layout, 4)
        reconfigure(folder, remap=table)
        packed = pack(beyond_P(json.loads((folder / file.CONFIG).read_text())))
        relabel(folder, lambda metadata, packed=packed: {**metadata, "uniproj.settings": packed})
        asked.append(("read", folder))
    for cost in costs(*asked, most=512):
        assert cost.said.startswith("AdapterError: ") and "remap: rows times modules must be few" in cost.said, cost
        assert cost.megabytes < 256 and cost.seconds < 5, cost
    few = LoRALayout.from_shapes({f"layers.{i}.q": (1, 1) for i in range(800)}, 1)
    each = [[f"layers.{i}.q", f"blocks.{i}.query"] for i in range(800)]  # every module by a row of its own
    assert new_names(few, each) == {f"layers.{i}.q": f"blocks.{i}.query" for i in range(800)}


def test_a_limit_that_is_raised_lets_a_large_file_in(tmp_path: Path, monkeypatch) -> None:
    saved = save(tmp_path)
    D = saved.header.layout.D if saved.header else 0
    monkeypatch.setattr(limits, "rows", D - 1)
    header = file.read(tmp_path).header
    assert header is not None
    with pytest.raises(AdapterError, match=rf"D must be at most {D - 1}, got {D}\. .*raise uniproj\.limits\.rows"):
        header.build()
    assert header.build(on_base=True).D == D  # a base model that has more weights
    monkeypatch.setattr(limits, "rows", D)
    assert header.build().D == D
    for name, value in {"modules": 3, "file_bytes": 200, "header_bytes": 99, "config_bytes": 98}.items():
        with (
            monkeypatch.context() as low,
            pytest.raises(AdapterError, match=rf"must be at most .* uniproj\.limits\.{name}"),
        ):
            low.setattr(limits, name, value)
            file.read(tmp_path)
    low_rows = {"UNIPROJ_MAX_ROWS": str(D - 1)}
    assert f"must be at most {D - 1}," in costs(("verify", tmp_path), **low_rows)[0].said
    assert "has its checksum" in costs(("verify", tmp_path), UNIPROJ_MAX_ROWS=str(D))[0].said


def test_tensors_are_read_where_the_header_says_and_nowhere_else(tmp_path: Path) -> None:
    save(tmp_path)
    path = tmp_path / file.WEIGHTS
    header, numbers = parts(path.read_bytes())
    one, two = [name for name in header if name != "__metadata__"][:2]
    places = {name: header[name]["data_offsets"] for name in (one, two)}
    changes: list[dict[str, Any]] = [
        {one: {**header[one], "data_offsets": places[two]}},
        {one: {**header[one], "data_offsets": [-1, places[one][1]]}},
        {one: {**header[one], "shape": [2**40, 2**40]}},
        {one: {**header[one], "shape": {}}},
        {one: {**header[one], "dtype": "F4"}},
        {one: []},
        {"more": {"dtype": "F32", "shape": [1], "data_offsets": [len(numbers), len(numbers) + 4]}},
        {"more": {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}},
        {"__metadata__": {"a": 1}},
        {"__metadata__": [1]},
    ]
    for change in changes:
        path.write_bytes(joined({**header, **change}, numbers))
        with pytest.raises(AdapterError, match="must be a whole safetensors file"):
            file.read(tmp_path)
    text = json.dumps(header)
    twice = f'{text[:-1]}, "{one}": {json.dumps(header[one])}}}'.encode()
    path.write_bytes(len(twice).to_bytes(8, "little") + twice + numbers)
    with pytest.raises(AdapterError, match="a name that stands twice"):
        file.read(tmp_path)


def test_a_pipe_in_place_of_a_configuration_is_refused(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / file.CONFIG).unlink()
    os.mkfifo(tmp_path / file.CONFIG)
    with pytest.raises(AdapterError, match="must be a regular file"):
        file.read(tmp_path)
    assert not file.says_ours(tmp_path)


@pytest.mark.parametrize(
    "hyperparameters", [{"vector_length": -1}, {"num_vectors": "x"}, {"topk": 10**6}, {"trained": 3}]
)
def test_hyperparameters_that_no_method_takes_are_refused_on_reading(tmp_path: Path, hyperparameters: Any) -> None:
    name = "tied_lora" if "trained" in hyperparameters else "vblora"
    save(tmp_path, name)
    relabel(tmp_path, lambda m: {**m, "uniproj.projection_kwargs": json.dumps(hyperparameters)})
    reconfigure(tmp_path, projection_kwargs=hyperparameters)
    with pytest.raises(AdapterError):
        file.read(tmp_path)


@pytest.mark.parametrize("name", names())
def test_the_shapes_of_a_P_are_known_before_it_is_made(name: str) -> None:
    from tests.format.saved import LAYOUT
    from uniproj.testing import sample

    for variant in get(name).variants:
        P = sample(name, LAYOUT, 40, **variant)
        found = get(name).parameter_shapes(LAYOUT, P.d, **variant)
        assert found == {key: tuple(p.shape) for key, p in P.named_parameters()}
        assert get(name).draws(LAYOUT, P.d, **variant) <= 2**8 * P.D * P.d


@pytest.mark.parametrize("D", [3e9, "5", None])
def test_a_D_that_is_no_integer_is_refused(D: Any) -> None:
    with pytest.raises(ProjectionError, match="D must be an integer, got"):
        LoRALayout.flat(D)
    if D is not None:
        with pytest.raises(ProjectionError, match="D must be an integer, got"):
            build("unilora", D, 4)


def test_a_D_of_three_billion_is_a_sentence_or_works() -> None:
    assert LoRALayout.flat(3_000_000_000).D == 3_000_000_000
    with pytest.raises(ProjectionError, match=r"unilora: .* n must lie in .* got 3000000000"):
        build("unilora", 3_000_000_000, 4)
    P = build("gaussian", 3_000_000_000, 1)
    assert len(P.checksum()) == 64
