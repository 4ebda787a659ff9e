"""Any LoRA folder in, one vector out: `python -m analysis.compress FOLDER OUT --projection NAME --d N`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import uniproj
from analysis.reconstruction.adapter import LoRAAdapter, read
from analysis.reconstruction.fit import balanced, captured, captured_delta_W, fit
from analysis.reconstruction.table import GAUGE_LIMIT, GAUGE_NOTE
from experiments import models, plugins
from experiments.errors import ExperimentError
from uniproj import AdapterError, Projection, ProjectionError
from uniproj.adapters import file
from uniproj.tuner import UniProjConfig

# What the two kinds of configuration share; the modules are named one by one.
SHARED = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias")
# Set after the adapter is attached: on bare layers they would have no meaning.
OF_THE_MODEL = (
    "base_model_name_or_path",
    "target_modules",
    "exclude_modules",
    "fan_in_fan_out",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "task_type",
    "lora_dropout",
)


def compress(
    adapter: LoRAAdapter, projection: str, d: int | None, seed: int, options: Mapping[str, Any], base: nn.Module | None
) -> tuple[PeftModel, dict[str, Any]]:
    """A uniproj adapter whose theta_D is nearest to the balanced one of a LoRA, and its quality.

    base: the model that the adapter belongs to, for projections that are made of its weights; any other projection
    needs the shapes alone. Raises ProjectionError or AdapterError where the projection refuses them.
    """
    bare = _bare(adapter, base, projection)
    shared = {key: getattr(adapter.config, key) for key in SHARED}
    config = UniProjConfig(
        projection=projection, d=d, projection_seed=seed, projection_kwargs=dict(options),
        target_modules=list(adapter.layout.modules), **shared,
    )  # fmt: skip
    model = get_peft_model(bare, config)
    tuner: Any = model.base_model
    P: Projection = tuner.projections["default"]
    target = balanced(adapter.layout, adapter.theta_D)
    with torch.no_grad():
        unbalanced = captured(adapter.theta_D, fit(P.rebuild(), adapter.theta_D).theta_D)
    found = fit(P, target)
    tuner.uniproj_theta_d["default"].data.copy_(found.theta_d)
    # as it will be read: theta_d in float32
    with torch.no_grad():
        reached = P(found.theta_d.float().double())
    factor = captured(target, reached)
    return model, {
        "projection": projection,
        "method": found.method,
        "D": P.D,
        "d": P.d,
        "trained": P.trained,
        "random": P.d / P.D,
        "captured_factor": factor,
        "captured_as_trained": unbalanced,
        "captured_delta_W": captured_delta_W(adapter.layout, dict(adapter.scales), target, reached),
        "note": GAUGE_NOTE if abs(factor - unbalanced) > GAUGE_LIMIT else "",
    }


def _bare(adapter: LoRAAdapter, base: nn.Module | None, projection: str) -> nn.Module:
    """Linear layers of the adapter's names and shapes, with the weights of `base` where P is made of them."""
    wanted = uniproj.get(projection).needs_base_weights
    if wanted and base is None:
        raise AdapterError(
            f"compress: {projection} is made of the base weights, which a LoRA folder does not hold. Pass --model."
        )
    root = nn.Module()
    for name, (out, in_) in adapter.layout.shapes().items():
        layer = nn.Linear(in_, out, bias=False)
        if wanted and base is not None:
            W: Tensor = base.get_submodule(name).weight.detach()  # type: ignore[operator, assignment]
            layer.weight.data.copy_(W.T if adapter.config.fan_in_fan_out else W)
        *parents, last = name.split(".")
        place = root
        for part in parents:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = getattr(place, part)
        place.add_module(last, layer)
    return root


def save(model: PeftModel, adapter: LoRAAdapter, out: Path) -> None:
    """Write the adapter as PEFT does, with the head and the like that came with the LoRA."""
    config = model.peft_config["default"]
    for key in OF_THE_MODEL:
        setattr(config, key, getattr(adapter.config, key))
    model.save_pretrained(str(out))
    if adapter.other:
        saved = file.read(out)
        assert saved.header is not None
        file.write(out, {**saved.tensors, **adapter.other}, saved.header, saved.config)


def load_base(name: str, adapter: LoRAAdapter) -> nn.Module:
    """The model of an adapter: a classifier with as many outputs as its head has, else a causal language model."""
    heads = [t for key, t in adapter.other.items() if key.endswith("weight")]
    if str(adapter.config.task_type).endswith("SEQ_CLS") and heads:
        return models.load_classifier(models.Base(name), len(heads[-1]), None, seed=0)
    return models.load_causal(models.Base(name))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    options = argparse.ArgumentParser(prog="python -m analysis.compress", description=(__doc__ or "").split(":")[0])
    options.add_argument("folder", type=Path, help="a LoRA adapter that PEFT saved")
    options.add_argument("out", type=Path, help="folder of the uniproj adapter")
    options.add_argument("--projection", required=True, metavar="NAME", help="a name of `python -m uniproj list`")
    options.add_argument("--d", type=int, help="length of theta_d, where the method leaves it free")
    options.add_argument("--seed", type=int, default=0, help="of P")
    options.add_argument("--options", type=json.loads, default={}, metavar="JSON", help="hyperparameters of P")
    options.add_argument("--model", help="the base model, for projections made of its weights")
    options.add_argument("--plugins", nargs="+", default=[], metavar="FILE", help="Python files with your projections")
    options.add_argument("--json", action="store_true", help="print JSON")
    return options.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Entry point: 0 done, 2 bad input."""
    args = parse(argv)
    try:
        plugins.load(args.plugins)
        adapter = read(args.folder)
        base = load_base(args.model, adapter) if args.model else None
        model, quality = compress(adapter, args.projection, args.d, args.seed, args.options, base)
        save(model, adapter, args.out)
    except (AdapterError, ProjectionError, ExperimentError) as error:
        print(error, file=sys.stderr)
        return 2
    quality |= {"bytes_before": _bytes(args.folder), "bytes": _bytes(args.out)}
    print(json.dumps(quality, indent=2) if args.json else _text(quality, args.out))
    return 0


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("adapter_model.*"))


def _text(quality: Mapping[str, Any], out: Path) -> str:
    shown = "\n".join(f"{k:20s} {v:.4g}" if isinstance(v, float) else f"{k:20s} {v}" for k, v in quality.items())
    return f"{shown}\nAdapter: {out}"


if __name__ == "__main__":
    sys.exit(main())
