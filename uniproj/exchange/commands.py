"""The commands `export` and `import`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uniproj import plugins
from uniproj.errors import printable

FORMATS = ("lora", "vllm", "unilora", "vera", "vblora", "tinylora")


def add_to(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the two parsers."""
    out = commands.add_parser("export", help="a uniproj adapter as an adapter of PEFT, with the same updates")
    out.add_argument("path", help="folder of a uniproj adapter")
    out.add_argument("out", help="folder to write")
    out.add_argument("--to", choices=FORMATS, default="lora")
    out.add_argument("--rank", type=int, help="pad every module to this rank (lora, vllm)")
    out.set_defaults(run=_export)
    into = commands.add_parser("import", help="an adapter of PEFT as a uniproj adapter, exact or compressed")
    into.add_argument("path", help="folder of a LORA, UNILORA, VERA, VBLORA or TINYLORA adapter")
    into.add_argument("out", help="folder to write")
    into.add_argument("--projection", metavar="NAME", help="compress into this one; without it nothing is lost")
    into.add_argument("--d", type=int, help="length of theta_d, where the projection leaves it free")
    into.add_argument("--seed", type=int, default=0, help="of P")
    into.add_argument("--options", type=json.loads, default={}, metavar="JSON", help="hyperparameters of P")
    into.set_defaults(run=_import)
    for command in (out, into):
        command.add_argument("--base", help="the base model: a folder or a name on the hub")
        plugins.add_trust(command)
    return [out, into]


def _export(args: argparse.Namespace) -> int:
    from uniproj.exchange.transfer import export  # PEFT and Transformers take seconds to import

    export(args.path, args.out, args.to, args.rank, args.base, trust_remote_code=args.trust_remote_code)
    _print({"format": args.to, "bytes": _bytes(args.out), "folder": args.out}, args.json)
    return 0


def _import(args: argparse.Namespace) -> int:
    from uniproj.exchange.transfer import import_adapter

    given = (args.projection, args.d, args.seed, args.options, args.base, args.trust_remote_code)
    report = import_adapter(args.path, args.out, *given)
    _print({**report, "bytes_before": _bytes(args.path), "bytes": _bytes(args.out), "folder": args.out}, args.json)
    return 0


def _bytes(folder: str) -> int:
    return sum(path.stat().st_size for path in Path(folder).glob("adapter_model.*"))


def _print(report: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        for key, value in report.items():
            print(f"{key:20s} {f'{value:.6g}' if isinstance(value, float) else printable(value)}")
