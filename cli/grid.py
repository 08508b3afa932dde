"""A design space as a TOML file: the axes of a sweep, and the blocks of points that they span."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from refimpl.config import DTYPES, LARGEST, PHASES
from refimpl.errors import ConfigError, unknown
from refimpl.methods import CATALOG
from refimpl.parameters import PARAMETERS
from refimpl.weights import resolve_config

from .parsing import parse_lengths
from .request import KV_LENGTHS, LENGTHS, METHODS, default_model

TABLES = ("model", "workload", "method", "hardware")
SIZES = ("layers", "d_model", "heads", "kv_heads", "d_ff", "vocab")
WORKLOAD = ("seq", "kv_len", "batch", "phase", "dtype", "steps", "causal")
EXAMPLE = """\
# Axes are lists; every combination is a point. A line left out is the default of the other commands.
[model]
name = "conformer-m"
layers = [8, 16]

[workload]
seq = "2^10:2^12"
batch = [1, 4]

[method.dense]
[method.flash]
[method.reuse]
group = [2, 4]

[hardware]
name = ["xeon-8480", "h100-sxm"]
"""
MOST_VALUES = 10_000_000  # of one axis, and designs of a grid: they are kept in memory, the points are not


@dataclass(frozen=True)
class Work:
    """What one pass does, apart from lengths and batch."""

    phase: str = "prefill"
    dtype: str = "float32"
    steps: int | None = None
    causal: bool | None = None


@dataclass(frozen=True)
class Block:
    """The points that share everything but hardware, batch and length, in this order.

    Attributes
    ----------
    first : int
        Number of its first point in the grid.
    lengths : tuple of int
        T of a prefill; None where a streaming model is to take its own left context in decoding.
    """

    first: int
    model: str
    sizes: Mapping[str, int]
    work: Work
    method: str
    params: Mapping[str, Any]
    hardware: tuple[str | None, ...]
    batches: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def workloads(self) -> int:
        """Pairs of batch and length."""
        return len(self.batches) * len(self.lengths)

    @property
    def size(self) -> int:
        return len(self.hardware) * self.workloads

    def workload(self, index: int) -> tuple[int, int]:
        """Batch and length of a pair."""
        batch, length = divmod(index, len(self.lengths))
        return self.batches[batch], self.lengths[length]


@dataclass(frozen=True)
class Grid:
    """The axes of a design space; see `read`.

    Attributes
    ----------
    sizes : mapping
        Override -> its values.
    designs : tuple of (str, mapping)
        Methods, each with one choice of its parameters.
    seq, kv_len : tuple of int
        Lengths of a prefill, and cached positions in decoding.
    """

    models: tuple[str, ...]
    sizes: Mapping[str, tuple[int, ...]]
    phases: tuple[str, ...]
    dtypes: tuple[str, ...]
    steps: tuple[int | None, ...]
    causal: tuple[bool | None, ...]
    designs: tuple[tuple[str, Mapping[str, Any]], ...]
    hardware: tuple[str | None, ...]
    batches: tuple[int, ...]
    seq: tuple[int, ...]
    kv_len: tuple[int, ...] | None

    @cached_property
    def works(self) -> tuple[Work, ...]:
        """Every phase with its dtypes, steps and masks."""
        return tuple(
            Work(phase, dtype, steps, causal)
            for phase in self.phases
            for dtype in self.dtypes
            for steps in (self.steps if phase == "decode" else (None,))
            for causal in self.causal
        )

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(method for method, _ in self.designs))

    @cached_property
    def size(self) -> int:
        """Points."""
        overrides = math.prod(map(len, self.sizes.values()))
        each = len(self.designs) * len(self.hardware) * len(self.batches) * overrides
        return each * sum(len(self.lengths(model, work)) for model in self.models for work in self.works)

    @cached_property
    def evaluations(self) -> int:
        """Designs, works and machines that are evaluated one after another."""
        overrides = math.prod(map(len, self.sizes.values()))
        return len(self.models) * overrides * len(self.works) * len(self.designs) * len(self.hardware)

    def lengths(self, model: str, work: Work) -> tuple[int, ...]:
        """Those of a phase."""
        if work.phase == "prefill":
            return self.seq
        if self.kv_len is not None:
            return self.kv_len
        config = resolve_config(model)
        return (config.left_context,) if config.streams else KV_LENGTHS

    def blocks(self) -> Iterator[Block]:
        """All points, block by block."""
        first = 0
        for model in self.models:
            for values in itertools.product(*self.sizes.values()):
                sizes = dict(zip(self.sizes, values, strict=True))
                for work in self.works:
                    for method, params in self.designs:
                        lengths = self.lengths(model, work)
                        block = Block(first, model, sizes, work, method, params, self.hardware, self.batches, lengths)
                        yield block
                        first += block.size

    def checksum(self, **run: Any) -> str:
        """The same for the same axes and options of a run, however the file was written."""
        text = json.dumps([asdict(self), run], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


def read(path: Path) -> Grid:
    """The grid of a TOML file.

    Raises
    ------
    ConfigError
        If the file is no TOML, or a table, key or value of it is not allowed.
    """
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the grid {path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not a TOML file: it is not UTF-8 text, or nested too deeply") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not a TOML file: {error}") from error
    return from_table(table)


def from_table(table: Mapping[str, Any]) -> Grid:
    """The grid that nested mappings describe as a file does; see `read`."""
    for name, part in table.items():
        if name not in TABLES:
            raise unknown("table of a grid", name, TABLES)
        if not isinstance(part, Mapping):
            raise ConfigError(f"{name} = {_shown(part)}; it must be a table, as [{name}] with a line for each axis")
    model, workload = _model(table.get("model", {})), _keyed("workload", table.get("workload", {}), WORKLOAD)
    hardware = _keyed("hardware", table.get("hardware", {}), ("name",))
    designs = _designs(table.get("method", {}))
    phases = _names("[workload] phase", workload.get("phase", "prefill"), "phase", PHASES)
    _check_lengths(workload, phases)
    decodes = "decode" in phases
    return Grid(
        models=model.pop("name", None) or (default_model(tuple(name for name, _ in designs), phases[-1]),),
        sizes=model,
        phases=phases,
        dtypes=_names("[workload] dtype", workload.get("dtype", "float32"), "dtype", DTYPES),
        steps=_whole("[workload] steps", workload["steps"]) if decodes and "steps" in workload else (None,),
        causal=_booleans("[workload] causal", workload["causal"]) if "causal" in workload else (None,),
        designs=designs,
        hardware=_texts("[hardware] name", hardware["name"]) if "name" in hardware else (None,),
        batches=_whole("[workload] batch", workload.get("batch", 1)),
        seq=tuple(sorted(_whole("[workload] seq", workload.get("seq", list(LENGTHS))))),
        kv_len=tuple(sorted(_whole("[workload] kv_len", workload["kv_len"]))) if "kv_len" in workload else None,
    )


# --- tables ---------------------------------------------------------------------------------------------------------


def _keyed(name: str, table: Mapping[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """A table whose keys are these, with - or _ in them."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        plain = key.replace("-", "_")
        if plain not in known:
            raise unknown(f"key of [{name}]", key, known)
        if plain in found:
            raise ConfigError(f"[{name}] {key} is given twice: once with - and once with _")
        found[plain] = value
    return found


def _model(table: Mapping[str, Any]) -> dict[str, Any]:
    given = _keyed("model", table, ("name", *SIZES))
    found: dict[str, Any] = {
        key: _whole(f"[model] {key}", given[key]) for key in SIZES if key in given
    }  # in the order of SIZES
    if "name" in given:
        found["name"] = _texts("[model] name", given["name"])
        for name in found["name"]:
            resolve_config(name)
    return found


def _designs(table: Mapping[str, Any]) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    """Each method with every choice of its parameters."""
    found: list[tuple[str, Mapping[str, Any]]] = []
    for method, params in (table or {name: {} for name in METHODS}).items():
        if method not in CATALOG:
            raise unknown("method", method, CATALOG)
        if not isinstance(params, Mapping):
            axes = f"[method.{method}] with a line for each axis"
            raise ConfigError(f"[method] {method} = {_shown(params)}; it must be a table, {axes}")
        known = [field.name for field in fields(PARAMETERS[method])]
        choices: dict[str, tuple[Any, ...]] = {}
        for key, value in params.items():
            if key not in known:
                if not known:
                    raise ConfigError(f"method '{method}' has no parameters; '{key}' was given")
                raise unknown(f"parameter of {method}", key, known)
            choices[key] = _different(_values(f"[method.{method}] {key}", value))
        _check_count(f"[method.{method}]", math.prod(map(len, choices.values())))
        found += [(method, dict(zip(choices, values, strict=True))) for values in itertools.product(*choices.values())]
    return tuple(found)


def _check_lengths(workload: Mapping[str, Any], phases: Sequence[str]) -> None:
    """Raise ConfigError for the keys of a phase that is not asked for."""
    if "decode" not in phases and {"kv_len", "steps"} & set(workload):
        raise ConfigError('[workload] kv_len and steps belong to decoding: add phase = "decode", or give seq')
    if "prefill" not in phases and "seq" in workload:
        raise ConfigError("[workload] seq belongs to a prefill; decoding takes kv_len for the cached positions")


# --- axes -----------------------------------------------------------------------------------------------------------


def _values(where: str, given: Any) -> list[Any]:
    """A list as it is, a single value as a list of one."""
    values = given if isinstance(given, list | tuple) else [given]
    if not values:
        raise ConfigError(f"{where} is an empty list: give at least one value, or leave the line out")
    return list(values)


def _different(values: Sequence[Any]) -> tuple[Any, ...]:
    """Each value once, in order; 1, 1.0 and true are three."""
    return tuple({json.dumps(value, default=str): value for value in values}.values())


def _whole(where: str, given: Any) -> tuple[int, ...]:
    """Whole numbers from 1: numbers, "2^8:2^14", and { from, to, step }."""
    found: list[int] = []
    for value in _values(where, given):
        if isinstance(value, str):
            found += _named_length(where, value)
        elif isinstance(value, Mapping):
            found += _range(where, value)
        elif isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST:
            found.append(value)
        else:
            raise ConfigError(
                f'{where} = {_shown(value)}; it must be a whole number from 1 to 2^40, a text as "2^8:2^14", or '
                "{ from = 128, to = 1024, step = 128 }"
            )
    return tuple(dict.fromkeys(found))


def _named_length(where: str, text: str) -> tuple[int, ...]:
    try:
        return parse_lengths(text)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _range(where: str, given: Mapping[str, Any]) -> range:
    """From, over as many steps as fit, to at most the end."""
    names = ("from", "to", "step")
    for name in given:
        if name not in names:
            raise unknown(f"key of a range in {where}", name, names)
    numbers = [given.get(name, 1 if name == "step" else None) for name in names]
    if not all(isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= LARGEST for n in numbers):
        raise ConfigError(f"{where} = {_shown(given)}; from, to and step must be whole numbers from 1 to 2^40")
    first, last, step = numbers
    if first > last:
        raise ConfigError(f"{where} = {_shown(given)}; it ends before it begins")
    _check_count(where, (last - first) // step + 1)
    return range(first, last + 1, step)


def _check_count(where: str, count: int) -> None:
    if count > MOST_VALUES:
        raise ConfigError(f"{where} has {count} values; at most {MOST_VALUES} are allowed: take larger steps")


def _texts(where: str, given: Any) -> tuple[str, ...]:
    return _checked(where, given, lambda value: isinstance(value, str) and bool(value.strip()), "a name in quotes")


def _booleans(where: str, given: Any) -> tuple[bool, ...]:
    return _checked(where, given, lambda value: isinstance(value, bool), "true or false")


def _names(where: str, given: Any, kind: str, known: Sequence[str] | Mapping[str, Any]) -> tuple[str, ...]:
    names = _texts(where, given)
    for name in names:
        if name not in known:
            raise unknown(kind, name, known)
    return names


def _checked(where: str, given: Any, is_right: Callable[[Any], bool], allowed: str) -> tuple[Any, ...]:
    for value in (values := _values(where, given)):
        if not is_right(value):
            raise ConfigError(f"{where} = {_shown(value)}; it must be {allowed}, or a list of such")
    return _different(values)


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
