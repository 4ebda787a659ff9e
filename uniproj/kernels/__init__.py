"""The arithmetic that projections share, as `torch.library` operators with a PyTorch and a Triton implementation."""

from uniproj.kernels.dispatch import backend

__all__ = ["backend"]
