"""One measurement in a process of its own: `python -m analysis.overhead.worker OUT CONFIG PARENT` writes its record.

CONFIG is JSON, PARENT the id of the process with which this one ends. A process of its own has its own peak of
memory, and a crash of one method costs no other's result.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from analysis.overhead import records
from experiments.orphans import end_with


def main(argv: list[str]) -> None:
    """Measure and record; an error goes to standard error, where the parent reads its last line."""
    # or it would go on beside the next run and disturb its times
    end_with(int(argv[2]))
    try:
        measure(Path(argv[0]), json.loads(argv[1]))
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        # without what libraries say at an exit of the objects that the error keeps alive
        os._exit(1)


def measure(out: Path, config: Mapping[str, Any]) -> None:
    """Measure a configuration in this process and write its record."""
    torch.set_num_threads(config["threads"])
    torch.manual_seed(config["seed"])
    # each part imports much that the others do not need
    part = importlib.import_module(f"analysis.overhead.{config['part']}")
    # what is imported is no method's: the count of live tensors may pass over it, which saves 0.3 s each time
    gc.freeze()
    records.save(out, config, part.measure(config))


if __name__ == "__main__":
    main(sys.argv[1:])
