"""Banks of adapters: `python -m analysis.bank` measures room, switching and mixed batches, and runs the soak."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from analysis.bank import batches, models, report, soak, storage, switching
from experiments.errors import status
from experiments.models import BaseModel, load_causal
from uniproj import console
from uniproj.bank import AdapterBank

_OF_SOAK = {"d": 2048, "processes": 4, "seed": 0}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m analysis.bank", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, metavar="PART")
    parser.add_argument("--base", default="smollm2", help="base model (smollm2)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the base (float32)")
    parser.add_argument("--adapters", type=int, default=10_000, help="of the largest bank")
    parser.add_argument("--d", type=int, default=23_040, help="length of theta_d")
    parser.add_argument("--users", type=int, default=16, help="rows of a mixed batch, each with an adapter of its own")
    parser.add_argument("--new-tokens", type=int, default=32, help="that a mixed batch decodes")
    parser.add_argument("--rounds", type=int, default=15, help="turns of every alternative, at least 6")
    parser.add_argument("--operations", type=int, default=100_000, help="of the soak")
    parser.add_argument("--kills", type=float, default=2.0, help="of the soak, per second")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of PyTorch (all cores)")
    parser.add_argument("--scratch", type=Path, help="folder for banks, on the disk that is to be measured")
    parser.add_argument("--out", type=Path, default=Path("results/bank"), help="folder of records and table")
    return parser.parse_args(argv)


def _shape(args: argparse.Namespace, targets: str) -> models.Shape:
    return models.Shape(partial(load_causal, BaseModel(args.base, args.dtype)), targets, args.d)


@console.command
def main(argv: list[str] | None = None) -> int:
    """Entry point: 0 done, 1 the soak lost something, 2 bad input, 130 interrupted."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    return status(lambda: _measure(args), interrupted=": the parts that were finished are kept.")


def _measure(args: argparse.Namespace) -> int:
    try:
        with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
            for part in args.parts:
                report.save(args.out, part, args, PARTS[part](args, Path(scratch) / part))
        print(report.write(args.out))
    except AssertionError as error:
        print(f"soak: {error}", file=sys.stderr)
        return 1
    return 0


def _bank(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Room and switching, on banks of 10, 100, .. adapters with q and v adapted."""
    shape = _shape(args, "q, v")
    model = models.ours(shape)
    sizes = sorted({*(10**k for k in range(1, len(str(args.adapters - 1)))), args.adapters})
    banks = {n: AdapterBank.create(scratch / f"{n}", model) for n in sizes}
    seconds = {n: storage.fill(bank, n) for n, bank in banks.items()}
    peers = {"LoRA": models.lora(shape, ["u0"]), "UNILORA": models.unilora(shape)}
    folders = {name: scratch / name for name in peers}
    for name, peer in peers.items():
        peer.save_pretrained(folders[name])
    folders["LoRA"] = folders["LoRA"] / "u0"
    return {
        "storage": storage.measure(banks[args.adapters], folders),
        "fill_seconds": [{"adapters": n, "seconds": s} for n, s in seconds.items()],
        **switching.measure(model, banks, {name: (peers[name], folders[name]) for name in peers}, args.rounds),
    }


def _mixed(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Mixed batches, with q and v adapted and with all linear layers."""
    found: dict[str, list[dict[str, Any]]] = {"seconds": [], "ratios": []}
    for targets in models.TARGETS:
        shape = _shape(args, targets)
        for key, rows in batches.measure(shape, args.users, args.new_tokens, args.rounds, scratch / targets).items():
            found[key] += rows
    return {**found, "adapter_names with UNILORA": batches.mixes(models.unilora(_shape(args, "q, v")))}


def _soak(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """The soak, on a layer of its own: numbers, not models, are at stake."""
    work = soak.prepare(scratch, args.operations, **_OF_SOAK)
    return {"rows": [{**_OF_SOAK, **soak.run(work, args.kills)}]}


PARTS: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {"soak": _soak, "bank": _bank, "mixed": _mixed}

if __name__ == "__main__":
    sys.exit(main())
