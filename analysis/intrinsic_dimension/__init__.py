"""How few trained numbers do as well as LoRA: d90."""

from analysis.intrinsic_dimension.measure import crossing, d90, read, summary

__all__ = ["crossing", "d90", "read", "summary"]
