"""Many adapters of one P: kept in one file, switched in place, mixed in one batch, trained together."""

from uniproj.bank.arithmetic import interpolate, mean
from uniproj.bank.bank import INDEX, VECTORS, AdapterBank
from uniproj.bank.mixed import mixed

__all__ = ["INDEX", "VECTORS", "AdapterBank", "interpolate", "mean", "mixed"]
