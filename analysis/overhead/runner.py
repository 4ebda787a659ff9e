"""Measurements one after another, each in a process of its own, and their records: one file per configuration.

`python -m analysis.overhead.runner OUT CONFIGS PARENT` is such a process: CONFIGS is a list in JSON, PARENT the id of
the process with which it ends. It has its own peak of memory, and a crash of one method costs no other's result. A
record is written whole; its presence with status "done" means measured.
"""

from __future__ import annotations

import gc
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from experiments.errors import ExperimentError
from experiments.files import digest, disk_errors, read_json, write_json
from experiments.orphans import end_with
from experiments.provenance import provenance
from uniproj import console

ROOT = Path(__file__).parent.parent.parent
DONE, FAILED = "done", "failed"
_KEYS = {"config", "status", "rows", "provenance"}
# seconds between two looks at what a process has measured
_LOOK = 0.5


def path(out: Path, config: Mapping[str, Any]) -> Path:
    """Where the record of a configuration lies: neither the commit nor the date is part of its name."""
    return out / "records" / f"{config['part']}-{digest(config)}.json"


def read(file: Path) -> dict[str, Any]:
    """A record. Raises ExperimentError where the file is damaged or holds something else."""
    record = read_json(file)
    if missing := _KEYS - set(record):
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


def _write(out: Path, config: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    where_from = provenance(config["device"])
    where_from["hardware"]["threads"] = config["threads"]
    write_json(path(out, config), {"config": dict(config), **found, "provenance": where_from})


def load(out: Path, configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The records that exist of these configurations, in their order."""
    return [read(path(out, config)) for config in configs if path(out, config).exists()]


def run_all(configs: Sequence[Mapping[str, Any]], out: Path, together: bool = False, seconds: float = math.inf) -> None:
    """Measure what is not recorded yet; a failure is recorded too. One at a time: they must not share the machine.

    together: one process measures all, and after a failure another one the rest. On a GPU, where the allocator counts
    each peak, to import the libraries anew would take longer than most measurements. seconds: what runs then is
    cut off, which is a failure, and the rest is left out. What failed earlier comes last, so that it starves nothing.

    KeyboardInterrupt passes through after the running process was ended.
    """
    end = time.monotonic() + seconds
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    waiting = [config for config in configs if not is_done(out, config)]
    waiting.sort(key=lambda config: path(out, config).exists())
    with (
        tempfile.TemporaryDirectory() as scratch,
        console.Progress("measurement", len(configs), len(configs) - len(waiting)) as progress,
    ):
        while waiting and time.monotonic() < end:
            progress.bar.set_postfix_str(describe(waiting[0]))
            for reason in _run(waiting[: len(waiting) if together else 1], out, scratch, end):
                config = waiting.pop(0)
                if reason is not None:
                    _write(out, config, {"status": FAILED, "reason": reason, "rows": []})
                progress.ended(describe(config), console.DONE if reason is None else f"failed: {reason}")
                progress.bar.set_postfix_str(describe(waiting[0]) if waiting else "")


def kept(out: Path) -> str:
    """What is said of records when a command is interrupted."""
    return f"; what was measured is in {out}. The same command goes on."


def describe(config: Mapping[str, Any]) -> str:
    """A measurement in a few words."""
    return " ".join(
        str(config[key])
        for key in ("part", "architecture", "base", "family", "method", "axis", "r", "targets", "users", "paths")
        if key in config
    )


def _run(configs: Sequence[Mapping[str, Any]], out: Path, scratch: str, end: float) -> Iterator[str | None]:
    """One process for these: None for each as it is measured, and last why the process failed at the next, if it did.

    That is the last line it wrote, or the signal that ended it.
    """
    threads = str(configs[0]["threads"])
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        # what one process unpacks, the next ones find; it is gone in the end
        "TMPDIR": scratch,
        "TOKENIZERS_PARALLELISM": "false",
        # nothing here needs the network, and a search for it would be timed
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    command = [sys.executable, "-m", "analysis.overhead.runner", str(out), json.dumps(configs), str(os.getpid())]
    measured, cut = 0, False
    with tempfile.TemporaryFile("w+") as words:
        # a session of its own: Ctrl-C reaches the parent only
        child = subprocess.Popen(command, stdout=words, stderr=words, env=environment, start_new_session=True)
        try:
            while child.returncode is None:
                with suppress(subprocess.TimeoutExpired):
                    child.wait(min(_LOOK, max(0.0, end - time.monotonic())))
                cut = child.returncode is None and time.monotonic() >= end
                if cut:
                    _end(child)
                while measured < len(configs) and is_done(out, configs[measured]):
                    measured += 1
                    yield None
        except BaseException:
            _end(child)
            raise
        if measured == len(configs):
            return
        words.seek(0)
        said, status = words.read().strip().splitlines()[-1:], child.returncode
        if cut:
            yield " ".join(["cut off when the time was over.", *(f"Its last words: {line}" for line in said)])
        elif status < 0:
            yield f"ended by {signal.Signals(-status).name}" + (" (out of memory?)" if status == -9 else "")
        else:
            yield (said or [f"ended with status {status} without a word"])[0]


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill a process and all that it started, which would disturb the next one."""
    if child.returncode is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def main(argv: list[str]) -> None:
    """Measure and record; an error goes to standard error, where the parent reads its last line."""
    # or it would go on beside the next run and disturb its times
    end_with(int(argv[2]))
    try:
        for config in json.loads(argv[1]):
            measure(Path(argv[0]), config)
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
    part = importlib.import_module(f"{config.get('package', 'analysis.overhead')}.{config['part']}")
    # what the measurement before left
    gc.collect()
    torch.cuda.empty_cache()
    # what is imported is no method's: the count of live tensors may pass over it, which saves 0.3 s each time
    gc.freeze()
    save(out, config, part.measure(config))


if __name__ == "__main__":
    main(sys.argv[1:])
