"""Says on stderr what goes on. stdout belongs to the result."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_BAR = 24  # characters
_REDRAW_S = 0.1


class Progress:
    """Stages of long work, and notes that belong to the result.

    On a terminal a stage is one line that is redrawn; elsewhere it is written once. Silent unless `stream` is given.

    Attributes
    ----------
    notes : list of str
        What a reader of the result should know.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.notes: list[str] = []
        self._stream = stream
        self._redraws = stream is not None and stream.isatty()
        self._drawn_s = 0.0

    @classmethod
    def on_stderr(cls, quiet: bool) -> Progress:
        return cls(None if quiet else sys.stderr)

    def note(self, text: str) -> None:
        """Something about the result that is not in its numbers."""
        self.notes.append(text)
        self.line(text)

    def stage(self, text: str) -> None:
        """What begins now."""
        self._drawn_s = 0.0
        if self._redraws:
            self.advance(text, 0.0)
        else:
            self.line(text)

    def advance(self, message: str, fraction: float) -> None:
        """How far the stage is; shown on a terminal only."""
        now = time.monotonic()
        if self._stream is None or not self._redraws or (now - self._drawn_s < _REDRAW_S and fraction < 1):
            return
        self._drawn_s = now
        full = round(_BAR * min(max(fraction, 0.0), 1.0))
        self._stream.write(f"\r\x1b[K[{'#' * full}{'-' * (_BAR - full)}] {message}"[:110])
        self._stream.flush()

    def done(self) -> None:
        """Clear the line of the stage."""
        if self._redraws and self._stream is not None:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def line(self, text: str) -> None:
        """One line that stays."""
        if self._stream is None:
            return
        self.done()
        self._stream.write(f"effref: {text}\n")
        self._stream.flush()
