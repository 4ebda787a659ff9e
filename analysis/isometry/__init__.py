"""Whether P is an isometry: verdicts, distances along real directions, and a learned P while it is trained."""

from analysis.isometry.distortion import distortion, measured
from analysis.isometry.measure import Deviation, deviation, exact, probed
from analysis.isometry.verdicts import verdicts

__all__ = ["Deviation", "deviation", "distortion", "exact", "measured", "probed", "verdicts"]
