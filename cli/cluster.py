"""A sweep on the workers of a Dask cluster: the same rows as in one process.

A worker takes one measurement at a time, and so do all worker processes of a machine together. A task whose worker dies
is given to another one by the scheduler; its row arrives once.
"""

from __future__ import annotations

import itertools
import queue
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from refimpl.errors import ConfigError, MissingDependencyError

from . import __version__
from .context import cache_root
from .sweep_estimate import Estimator, Part, in_order
from .sweep_measure import Outcome, Point, measure_point
from .sweep_rows import Rows

if sys.platform != "win32":
    import fcntl

MEASURING = "effref-measuring"  # what a measurement takes of a worker
CONNECT_S = 20
LOST_S = 60.0  # without an outcome, after which it is asked whether there are workers
AHEAD = 2  # tasks for each thread or worker that wait for it


def estimated_on(
    address: str, parts: Iterable[Part], estimator: Estimator, needed: tuple[str, ...] | None
) -> Iterator[tuple[Part, Rows | None]]:
    """Rows in the order of the parts; reasons of skipped points are added to those of the estimator."""
    with _connected(address) as client:
        threads = sum(worker["nthreads"] for worker in client.scheduler_info(-1)["workers"].values())
        yield from in_order(
            parts, estimator, needed, lambda task: client.submit(task, pure=False), AHEAD * max(threads, 1)
        )


def measured_on(address: str, points: Iterable[Point]) -> Iterator[Outcome]:
    """Outcomes as they come; each point is measured by the worker that is free first.

    Raises
    ------
    ConfigError
        If the scheduler, or for a while all workers, are gone.
    """
    with _connected(address) as client:
        from distributed import CancelledError, KilledWorker

        client.register_plugin(_plugin())
        remaining, finished = iter(points), queue.SimpleQueue[Any]()
        numbers: dict[str, int] = {}

        def submit(count: int) -> None:
            for point in itertools.islice(remaining, count):
                future = client.submit(_measure, point, resources={MEASURING: 1}, pure=False)
                numbers[future.key] = point.number
                future.add_done_callback(finished.put)

        submit(AHEAD * _workers(client, address))
        while numbers:
            future = _next(finished, client, address)
            number = numbers.pop(future.key)
            try:
                outcome = future.result()
            except KilledWorker:
                outcome = Outcome(number, reason="the workers that measured the point died, one after another")
            except CancelledError as error:
                raise ConfigError(f"{_lost(address)}: start it and run again") from error
            submit(1)
            yield outcome


def _next(finished: queue.SimpleQueue[Any], client: Any, address: str) -> Any:
    """The next future that is done."""
    while True:
        try:
            return finished.get(timeout=LOST_S)
        except queue.Empty:
            _workers(client, address)


def _workers(client: Any, address: str) -> int:
    """How many there are; ConfigError for none."""
    try:
        count = len(client.scheduler_info(-1)["workers"])
    except OSError as error:
        raise ConfigError(f"{_lost(address)}: start it and run again") from error
    if not count:
        raise ConfigError(f"the cluster at {address} has no workers: start some with 'dask worker {address}'")
    return count


def _lost(address: str) -> str:
    return f"the scheduler at {address} does not answer any more; points that were measured are kept"


# --- on a worker ----------------------------------------------------------------------------------------------------


def _measure(point: Point) -> Outcome:
    with _alone():
        return measure_point(point)


@contextmanager
def _alone() -> Iterator[None]:
    """Wait until no other process of this machine measures for a sweep."""
    if sys.platform == "win32":
        yield
        return
    place = cache_root() / "measuring.lock"
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go by the system when the process ends
        yield


def _version() -> str:
    return __version__


# --- on this side ---------------------------------------------------------------------------------------------------


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """A client of the scheduler; what was submitted and is not done is cancelled at the end.

    Raises
    ------
    ConfigError
        If there is no scheduler, it has no workers, or a worker has another version of effref.
    MissingDependencyError
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise MissingDependencyError("--cluster needs the package dask: pip install 'effref[sweep]'") from error
    try:
        client = Client(address, timeout=CONNECT_S, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no Dask scheduler answers at {address}: start one with 'dask scheduler'") from error
    with client:
        _workers(client, address)
        _check_versions(client, _version)
        yield client


def _check_versions(client: Any, version: Callable[[], str]) -> None:
    for worker, found in client.run(version, on_error="return").items():
        if found != __version__:
            shown = "no effref" if isinstance(found, Exception) else f"effref {found}"
            raise ConfigError(f"the worker {worker} has {shown}; this is effref {__version__}: install it there, too")


def _plugin() -> Any:
    """Lets each worker, also one that is started later, take one measurement at a time."""
    from distributed import WorkerPlugin

    class OneAtATime(WorkerPlugin):  # type: ignore[misc]  # Dask has no types
        name = MEASURING

        async def setup(self, worker: Any) -> None:
            await worker.set_resources(**{MEASURING: 1})

    return OneAtATime()
