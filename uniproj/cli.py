"""The commands of `python -m uniproj`: list, check, scaffold, inspect, verify, restore, export, import, push."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from uniproj import console, plugins
from uniproj.errors import AdapterError, ProjectionError, printable
from uniproj.exchange import registry
from uniproj.layout import LoRALayout
from uniproj.registry import get, names
from uniproj.scaffold import scaffold
from uniproj.testing import BatteryFailure, Check, check_projection, sample

_LAYOUT = LoRALayout.from_shapes({f"layer.{i}.{m}": (24, 16) for i in range(3) for m in ("query", "value")}, r=2)


def describe(name: str) -> dict[str, Any]:
    """What `list` says of a projection: formula, d, kind, claims and source."""
    cls = get(name)
    return {
        "name": name,
        "theta_D": cls.formula,
        "d": cls.d_formula,
        "learned": cls.learned,
        "needs": [
            n for n, wanted in (("modules", cls.needs_modules), ("base weights", cls.needs_base_weights)) if wanted
        ],
        "claims": sorted(cls.claims),
        "claims_if": {claim: condition for claim, (condition, _) in cls.claims_if.items()},
        "source": cls.source,
    }


def _list(args: argparse.Namespace) -> int:
    rows = [describe(name) for name in names()]
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    for row in rows:
        conditional = [f"{claim} if {when}" for claim, when in row["claims_if"].items()]
        kind = "learned P" if row["learned"] else "fixed P"
        print(f"{row['name']}  ({kind}; {row['source']})")
        print(f"    theta_D  {row['theta_D']}")
        print(f"    d        {row['d']}")
        print(f"    claims   {', '.join([*row['claims'], *conditional])}")
    return 0


def _check(args: argparse.Namespace) -> int:
    """Run the battery on every variant of a projection. Exit status 1 if a check fails."""
    name, seed = args.name, args.seed
    report: list[dict[str, Any]] = []
    for variant in get(name).variants:
        D, d = None, None
        try:
            P = sample(name, _LAYOUT, d=48, seed=seed, **variant)
            D, d = P.shape
            checks = check_projection(P)
        except BatteryFailure as failure:
            checks = failure.checks
        except Exception as error:  # a projection may be anybody's; its other variants are still checked
            checks = [Check("builds", float("inf"), 0.0, False, f"raised {type(error).__name__}: {error}")]
        report.append({"variant": dict(variant), "D": D, "d": d, "checks": [vars(c) for c in checks]})
        if not args.json:
            _print(name, variant, (D, d), checks)
    failed = sum(not c["passed"] for entry in report for c in entry["checks"])
    if args.json:
        # JSON has no NaN: a claim that is decided by its own rule has no limit
        rows = json.loads(json.dumps(report), parse_constant=lambda _: None)
        print(json.dumps({"name": name, "seed": seed, "failed": failed, "variants": rows}, indent=2))
    return int(failed > 0)


def _print(name: str, variant: Any, shape: tuple[int | None, int | None], checks: list[Check]) -> None:
    print(f"{name} {dict(variant) or ''} (D, d) = {shape}")
    for c in checks:
        limit = "" if c.limit != c.limit else f"limit {c.limit:.1e}"
        print(f"  {'ok  ' if c.passed else 'FAIL'} {c.name:32s} {c.value:<12.3e} {limit:16s} {c.note}")


def _scaffold(args: argparse.Namespace) -> int:
    path = str(scaffold(args.name))
    said = f"{path}: change it, then run `python -m uniproj check {args.name}`"
    print(json.dumps({"written": path}) if args.json else said)
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from uniproj.exchange.inspect import describe, summary  # PEFT and Transformers take seconds to import

    found = describe(args.path)
    console.report(found if args.json else summary(found), args.json)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from uniproj.exchange.verify import verify

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        said = verify(args.path, args.base, dict(args.remap), args.trust_remote_code)
    warned = [str(w.message) for w in caught if w.category is UserWarning]
    if args.json:
        print(json.dumps({"holds": said, "warnings": warned}, indent=2))
    else:
        print("\n".join(map(printable, [*said, *(f"warning: {text}" for text in warned)])))
    return 0


def _restore(args: argparse.Namespace) -> int:
    from uniproj.exchange.restore import restore
    from uniproj.format.file import CONFIG

    config, written = restore(args.path), args.path / CONFIG
    said = {"written": str(written), "projection": config.projection, "d": config.d}
    print(json.dumps(said, indent=2) if args.json else f"{written}: {config.projection}, d = {config.d}")
    return 0


def _export(args: argparse.Namespace) -> int:
    from uniproj.exchange.transfer import export, size

    export(args.path, args.out, args.to, args.rank, args.base, trust_remote_code=args.trust_remote_code)
    place, weights = "file" if Path(args.out).is_file() else "folder", registry.get(args.to).weights
    console.report({"format": args.to, "bytes": size(args.out, weights), place: args.out}, args.json)
    return 0


def _import(args: argparse.Namespace) -> int:
    from uniproj.exchange import import_adapter

    given = (args.projection, args.d, args.seed, args.options, args.base, args.trust_remote_code)
    console.report({**import_adapter(args.path, args.out, *given), "folder": args.out}, args.json)
    return 0


def _push(args: argparse.Namespace) -> int:
    from uniproj.bank import INDEX, AdapterBank
    from uniproj.hub import push

    options = {"base_model": args.base, **console.uploading(args)}
    if (args.path / INDEX).is_file():
        done = AdapterBank(args.path).push_to_hub(args.repo, **options)
    else:
        done = push(args.path, args.repo, **options)
    done.show(args.json)
    return 0


def _row(text: str) -> tuple[str, str]:
    old, equals, new = text.partition("=")
    if not (old and equals):
        raise argparse.ArgumentTypeError(f"must be OLD=NEW, got {text!r}")
    return old, new


@console.command
def main(argv: list[str] | None = None) -> int:
    """Entry point of the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m uniproj", description="Projections of LoRA's parameters.")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help)
        command.set_defaults(run=run)
        command.add_argument("--json", action="store_true", help="print JSON")
        plugins.add_option(command)
        return command

    add("list", _list, "every projection: formula, d, claims, source")
    check = add("check", _check, "run the battery on one projection and print what it measured")
    check.add_argument("name")
    check.add_argument("--seed", type=int, default=0)
    add("scaffold", _scaffold, "start the file of a projection of your own, with one that works").add_argument("name")
    add("inspect", _inspect, "everything known of a saved adapter, without a model").add_argument("path", type=Path)
    verify = add("verify", _verify, "rebuild a saved adapter's P, and say whether it fits a base model")
    verify.add_argument("path")
    verify.add_argument("--base", help="name or folder of a model; only its configuration is loaded")
    verify.add_argument("--remap", type=_row, action="append", default=[], metavar="OLD=NEW", help="renamed modules")
    plugins.add_trust(verify)
    restore = add("restore", _restore, "write adapter_config.json anew, from the header of the weights")
    restore.add_argument("path", type=Path)
    formats = ", ".join(registry.names())
    out = add("export", _export, "a uniproj adapter in another format, with the same updates")
    out.add_argument("path", help="folder of a uniproj adapter")
    out.add_argument("--to", default="lora", metavar="FORMAT", help=f"one of {formats}")
    out.add_argument("--rank", type=int, help="pad every module to this rank (lora, vllm)")
    into = add("import", _import, "an adapter of another format as a uniproj adapter, exact or compressed")
    into.add_argument("path", help=f"folder of an adapter ({formats})")
    into.add_argument("--projection", metavar="NAME", help="compress into this one; without it nothing is lost")
    into.add_argument("--d", type=int, help="length of theta_d, where the projection leaves it free")
    into.add_argument("--seed", type=int, default=0, help="of P")
    into.add_argument("--options", type=json.loads, default={}, metavar="JSON", help="hyperparameters of P")
    upload = add("push", _push, "upload an adapter or a bank to the Hub, with a card written from its header")
    upload.add_argument("path", type=Path, help="folder of a uniproj adapter, or of a bank")
    console.add_upload(upload)
    for command in (out, into):
        command.add_argument("out", help="folder to write, or the file where the format is one")
        command.add_argument("--base", help="the base model: a folder or a name on the hub")
        plugins.add_trust(command)
    args = parser.parse_args(argv)
    try:
        plugins.load(args.plugins)
        return int(args.run(args))
    except (AdapterError, ProjectionError) as error:
        print(error, file=sys.stderr)
        return 2
