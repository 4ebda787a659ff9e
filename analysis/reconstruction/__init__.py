"""The best theta_d for a trained LoRA adapter, and what of it is lost."""

from analysis.reconstruction.measure import fisher, reconstruct

__all__ = ["fisher", "reconstruct"]
