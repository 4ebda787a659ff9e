"""Which parts of a model each coordinate of theta_d touches."""

from analysis.sharing.measure import describe, heat_map, sharing

__all__ = ["describe", "heat_map", "sharing"]
