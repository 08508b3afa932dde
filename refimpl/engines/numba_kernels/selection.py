"""The largest numbers of long rows, and products with rows that are picked one by one.

`kernel_top` never sorts a row. From a sample of it a threshold is guessed that somewhat more than n numbers pass; one
pass notes which do; of those, few, the n-th largest is found by partition and decides. If the guess was wrong the
whole row is partitioned. The result is exact either way, and does not depend on the number of threads.

`kernel_refine` computes several products at a time, so that several rows of the matrix are on their way from memory
at once, and asks for the next rows meanwhile.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, types

from .parallel import STEP, any_strides, read, share, write
from .vector import PICKED, dot_picked, note_reaching, offset, pointer, vector_lanes

SAMPLE = 4096  # numbers of a row from which its threshold is guessed
BLOCK = 2**14  # numbers that are compared with it at a time
BINS = 2048  # of a histogram of the numbers that reach it
CANDIDATES = 256  # products that are shared out together
MARGIN = 4.0  # standard deviations of the sample's rank by which the guess lies low

IDS = types.Array(types.int64, 2, "A", readonly=True)
NEW_IDS = types.Array(types.int64, 2, "A")


@njit(**STEP)
def _guess_thresholds(z, n, thresholds, first, last):
    """Set a number of each row that, by a sample, somewhat more than n numbers reach; -inf where all may be needed."""
    width = z.shape[1]
    step = width // SAMPLE
    for row in range(first, last):
        thresholds[row] = -np.inf
        if step < 2:
            continue
        sample = z[row, ::step].copy()
        expected = n * sample.size / width
        rank = int(expected + MARGIN * math.sqrt(expected)) + 1
        if rank < sample.size:
            thresholds[row] = np.partition(sample, sample.size - rank)[sample.size - rank]


@njit(**STEP)
def _note_blocks(z, thresholds, blocks, kept, counts, first, last):
    """Note in kept (rows, V) from the start of each block on which of its numbers reach the threshold of the row."""
    width = z.shape[1]
    for item in range(first, last):
        row, start = item // blocks, item % blocks * BLOCK
        threshold, stop, count = thresholds[row], min(start + BLOCK, width), 0
        numbers = offset(pointer(z.ctypes.data, z.dtype.type(0)), row * width)
        own = kept[row, start:]
        lanes = vector_lanes(numbers)
        whole = start + (stop - start) // lanes * lanes
        for i in range(start, whole, lanes):
            place = pointer(own.ctypes.data + count * own.itemsize, np.int32(0))
            count += note_reaching(place, offset(numbers, i), i, threshold)
        for i in range(whole, stop):
            if z[row, i] >= threshold:
                own[count] = i
                count += 1
        counts[item] = count


@njit(**STEP)
def _nth_largest(values, n):
    """Find the n-th largest of some numbers: the bin of a histogram that it falls into, and in there by partition."""
    low, high = values[0], values[0]
    for value in values:
        low, high = min(low, value), max(high, value)
    scale = BINS / (high - low)
    if values.size < BINS or not np.isfinite(scale):
        return np.partition(values, values.size - n)[values.size - n]
    bins, counts = np.empty(values.size, np.int32), np.zeros(BINS, np.int64)
    for i in range(values.size):  # larger numbers never fall into lower bins, however differences round
        bins[i] = max(0, min(int((values[i] - low) * scale), BINS - 1))
        counts[bins[i]] += 1
    found, above = BINS - 1, 0
    while above + counts[found] < n:
        above += counts[found]
        found -= 1
    members, count = np.empty(counts[found], values.dtype), 0
    for i in range(values.size):
        if bins[i] == found:
            members[count] = values[i]
            count += 1
    return np.partition(members, count - (n - above))[count - (n - above)]


@njit(**STEP)
def _choose_rows(z, n, blocks, kept, counts, ids, first, last):
    """Set ids (rows, n): of the noted numbers the n largest, in the order of the row."""
    width = z.shape[1]
    for row in range(first, last):
        total = 0
        for block in range(blocks):
            total += counts[row * blocks + block]
        if total < n:
            values, places = z[row].copy(), np.arange(width)
        else:
            values, places = np.empty(total, z.dtype), np.empty(total, np.int64)
            total = 0
            for block in range(blocks):
                for i in range(counts[row * blocks + block]):
                    places[total] = kept[row, block * BLOCK + i]
                    values[total] = z[row, places[total]]
                    total += 1
        smallest, equal, taken = _nth_largest(values, n), n, 0
        for value in values:
            equal -= value > smallest
        for i in range(values.size):  # without a branch
            tied = values[i] == smallest and equal > 0
            places[taken] = places[i]
            taken += tied or values[i] > smallest
            equal -= tied
        ids[row] = places[:n]


@any_strides(read(2), types.intp, NEW_IDS, types.intp)
def kernel_top(z, n, ids, parts):
    """Set ids (rows, n), ascending: where the n largest numbers of each row of z (rows, V) stand."""
    rows, width = z.shape
    blocks = (width + BLOCK - 1) // BLOCK
    thresholds, counts = np.empty(rows, z.dtype), np.empty(rows * blocks, np.int64)
    kept = np.empty((rows, width), np.int32)  # memory that is not reached costs nothing
    share(_guess_thresholds, (z, n, thresholds), rows, min(parts, rows))
    share(_note_blocks, (z, thresholds, blocks, kept, counts), rows * blocks, min(parts, rows * blocks))
    share(_choose_rows, (z, n, blocks, kept, counts, ids), rows, min(parts, rows))


@njit(**STEP)
def _refine_ranges(z, ids, weight, g, replace, ranges, first, last):
    """Add the products of some candidates of some rows, or put them in the place of what is there."""
    n, depth = ids.shape[1], weight.shape[1]
    stride = weight.strides[0] // weight.itemsize
    start_of = pointer(weight.ctypes.data, weight.dtype.type(0))
    sums, now, ahead = np.empty(PICKED, z.dtype), np.empty(PICKED, np.int64), np.empty(PICKED, np.int64)
    out = pointer(sums.ctypes.data, z.dtype.type(0))
    for item in range(first, last):
        row, start = item // ranges, item % ranges * CANDIDATES
        stop = min(start + CANDIDATES, n)
        x = offset(pointer(g.ctypes.data, g.dtype.type(0)), row * (g.strides[0] // g.itemsize))
        for i in range(start, stop, PICKED):
            for k in range(PICKED):
                now[k] = ids[row, min(i + k, n - 1)]
                ahead[k] = ids[row, min(i + k + PICKED, n - 1)]
            dot_picked(
                depth, out, x, start_of, stride,
                pointer(now.ctypes.data, np.int64(0)), pointer(ahead.ctypes.data, np.int64(0)),
            )  # fmt: skip
            for k in range(min(PICKED, stop - i)):
                if replace:
                    z[row, now[k]] = sums[k]
                else:
                    z[row, now[k]] += sums[k]


@any_strides(write(2), IDS, read(2), read(2), types.boolean, types.intp)
def kernel_refine(z, ids, weight, g, replace, parts):
    """``z[i] += weight[i] . g``, or ``=``, for the ids i of each row: z (rows, V), ids (rows, n), weight (V, K), g
    (rows, K); rows of weight and of g without gaps."""
    ranges = (ids.shape[1] + CANDIDATES - 1) // CANDIDATES
    share(_refine_ranges, (z, ids, weight, g, replace, ranges), len(ids) * ranges, min(parts, len(ids) * ranges))
