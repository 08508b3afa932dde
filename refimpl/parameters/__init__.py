"""The parameters of the methods: named, with defaults, checked once and shared by program and cost model."""

from __future__ import annotations

from refimpl.parameters.base import NoParameters, make
from refimpl.parameters.reuse import ReuseParameters

__all__ = ["NoParameters", "ReuseParameters", "make"]
