"""Measurements one after another, each in its own process, with one progress bar and a clean stop on Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.overhead import records
from experiments.files import disk_errors
from uniproj.console import DONE, Progress

ROOT = Path(__file__).parent.parent.parent


def run_all(configs: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Measure what is not recorded yet; a failure is recorded too. One at a time: they must not share the machine.

    KeyboardInterrupt passes through after the running process was ended.
    """
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    waiting = [config for config in configs if not records.is_done(out, config)]
    with (
        tempfile.TemporaryDirectory() as scratch,
        Progress("measurement", len(configs), len(configs) - len(waiting)) as progress,
    ):
        for config in waiting:
            progress.bar.set_postfix_str(describe(config))
            reason = _run(config, out, scratch)
            if reason is not None:
                records.save_failure(out, config, reason)
            progress.ended(describe(config), DONE if reason is None else f"failed: {reason}")


def describe(config: Mapping[str, Any]) -> str:
    """A measurement in a few words."""
    return " ".join(
        str(config[key]) for key in ("part", "architecture", "base", "family", "method", "axis", "r") if key in config
    )


def _run(config: Mapping[str, Any], out: Path, scratch: str) -> str | None:
    """None, or why the process failed: the last line it wrote, or the signal that ended it."""
    threads = str(config["threads"])
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
    command = [sys.executable, "-m", "analysis.overhead.worker", str(out), json.dumps(config), str(os.getpid())]
    with tempfile.TemporaryFile("w+") as words:
        # a session of its own: Ctrl-C reaches the parent only
        child = subprocess.Popen(command, stdout=words, stderr=words, env=environment, start_new_session=True)
        try:
            status = child.wait()
        except BaseException:
            child.kill()
            child.wait()
            raise
        if status == 0:
            return None
        if status < 0:
            return f"ended by {signal.Signals(-status).name}" + (" (out of memory?)" if status == -9 else "")
        words.seek(0)
        return (words.read().strip().splitlines() or [f"ended with status {status} without a word"])[-1]
