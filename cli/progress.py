"""Says on stderr what goes on. stdout belongs to the result."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from typing import TextIO

_BAR = 24  # characters
_REDRAW_S = 0.1


def write(stream: TextIO | None, text: str) -> None:
    """Write at once; what cannot be said (a full disk, a reader that has left) stays unsaid and costs no result."""
    if stream is None:  # closed
        return
    try:
        stream.write(text)
        stream.flush()
    except OSError:
        with suppress(OSError):  # of streams without a file, too
            drop(stream)


def drop(stream: TextIO) -> None:
    """Let a stream lead nowhere: what is still buffered would fail again at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


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
        write(self._stream, f"\r\x1b[K[{'#' * full}{'-' * (_BAR - full)}] {message}"[:110])

    def done(self) -> None:
        """Clear the line of the stage."""
        if self._redraws:
            write(self._stream, "\r\x1b[K")

    def line(self, text: str) -> None:
        """One line that stays."""
        self.done()
        write(self._stream, f"effref: {text}\n")
