"""A finished run or an exported sweep on the Hub: `python -m experiments.push FOLDER REPO`.

FOLDER is that of a run, whose adapter goes with its scores and settings on the card, or one that `experiments.export`
wrote, whose tables go as a data set.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors import SafetensorError, safe_open

from experiments.errors import ExperimentError, status
from experiments.files import read_json, sha256, write_json, write_text
from experiments.records import RECORDS, cards, gather, result, without_paths
from experiments.records.committed import SUMMARY
from experiments.runs import ADAPTER, RESULT
from uniproj import console, hub, plugins
from uniproj.format import CONFIG, WEIGHTS

# of a run: the configuration and the numbers of an adapter, or of a whole model
_SAVED = ((CONFIG, WEIGHTS), ("config.json", "model.safetensors"))
# where the configurations of PEFT and Transformers name the base
_PLACES = ("base_model_name_or_path", "_name_or_path")


def push(folder: Path, repo: str, base_model: str | None = None, **options: Any) -> hub.Upload:
    """Upload a finished run or an exported sweep. options: of `uniproj.hub.upload`.

    Raises ExperimentError for a folder that is neither, for a run without what it trained or with another than was
    scored, and AdapterError as `uniproj.hub` does.
    """
    if (folder / RESULT).exists():
        return _push_run(folder, repo, base_model, options)
    if (folder / RECORDS).exists():
        return _push_sweep(folder, repo, options)
    raise ExperimentError(
        f"push: {folder} must be the folder of a finished run, with {RESULT}, or of an exported sweep, with {RECORDS}; "
        "got neither. Train the run to its end, or write the sweep with `python -m experiments.export`."
    )


def _push_run(folder: Path, repo: str, base_model: str | None, options: dict[str, Any]) -> hub.Upload:
    found = result(folder)
    names = next((pair for pair in _SAVED if all((folder / ADAPTER / name).is_file() for name in pair)), None)
    if names is None:
        raise ExperimentError(
            f"push: {folder / ADAPTER} must hold what was trained, {' and '.join(_SAVED[0])}, got none. A run that "
            "diverged keeps nothing, nor does full fine-tuning unless its options say keep: true."
        )
    config, weights = (folder / ADAPTER / name for name in names)
    saved, base_model = read_json(config), base_model or cards.base_of(found)
    if saved.get("peft_type") == "UNIPROJ":
        _check_scored(found, weights, weights)
        options |= {"results": cards.results(found), "sections": cards.sections(found)}
        return hub.push(config.parent, repo, base_model=base_model, **options)
    saved |= {key: base_model for key in _PLACES if key in saved}
    with hub.apart() as out:
        write_json(out / config.name, cards.without_places(saved))
        copied = out / weights.name
        shutil.copyfile(weights, copied)
        _check_scored(found, copied, weights)
        size = copied.stat().st_size
        return hub.upload(out, repo, lambda name: cards.of_entrant(found, name, size, saved, base_model), **options)


def _check_scored(found: dict[str, Any], file: Path, weights: Path) -> None:
    """Raises ExperimentError for a file of these weights, or a copy, that is cut off or not what the result is of."""
    try:
        with safe_open(file, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ExperimentError(
            f"push: {weights} must be a whole safetensors file, got {error}. Bring it back, or train the run again."
        ) from error
    digest = sha256(file)
    if found.get("adapter_sha256") not in (None, digest):
        raise ExperimentError(
            f"push: {weights} must be what the run was scored with, of SHA-256 {found['adapter_sha256'][:12]}.., got "
            f"{digest[:12]}... Bring it back, or train the run again."
        )


def _push_sweep(folder: Path, repo: str, options: dict[str, Any]) -> hub.Upload:
    gather.read_sweep(folder)  # raises for what is damaged
    runs = pd.read_csv(folder / RECORDS)
    with hub.apart() as out:
        for name in cards.FILES:
            if (folder / name).exists():
                write_text(out / name, without_paths(_text(folder / name), runs))
        return hub.upload(out, repo, lambda name: cards.of_sweep(out, name), kind="dataset", **options)


def _text(path: Path) -> str:
    """A file of a sweep. Raises ExperimentError for a link, whose target may be anything, and for a broken table."""
    if path.is_symlink():
        raise ExperimentError(f"push: {path} must be a file, got a link. Put the file itself there.")
    if path.suffix == ".csv":
        gather.read_table(path, ("task", "model") if path.name == SUMMARY else ())
    return path.read_text()


@console.command
def main(argv: list[str] | None = None) -> int:
    """Entry point: 0 done, 2 bad input."""
    about = (__doc__ or "").split(": ")[0] + "."
    parser = argparse.ArgumentParser(prog="python -m experiments.push", description=about)
    parser.add_argument("folder", type=Path, help="of a finished run, or of a sweep that `experiments.export` wrote")
    console.add_upload(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    plugins.add_option(parser)
    args = parser.parse_args(argv)

    def run() -> int:
        plugins.load(args.plugins)
        push(args.folder, args.repo, args.base, **console.uploading(args)).show(args.json)
        return 0

    return status(run)


if __name__ == "__main__":
    sys.exit(main())
