"""The loss along directions of the subspace, and what it keeps of LoRA's gradient."""

from analysis.landscape.measure import along, gradient_norms, landscape

__all__ = ["along", "gradient_norms", "landscape"]
