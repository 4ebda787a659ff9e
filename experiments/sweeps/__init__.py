"""Many runs out of one file: what it asks for, checks before, tune-lock-confirm, launchers, tables."""

from experiments.sweeps.file import CONF, read
from experiments.sweeps.launchers import trainer
from experiments.sweeps.preflight import check, doctor, estimate
from experiments.sweeps.protocol import confirm, tune
from experiments.sweeps.report import write
from experiments.sweeps.sweep import Sweep

__all__ = ["CONF", "Sweep", "check", "confirm", "doctor", "estimate", "read", "trainer", "tune", "write"]
