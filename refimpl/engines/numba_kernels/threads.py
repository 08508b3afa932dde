"""One set of cores for two pools of threads, Numba's and those of BLAS; and news of compilation."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import numba
from numba.core import event
from threadpoolctl import ThreadpoolController

from refimpl.errors import ConfigError


def start() -> None:
    """Start Numba's threads such that idle ones sleep instead of spin, unless the user has chosen."""
    # BLAS products and kernels in turn (T = 128, d = 384, two cores) take 6.8 times their time apart where
    # idle OpenMP threads spin, which is libgomp's default; 1.05 times where they sleep; 1.10 with Numba's
    # "workqueue". A launch costs 3 us spinning, 8 us asleep, 20 us with "workqueue". To spin some 10 us first
    # lets the caller see the end of a kernel without sleep, and costs BLAS nothing that can be measured.
    with _environment(OMP_WAIT_POLICY="passive", GOMP_SPINCOUNT="1000"):  # OpenMP reads them when Numba loads it
        numba.get_num_threads()


def count() -> int:
    """Threads that kernels use."""
    return int(numba.get_num_threads())


def most() -> int:
    """The most threads that kernels can use."""
    return int(numba.config.NUMBA_NUM_THREADS)


def set_count(n: int) -> None:
    """Use `n` threads in kernels and in BLAS."""
    if not 1 <= n <= most():
        message = f"threads must be 1 to {most()} on this machine, not {n}; NUMBA_NUM_THREADS raises the limit"
        raise ConfigError(message)
    numba.set_num_threads(n)
    ThreadpoolController().limit(limits=n, user_api="blas")


def on_first_compilation(announce: Callable[[str], None]) -> None:
    """Call ``announce(message)`` once, when a kernel of this package is compiled, not loaded from disk."""
    event.register("numba:compile", _Announcer(announce))


class _Announcer(event.Listener):  # type: ignore[misc]  # Numba is untyped
    """Speaks at the first compilation of this package's code, then stays silent."""

    def __init__(self, announce: Callable[[str], None]) -> None:
        self._announce: Callable[[str], None] | None = announce

    def on_start(self, event: Any) -> None:
        module = event.data["dispatcher"].py_func.__module__
        if self._announce is not None and module.startswith("refimpl."):
            announce, self._announce = self._announce, None
            announce("compiling kernels for this machine (once; later runs load them from Numba's cache)")

    def on_end(self, event: Any) -> None:
        pass


@contextlib.contextmanager
def _environment(**settings: str) -> Iterator[None]:
    """Set environment variables for a moment, unless one of them is set."""
    if any(name in os.environ for name in settings):
        yield
        return
    os.environ.update(settings)
    try:
        yield
    finally:
        for name in settings:
            del os.environ[name]
