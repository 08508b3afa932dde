"""Little-endian values of a file, one after the other, never past its end."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.errors import WeightsError


class Cursor:
    """A place in a file that is mapped into memory.

    Attributes
    ----------
    path : Path
    left : memoryview of bytes
        What is not yet read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.left = np.memmap(path, np.uint8, "r").data if path.stat().st_size else memoryview(b"")
        self._size = len(self.left)

    @property
    def position(self) -> int:
        """Bytes read so far."""
        return self._size - len(self.left)

    def take(self, size: int) -> memoryview:
        """The next `size` bytes; raises WeightsError where the file ends before."""
        if size > len(self.left):
            raise WeightsError(
                f"{self.path} is truncated: {size - len(self.left)} bytes are missing; download it again"
            )
        taken, self.left = self.left[:size], self.left[size:]
        return taken

    def unpack(self, layout: str) -> Any:
        """The next values of a `struct` layout; a single one is not in a tuple."""
        values = struct.unpack(f"<{layout}", self.take(struct.calcsize(f"<{layout}")))
        return values[0] if len(values) == 1 else values
