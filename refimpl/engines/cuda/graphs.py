"""A pass as a CUDA graph: recorded once, then launched as a whole, without the host's share of each op.

Recording takes a stream and a memory pool of its own. The pass runs twice: first as usual, which compiles kernels,
fills the pool and notes what the host uploads on the way; then into the graph, which finds memory and uploads ready.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from refimpl.engines.cuda.failures import of_cupy, one_line
from refimpl.engines.protocol import Array
from refimpl.errors import UnsupportedError

if TYPE_CHECKING:
    from refimpl.engines.cuda.device import Device


class Uploads:
    """What a pass copies to the device, as masks and tables: noted in its first run, handed out again in the second."""

    def __init__(self) -> None:
        self.kept: list[tuple[Array, Array]] = []  # on the host and on the device
        self.recording = False

    def take(self, host: Array, upload: Callable[[Array], Array]) -> Array:
        """The array on the device."""
        if not self.recording:
            self.kept.append((np.array(host), upload(host)))
            return self.kept[-1][1]
        for before, placed in self.kept:
            if before.dtype == host.dtype and np.array_equal(before, host):
                return placed
        raise cannot("it uploads something else whenever it is run")


class Replay:
    """A recorded pass.

    Raises
    ------
    UnsupportedError
        If the pass cannot be recorded, because the host reads a result on the way or waits for the device.
    """

    def __init__(self, device: Device, work: Callable[[], Array]) -> None:
        self._device, xp = device, device.xp
        device.synchronize()  # what the pass reads was uploaded on another stream
        self._stream, self._pool, self._uploads = xp.cuda.Stream(non_blocking=True), xp.cuda.MemoryPool(), Uploads()
        with self._stream, xp.cuda.using_allocator(self._pool.malloc):
            device.uploads = self._uploads
            try:
                work()
                self._stream.synchronize()
                self._uploads.recording = True
                self._stream.begin_capture()
                self._output, self._graph = self._recorded(work)
            finally:
                device.uploads = None

    def _recorded(self, work: Callable[[], Array]) -> tuple[Array, Any]:
        failure: BaseException | None = None
        try:
            output = work()
        except BaseException as error:  # Ctrl-C, too
            failure = error
        try:  # in any case, or the stream stays in capture
            graph = self._stream.end_capture()
        except Exception as error:
            failure = failure or error
        if failure is None:
            return output, graph
        if isinstance(failure, MemoryError) or not of_cupy(failure):
            raise failure
        raise cannot(one_line(failure)) from failure

    def __call__(self) -> tuple[Array, float]:
        """Launch it and wait: the output, which the next launch overwrites, and the seconds on the device."""
        xp = self._device.xp
        with self._stream:
            start, stop = xp.cuda.Event(), xp.cuda.Event()
            start.record()
            self._graph.launch()
            stop.record()
        return self._output, self._device.elapsed_s(start, stop)


def cannot(reason: str) -> UnsupportedError:
    """The error for a pass that cannot be recorded."""
    return UnsupportedError(f"the pass cannot be recorded as a CUDA graph: {reason}; leave --graph away")
