"""Measurements on disk: one file per configuration, written whole; its presence with status "done" means measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.errors import ExperimentError
from experiments.files import digest, read_json, write_json
from experiments.runs.provenance import provenance

DONE, FAILED = "done", "failed"
KEYS = {"config", "status", "rows", "provenance"}


def path(out: Path, config: Mapping[str, Any]) -> Path:
    """Where the record of a configuration lies: neither the commit nor the date is part of its name."""
    return out / "records" / f"{config['part']}-{digest(config)}.json"


def read(file: Path) -> dict[str, Any]:
    """A record. Raises ExperimentError where the file is damaged or holds something else."""
    record = read_json(file)
    if missing := KEYS - set(record):
        raise ExperimentError(
            f"overhead: {file} must hold {sorted(missing)}, got keys {sorted(record)}. "
            "Move the file away and run the same command again."
        )
    return record


def is_done(out: Path, config: Mapping[str, Any]) -> bool:
    """Whether this was measured. A failure is not: the next run tries again."""
    file = path(out, config)
    return file.exists() and read(file)["status"] == DONE


def save(out: Path, config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows of a finished measurement."""
    _write(out, config, {"status": DONE, "rows": list(rows)})


def save_failure(out: Path, config: Mapping[str, Any], reason: str) -> None:
    """What a measurement that did not finish said last."""
    _write(out, config, {"status": FAILED, "reason": reason, "rows": []})


def _write(out: Path, config: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    where_from = provenance(config["device"])
    where_from["hardware"]["threads"] = config["threads"]
    write_json(path(out, config), {"config": dict(config), **found, "provenance": where_from})


def load(out: Path, configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The records that exist of these configurations, in their order."""
    return [read(path(out, config)) for config in configs if path(out, config).exists()]
