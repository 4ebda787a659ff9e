"""Many runs out of one file: what it asks for, checks before, tune-lock-confirm, launchers, tables."""

from experiments.sweeps import comparison, preflight, protocol, report
from experiments.sweeps.file import CONF, read
from experiments.sweeps.launchers import LAUNCHERS, at_once, check_launchers, trainer
from experiments.sweeps.sweep import Sweep

__all__ = [
    "CONF", "LAUNCHERS", "Sweep", "at_once", "check_launchers", "comparison", "preflight", "protocol", "read",
    "report", "trainer",
]  # fmt: skip
