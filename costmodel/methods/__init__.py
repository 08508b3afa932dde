"""The closed form of each method, under the names of ``refimpl.methods.CATALOG``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refimpl.registry import Registry

if TYPE_CHECKING:
    from costmodel.methods.dense import Dense

COSTS: Registry[type[Dense]] = Registry(
    {
        "dense": "costmodel.methods.dense:Dense",
        "flash": "costmodel.methods.flash:Flash",
        "reuse": "costmodel.methods.reuse:Reuse",
        "folding": "costmodel.methods.folding:Folding",
        "svd-softmax": "costmodel.methods.svd_softmax:SVDSoftmax",
        "attmemo": "costmodel.methods.attmemo:AttMemo",
        "latte": "costmodel.methods.latte:Latte",
        "kvsharer": "costmodel.methods.kvsharer:KVSharer",
        "headshare": "costmodel.methods.headshare:HeadShare",
        "efficientasr": "costmodel.methods.efficientasr:EfficientASR",
        "fewer-heads": "costmodel.methods.fewer_heads:FewerHeads",
        "narrow": "costmodel.methods.narrow:Narrow",
        "local": "costmodel.methods.local:Local",
        "linformer": "costmodel.methods.linformer:Linformer",
        "linear": "costmodel.methods.linear:Linear",
    },
    composed="costmodel.methods.composite:Composite",
)
