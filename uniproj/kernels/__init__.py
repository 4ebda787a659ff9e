"""The arithmetic that projections share: `torch.library` operators in PyTorch, and beside them Numba's and Triton's."""

from uniproj.kernels.dispatch import backend

__all__ = ["backend"]
