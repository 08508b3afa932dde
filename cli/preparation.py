"""What methods find before they run, on real inputs: found once, kept in the user's cache, written for others to use.

A method whose parameters have ``to_document()`` can be prepared. Where finding takes long, they also say in ``FILE``
which parameter reads such a document; it is then kept, and the same weights, inputs and parameters find it again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refimpl.config import ModelConfig
from refimpl.engines.protocol import Array
from refimpl.errors import ConfigError
from refimpl.inputs import load_input
from refimpl.methods import CATALOG, parameters
from refimpl.methods.dense import Dense
from refimpl.methods.programs import PROGRAMS
from refimpl.model import Prepared, Runner
from refimpl.parameters import PARAMETERS
from refimpl.parameters.composition import members
from refimpl.preparation.checksum import checksum
from refimpl.weights import load_model

from . import machines, render
from .context import cache_root
from .files import OutputError, write_text
from .progress import Progress
from .request import Request, resolve


def prepare(
    input_file: str | Path,
    model: str | Path | ModelConfig | None = None,
    method: str = "kvsharer",
    params: Mapping[str, Any] | None = None,
    *,
    seq: int | None = None,
    overrides: Mapping[str, int | None] | None = None,
    dtype: str = "float32",
    seed: int = 0,
    device: str | None = None,
    engine: str | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Find what a method needs before it runs: which layers share, which heads are alike.

    Parameters
    ----------
    input_file : str or Path
        Text, recording or array to find it on.
    model, overrides, dtype, device, engine, threads
        As for `effref.measure`.
    method : str
    params : mapping, optional
        Its parameters, as ``{"layers": 8}``.
    seq : int, optional
        Positions of the input that are used; default all.
    seed : int
        Of random weights.

    Returns
    -------
    document : dict
        What ``effref prepare --output FILE`` writes, and the method's parameter reads.

    Raises
    ------
    ConfigError, InputError
        Unknown names, values that are not allowed, inputs that do not fit; a method that finds nothing beforehand.
    """
    request = request_for(
        model, method, params, overrides=overrides, dtype=dtype, device=device, engine=engine, threads=threads
    )
    return found(request, Path(input_file), seq, seed, Progress())


def request_for(
    model: str | Path | ModelConfig | None, method: str, params: Mapping[str, Any] | None, **given: Any
) -> Request:
    """What is asked for, checked; ConfigError for a method that finds nothing beforehand."""
    if "+" in method:
        raise ConfigError(f"'{method}' names several methods: prepare them one by one, and give each what was found")
    able = [name for name, kind in PARAMETERS.items() if hasattr(kind, "to_document")]
    if method in CATALOG and method not in able:
        raise ConfigError(f"method '{method}' finds nothing before it runs; these do: {', '.join(able)}")
    return resolve(model, seq=1, method=method, params={method: params or {}}, **given)


def found(request: Request, input_file: Path, seq: int | None, seed: int, progress: Progress) -> dict[str, Any]:
    """The document that the request's method finds on a file."""
    (method,) = request.methods
    engine = machines.started(request.engine, request.threads, progress)
    with machines.limited(request.engine, request.threads):
        progress.stage(f"loading {request.config.name}")
        model = load_model(request.model, seed=seed, dtype=request.dtype)
        progress.note(f"{model.config.name}: {model.source}")
        inputs = load_input(model, input_file, seq)
        for note in inputs.notes:
            progress.note(note)
        _, document = prepared(Runner(model, engine), method, request.params[method], inputs.array, progress)
    if document is None:
        raise ConfigError(f"with these parameters of {method} nothing is left to find")
    return document


def prepared(
    runner: Runner,
    method: str,
    params: Mapping[str, Any] | None,
    inputs: Array,
    progress: Progress,
    causal: bool | None = None,
) -> tuple[Prepared, dict[str, Any] | None]:
    """`Runner.prepare`, by what was found before on the same weights, inputs and parameters where there is such.

    Returns
    -------
    ready : Prepared
    document : dict or None
        What was found; None where nothing had to be.
    """
    if len(members(method)) > 1:
        return _prepared_together(runner, method, params, inputs, progress, causal), None
    given = parameters(method, params, runner.config)
    place = _place(runner, method, given, inputs, causal)
    if place is not None and place.is_file():
        try:
            ready = runner.prepare(method, {**(params or {}), given.FILE: str(place)})
        except ConfigError as error:
            progress.line(f"{error}: it is found anew")
        else:
            document = ready.parameters.to_document()
            progress.note(f"{method} was prepared before, in {document.get('prepared_s')} s")
            progress.line(f"read from {place}")
            return ready, document
    return _prepared_now(runner, method, params, inputs, place, progress, causal)


def looks_first(method: str) -> bool:
    """Whether a method, or one of several, finds something before it runs."""
    return any(PROGRAMS[one].complete.__func__ is not Dense.complete.__func__ for one in members(method))  # type: ignore[attr-defined]


def _prepared_together(
    runner: Runner, method: str, params: Mapping[str, Any] | None, inputs: Array, progress: Progress,
    causal: bool | None,
) -> Prepared:  # fmt: skip
    """Every member finds, and keeps, what it would alone."""
    alone, found = Runner(runner.model, runner.engine), dict(params or {})  # what is made of it for one goes with it
    parameters(method, params, runner.config)  # refuses what cannot be combined before any search
    for name in members(method):
        if looks_first(name):
            found[name] = prepared(alone, name, found.get(name), inputs, progress, causal)[0].parameters
    return runner.prepare(method, found, inputs, progress.advance, causal)


def _prepared_now(
    runner: Runner,
    method: str,
    params: Mapping[str, Any] | None,
    inputs: Array,
    place: Path | None,
    progress: Progress,
    causal: bool | None = None,
) -> tuple[Prepared, dict[str, Any] | None]:
    if hasattr(PARAMETERS[method], "to_document"):  # something has to be found
        progress.stage(f"preparing {method}")
    start = time.perf_counter()
    ready = runner.prepare(method, params, inputs, progress.advance, causal)
    spent = round(time.perf_counter() - start, 3)
    note = getattr(ready.parameters, "announcement", None)
    if note and ready.parameters != parameters(method, params, runner.config):
        progress.note(f"{note()} ({spent} s, which counts for no pass)")
    if not hasattr(ready.parameters, "to_document") or ready.parameters == parameters(method, params, runner.config):
        return ready, None
    document = {**ready.parameters.to_document(), "prepared_s": spent}
    progress.note(f"{method} was prepared in {spent} s, which counts for no pass")
    if place is not None:
        _keep(place, document, progress)
    return ready, document


def _place(runner: Runner, method: str, given: Any, inputs: Array, causal: bool | None) -> Path | None:
    """The file in the user's cache; None where nothing is kept, or nothing has to be found."""
    file = getattr(given, "FILE", None)
    if file is None or getattr(given, file) is not None:
        return None
    passes = (runner.config.causal if causal is None else causal,) if getattr(given, "PER_CAUSALITY", False) else ()
    if hasattr(given, "found_in"):  # in less than everything
        weights, of_inputs, *settings = given.found_in(runner.model.weights, inputs)
        key = checksum(weights, of_inputs, *settings, *passes)
    else:
        key = checksum(runner.model.weights, inputs, runner.config, given, runner.engine.name, *passes)
    return cache_root() / "prepared" / f"{method}-{key[:16]}.json"


def _keep(place: Path, document: Mapping[str, Any], progress: Progress) -> None:
    """Write the document whole or not at all; a cache that cannot be written to is no reason to fail."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_text(place, render.as_json(document))
        progress.line(f"kept in {place}")
    except (OutputError, OSError) as error:
        progress.line(f"not kept for the next time: {error}")
