"""Small files that ask for much: each is refused by a sentence, before the memory or the time is spent."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.format.costs import Cost, cost
from tests.format.saved import LAYOUT, joined, parts, reconfigure, relabel, save
from uniproj import AdapterError, LoRALayout, ProjectionError, build, get, limits, names
from uniproj.exchange import export
from uniproj.exchange.verify import verify
from uniproj.format import file
from uniproj.format.header import Header, beyond_P, pack
from uniproj.format.keys import OF_P, THETA_D
from uniproj.format.remap import new_names
from uniproj.testing import sample
from uniproj.tuner import UniProjConfig

SQUARE = {"layers.0.q": (20_000, 20_000)}


def forge(folder: Path, projection: str, layout: LoRALayout, d: int, own: Any = (), **hyperparameters: Any) -> Path:
    """An adapter whose digest, fingerprint, identity and configuration agree; its P was never made."""
    cls, r = get(projection), layout.blocks[0].shape[1]
    fields = {"projection": projection, "projection_kwargs": hyperparameters, "r": r, "target_modules": ["q"]}
    config = UniProjConfig(**fields, d=d if cls.free_d else None)
    settings = beyond_P(config.to_dict())
    header = Header(projection, cls.version, hyperparameters, d, 0, layout, "0" * 64, settings=settings)
    file.write(folder, {THETA_D: torch.ones(d), **dict(own)}, header, config.to_dict())
    return folder


def one_module(D: int, r: int = 8) -> LoRALayout:
    return LoRALayout.from_shapes({"layers.0.q": (D // r // 2, D // r // 2)}, r)


def refused_cheaply(found: Cost, message: str, megabytes: float = 32) -> None:
    assert found.said.startswith("AdapterError: ") and message in found.said, found
    assert found.megabytes < megabytes and found.seconds < 5, found


def test_a_P_that_its_file_does_not_hold_or_that_is_too_large_is_refused_before_it_is_made(tmp_path: Path) -> None:
    options = {"vblora": {"num_vectors": 500, "vector_length": 1}, "unilora_sparse": {"exclusive": True}}
    forged = {
        # its logits would take 3.2 GB, and their draw three times as much
        "vblora": (1_600_000, 500, "must hold a tensor of shape (1600000, 500), got none"),
        "unilora_sparse": (10**9, 4, "D must be at most 134,217,728, got 1,000,000,000. "),
        "fastfood": (2 * 10**18, 4, "D must be at most 134,217,728, got 2,000,000,000,000,000,000"),
        "gaussian_orthonormal": (2**17, 2048, "must be at most 17,179,869,184, got 68,719,476,736"),
        "gaussian": (2**27, 2**12, "random numbers that gaussian takes must be at most 17,179,869,184, got"),
        "nola": (2**27, 2**12, "random numbers that nola takes must be at most 17,179,869,184, got"),
    }
    for name, (D, d, message) in forged.items():
        folder = forge(tmp_path / name, name, one_module(D), d, **options.get(name, {}))
        refused_cheaply(cost(verify, folder), message, 64)
        refused_cheaply(cost(export, folder, tmp_path / "exported"), message, 64)


def test_random_numbers_that_a_P_of_base_weights_holds_are_counted_before_it_is_made(tmp_path: Path) -> None:
    header = file.read(forge(tmp_path / "a", "tinylora", one_module(2**26, 2**12), 64, u=64)).header
    assert header is not None  # 64 matrices of 2^12 x 2^12, 4 GiB in float32
    with pytest.raises(AdapterError, match="random numbers that tinylora takes must be at most"):
        header.build({"layers.0.q": torch.empty(2**13, 2**13, device="meta")})
    header = file.read(forge(tmp_path / "b", "tinylora", one_module(2**22, 2**8), 64, u=64)).header
    assert header is not None
    header.check_cost()


def test_what_is_allowed_takes_memory_and_time_linear_in_D(tmp_path: Path) -> None:
    """Every method with a free d at D = 2^20, from a file of a few kB: at most 80 bytes a row."""
    small, layout = one_module(2**14), one_module(2**20)
    for name in names():
        cls = get(name)
        for k, variant in enumerate(cls.variants) if not cls.needs_base_weights and cls.free_d else ():
            compiling = forge(tmp_path / f"{name}{k} small", name, small, max(4, cls.min_d(small)), **variant)
            with pytest.raises(AdapterError, match="P must have the checksum"):
                verify(compiling)  # here, as compiling takes more memory than what is measured
            folder = forge(tmp_path / f"{name}{k}", name, layout, max(4, cls.min_d(layout)), **variant)
            found = cost(verify, folder, most=1024)
            assert "P must have the checksum 000000000000.." in found.said, (folder.name, found)
            assert found.megabytes < 32 + 80 and found.seconds < 15, (folder.name, found)


def test_a_sparse_file_is_judged_by_its_header(tmp_path: Path) -> None:
    def theta_d(numbers: int) -> dict[str, Any]:
        return {THETA_D: {"dtype": "F32", "shape": [numbers], "data_offsets": [0, 4 * numbers]}}

    two, hundred = 2 * 10**9, 100 * 10**9
    weight = {"base_model.model.norm.weight": {"dtype": "F32", "shape": [two // 4], "data_offsets": [160, 160 + two]}}
    large = "its bytes must be at most 8,589,934,592, got 100,000,0"
    for action, size, entries, message in (
        (file.read, two, theta_d(two // 4), "shape (40,), got (500000000,)"),
        (file.read, two, theta_d(40), "must be a whole safetensors file"),
        (file.read, hundred, theta_d(hundred // 4), large),
        (verify, hundred, theta_d(40), large),
        (file.read, 160 + two, theta_d(40) | weight, "norm.weight must be what the configuration trains"),
    ):
        save(tmp_path)
        path = tmp_path / file.WEIGHTS
        metadata = parts(path.read_bytes())[0]["__metadata__"]
        path.write_bytes(joined({"__metadata__": metadata, **entries}, b""))
        os.truncate(path, path.stat().st_size + size)  # room on the disk for the header alone
        refused_cheaply(cost(action, tmp_path), message)
    os.truncate(tmp_path / file.CONFIG, hundred)
    refused_cheaply(cost(file.read, tmp_path), "its bytes must be at most 4,194,304, got 100,000,000,000")


def test_long_lines_and_headers_are_refused_before_they_are_parsed(tmp_path: Path) -> None:
    lists = f'{{"a":[{",".join(["[]"] * 6_000_000)}]}}'
    layout = pack([["q", 1, 1, 1]] * 300_000)
    for key, text, message in (
        ("projection_kwargs", lists, "the bytes of its header must be at most 16,777,216, got 18,"),
        (
            "projection_kwargs",
            lists[: 5 * 2**20],
            "letters of the header's projection_kwargs must be at most 4,194,304, got",
        ),
        ("layout", layout, "modules must be at most 131,072, got 300,000"),
    ):
        save(tmp_path)
        relabel(tmp_path, lambda metadata, key=key, text=text: {**metadata, f"uniproj.{key}": text})
        refused_cheaply(cost(file.read, tmp_path), message)
    for row, message in (
        (["q", 1, 1, 1, 10**9], "modules must be at most 131,072, got 1,000,000,00"),
        (["q", 1, 1, 1, 10**9, [1]], "modules must be at most 131,072, got 1,000,000,00"),
        (["q", 1, 1, 1, 10**40], "modules must be at most 131,072, got"),
        (["q" * 20_000, 1, 1, 1, 10**5], "names of at most 16,777,216 letters in all, got 2,000,000,000"),
    ):
        save(tmp_path)
        relabel(tmp_path, lambda metadata, row=row: {**metadata, "uniproj.layout": pack([row])})
        refused_cheaply(cost(file.read, tmp_path), message)
    (tmp_path / file.CONFIG).write_text(lists)
    refused_cheaply(cost(file.read, tmp_path), "its bytes must be at most 4,194,304, got 18,")


def test_a_mixture_of_experts_is_verified_in_seconds(tmp_path: Path) -> None:
    shapes = {f"model.layers.{i}.mlp.experts.{j}.{m}": (8, 6) for i in range(57) for j in range(64) for m in "qvo"}
    layout = LoRALayout.from_shapes(shapes, 1)
    assert len(layout.modules) == 10_944
    for name, d, hyperparameters in (
        ("unilora", 12_500, {"assignment": "peft"}),
        ("unilora_local", 12_500, {"per": "module"}),
        ("tied_lora", 3 * (8 + 6), {}),  # one B and one A for each of q, v, o
    ):
        own = get(name).parameter_shapes(layout, d, **hyperparameters) or {}
        zeros = {f"{OF_P}{key}": torch.zeros(shape) for key, shape in own.items()}
        found = cost(verify, forge(tmp_path / name, name, layout, d, zeros, **hyperparameters))
        assert "P must have the checksum 000000000000.." in found.said, found
        assert found.megabytes < 256 and found.seconds < 8, found


def test_a_table_of_renamed_modules_costs_no_more_than_it_may(tmp_path: Path) -> None:
    """A header packs each in kilobytes: rows that rename nothing, and one whose new name is long for many modules."""
    layout = LoRALayout.from_shapes({f"layers.{i}.q": (1, 1) for i in range(2**12)}, 1)
    tables = {"many": [[f"a{i}", ""] for i in range(2**14)], "long": [["q", "b" * 3_000_000]]}
    for name, table in tables.items():
        folder = forge(tmp_path / name, "unilora", layout, 4)
        reconfigure(folder, remap=table)
        packed = pack(beyond_P(json.loads((folder / file.CONFIG).read_text())))
        relabel(folder, lambda metadata, packed=packed: {**metadata, "uniproj.settings": packed})
        refused_cheaply(cost(file.read, folder), "remap: rows times modules must be few", 256)
    few = LoRALayout.from_shapes({f"layers.{i}.q": (1, 1) for i in range(800)}, 1)
    each = [[f"layers.{i}.q", f"blocks.{i}.query"] for i in range(800)]  # every module by a row of its own
    assert new_names(few, each) == {f"layers.{i}.q": f"blocks.{i}.query" for i in range(800)}


def test_a_stack_is_renamed_with_all_its_modules() -> None:
    layout = LoRALayout.from_shapes({"a": (1, 1, 2**12), "b.0": (1, 1)}, 1)
    assert new_names(layout, [["a", "c"]]) == {"a": "c", "b.0": "b.0"}
    with pytest.raises(AdapterError, match=r"rows times modules must be few.* for 4,097 modules"):
        new_names(layout, [["a", "b" * 3_000_000]])
    with pytest.raises(AdapterError, match=r"every module must get a name of its own, got a\.0 twice"):
        new_names(layout, [["b", "a"]])


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


def test_a_limit_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNIPROJ_MAX_ROWS", "100")
    assert importlib.reload(limits).rows == 100
    with pytest.raises(AdapterError, match=r"D must be at most 100, got 101\. .*UNIPROJ_MAX_ROWS"):
        limits.check("rows", 101, "D", "a file")
    monkeypatch.setenv("UNIPROJ_MAX_ROWS", "1e9")
    with pytest.raises(AdapterError, match="UNIPROJ_MAX_ROWS: must be a whole number below"):
        importlib.reload(limits)
    monkeypatch.undo()
    assert importlib.reload(limits).rows == 2**27


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
    last = max({*header} - {"__metadata__"}, key=lambda name: header[name]["data_offsets"])
    begin, end = header[last]["data_offsets"]
    apart = {**header, last: {**header[last], "data_offsets": [begin + 4, end + 4]}}
    path.write_bytes(joined(apart, numbers[:begin] + b"more" + numbers[begin:]))  # which no digest would cover
    with pytest.raises(AdapterError, match="tensors that do not follow one another"):
        file.read(tmp_path)
    text = json.dumps(header)
    twice = f'{text[:-1]}, "{one}": {json.dumps(header[one])}}}'.encode()
    path.write_bytes(len(twice).to_bytes(8, "little") + twice + numbers)
    with pytest.raises(AdapterError, match="a key that stands twice"):
        file.read(tmp_path)


def test_hyperparameters_that_no_method_takes_are_refused_on_reading(tmp_path: Path) -> None:
    wrong: list[tuple[str, dict[str, Any]]] = [("tied_lora", {"trained": 3})]
    wrong += [("vblora", {key: value}) for key, value in (("vector_length", -1), ("num_vectors", "x"), ("topk", 10**6))]
    for name, hyperparameters in wrong:
        save(tmp_path, name)
        text = json.dumps(hyperparameters)
        relabel(tmp_path, lambda lines, text=text: {**lines, "uniproj.projection_kwargs": text})
        reconfigure(tmp_path, projection_kwargs=hyperparameters)
        with pytest.raises(AdapterError, match="P cannot be made from its header"):
            file.read(tmp_path)


def test_the_shapes_of_a_P_are_known_before_it_is_made() -> None:
    for name in names():
        for variant in get(name).variants:
            P = sample(name, LAYOUT, 40, **variant)
            found = get(name).parameter_shapes(LAYOUT, P.d, **variant)
            assert found == {key: tuple(p.shape) for key, p in P.named_parameters()}, (name, variant)
            assert get(name).draws(LAYOUT, P.d, **variant) <= 2**8 * P.D * P.d, (name, variant)


def test_a_D_that_is_no_integer_is_refused() -> None:
    for make in (LoRALayout.flat, lambda D: build("unilora", D, 4)):
        for D in (3e9, "5", b"5"):
            with pytest.raises(ProjectionError, match="D must be an integer, got"):
                make(D)
    with pytest.raises(ProjectionError, match="D must be an integer, got"):
        LoRALayout.flat(None)  # type: ignore[arg-type]


def test_a_D_of_three_billion_is_a_sentence_or_works() -> None:
    assert LoRALayout.flat(3_000_000_000).D == 3_000_000_000
    with pytest.raises(ProjectionError, match=r"unilora: .* n must lie in .* got 3000000000"):
        build("unilora", 3_000_000_000, 4)
    P = build("gaussian", 3_000_000_000, 1)
    assert len(P.checksum()) == 64
