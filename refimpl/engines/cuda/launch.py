"""How a kernel is launched: its source compiled once per dtype, arrays as its kernels read them, arguments by type."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.engines.cuda.device import Device
from refimpl.engines.cuda.shapes import C_TYPES, PACK_BYTES, WIDE, Launch, Strides, element_strides, row_stride
from refimpl.engines.protocol import Array
from refimpl.errors import ShapeError, UnsupportedError

FOLDER = Path(__file__).parent
OPTIONS = ("--std=c++17",)
DEFAULT_SHARED_BYTES = 48 << 10  # of a block, on every device


@dataclass(frozen=True)
class Source:
    """A file of kernels.

    Attributes
    ----------
    file : str
        Its name in this folder.
    kernels : tuple of str
        What is compiled: names without ``kernel_``, with their template arguments, in which T is the dtype of the
        arrays, A the one that they are computed in, and V the elements in 16 bytes.
    dtypes : tuple of str
        Those that it is for.
    capability : int
        The least compute capability of a device that can run it: 80 is 8.0.
    apart : bool
        Compile each kernel when it is first used, not all of them: where they are many or large.
    """

    file: str
    kernels: tuple[str, ...]
    dtypes: tuple[str, ...] = tuple(C_TYPES)
    capability: int = 75
    apart: bool = False

    @property
    def text(self) -> str:
        """The file with the project's own includes in their places, as CuPy's cache of compiled code needs it."""
        return included(self.file)

    def instances(self, dtype: str) -> tuple[str, ...]:
        """The C++ names of the kernels for arrays of this dtype."""
        return tuple(dict.fromkeys(instance(kernel, dtype) for kernel in self.kernels))


def instance(kernel: str, dtype: str) -> str:
    """A kernel of a `Source` as C++ names it: ``softmax<A, T>`` in float16 is ``kernel_softmax<float, __half>``."""
    known = {"T": C_TYPES[dtype], "A": C_TYPES[WIDE[dtype]], "V": str(PACK_BYTES // np.dtype(dtype).itemsize)}
    return "kernel_" + re.sub(r"\b[TAV]\b", lambda match: known[match[0]], kernel)


@cache
def included(file: str) -> str:
    """A file of this folder whose ``#include "..."`` lines are replaced by the files that they name, each once."""
    seen: set[str] = set()

    def lines(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        found = []
        for line in (FOLDER / name).read_text("utf-8").splitlines(keepends=True):
            if line.startswith('#include "'):
                found.append(lines(line.split('"')[1]))
            elif not line.startswith("#pragma once"):
                found.append(line)
        return "".join(found)

    return lines(file)


class Launcher(Device):
    """Launches kernels. Ops check what they are given, make the result and call `_launch`."""

    def __init__(self) -> None:
        super().__init__()
        self._modules: dict[tuple[tuple[str, ...], str], Any] = {}
        self._kernels: dict[tuple[str, str, str], Any] = {}

    def _launch(self, source: Source, kernel: str, x: Array, shape: Launch, *arguments: Any) -> None:
        """Run one of the source's kernels for the dtype of x, unless there is nothing to do."""
        if 0 in shape.grid or x.size == 0:
            return
        function = self._kernel(source, kernel, dtype_of(x))
        given = tuple(kernel_argument(argument) for argument in arguments)
        if shape.shared_bytes > DEFAULT_SHARED_BYTES:  # more has to be asked for
            function.max_dynamic_shared_size_bytes = shape.shared_bytes
        function(shape.grid, shape.block, given, shared_mem=shape.shared_bytes)

    def _kernel(self, source: Source, kernel: str, dtype: str) -> Any:
        key = source.file, kernel, dtype
        if key not in self._kernels:
            name = instance(kernel, dtype)
            names = (name,) if source.apart else source.instances(dtype)
            if (names, dtype) not in self._modules:
                self._modules[names, dtype] = self.xp.RawModule(
                    code=source.text, options=OPTIONS, name_expressions=names
                )
            self._kernels[key] = self._modules[names, dtype].get_function(name)
        return self._kernels[key]

    def _rows(self, x: Array) -> tuple[Array, int, int, int]:
        """x, the number and width of its rows, and the elements between them; a copy where these vary."""
        width, stride = x.shape[-1], row_stride(x.shape, element_strides(x))
        if stride is None:
            x, stride = self.xp.ascontiguousarray(x), width
        return x, math.prod(x.shape[:-1]), width, stride

    def _operand(self, x: Array, y: Array, shape: tuple[int, ...]) -> Array:
        """y as a kernel reads it beside x: of this shape, of x's dtype, contiguous."""
        if y.shape != shape or y.dtype != x.dtype:
            raise ShapeError(f"an operand is {y.shape} {y.dtype}; x {x.shape} {x.dtype} needs {shape} {x.dtype}")
        return self.xp.ascontiguousarray(y)

    def _unit_columns(self, x: Array) -> Array:
        """x with its last axis contiguous and its rows apart; a copy where they are not."""
        *_, rows, columns = x.shape
        row, column = element_strides(x)[-2:]
        even = (column == 1 or columns == 1) and (row >= columns or rows == 1)
        return x if even else self.xp.ascontiguousarray(x)

    def _heads_last(self, shape: tuple[int, ...], dtype: Any, zeros: bool = False) -> Array:
        """Room for (B, H, T, D) that lies in memory as (B, T, H, D), so that `merge_heads` need not copy."""
        batch, heads, length, width = shape
        make = self.xp.zeros if zeros else self.xp.empty
        return make((batch, length, heads, width), dtype).transpose(0, 2, 1, 3)

    def _mask_of(self, shape: tuple[int, ...], other: Array, mask: Array | None) -> tuple[Array, Strides]:
        """A kernel's mask arguments: its array, 1 and its strides; any array, 0 and zeros where there is none."""
        if mask is None:
            return other, (0,) * (1 + len(shape))
        mask = self.xp.broadcast_to(mask if mask.dtype == bool else mask != 0, shape)
        return mask, (1, *element_strides(mask))


def dtype_of(x: Array) -> str:
    """The name of an array's dtype; UnsupportedError if the kernels do not compute in it."""
    name = str(x.dtype.name)
    if name not in C_TYPES:
        raise UnsupportedError(f"the CuPy engine computes in {', '.join(C_TYPES)}; the array is {name}")
    return name


def flag(value: bool) -> str:
    """A truth value as C++ writes it."""
    return "true" if value else "false"


def kernel_argument(value: Any) -> Any:
    """Whole numbers as 64-bit integers, others as doubles: what every kernel declares; arrays as they are."""
    if isinstance(value, (bool, int)):
        return np.int64(value)
    return np.float64(value) if isinstance(value, float) else value
