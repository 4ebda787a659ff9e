"""The place of a program in a grid of one axis, as CUDA ends the second and third at 65,535."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place(cells, blocks):
    """(program of its block, its block, its vector) where each vector has `blocks` blocks of `cells` programs."""
    program = tl.program_id(0)
    return program % cells, program // cells % blocks, (program // cells // blocks).to(tl.int64)
