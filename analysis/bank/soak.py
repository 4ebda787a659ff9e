"""The soak: processes read and write one bank at random while they are killed at random; nothing is lost or torn.

Each process writes names of its own, whose state it knows from a journal, and names that all of them replace. Every
vector is a function of its name and a token that lies in its first two numbers, so whoever reads one knows whether it
is whole, and whose it is.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import sqlite3
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from safetensors import safe_open
from torch import nn

from analysis.bank.journal import Journal
from experiments.orphans import end_with
from uniproj import AdapterError
from uniproj.bank import INDEX, VECTORS, AdapterBank
from uniproj.tuner import UniProjConfig

OWN = 50
# every process replaces these names and none deletes them
SHARED = [f"shared/{k}" for k in range(8)]
# what an operation is, and in how many of 100 cases
_ODDS = {"get": 66, "names": 4, "replace": 10, "shared": 6, "add": 7, "delete": 7}
_RADIX = 2**20


@dataclass(frozen=True)
class _Soak:
    """A bank, the folder of the journals, how many operations how many processes do, and the length of a vector."""

    bank: Path
    journals: Path
    operations: int
    processes: int
    d: int
    seed: int

    def journal(self, worker: int) -> Journal:
        return Journal(self.journals / str(worker))


def prepare(folder: Path, operations: int, d: int, processes: int, seed: int) -> _Soak:
    """A soak of an empty bank, whose P sits on a single layer."""
    config = UniProjConfig(d=d, r=4, target_modules=["0"])
    AdapterBank.create(folder / "bank", get_peft_model(nn.Sequential(nn.Linear(d, 4)), config)).close()
    return _Soak(folder / "bank", folder / "journals", operations, processes, d, seed)


def vector(name: str, token: int, d: int) -> torch.Tensor:
    """The numbers that belong to a name and a token."""
    numbers = np.random.Generator(np.random.Philox(key=[zlib.crc32(name.encode()), token])).random(d, np.float32)
    numbers[:2] = token // _RADIX, token % _RADIX
    return torch.from_numpy(numbers)


def token_of(name: str, theta: torch.Tensor) -> int:
    """The token of a vector. Raises AssertionError for a torn one, and for that of another name."""
    token = int(theta[0]) * _RADIX + int(theta[1])
    assert torch.equal(theta, vector(name, token, len(theta))), f"{name}: torn, or another name's (token {token})"
    return token


def run(soak: _Soak, kills_per_second: float) -> dict[str, Any]:
    """Let the processes work and die until all operations are done, and check what is left.

    Raises AssertionError for an adapter that is lost, torn, or another's.
    """
    soak.journals.mkdir(parents=True)
    bank = AdapterBank(soak.bank)
    bank.add_many((name, vector(name, 0, soak.d)) for name in SHARED)
    bank.close()
    context, chance, started = multiprocessing.get_context("fork"), random.Random(soak.seed), time.perf_counter()
    alive: dict[int, Any] = {}
    born: dict[int, int] = {}
    waiting, kills = set(range(soak.processes)), 0
    while waiting or alive:
        for worker in waiting:
            born[worker] = soak.journal(worker).finished()
            alive[worker] = context.Process(target=_work, args=(soak, worker, os.getpid()))
            alive[worker].start()
        waiting = set()
        time.sleep(chance.expovariate(kills_per_second))
        # one that has finished an operation since it began: on a slow disk a write takes longer than a kill is away
        if busy := [w for w in sorted(alive) if alive[w].is_alive() and soak.journal(w).finished() > born[w]]:
            victim = chance.choice(busy)
            alive[victim].kill()
            alive[victim].join()
            kills += 1
        for worker in [w for w, process in alive.items() if not process.is_alive()]:
            status = alive.pop(worker).exitcode
            assert status in (0, -9), (soak.journals / f"{worker}.failure").read_text()
            if status:
                waiting.add(worker)
    return {"kills": kills, "seconds": time.perf_counter() - started, **_found(soak)}


def _found(soak: _Soak) -> dict[str, Any]:
    """Check the bank against all journals, and gather what the processes measured."""
    bank, workers = AdapterBank(soak.bank), range(soak.processes)
    for worker in workers:
        _settle(bank, soak, worker)
    pasts = [soak.journal(worker).past() for worker in workers]
    for name in SHARED:
        written = {0}.union(*(past.shared.get(name, ()) for past in pasts))
        assert token_of(name, bank.get(name)) in written, f"{name}: a token that nobody wrote"
    held = len(bank)
    assert held == len(SHARED) + sum(len(past.tokens) for past in pasts), "an adapter is lost, or nobody's"
    # a crash between the growth of the file and its header is healed by the next write
    bank.replace(SHARED[0], vector(SHARED[0], 0, soak.d))
    bank.close()
    with sqlite3.connect(soak.bank / INDEX) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        slots = [slot for (slot,) in database.execute("SELECT slot FROM adapters UNION ALL SELECT slot FROM free")]
    assert sorted(slots) == list(range(len(slots))), "a slot is lost, or used twice"
    with safe_open(soak.bank / VECTORS, "np") as file:
        assert file.get_slice("theta_d").get_shape()[0] >= len(slots)
    reads = np.concatenate([soak.journal(worker).reads() for worker in workers])
    return {
        "operations": sum(past.done for past in pasts),
        "kills_within_a_write": sum(past.interrupted for past in pasts),
        "adapters": held,
        "slots": len(slots),
        "reads": len(reads),
        **{f"read_{key}": value for key, value in _quantiles(reads[:, 0]).items()},
        **{f"read_blocked_{key}": value for key, value in _quantiles(reads[:, 1]).items()},
    }


def _quantiles(seconds: np.ndarray) -> dict[str, float]:
    return {
        "median_seconds": float(np.median(seconds)),
        "p999_seconds": float(np.quantile(seconds, 0.999)),
        "most_seconds": float(seconds.max()),
    }


def _work(soak: _Soak, worker: int, parent: int) -> None:
    end_with(parent)
    try:
        _operate(soak, worker)
    except BaseException as error:
        (soak.journals / f"{worker}.failure").write_text(f"process {worker}: {type(error).__name__}: {error}")
        os._exit(1)
    os._exit(0)


def _operate(soak: _Soak, worker: int) -> None:
    journal = soak.journal(worker)
    journal.mend()
    with journal.reading():
        bank = AdapterBank(soak.bank)
    _settle(bank, soak, worker)
    past = journal.past()
    tokens, begun = past.tokens, past.begun
    chance = random.Random(f"{soak.seed}/{worker}/{begun}/{past.done}")
    for _ in range(past.done, soak.operations // soak.processes):
        kind = chance.choices(list(_ODDS), list(_ODDS.values()))[0]
        own = [f"{worker}/{k}" for k in range(OWN)]
        possible = SHARED if kind == "shared" else [n for n in own if (n in tokens) == (kind != "add")]
        if kind == "get" or not possible:
            anyone = f"{chance.randrange(soak.processes)}/{chance.randrange(OWN)}"
            _get(bank, journal, chance.choice([anyone, chance.choice(SHARED)]))
        elif kind == "names":
            with journal.reading():
                names = bank.names()
            assert set(SHARED) <= set(names), "a shared name is lost"
        else:
            name, begun = chance.choice(possible), begun + 1
            token = begun * soak.processes + worker
            journal.begin(kind, name, token)
            if kind == "delete":
                bank.delete(name)
                del tokens[name]
            else:
                (bank.add if kind == "add" else bank.replace)(name, vector(name, token, soak.d))
                if kind != "shared":
                    tokens[name] = token
        journal.finish()
    bank.close()


def _get(bank: AdapterBank, journal: Journal, name: str) -> None:
    try:
        with journal.reading():
            theta = bank.get(name)
    except AdapterError as error:
        assert "must hold the name" in str(error) and not name.startswith("shared"), error
    else:
        token_of(name, theta)


def _settle(bank: AdapterBank, soak: _Soak, worker: int) -> None:
    """Compare the process's own names with its journal: a write in which it was killed happened or did not."""
    journal = soak.journal(worker)
    past = journal.past()
    kind, changed, token = past.pending or ("", "", 0)
    for name in (f"{worker}/{k}" for k in range(OWN)):
        before = past.tokens.get(name)
        after = before if name != changed else None if kind == "delete" else token
        found = token_of(name, bank.get(name)) if name in bank else None
        assert found in (before, after), f"{name}: must have token {before} or {after}, got {found}: lost"
        if name == changed:
            journal.settle(happened=found == after)
    if kind == "shared":
        journal.settle(happened=False)
