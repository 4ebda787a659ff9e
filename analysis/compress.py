"""Any LoRA folder in, one vector out: `python -m analysis.compress FOLDER OUT --projection NAME --d N`.

`python -m uniproj import` does the same; here base models have the names of the experiments.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from torch import nn

from experiments import models
from experiments.errors import ExperimentError
from experiments.models import trust
from uniproj import AdapterError, ProjectionError, console
from uniproj.exchange import LoRAAdapter, import_adapter
from uniproj.exchange.formats.lora import read


def _load_base(name: str, adapter: LoRAAdapter) -> nn.Module:
    """The model of an adapter: a classifier with as many outputs as its head has, else a causal language model."""
    heads = [t for key, t in adapter.other.items() if key.endswith("weight")]
    if str(adapter.config.task_type).endswith("SEQ_CLS") and heads:
        return models.load_classifier(models.BaseModel(name), len(heads[-1]), None, seed=0)
    return models.load_causal(models.BaseModel(name))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    options = argparse.ArgumentParser(prog="python -m analysis.compress", description=(__doc__ or "").split(":")[0])
    options.add_argument("folder", type=Path, help="a LoRA adapter that PEFT saved")
    options.add_argument("out", type=Path, help="folder of the uniproj adapter")
    options.add_argument("--projection", required=True, metavar="NAME", help="a name of `python -m uniproj list`")
    options.add_argument("--d", type=int, help="length of theta_d, where the method leaves it free")
    options.add_argument("--seed", type=int, default=0, help="of P")
    options.add_argument("--options", type=json.loads, default={}, metavar="JSON", help="hyperparameters of P")
    options.add_argument("--base", help="the base model, for projections made of its weights")
    trust.add_options(options, 1)
    options.add_argument("--json", action="store_true", help="print JSON")
    return options.parse_args(argv)


@console.command
def main(argv: list[str] | None = None) -> int:
    """Entry point: 0 done, 2 bad input."""
    args = parse(argv)
    try:
        trust.apply(args)
        base = _load_base(args.base, read(args.folder)) if args.base else None
        quality = import_adapter(args.folder, args.out, args.projection, args.d, args.seed, args.options, base)
    except (AdapterError, ProjectionError, ExperimentError) as error:
        print(error, file=sys.stderr)
        return 2
    console.report({**quality, "folder": str(args.out)}, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
