"""The parameters of the methods: named, with defaults, checked once and shared by program and cost model."""

from __future__ import annotations

from refimpl.parameters.base import NoParameters, make
from refimpl.parameters.efficientasr import EfficientASRParameters
from refimpl.parameters.folding import FoldingParameters
from refimpl.parameters.headshare import HeadShareParameters
from refimpl.parameters.kvsharer import KVSharerParameters
from refimpl.parameters.reuse import ReuseParameters

__all__ = [
    "EfficientASRParameters",
    "FoldingParameters",
    "HeadShareParameters",
    "KVSharerParameters",
    "NoParameters",
    "ReuseParameters",
    "make",
]
