"""Runs an engine's ops under a component's name and notes each call: component, op, sizes, seconds.

A program is given ``at = Recorder(engine).at`` and writes ``at(SCORES).scores(q, k, scale)``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from refimpl.engines.protocol import OUTCOMES, SIZES, Array, Engine

At = Callable[[str], Engine]  # component -> the engine, whose calls count for that component


@dataclass(frozen=True)
class Call:
    """One executed op."""

    component: str
    op: str
    sizes: tuple[tuple[str, int], ...]
    seconds: float


class Recorder:
    """Wraps an engine; `at` is what programs are given."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._marks: list[tuple[str, str, dict[str, int], dict[str, Array], Any, Any]] = []
        self._bound: dict[str, Engine] = {}

    def at(self, component: str) -> Engine:
        """The engine, recording under `component`."""
        if component not in self._bound:
            self._bound[component] = cast(Engine, _Recorded(self, component))
        return self._bound[component]

    def calls(self) -> list[Call]:
        """What ran, in order; waits for the device."""
        elapsed, host = self.engine.elapsed_s, self.engine.to_numpy
        return [
            Call(
                component,
                op,
                (*sizes.items(), *((name, int(host(array).sum())) for name, array in outcomes.items())),
                elapsed(*marks),
            )
            for component, op, sizes, outcomes, *marks in self._marks
        ]

    def note(
        self, component: str, op: str, sizes: dict[str, int], outcomes: dict[str, Array], start: Any, stop: Any
    ) -> None:
        """Add one executed op; `outcomes` are arrays whose sums are sizes."""
        self._marks.append((component, op, sizes, outcomes, start, stop))


class _Recorded:
    """An engine whose ops are noted; made once per component, each op wrapped at first use."""

    def __init__(self, recorder: Recorder, component: str) -> None:
        self._recorder = recorder
        self._component = component

    def __getattr__(self, op: str) -> Any:
        recorder, component = self._recorder, self._component
        function, mark = getattr(recorder.engine, op), recorder.engine.mark
        if op not in SIZES:
            return function
        sizes_of, outcomes_of = SIZES[op], OUTCOMES.get(op)

        def recorded(*args: Any, **kwargs: Any) -> Any:
            start = mark()
            result = function(*args, **kwargs)
            stop = mark()
            outcomes = outcomes_of(result) if outcomes_of else {}
            recorder.note(component, op, sizes_of(*args, **kwargs), outcomes, start, stop)
            return result

        setattr(self, op, recorded)
        return recorded


def breakdown(calls: list[Call]) -> dict[str, float]:
    """Seconds per component, in the order in which the components first ran."""
    seconds: dict[str, float] = {}
    for call in calls:
        seconds[call.component] = seconds.get(call.component, 0.0) + call.seconds
    return seconds


def tally(calls: list[Call]) -> Counter[tuple[str, str, tuple[tuple[str, int], ...]]]:
    """How often each (component, op, sizes) ran; what the closed form must equal."""
    return Counter((call.component, call.op, call.sizes) for call in calls)
