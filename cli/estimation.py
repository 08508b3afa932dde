"""Predicted cost of methods at lengths; no kernel is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from costmodel.hardware import Hardware
from costmodel.predict import predict
from refimpl.config import ModelConfig

from . import machines, results
from .progress import Progress
from .request import METHODS, Request, resolve

if TYPE_CHECKING:
    from costmodel.energy import EnergyModel


def estimate(
    model: str | Path | ModelConfig | None = None,
    seq: int | Sequence[int] | None = None,
    method: str | Sequence[str] = METHODS,
    params: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    hardware: str | Hardware | None = None,
    overrides: Mapping[str, int | None] | None = None,
    batch: int = 1,
    dtype: str = "float32",
    phase: str = "prefill",
    kv_len: int | Sequence[int] | None = None,
    steps: int | None = None,
    causal: bool | None = None,
    device: str | None = None,
    engine: str | None = None,
    threads: int | None = None,
    energy: str | None = None,
    graph: bool = False,
) -> dict[str, Any]:
    """FLOPs, bytes, memory and seconds in closed form.

    Parameters
    ----------
    model : str, Path or ModelConfig, optional
        Preset name, checkpoint folder, ``config.json`` or a shape. Default: the example model of the first method that
        is not exact.
    seq, method : int or str, or sequences of them
        Lengths T, and names of the catalogue. ``dense`` and ``flash`` are computed in any case, for the speed-ups.
    params : mapping, optional
        Method -> its parameters, as ``{"reuse": {"group": 4}}``.
    hardware : str or Hardware, optional
        Preset, profile file or ``"local"``. Default: this machine's profile, else its nearest preset.
    overrides : mapping, optional
        Sizes that replace the model's: layers, d_model, heads, kv_heads, d_ff, vocab.
    batch, dtype, phase, causal
        See ``refimpl.Workload``.
    kv_len, steps : int or sequence of int; int
        In phase "decode": positions in the cache (default 256 and 1024), and tokens of one pass (default 1).
    device, engine, threads
        Which profile of this machine to take.
    energy : str, optional
        Name of an energy model (`costmodel.energy.energy_models`): adds joules, and watts where the input has a
        duration.
    graph : bool
        Seconds of recorded passes: CUDA graphs, or on the CPU decoding steps in one compiled call.

    Returns
    -------
    result : dict
        The schema of ``effref estimate --format json``; seconds, bytes and FLOPs.

    Raises
    ------
    ConfigError, UnsupportedError
        Unknown names or values that are not allowed; hardware without a peak for the dtype.

    Examples
    --------
    >>> import effref
    >>> result = effref.estimate(seq=4096, method="reuse", hardware="xeon-8480")
    >>> result["results"][0]["total"]["matmul_flops"]
    611408805888
    """
    from .context import context

    named = machines.find(hardware)
    request = resolve(
        model, seq, method, params, overrides=overrides, batch=batch, dtype=dtype, phase=phase, kv_len=kv_len,
        steps=steps, causal=causal, device=device or default_device(named, engine), engine=engine, threads=threads,
    )  # fmt: skip
    document = estimated(request, named or hardware, Progress(), energy, graph)
    return {**document, "context": context(request.threads)}


def default_device(named: Hardware | None, engine: str | None) -> str | None:
    """The kind of the hardware that is named, where neither device nor engine is."""
    return named.kind if named and engine is None else None


def estimated(
    request: Request, hardware: str | Hardware | None, progress: Progress, energy: str | None = None,
    graph: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The result without its context."""
    if graph:
        request.check_recorded()
    joules = None if energy is None else _energy_model(energy)
    machine = machines.choose(hardware, request.engine, request.threads, request.dtype, progress)
    if graph and machine.level == "spec":
        progress.note("a spec sheet knows no overheads: its bound is also that of ordinary passes")
    found = []
    for length in request.lengths:
        predictions = {
            name: predict(request.estimate(name, length), machine, recorded=graph) for name in request.all_methods
        }
        seconds = {name: float(prediction.total.seconds) for name, prediction in predictions.items()}
        for name in request.methods:
            result = results.entry(request, name, predictions[name])
            result["speedup"] = results.speedups(seconds, {}, name)
            if joules:
                results.add_energy(result, predictions, joules)
            found.append(result)
    document = results.document(request, machine, found, progress.notes)
    document["config"]["graph"] = graph
    return {**document, "energy_model": asdict(joules)} if joules else document


def _energy_model(name: str) -> EnergyModel:
    from costmodel.energy import energy_model

    return energy_model(name)
