"""Scattered records as one batch: by mapping their pages side by side, or by copying them.

Mapping (Linux): reserve a range of addresses, and let each record's pages appear in it, one record behind the other:

    mmap(none, n stride, reserved)                    the range
    mmap(range + b stride, stride, file, i_b stride)  record i_b as sequence b, with MAP_FIXED: n calls, no copy

The pages are those of the page cache. A record that is not a whole number of pages is padded in the file, and the
batch is then an array with gaps between its sequences.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import weakref
from collections.abc import Sequence
from functools import cache
from math import prod
from typing import Any

import numpy as np

from refimpl.engines.protocol import Array
from refimpl.errors import ShapeError, UnsupportedError
from refimpl.memo.database import Records

MAP_FIXED = 0x10  # <asm-generic/mman-common.h>; Python's mmap module has the others, but no fixed addresses
_FAILED = ctypes.c_void_p(-1).value


def can_map(records: Records) -> bool:
    """Whether the records of this file can be mapped on this machine."""
    return sys.platform == "linux" and records.layout.stride % mmap.PAGESIZE == 0


def gather(records: Records, rows: Sequence[int | None], transfer: str, out: Array | None = None) -> Array:
    """The records of these rows as one batch, whose rows of None are left for the caller to fill.

    Parameters
    ----------
    records : Records
    rows : sequence of int or None
    transfer : {"map", "copy"}
    out : array, optional
        Where to copy to: as many rows, of the shape of a record.

    Returns
    -------
    array
        The records behind each other. Mapped: read-only where no row is None. Where some are, every row may be written
        to; what is written into a record stays in this array and never reaches the file. The mapping lives as long as
        any array that shows it.

    Raises
    ------
    UnsupportedError
        If the records cannot be mapped here.
    """
    if transfer == "map":
        return _gather_mapped(records, rows)
    batch = np.empty((len(rows), *records.layout.shape), records.layout.dtype) if out is None else out
    for b, row in enumerate(rows):
        if row is not None:
            batch[b] = records.array[row]
    return batch


def _gather_mapped(records: Records, rows: Sequence[int | None]) -> Array:
    layout = records.layout
    if not can_map(records):
        raise UnsupportedError(
            f"records of {layout.stride} bytes cannot be mapped here (it takes Linux and a multiple of its pages of "
            f"{mmap.PAGESIZE} bytes): give transfer='copy'"
        )
    if not rows or not layout.record_bytes:
        return np.empty((len(rows), *layout.shape), layout.dtype)
    for row in rows:
        if row is not None and not 0 <= row < len(records):
            raise IndexError(f"record {row} of {len(records)}")
    return _Range(records, rows).array()


def check_rows(op: str, store: Array, new: Array, rows: Sequence[int]) -> None:
    """Raise ShapeError where `new` does not fit into these rows of `store`."""
    fits = store.shape[1:] == new.shape[1:] and new.shape[0] == len(rows) and store.dtype == new.dtype
    if not (fits and all(0 <= row < store.shape[0] for row in rows)):
        raise ShapeError(
            f"{op}: new {new.shape} {new.dtype} does not fit into the rows {tuple(rows)} of store {store.shape} "
            f"{store.dtype}"
        )


class _Range:
    """A range of addresses that shows records; given back when the last array on it is gone."""

    def __init__(self, records: Records, rows: Sequence[int | None]) -> None:
        self.layout, self.count = records.layout, len(rows)
        stride, filled = self.layout.stride, any(row is None for row in rows)
        access = mmap.PROT_READ | (mmap.PROT_WRITE if filled else 0)
        size = self.count * stride
        self.address = _map(None, size, access, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        weakref.finalize(self, _unmap, self.address, size)
        shared = mmap.MAP_PRIVATE if filled else mmap.MAP_SHARED  # private: a write makes a copy of its page
        for b, row in enumerate(rows):
            if row is not None:
                flags = shared | mmap.MAP_POPULATE | MAP_FIXED  # all pages now, not at their first use
                _map(self.address + b * stride, stride, access, flags, records.descriptor, row * stride)
        self.writable = filled

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """What NumPy makes an array of; the array keeps this object alive."""
        dtype, shape = np.dtype(self.layout.dtype), self.layout.shape
        inner = [dtype.itemsize * prod(shape[axis + 1 :]) for axis in range(len(shape))]
        return {
            "version": 3,
            "data": (self.address, not self.writable),
            "typestr": dtype.str,
            "shape": (self.count, *shape),
            "strides": (self.layout.stride, *inner),
        }

    def array(self) -> Array:
        return np.asarray(self)


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
    )  # fmt: skip
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return libc


def _map(address: int | None, size: int, access: int, flags: int, descriptor: int, offset: int) -> int:
    found = _libc().mmap(address, size, access, flags, descriptor, offset)
    if found == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, f"mmap of {size} bytes: {os.strerror(code)}")
    return int(found)


def _unmap(address: int, size: int) -> None:
    _libc().munmap(address, size)
