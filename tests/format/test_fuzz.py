"""Mutated files: each is refused by an AdapterError, or is exactly what was written."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.format.saved import joined, parts, save
from uniproj import AdapterError
from uniproj.format import file
from uniproj.format.fields import FREE

ODD = [None, True, False, 0, -1, 1, 2**31, 2**64, 10**30, 1.5, float("nan"), "", "x", "0", "unilora", "../x", "\ud800"]
ODD += [[], [0], [-1], [[]], [2, 3], [6], [0, 24], [0, 160], {}, {"a": 1}]
ODD += ["F64", "F16", "I32", "BOOL", "F8_E4M3", "F4", "C64"]


def _flip(r: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(r.choice([1, 1, 2, 8])):
        changed[r.randrange(len(changed))] ^= 1 << r.randrange(8)
    return bytes(changed)


def _cut(r: random.Random, data: bytes) -> bytes:
    return data[: r.randrange(len(data))]


def _grow(r: random.Random, data: bytes) -> bytes:
    return data + r.randbytes(r.randrange(1, 64))


def _splice(r: random.Random, data: bytes) -> bytes:
    """A span removed, repeated, moved, or overwritten."""
    a, b = sorted(r.randrange(len(data)) for _ in range(2))
    c = r.randrange(len(data))
    return r.choice([
        data[:a] + data[b:],
        data[:b] + data[a:],
        data[:a] + data[b:][: c] + data[a:b] + data[b:][c:],
        data[:a] + r.randbytes(b - a) + data[b:],
    ])  # fmt: skip


def edit(r: random.Random, value: Any) -> Any:
    """One place of a JSON value replaced, removed, renamed, or exchanged with another."""
    if isinstance(value, dict) and value and r.random() < 0.9:
        key, other = r.choice(list(value)), r.choice(list(value))
        changed = dict(value)
        what = r.randrange(5)
        if what == 0:
            del changed[key]
        elif what == 1:
            changed[key], changed[other] = changed[other], changed[key]
        elif what == 2:
            changed[key + r.choice("xA.0")] = changed.pop(key)
        else:
            changed[key] = edit(r, changed[key])
        return changed
    if isinstance(value, list) and value and r.random() < 0.7:
        changed = list(value)
        changed[r.randrange(len(changed))] = r.choice(ODD)
        return changed
    if isinstance(value, str) and value and r.random() < 0.6:
        at = r.randrange(len(value))
        return value[:at] + chr(r.randrange(32, 127)) + value[at + 1 :]
    if isinstance(value, (int, float)) and r.random() < 0.5:
        return value + r.choice([-1, 1, 8, -8])
    return r.choice(ODD)


def _edit_header(r: random.Random, data: bytes) -> bytes:
    header, tensors = parts(data)
    place = header if r.random() < 0.4 else header["__metadata__"]
    changed = edit(r, place)
    if place is not header and isinstance(changed, dict):
        changed = {**header, "__metadata__": changed}
    return joined(changed, tensors)


def _edit_config(r: random.Random, data: bytes) -> bytes:
    return json.dumps(edit(r, json.loads(data))).encode()


def _respace(r: random.Random, data: bytes) -> bytes:
    """The same content otherwise written: it must load."""
    header, tensors = parts(data)
    keys = r.sample(list(header), len(header))
    return joined({key: header[key] for key in keys}, tensors)


BYTES: list[Callable[[random.Random, bytes], bytes]] = [_flip, _flip, _cut, _grow, _splice]
MUTATIONS = {
    file.WEIGHTS: [*BYTES, _edit_header, _edit_header, _edit_header, _respace],
    file.CONFIG: [*BYTES, _edit_config],
}


def _settled(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in FREE}


def _fuzz(folder: Path, rounds: int) -> dict[str, int]:
    written = []
    for i, projection in enumerate(("unilora", "vblora", "sparse")):
        save(folder / str(i), projection)
        read = file.read(folder / str(i))
        contents = {name: (folder / str(i) / name).read_bytes() for name in MUTATIONS}
        written.append((folder / str(i), read, contents))
    counts = {"refused": 0, "exact": 0}

    @settings(max_examples=rounds, database=None)
    @given(st.randoms(use_true_random=False))
    def mutate(r: random.Random) -> None:
        place, read, contents = r.choice(written)
        name = r.choice([file.WEIGHTS, file.WEIGHTS, file.CONFIG])
        mutated = r.choice(MUTATIONS[name])(r, contents[name])
        (place / name).write_bytes(mutated)
        try:
            found = file.read(place)
        except AdapterError as error:
            assert str(error), mutated
            counts["refused"] += 1
        else:
            assert found.header == read.header, mutated
            assert _settled(found.config) == _settled(read.config), mutated
            assert found.tensors.keys() == read.tensors.keys(), mutated
            for key, tensor in read.tensors.items():
                assert found.tensors[key].dtype == tensor.dtype and torch.equal(found.tensors[key], tensor), mutated
            counts["exact"] += 1
        finally:
            (place / name).write_bytes(contents[name])

    mutate()
    return counts


def test_a_mutated_file_is_refused_or_exact(tmp_path: Path) -> None:
    counts = _fuzz(tmp_path, rounds=500)
    assert counts["refused"] > 250 and counts["exact"] > 12  # neither answer is given to everything


@pytest.mark.slow
def test_a_hundred_thousand_mutated_files(tmp_path: Path) -> None:
    counts = _fuzz(tmp_path, rounds=100_000)
    print(counts)
    assert sum(counts.values()) >= 100_000 and counts["exact"] > 2_500
