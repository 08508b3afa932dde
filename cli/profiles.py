"""Where the calibrated profile of this machine lives."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from costmodel.hardware import Hardware
from refimpl.engines import ENGINES
from refimpl.errors import ConfigError

from .context import cache_root, cpu_name, gpu_name, slug
from .files import OutputError, write_text


def path(engine: str, threads: int, dtype: str) -> Path:
    """The file of the profile for this engine, thread count and dtype on this machine."""
    if ENGINES[engine][2] == "gpu":
        parts = [slug(gpu_name() or "gpu"), engine, dtype]
    else:
        parts = [slug(cpu_name()), engine, f"{threads}t", dtype]
    return cache_root() / "profiles" / ("-".join(parts) + ".json")


def load(engine: str, threads: int, dtype: str) -> Hardware | None:
    """The profile, or None before the first calibration.

    Raises
    ------
    ConfigError
        If the file is damaged or cannot be read.
    """
    place = path(engine, threads, dtype)
    try:
        return Hardware.from_json(place.read_text("utf-8"), str(place))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{place}: cannot be read ({error}); run 'effref calibrate' again") from error


def save(hardware: Hardware, engine: str, threads: int, dtype: str) -> Path:
    """Keep the profile and say where.

    Raises
    ------
    OutputError
        If it cannot be written.
    """
    place = path(engine, threads, dtype)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {place.parent} ({error.strerror}): set EFFREF_CACHE") from error
    write_text(place, hardware.to_json())
    return place


def kept() -> list[Hardware]:
    """All readable profiles on this machine."""
    found = []
    for place in sorted((cache_root() / "profiles").glob("*.json")):
        with suppress(ConfigError, OSError, UnicodeDecodeError):
            found.append(replace(Hardware.from_json(place.read_text("utf-8"), str(place)), name=place.stem))
    return found
