"""What the CuPy engine asks of the device beside ops, with a `cupy` that answers as told."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

import refimpl
from refimpl.errors import ConfigError, EffrefError, MissingDependencyError


class CUDARuntimeError(RuntimeError):
    """As CuPy's, which it does not export."""


def cupy_with(
    free: int = 60, total: int = 80, pool_free: int = 5, used: int = 7, limit: int = 0, refuses: Exception | None = None
) -> Any:
    def get_limit() -> int:
        if refuses:
            raise refuses
        return limit

    pool = types.SimpleNamespace(
        get_limit=get_limit, free_bytes=lambda: pool_free, used_bytes=lambda: used, total_bytes=lambda: pool_free + used
    )
    runtime = types.SimpleNamespace(getDeviceCount=lambda: 1, memGetInfo=lambda: (free, total))
    cuda = types.SimpleNamespace(
        runtime=runtime, cublas=None, nvrtc=None, Device=lambda: types.SimpleNamespace(id=0, pci_bus_id="0000:3B:00.0")
    )
    return types.SimpleNamespace(cuda=cuda, get_default_memory_pool=lambda: pool)


def engine_on(monkeypatch: pytest.MonkeyPatch, **given: Any) -> Any:
    monkeypatch.setitem(sys.modules, "cupy", cupy_with(**given))
    return refimpl.engine("cupy")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, 65),  # what is free, and what the pool holds unused
        ({"limit": 40}, 33),  # the limit less what is in use
        ({"limit": 90}, 65),
        ({"limit": 5}, 0),
    ],
)
def test_free_bytes(monkeypatch, given, expected) -> None:
    assert engine_on(monkeypatch, **given).free_bytes() == expected


def test_what_others_hold(monkeypatch) -> None:
    assert engine_on(monkeypatch).memory_bytes() == (80, 80 - 60 - 12)


def test_place_on_the_bus(monkeypatch) -> None:
    assert engine_on(monkeypatch).bus_id() == "0000:3B:00.0"


@pytest.mark.parametrize(
    ("refuses", "kind", "said"),
    [
        (ValueError("could not convert string\nto float"), ConfigError, "CUPY_GPU_MEMORY_LIMIT must be bytes"),
        (CUDARuntimeError("cudaErrorDevicesUnavailable: busy"), MissingDependencyError, "cannot be used: cudaErrorDev"),
    ],
)
def test_a_device_that_cannot_be_used(monkeypatch, refuses, kind, said) -> None:
    with pytest.raises(EffrefError) as error:
        engine_on(monkeypatch, refuses=refuses)
    assert type(error.value) is kind
    assert said in str(error.value)
    assert "\n" not in str(error.value)
