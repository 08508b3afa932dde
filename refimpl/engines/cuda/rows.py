"""Launching kernels over (rows, width): which read 16 bytes at a time where all arrays allow it."""

from __future__ import annotations

import re
from typing import Any

from refimpl.engines.cuda.launch import Launcher, Source
from refimpl.engines.cuda.tiles import HELD, ROWS_EACH, pack_elements, row_holders, tiles
from refimpl.engines.protocol import Array

Placed = tuple[Array, int]  # an array and the elements between its rows


def packed(*kernels: str) -> tuple[str, ...]:
    """Kernels for packs of V elements and for single ones."""
    return tuple(with_pack(kernel, pack) for kernel in kernels for pack in (True, False))


def held(*kernels: str) -> tuple[str, ...]:
    """Kernels for rows in registers: P packs of V elements per thread, or the most single ones."""
    return tuple(
        with_pack(re.sub(r"\bP\b", str(each), kernel), pack)
        for kernel in kernels
        for each, pack in (*((each, True) for each in HELD), (HELD[-1], False))
    )


def with_pack(kernel: str, pack: bool) -> str:
    """The kernel's name with V as it is (16 bytes), or 1."""
    return kernel if pack else re.sub(r"\bV\b", "1", kernel)


class RowKernels(Launcher):
    """Kernels over rows."""

    def _launch_tiles(
        self, source: Source, kernel: str, rows: int, width: int, arrays: tuple[Placed, ...], *arguments: Any,
        rows_each: int = ROWS_EACH,
    ) -> None:  # fmt: skip
        """Launch an elementwise kernel over (rows, width); its arguments begin with the arrays, rows and width."""
        pack = pack_of(width, arrays)
        shape = tiles(rows, width // pack, rows_each)
        given = (x for x, _ in arrays)
        self._launch(source, with_pack(kernel, pack > 1), arrays[0][0], shape, *given, rows, width, *arguments)

    def _elementwise(
        self, source: Source, kernel: str, x: Array, columns: tuple[Array, ...] = (), *arguments: Any
    ) -> Array:
        """An elementwise kernel over x and arrays with its columns, into a new array."""
        x, rows, width, stride = self._rows(x)
        out = self.xp.empty(x.shape, x.dtype)
        arrays = (x, stride), *((y, width) for y in columns), (out, width)
        self._launch_tiles(source, kernel, rows, width, arrays, stride, *arguments)
        return out

    def _launch_rows(
        self, source: Source, kernel: str, rows: int, width: int, arrays: tuple[Placed, ...], *arguments: Any
    ) -> None:
        """Launch a kernel that holds rows; its arguments begin with the arrays, rows and width."""
        pack = pack_of(width, arrays)
        each, shape = row_holders(rows, width // pack, HELD if pack > 1 else HELD[-1:])
        name = with_pack(re.sub(r"\bP\b", str(each), kernel), pack > 1)
        self._launch(source, name, arrays[0][0], shape, *(x for x, _ in arrays), rows, width, *arguments)


def pack_of(width: int, arrays: tuple[Placed, ...]) -> int:
    """Elements that a kernel over these arrays moves at once."""
    places = ((int(x.data.ptr), stride) for x, stride in arrays)
    return pack_elements(arrays[0][0].dtype.itemsize, width, *places)
