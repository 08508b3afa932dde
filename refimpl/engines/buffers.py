"""A caching allocator for the results of the CPU engine.

NumPy returns a large freed array to the operating system and page-faults the next one anew, which costs more
than many ops and makes timings irregular. Here a block of memory is kept and handed out again once no array
refers to it: every view of a block holds a reference to the block's owner (NumPy collapses ``base``), so
CPython's reference count tells.
"""

from __future__ import annotations

import math
import sys
import threading
from typing import Any

import numpy as np

Array = Any

ALIGNMENT = 64  # bytes of a cache line, and of the widest vector
SMALLEST_BYTES = 64 * 1024  # what is smaller comes from NumPy, whose own cache serves it
CLASSES_PER_OCTAVE = 4  # sizes are rounded up to 5/4, 6/4, 7/4 or 8/4 of a power of two


class _Block:
    """One piece of memory: `owner` is the NumPy array that views collapse to."""

    __slots__ = ("owner", "requested", "start")

    def __init__(self, capacity: int) -> None:
        self.owner: Array = np.empty(capacity + ALIGNMENT, np.uint8)
        self.start = -self.owner.ctypes.data % ALIGNMENT
        self.requested = 0  # bytes of the array that was last made of it

    @property
    def free(self) -> bool:
        """Whether no array outside refers to the memory."""
        return sys.getrefcount(self.owner) <= _REFERENCES_OF_A_FREE_OWNER

    def view(self, shape: tuple[int, ...], dtype: Any, n_bytes: int) -> Array:
        """An aligned array over the start of the memory."""
        self.requested = n_bytes
        return np.ndarray(shape, dtype, self.owner, self.start)


def _references_of_a_free_owner() -> int:
    """Reference count that `_Block.free` sees when nobody else refers: it differs between Python versions."""
    counts: list[int] = []

    class Probe(_Block):
        @property
        def free(self) -> bool:
            counts.append(sys.getrefcount(self.owner))
            return True

    return counts[0] if Probe(0).free else 0


_REFERENCES_OF_A_FREE_OWNER = _references_of_a_free_owner()


class Buffers:
    """Hands out arrays and takes their memory back by itself. A lock makes each call atomic among threads.

    Parameters
    ----------
    most_kept_bytes : int
        Unused memory beyond this is returned to the operating system, oldest block first.
    """

    def __init__(self, most_kept_bytes: int = 2**30) -> None:
        self.most_kept_bytes = most_kept_bytes
        self._blocks: dict[int, list[_Block]] = {}  # capacity -> blocks
        self._high_water_bytes = 0
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """An uninitialised row-major array, aligned to a cache line unless it is small."""
        n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        if n_bytes < SMALLEST_BYTES:
            return np.empty(shape, dtype)
        with self._lock:
            array = self._block(_capacity(n_bytes)).view(shape, dtype, n_bytes)
            self._high_water_bytes = max(self._high_water_bytes, self._live_bytes())
            return array

    @property
    def live_bytes(self) -> int:
        """Bytes of the arrays in use, without small ones."""
        with self._lock:
            return self._live_bytes()

    @property
    def high_water_bytes(self) -> int:
        """The most that `live_bytes` has been since `reset_high_water`."""
        return self._high_water_bytes

    @property
    def kept_bytes(self) -> int:
        """Bytes of all blocks, used and unused."""
        with self._lock:
            return sum(capacity * len(blocks) for capacity, blocks in self._blocks.items())

    def reset_high_water(self) -> None:
        """Start a new high-water mark from what is in use now."""
        self._high_water_bytes = self.live_bytes

    def release(self) -> None:
        """Return all unused memory to the operating system."""
        with self._lock:
            self._drop(0)

    def _block(self, capacity: int) -> _Block:
        blocks = self._blocks.setdefault(capacity, [])
        for block in blocks:
            if block.free:
                return block
        self._drop(max(0, self.most_kept_bytes - capacity))
        blocks = self._blocks.setdefault(capacity, [])
        blocks.append(_Block(capacity))
        return blocks[-1]

    def _live_bytes(self) -> int:
        count, free = (
            sys.getrefcount,
            _REFERENCES_OF_A_FREE_OWNER,
        )  # as in `free`, without a call for each block
        every = [block for blocks in self._blocks.values() for block in blocks]
        return sum([block.requested for block in every if count(block.owner) > free])

    def _drop(self, keep_bytes: int) -> None:
        """Forget unused blocks, oldest first, until at most `keep_bytes` of them remain."""
        unused = [(capacity, block) for capacity, blocks in self._blocks.items() for block in blocks if block.free]
        excess = sum(capacity for capacity, _ in unused) - keep_bytes
        for capacity, block in unused:
            if excess <= 0:
                break
            self._blocks[capacity].remove(block)
            excess -= capacity
        self._blocks = {capacity: blocks for capacity, blocks in self._blocks.items() if blocks}


def _capacity(n_bytes: int) -> int:
    """Size class: `n_bytes` rounded up by at most a quarter."""
    step = max(1, (1 << (n_bytes - 1).bit_length()) // (2 * CLASSES_PER_OCTAVE))
    return -(-n_bytes // step) * step
