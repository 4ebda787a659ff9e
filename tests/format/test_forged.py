"""Forged files: digest, fingerprint, identity, checksum and configuration agree, as a stranger would make them agree.

Each is refused by a sentence or loads, in limited time and memory; the frozen base stays what it was either way.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import random
import resource
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from tests.format.fixtures import KINDS, base, kinds
from tests.format.test_fuzz import ODD, edit
from uniproj import AdapterError, ProjectionError, build, get
from uniproj.exchange.verify import verify
from uniproj.format import file, identity
from uniproj.format.fields import FREE
from uniproj.format.header import Header, pack
from uniproj.format.keys import IDENTITY, OF_P, THETA_D
from uniproj.format.tensors import serialise
from uniproj.tuner import UniProjConfig, adapter_of

SECONDS, BYTES = 10, 2**29
PROJECTIONS = ("unilora", "vblora", "tied_lora", "sparse", "fastfood", "lora_xs")
LARGE = [2**20, 10**9, 2**40, 2**62]
# what PEFT puts between a module and its tensors
INSIDE = ["", "", ".base_layer", ".original_module", ".modules_to_save.default", ".modules_to_save.other"]
INSIDE += [".lora_A.default", ".token_adapter", ".module"]
# by its checksum a forger proves a P that he could build himself
_BUILT = 10**5


@dataclasses.dataclass
class Forgery:
    """What a file says, open to any change: plain values of the header, rows of the layout, tensors, settings."""

    header: dict[str, Any]
    rows: Any
    settings: Any
    tensors: dict[str, Tensor]
    free: dict[str, Any]


Mutation = Callable[[random.Random, Forgery, dict[str, Tensor]], None]


def _field(r: random.Random, made: Forgery, _: dict[str, Tensor]) -> None:
    key = r.choice(["projection", "projection_kwargs", "d", "projection_seed", "base_model", "base_revision"])
    made.header[key] = r.choice(LARGE) if r.random() < 0.1 else edit(r, made.header[key])


def _setting(r: random.Random, made: Forgery, _: dict[str, Tensor]) -> None:
    made.settings = edit(r, made.settings)


def _row(r: random.Random, made: Forgery, _: dict[str, Tensor]) -> None:
    made.rows = copy.deepcopy(made.rows)
    row = r.choice(made.rows)
    at = r.randrange(4)
    row[at] = r.choice([*LARGE, *ODD]) if r.random() < 0.5 else edit(r, row[at])


def _rank(r: random.Random, made: Forgery, _: dict[str, Tensor]) -> None:
    rank = r.choice([1, 2, 3, 8, 64, *LARGE])
    made.rows = [[*row[:3], rank, *row[4:]] for row in made.rows]
    made.settings = {**made.settings, "r": rank}


def _stack(r: random.Random, made: Forgery, _: dict[str, Tensor]) -> None:
    """Counts and axes, of any row, over any name."""
    made.rows = copy.deepcopy(made.rows)
    row, width = r.choice(made.rows), made.rows[0][2]
    counts = [1, 2, 3, 0, -3, True, 10**5, *LARGE]
    axes = [[], [width], [2, width], [-1, -width], [1] * 5, ["a"], [2**62] * 4]
    row[4:] = r.choice([[r.choice(counts)], [r.choice(axes)], [r.choice(counts), r.choice(axes)], [[], 2], [None]])
    if r.random() < 0.3:
        row[0] = r.choice(made.rows)[0].rpartition(".")[0]
    made.header["format_version"] = r.choice([3, 4, 4, 4])


def _modules(r: random.Random, made: Forgery, _: dict[str, Tensor]) -> None:
    kept = r.sample(made.rows, r.randrange(1, len(made.rows) + 1))
    made.rows = [row for row in made.rows if row in kept] * r.choice([1, 1, 2])


def _size(r: random.Random, made: Forgery, _: dict[str, Tensor]) -> None:
    d = r.choice([1, 2, 39, 64, 1000])
    made.header["d"], made.tensors[THETA_D] = d, torch.linspace(-1, 1, d) + 0.1


def _option(r: random.Random, made: Forgery, _: dict[str, Tensor]) -> None:
    cls = get(made.header["projection"]) if made.header["projection"] in PROJECTIONS else get("unilora")
    known = [key for variant in cls.variants for key in variant] or ["n", "u", "assignment", "module_order"]
    made.header["projection_kwargs"] = {r.choice(known): r.choice([*LARGE, *ODD, *range(9)])}


def _extra(r: random.Random, made: Forgery, of_base: dict[str, Tensor]) -> None:
    key = r.choice(list(of_base))
    module, _, leaf = key.rpartition(".")
    inside = r.choice(INSIDE)
    name = f"{r.choice(['base_model.model.', 'base_model.model.', 'base_model.', ''])}{module}{inside}.{leaf}"
    made.tensors[name] = torch.full_like(of_base[key], 9.0)


def _own(r: random.Random, made: Forgery, _: dict[str, Tensor]) -> None:
    names = ["index", "scale", "logits", "A", "B", "u", "v", "mask"]
    made.tensors[f"{OF_P}{r.choice(names)}"] = torch.ones(r.choice([(), (1,), (40,), (8, 8)]))


def _tensor(r: random.Random, made: Forgery, _: dict[str, Tensor]) -> None:
    key = r.choice(list(made.tensors))
    tensor = made.tensors[key]
    made.tensors[key] = r.choice(
        [
            lambda: tensor.flatten()[:-1],
            lambda: tensor.unsqueeze(0),
            lambda: tensor.long(),
            lambda: tensor.to(torch.float8_e4m3fn),
            lambda: tensor.to(torch.complex64),
            lambda: tensor.double() * 1e300,
            lambda: tensor * float("nan"),
            lambda: tensor * 0,
            lambda: tensor.bfloat16(),
        ]
    )()


def _drop(r: random.Random, made: Forgery, _: dict[str, Tensor]) -> None:
    del made.tensors[r.choice(list(made.tensors))]


def _heads(r: random.Random, made: Forgery, of_base: dict[str, Tensor]) -> None:
    names = [key.rpartition(".")[0] for key in of_base]
    made.settings = {**made.settings, "modules_to_save": r.choice([None, [], [r.choice(names)], ["weight"], [""], 3])}


MUTATIONS: list[Mutation] = [
    *(_field, _setting, _setting, _row, _rank, _stack, _modules, _size, _option),
    *(_extra, _extra, _own, _tensor, _drop, _heads),
]


def _opened(folder: Path) -> Forgery:
    saved = file.read(folder)
    header = saved.header
    assert header is not None
    plain = {f.name: getattr(header, f.name) for f in dataclasses.fields(Header)}
    rows = json.loads(plain.pop("layout").to_json())
    free = {key: value for key, value in json.loads((folder / file.CONFIG).read_text()).items() if key in FREE}
    return Forgery(plain, rows, plain.pop("settings"), dict(saved.tensors), free)


def _fingerprint(rows: Any) -> str:
    """By the words of docs/adapters.md: SHA-256 of names, shapes and order of the blocks."""
    try:
        blocks = []
        for m, out, in_, r, *more in rows:
            count = next((value for value in more if isinstance(value, int)), None)
            for name in [m] if count is None else [f"{m}.{i}" for i in range(min(count, _BUILT))]:
                blocks += [[name, "B", out, r], [name, "A", r, in_]]
        return hashlib.sha256(json.dumps(blocks, separators=(",", ":")).encode()).hexdigest()
    except (TypeError, ValueError):
        return "0" * 64


def _write(folder: Path, made: Forgery) -> None:
    """The file as it says, with everything made to agree that can be."""
    metadata = {f"uniproj.{key}": json.dumps(value) for key, value in made.header.items()}
    metadata |= {"uniproj.layout": pack(made.rows), "uniproj.settings": pack(made.settings)}
    metadata["uniproj.layout_fingerprint"] = _fingerprint(made.rows)
    tensors = dict(made.tensors)
    with suppress(AdapterError, ProjectionError):
        metadata["uniproj.checksum"] = json.dumps(_checksum(Header.from_metadata(metadata)))
    with suppress(AdapterError, ProjectionError):
        tensors[IDENTITY] = identity.encode(Header.from_metadata(metadata))  # type: ignore[arg-type]
    (folder / file.WEIGHTS).write_bytes(serialise(tensors, metadata))
    said = made.settings if isinstance(made.settings, dict) else {}
    of_P = {key: made.header[key] for key in ("format_version", "projection", "projection_seed", "projection_kwargs")}
    of_P |= {"d": made.header["d"], "layout_fingerprint": metadata["uniproj.layout_fingerprint"]}
    of_P |= {"projection_checksum": json.loads(metadata["uniproj.checksum"]), "peft_type": file.KIND}
    (folder / file.CONFIG).write_text(json.dumps({**said, **of_P, **made.free}))


def _checksum(header: Header | None) -> str:
    """That of the P which a header describes, where its forger could make it."""
    assert header is not None
    numbers = [value for value in header.projection_kwargs.values() if isinstance(value, int | float)]
    if max(header.layout.D, header.d, *map(abs, numbers)) > _BUILT or get(header.projection).needs_base_weights:
        return header.checksum
    options = header.projection_kwargs
    try:
        P = build(header.projection, layout=header.layout, d=header.d, seed=header.projection_seed, **options)
    except (TypeError, ValueError, ArithmeticError, LookupError):
        return header.checksum
    return P.checksum()


@contextmanager
def _limited() -> Iterator[None]:
    """Raise where what is inside takes more than SECONDS of the processors or BYTES."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"longer than {SECONDS} s")

    used = 1024 * int(Path("/proc/self/status").read_text().partition("VmSize:")[2].split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGPROF, stop)
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, hard))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, before)


def _adapter(folder: Path, projection: str) -> Path:
    fields: dict[str, Any] = {"projection": projection, "d": 40 if get(projection).free_d else None, "r": 2}
    of_llama = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]}
    return _saved(get_peft_model(base(), UniProjConfig(**fields, **of_llama)), folder)


def _saved(model: PeftModel, folder: Path) -> Path:
    with torch.no_grad():
        adapter_of(model).theta_d.add_(0.1)
    model.save_pretrained(str(folder))
    return folder


def _fuzz(folder: Path, rounds: int) -> dict[str, float]:
    opened = [(_opened(_adapter(folder / name, name)), base) for name in PROJECTIONS]
    on_kinds = get_peft_model(kinds(), UniProjConfig(d=40, r=2, **KINDS))
    opened += [(_opened(_saved(on_kinds, folder / "kinds")), kinds)] * 2
    frozen_of = {make: make().state_dict() for make in (base, kinds)}
    place = folder / "forged"
    place.mkdir()
    counts: dict[str, float] = {"refused": 0, "loaded": 0, "seconds": 0.0}

    for seed in range(rounds):
        r = random.Random(seed)
        chosen, make = r.choice(opened)
        made, names, frozen = copy.deepcopy(chosen), [str(seed)], frozen_of[make]
        for mutation in r.choices(MUTATIONS, k=r.choice([1, 1, 2, 3])):
            # a change to which another one left nothing
            with suppress(TypeError, KeyError, IndexError, AttributeError, ValueError, NotImplementedError):
                mutation(r, made, frozen)
                names.append(mutation.__name__)
        try:
            _write(place, made)
        except (TypeError, ValueError, KeyError, OverflowError):
            continue  # not even a stranger can write it
        model = None
        began = time.process_time()
        with _limited(), warnings.catch_warnings(action="ignore"):
            try:
                if r.random() < 0.9:
                    verify(place)
                model = make()
                PeftModel.from_pretrained(model, str(place))
                counts["loaded"] += 1
            except (AdapterError, ProjectionError) as error:
                assert "\n" not in str(error), names
                counts["refused"] += 1
                assert model is None or not any(isinstance(m, LoraLayer) for m in model.modules()), names
            except Exception as error:
                raise AssertionError(names) from error
        counts["seconds"] = max(counts["seconds"], time.process_time() - began)
        if model is not None:
            _check_frozen(model, frozen, names)
    return counts


def _check_frozen(model: nn.Module, frozen: dict[str, Tensor], names: list[str]) -> None:
    """Every weight of the base is what it was, wherever PEFT keeps it by now."""
    now = {}
    for key, tensor in model.state_dict().items():
        for part in (".base_layer", ".original_module"):
            key = key.replace(part, "")
        now.setdefault(key, tensor)
    for key, tensor in frozen.items():
        assert torch.equal(now[key], tensor), (key, names)


def test_a_forged_file_is_refused_or_leaves_the_base_alone(tmp_path: Path) -> None:
    counts = _fuzz(tmp_path, rounds=250)
    assert counts["refused"] > 50 and counts["loaded"] > 10


@pytest.mark.slow
def test_a_hundred_thousand_forged_files(tmp_path: Path) -> None:
    counts = _fuzz(tmp_path, rounds=100_000)
    print(counts, f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024} MB")
    assert counts["refused"] + counts["loaded"] > 95_000 and counts["loaded"] > 5_000
