"""What is asked for, resolved and checked: the inputs that estimate and measure share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import costmodel
from costmodel.closed_form import Estimate
from refimpl.config import PHASES, ModelConfig, Workload, override, preset
from refimpl.engines import ENGINES
from refimpl.errors import ConfigError, UnsupportedError, unknown
from refimpl.methods import CATALOG
from refimpl.methods import method as method_row
from refimpl.parameters.composition import as_dict, canonical, members
from refimpl.weights import resolve_config

from .context import cores

BASELINES = ("dense", "flash")  # both exact
METHODS = ("dense", "flash", "reuse")
LENGTHS = (256, 512, 1024, 2048)
KV_LENGTHS = (256, 1024)
DECODER = "smollm2-135m"
DEFAULT_ENGINE = {"cpu": "numba", "gpu": "cupy"}
TF32 = "cupy-tf32"


@dataclass(frozen=True)
class Request:
    """A model, methods and lengths, on an engine.

    Attributes
    ----------
    model : str, Path or ModelConfig
        What ``refimpl.load_model`` takes; a ModelConfig where sizes were overridden.
    config : ModelConfig
    lengths, methods : tuple
        Lengths are T of a prefill, or in decoding the positions S that the cache holds before the first step.
    params : dict
        Method -> its parameters as given; a combination takes those of its members.
    steps : int
        Tokens of a decoding pass, one after the other; chunks of a streaming model.
    """

    model: str | Path | ModelConfig
    config: ModelConfig
    lengths: tuple[int, ...]
    methods: tuple[str, ...]
    params: Mapping[str, Mapping[str, Any]]
    batch: int
    dtype: str
    phase: str
    causal: bool | None
    device: str
    engine: str
    threads: int
    steps: int = 1

    @property
    def decodes(self) -> bool:
        """Whether a pass continues sequences whose keys and values are cached."""
        return self.phase == "decode"

    @property
    def all_methods(self) -> tuple[str, ...]:
        """The methods named, and the baselines that they are compared with."""
        return tuple(dict.fromkeys((*self.methods, *BASELINES)))

    def check_recorded(self) -> None:
        """Raise ConfigError or UnsupportedError where no pass of these can be a recorded one."""
        check_records(self.device, self.engine, self.decodes)
        if self.steps > 1 or self.config.streams:
            raise ConfigError("--graph replays one pass: give --steps 1 and a model that does not stream")
        if self.device != "gpu":
            self._check_instructions()

    def _check_instructions(self) -> None:
        """Raise UnsupportedError for a method with an op that no step on the CPU has."""
        from refimpl.engines.recorded_step import StepRecorder

        recorder = StepRecorder(self.lengths[0])
        for name in self.methods:
            for op in self.estimate(name, self.lengths[0]).ops:
                try:
                    getattr(recorder, op.name)
                except UnsupportedError as error:
                    raise UnsupportedError(f"{name}: {error}") from error

    def baselines(self, only: str | None) -> list[str]:
        """The baselines whose ratios are shown; a method is not compared with itself alone."""
        shown = [only] if only else list(BASELINES)
        return [name for name in shown if self.methods != (name,)]

    def workload(self, length: int) -> Workload:
        """What a pass does at a length; the prefill of a language model fills its cache."""
        if self.decodes:
            new = self.step_positions
            return Workload(new, self.batch, self.phase, self.causal, self.dtype, kv_len=length, steps=self.steps)
        fills = self.config.generates and self.causal is not False
        return Workload(length, self.batch, self.phase, self.causal, self.dtype, fills_cache=fills)

    @property
    def step_positions(self) -> int:
        """New positions of a decoding step: a token, or a chunk of a streaming model."""
        return self.config.chunk or 1

    def positions(self, length: int) -> int:
        """Positions that a sequence has at the end of a pass."""
        return length + self.steps * self.step_positions if self.decodes else length

    def estimate(self, method: str, length: int, parameters: Any = None) -> Estimate:
        """What a method costs at a length, under these parameters instead of the given ones."""
        return costmodel.estimate(method, self.config, self.workload(length), parameters or self.params_of(method))

    def params_of(self, method: str) -> Mapping[str, Any] | None:
        """The parameters given for a method; for several combined, by method."""
        return params_of(method, self.params)

    def as_config(self) -> dict[str, Any]:
        """Every resolved input, for the ``config`` of a result."""
        return {
            "model": asdict(self.config),
            "seq": [self.step_positions] if self.decodes else list(self.lengths),
            **({"kv_len": list(self.lengths), "steps": self.steps} if self.decodes else {}),
            "method": list(self.methods),
            "params": {name: as_dict(self.estimate(name, self.lengths[0]).parameters) for name in self.methods},
            "batch": self.batch,
            "dtype": self.dtype,
            "phase": self.phase,
            "causal": self.config.causal if self.causal is None else self.causal,
            "device": self.device,
            "engine": self.engine,
            **({"tf32": self.engine == TF32} if self.device == "gpu" else {}),
            "threads": self.threads,
        }


def resolve(
    model: str | Path | ModelConfig | None = None,
    seq: int | Sequence[int] | None = None,
    method: str | Sequence[str] = METHODS,
    params: Mapping[str, Mapping[str, Any]] | None = None,
    *,
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
) -> Request:
    """Fill in the defaults and check everything that can be checked without running.

    Raises
    ------
    ConfigError
        If a name is unknown, or a value is outside what is allowed.
    """
    methods = _methods(method)
    config = resolve_config(default_model(methods, phase) if model is None else model)
    changed = override(config, **dict(overrides or {}))
    device, engine = device_and_engine(device, engine)
    check_dtype(engine, dtype)
    if threads is not None and threads < 1:
        raise ConfigError(f"threads is {threads}; it must be at least 1")
    request = Request(
        model=changed if changed is not config else (model or config.name),
        config=changed,
        lengths=_lengths(phase, seq, kv_len, steps, changed),
        methods=methods,
        params=check_params(params or {}, methods),
        batch=batch,
        dtype=dtype,
        phase=phase,
        causal=causal,
        device=device,
        engine=engine,
        threads=threads or cores(),
        steps=steps or 1,
    )
    for name in methods:  # parameters and workload are checked here
        request.estimate(name, request.lengths[0])
    return request


def _methods(given: str | Sequence[str]) -> tuple[str, ...]:
    names = [given] if isinstance(given, str) else given
    if not names:
        raise ConfigError(f"no method given; known: {', '.join(CATALOG)}")
    return tuple(dict.fromkeys(canonical(name) for name in names))


def default_model(methods: tuple[str, ...], phase: str) -> str:
    """The example model of the first method that is not a baseline; one that can decode where that is asked for."""
    model = method_row(next((name for name in methods if name not in BASELINES), methods[0])).model
    decodes = preset(model).generates or preset(model).streams
    return DECODER if phase == "decode" and not decodes else model


def _lengths(
    phase: str,
    seq: int | Sequence[int] | None,
    kv_len: int | Sequence[int] | None,
    steps: int | None,
    config: ModelConfig,
) -> tuple[int, ...]:
    """The lengths of a prefill, or those of the cache in decoding; the options of the other phase are refused."""
    if phase not in PHASES:
        raise unknown("phase", phase, PHASES)
    if phase == "decode":
        if seq is not None:
            step = f"a chunk of {config.chunk} positions" if config.streams else "one token"
            raise ConfigError(f"decoding takes {step} a step: give --kv-len for the cached positions, not --seq")
        own = (config.left_context,) if config.streams else KV_LENGTHS
        return _rising("kv_len", own if kv_len is None else kv_len)
    if kv_len is not None or steps is not None:
        raise ConfigError("--kv-len and --steps belong to decoding: add --phase decode, or give --seq")
    return _rising("seq", LENGTHS if seq is None else seq)


def _rising(name: str, given: int | Sequence[int]) -> tuple[int, ...]:
    lengths = tuple(sorted({int(length) for length in ([given] if isinstance(given, int) else given)}))
    if not lengths or lengths[0] < 1:
        raise ConfigError(f"{name} is {lengths[0] if lengths else 'empty'}; every length must be at least 1")
    return lengths


def check_params(given: Mapping[str, Mapping[str, Any]], methods: tuple[str, ...]) -> Mapping[str, Mapping[str, Any]]:
    """Raise ConfigError for parameters of a method that is not asked for."""
    asked_for = {one for name in methods for one in members(name)}
    for name in given:
        if name not in CATALOG:
            raise unknown("method", name, CATALOG)
        if name not in asked_for:
            raise ConfigError(
                f"parameters are given for '{name}', which is not among the methods: {', '.join(methods)}"
            )
    return given


def params_of(method: str, given: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """What is given for a method: its parameters; for several combined, those of each by its name."""
    names = members(method)
    return given.get(names[0]) if len(names) == 1 else {name: given[name] for name in names if name in given}


def check_records(device: str, engine: str, decodes: bool) -> None:
    """Raise ConfigError where an engine records no pass of this kind."""
    if device != "gpu" and not (decodes and engine == "numba"):
        raise ConfigError(
            "--graph is for GPUs and, on the CPU, for decoding with the engine 'numba': add --device gpu, take the "
            "phase 'decode', or leave it away"
        )


def check_dtype(engine: str, dtype: str) -> None:
    """Raise ConfigError where an engine is not for this dtype."""
    if engine == TF32 and dtype != "float32":
        raise ConfigError(f"TF32 is a way to multiply float32, but the dtype is {dtype}: leave one of them away")


def device_and_engine(device: str | None, engine: str | None) -> tuple[str, str]:
    """Both, where one decides the other; raises ConfigError where they disagree."""
    if engine is not None and engine not in ENGINES:
        raise unknown("engine", engine, ENGINES)
    if device is not None and device not in DEFAULT_ENGINE:
        raise unknown("device", device, DEFAULT_ENGINE)
    if engine is None:
        device = device or "cpu"
        return device, DEFAULT_ENGINE[device]
    own = ENGINES[engine][2]
    if device not in (None, own):
        raise ConfigError(f"engine '{engine}' runs on the {own}, but the device is '{device}': leave one of them away")
    return own, engine
