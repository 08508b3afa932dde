"""What a machine can do: spec-sheet presets, and profiles that ``effref calibrate`` fitted on a real one."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from refimpl.errors import ConfigError, unknown

PROFILE_SCHEMA = 2  # 1 knew no streamed bytes


@dataclass(frozen=True)
class MemoryLevel:
    """One level of the memory, of the whole chip."""

    level: str
    size_bytes: float
    bandwidth_bytes_per_s: float


@dataclass(frozen=True)
class OpModel:
    """Seconds of one call of an op on a calibrated machine; the form is `costmodel.predict.seconds_of_call`.

    Attributes
    ----------
    overhead_s : float
        What a call of no size takes.
    matmul_flops_per_s, vector_flops_per_s : float
        Saturated rates.
    half : mapping
        Size name -> the length at which half of the matrix rate is reached (Hockney's n 1/2).
    near_bytes_per_s, far_bytes_per_s : float
        Bandwidth for a working set well inside, and well outside, `cache_bytes`.
    overlaps : bool
        Whether the overhead passes while earlier work is still done, as launches of a GPU do.
    """

    overhead_s: float
    matmul_flops_per_s: float
    vector_flops_per_s: float
    half: Mapping[str, float]
    near_bytes_per_s: float
    far_bytes_per_s: float
    cache_bytes: float
    overlaps: bool = False


@dataclass(frozen=True)
class RecordedModel:
    """Seconds of a recorded pass, a CUDA graph or a decoding step in one compiled call, on a calibrated machine.

    ``start_s + sum over calls of (call_s + work * max(compute, memory))``

    Attributes
    ----------
    start_s : float
        What starting the pass takes.
    call_s : float
        What a call of an op takes beside its work.
    work : float
        The work of a call / that of the same call in an ordinary pass.
    """

    start_s: float
    call_s: float
    work: float


@dataclass(frozen=True)
class Band:
    """How far measurements lay from predictions on shapes that were held out: ratios measured / predicted."""

    low: float  # 10th percentile
    high: float  # 90th percentile


@dataclass(frozen=True)
class Hardware:
    """A machine.

    Attributes
    ----------
    level : {"spec", "calibrated"}
        Spec-sheet peaks give lower bounds; a calibrated profile gives forecasts.
    matmul_flops_per_s, vector_flops_per_s : mapping
        dtype -> dense peak; measured sustained rates in a profile.
    memory : tuple of MemoryLevel
        From the fastest level outward.
    ops : mapping
        kind of op (`costmodel.predict.kind_of`) -> OpModel; empty for a preset.
    recorded : RecordedModel, optional
        Of recorded passes, where the engine has them.
    bands : mapping
        kind of op -> Band, "total" for whole passes and "recorded" for recorded ones.
    about : mapping
        What a profile was fitted on: engine, device, threads, dtype, host, date, samples, residuals.
    """

    name: str
    title: str
    kind: Literal["cpu", "gpu"]
    level: Literal["spec", "calibrated"]
    source: str
    capacity_bytes: float
    matmul_flops_per_s: Mapping[str, float]
    vector_flops_per_s: Mapping[str, float]
    memory: tuple[MemoryLevel, ...]
    cores: int = 0
    energy: Mapping[str, Any] = field(default_factory=dict)
    ops: Mapping[str, OpModel] = field(default_factory=dict)
    recorded: RecordedModel | None = None
    bands: Mapping[str, Band] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The profile as text; `from_json` reads it back."""
        return json.dumps({"profile_schema": PROFILE_SCHEMA, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str, where: str = "profile") -> Hardware:
        """Read a profile.

        Raises
        ------
        ConfigError
            If the text is not a profile of this version.
        """
        try:
            given = json.loads(text)
            if given.pop("profile_schema") != PROFILE_SCHEMA:
                raise ConfigError(f"{where}: written by another version of effref; run 'effref calibrate' again")
            given["memory"] = tuple(MemoryLevel(**level) for level in given["memory"])
            given["ops"] = {name: OpModel(**model) for name, model in given["ops"].items()}
            if given.get("recorded") is not None:
                given["recorded"] = RecordedModel(**given["recorded"])
            given["bands"] = {name: Band(**band) for name, band in given["bands"].items()}
            return cls(**given)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"{where}: not a hardware profile ({error}); run 'effref calibrate' to make one"
            ) from error


@cache
def presets() -> dict[str, Hardware]:
    """Spec-sheet presets by name, from ``hardware.toml``."""
    table = tomllib.loads(Path(__file__).with_name("hardware.toml").read_text("utf-8"))
    return {name: _preset(name, entry) for name, entry in table.items()}


def _preset(name: str, entry: Mapping[str, Any]) -> Hardware:
    keys = ("level", "size_bytes", "bandwidth_bytes_per_s")
    return Hardware(
        name=name,
        title=entry["title"],
        kind=entry["kind"],
        level="spec",
        source=f"{entry['sku']}, {entry['date']}; {entry['sources'][0]['url']}",
        capacity_bytes=entry["capacity_bytes"],
        matmul_flops_per_s=entry["matmul_flops_per_s"],
        vector_flops_per_s=entry["vector_flops_per_s"],
        memory=tuple(MemoryLevel(**{key: level[key] for key in keys}) for level in entry["memory"]),
        cores=entry["cores"],
        energy=entry.get("energy", {}),
    )


def load_hardware(name_or_path: str) -> Hardware:
    """A preset by name, or a profile from a JSON file.

    Raises
    ------
    ConfigError
        If there is no such preset or file, or the file is not a profile.
    """
    if name_or_path in presets():
        return presets()[name_or_path]
    path = Path(name_or_path)
    if path.suffix == ".json" or path.is_file():
        try:
            return Hardware.from_json(path.read_text("utf-8"), str(path))
        except OSError as error:
            raise ConfigError(f"cannot read the profile {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{path}: not a hardware profile ({error}); run 'effref calibrate' to make one"
            ) from error
    raise unknown("hardware", name_or_path, [*presets(), "local"])
