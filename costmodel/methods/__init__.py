"""The closed form of each method, under the names of ``refimpl.methods.CATALOG``."""

from __future__ import annotations

from costmodel.methods.dense import Dense
from costmodel.methods.efficientasr import EfficientASR
from costmodel.methods.flash import Flash
from costmodel.methods.folding import Folding
from costmodel.methods.headshare import HeadShare
from costmodel.methods.kvsharer import KVSharer
from costmodel.methods.reuse import Reuse
from refimpl.parameters import (
    EfficientASRParameters,
    FoldingParameters,
    HeadShareParameters,
    KVSharerParameters,
    NoParameters,
    ReuseParameters,
)

# name -> (closed form, parameters)
COSTS: dict[str, tuple[type[Dense], type]] = {
    "dense": (Dense, NoParameters),
    "flash": (Flash, NoParameters),
    "reuse": (Reuse, ReuseParameters),
    "folding": (Folding, FoldingParameters),
    "kvsharer": (KVSharer, KVSharerParameters),
    "headshare": (HeadShare, HeadShareParameters),
    "efficientasr": (EfficientASR, EfficientASRParameters),
}
