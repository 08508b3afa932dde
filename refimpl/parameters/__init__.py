"""The parameters of the methods: named, with defaults, checked once and shared by program and cost model."""

from __future__ import annotations

from typing import Any

from refimpl.registry import Registry

# method -> frozen dataclass
PARAMETERS: Registry[type[Any]] = Registry(
    {
        "dense": "refimpl.parameters.base:NoParameters",
        "flash": "refimpl.parameters.base:NoParameters",
        "reuse": "refimpl.parameters.reuse:ReuseParameters",
        "folding": "refimpl.parameters.folding:FoldingParameters",
        "svd-softmax": "refimpl.parameters.svd_softmax:SVDSoftmaxParameters",
        "attmemo": "refimpl.parameters.attmemo:AttMemoParameters",
        "latte": "refimpl.parameters.latte:LatteParameters",
        "kvsharer": "refimpl.parameters.kvsharer:KVSharerParameters",
        "headshare": "refimpl.parameters.headshare:HeadShareParameters",
        "efficientasr": "refimpl.parameters.efficientasr:EfficientASRParameters",
        "fewer-heads": "refimpl.parameters.fewer_heads:FewerHeadsParameters",
        "narrow": "refimpl.parameters.narrow:NarrowParameters",
        "local": "refimpl.parameters.local:LocalParameters",
        "linformer": "refimpl.parameters.linformer:LinformerParameters",
        "linear": "refimpl.parameters.linear:LinearParameters",
    },
    composed="refimpl.parameters.composition:Composition",
)
