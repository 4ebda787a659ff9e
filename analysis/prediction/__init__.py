"""What the Triton kernels will take on an H100 or H200, from their compiled instructions and what they read.

launches, of_a_warp   kernels compiled and disassembled for sm_90 without a GPU
operators             every operator at one D, with the loops and the reads of its kernels
predicted             the least time of an operator on each GPU, by memory, instructions and caches
"""

from analysis.prediction.cubin import Launch, launches, of_a_warp
from analysis.prediction.floors import GPUS, floors, predicted
from analysis.prediction.operators import Operator, Read, operators

__all__ = ["GPUS", "Launch", "Operator", "Read", "floors", "launches", "of_a_warp", "operators", "predicted"]
