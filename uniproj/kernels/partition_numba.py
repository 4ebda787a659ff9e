"""The loops of `kernels/tiles.py` and of `Deal.index`, compiled by Numba."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import numba
import numpy as np

from uniproj.kernels.permutation import ROUNDS

parallel = numba.njit(parallel=True, cache=True)


@parallel
def tile(index, words, ends, row_bits, column_bits):
    """index (D,) -> words (D,), in each chunk ordered by bucket and then by row, and ends (chunks, buckets + 1)."""
    for chunk in numba.prange(len(ends)):
        first, last = chunk << row_bits, min(len(index), (chunk + 1) << row_bits)
        end = ends[chunk]
        end[:] = 0
        for row in range(first, last):
            end[(index[row] >> column_bits) + 1] += 1
        end[0] = first
        for bucket in range(len(end) - 1):
            end[bucket + 1] += end[bucket]
        place = end.copy()
        for row in range(first, last):
            bucket = index[row] >> column_bits
            words[place[bucket]] = ((index[row] - (bucket << column_bits)) << row_bits) | (row - first)
            place[bucket] += 1


@parallel
def untile(words, ends, index, row_bits, column_bits):
    """The inverse of `tile`."""
    low = np.uint32((1 << row_bits) - 1)
    for chunk in numba.prange(len(ends)):
        for bucket in range(ends.shape[1] - 1):
            for k in range(ends[chunk, bucket], ends[chunk, bucket + 1]):
                row = (chunk << row_bits) + (words[k] & low)
                index[row] = (bucket << column_bits) + (words[k] >> np.uint32(row_bits))


@parallel
def gather(x, words, ends, y, together, row_bits, column_bits):
    """y[n, row] = x[n, column]; `together` chunks are walked bucket by bucket."""
    low = np.uint32((1 << row_bits) - 1)
    for group in numba.prange(-(-len(ends) // together)):
        chunks = range(group * together, min(len(ends), (group + 1) * together))
        for n in range(len(x)):
            for bucket in range(ends.shape[1] - 1):
                columns = x[n, bucket << column_bits : (bucket + 1) << column_bits]
                for chunk in chunks:
                    rows = y[n, chunk << row_bits : (chunk + 1) << row_bits]
                    for k in range(ends[chunk, bucket], ends[chunk, bucket + 1]):
                        rows[words[k] & low] = columns[words[k] >> np.uint32(row_bits)]


@parallel
def add(y, words, ends, sums, together, row_bits, column_bits):
    """sums[run, n, column] += y[n, row], for each column in the order of the rows, a run taking equally many chunks."""
    low = np.uint32((1 << row_bits) - 1)
    each = -(-len(ends) // len(sums))
    for run in numba.prange(len(sums)):
        last = min(len(ends), (run + 1) * each)
        sums[run] = 0
        for group in range(run * each, last, together):
            for n in range(len(y)):
                for bucket in range(ends.shape[1] - 1):
                    columns = sums[run, n, bucket << column_bits : (bucket + 1) << column_bits]
                    for chunk in range(group, min(group + together, last)):
                        rows = y[n, chunk << row_bits : (chunk + 1) << row_bits]
                        for k in range(ends[chunk, bucket], ends[chunk, bucket + 1]):
                            columns[words[k] >> np.uint32(row_bits)] += rows[words[k] & low]


@parallel
def deal(start, n, a, b, tables, columns, first_column, out):
    """out[k] = first_column + pi(start + k) mod columns, pi the permutation of `kernels/permutation.py`."""
    for k in numba.prange(len(out)):
        x = start + k
        while True:
            L = x // b
            R = x - L * b
            for t in range(0, ROUNDS, 2):
                R += tables[t * a + L]
                if b <= R:
                    R -= b
                L += tables[(t + 1) * a + R]
                if a <= L:
                    L -= a
            x = L * b + R
            if x < n:
                break
        out[k] = first_column + x % columns
