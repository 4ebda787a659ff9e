"""The best theta_d for a trained LoRA adapter, and what of it is lost."""

from analysis.reconstruction.adapter import LoRAAdapter, read
from analysis.reconstruction.fit import Fit, balanced, captured, captured_delta_W, fit
from analysis.reconstruction.table import fisher, reconstruct

__all__ = ["Fit", "LoRAAdapter", "balanced", "captured", "captured_delta_W", "fisher", "fit", "read", "reconstruct"]
