"""How much room N adapters take on the disk and in memory, and how long it takes to open them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from analysis.bank.models import theta
from analysis.overhead.memory import resident_bytes
from uniproj.bank import AdapterBank

OPENINGS, READ = 20, 200


def fill(bank: AdapterBank, count: int) -> float:
    """Add `count` adapters, all different, and say how long that took in s."""
    numbers, started = theta(0, bank.header.d), time.perf_counter()
    bank.add_many((f"user-{k}", numbers.roll(k)) for k in range(count))
    return time.perf_counter() - started


def measure(bank: AdapterBank, peers: Mapping[str, Path]) -> list[dict[str, Any]]:
    """One row per method: bytes on the disk for as many adapters as `bank` holds, and for ours opening and memory.

    peers: a folder with one saved adapter of each of PEFT's methods; N of them take N times its bytes.
    """
    count = len(bank)
    numbers = 4 * bank.header.d * count
    added = _folder_bytes(bank.folder)
    for k in range(count // 50):
        bank.replace(f"user-{k}", theta(k, bank.header.d))
    bank.close()
    ours = {
        "method": "bank",
        "adapters": count,
        "bytes": added,
        "ratio_to_numbers": added / numbers,
        "ratio_after_replacing_2_percent": _folder_bytes(bank.folder) / numbers,
        **_open(bank.folder, count),
    }
    return [ours, *(_of_folder(name, folder, count, numbers) for name, folder in peers.items())]


def _open(folder: Path, count: int) -> dict[str, float]:
    """Seconds to open and read one adapter, and bytes that the process takes for it.

    Memory of the process's own: mapped files, which the system may drop, are not counted.
    """
    seconds, before = [], resident_bytes("RssAnon")
    for k in range(OPENINGS):
        started = time.perf_counter()
        bank = AdapterBank(folder)
        bank.get(f"user-{k % count}")
        seconds.append(time.perf_counter() - started)
        bank.close()
    for k in range(READ):
        bank.get(f"user-{k * count // READ}")
    return {
        "open_and_get_seconds": float(np.median(seconds)),
        "open_and_get_most_seconds": max(seconds),
        "own_bytes": resident_bytes("RssAnon") - before,
    }


def _of_folder(name: str, folder: Path, count: int, numbers: int) -> dict[str, Any]:
    size = _folder_bytes(folder) * count
    return {"method": name, "adapters": count, "bytes": size, "ratio_to_numbers": size / numbers}


def _folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder: of their blocks on the disk, or their lengths where these are more (holes)."""
    found = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum(max(512 * each.st_blocks, each.st_size) for each in found)
