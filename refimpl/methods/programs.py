"""The program of each method, under the names of ``refimpl.methods.CATALOG``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refimpl.registry import Registry

if TYPE_CHECKING:
    from refimpl.methods.dense import Dense

PROGRAMS: Registry[type[Dense]] = Registry(
    {
        "dense": "refimpl.methods.dense:Dense",
        "flash": "refimpl.methods.flash:Flash",
        "reuse": "refimpl.methods.reuse:Reuse",
        "folding": "refimpl.methods.folding:Folding",
        "svd-softmax": "refimpl.methods.svd_softmax:SVDSoftmax",
        "attmemo": "refimpl.methods.attmemo:AttMemo",
        "latte": "refimpl.methods.latte:Latte",
        "kvsharer": "refimpl.methods.kvsharer:KVSharer",
        "headshare": "refimpl.methods.headshare:HeadShare",
        "efficientasr": "refimpl.methods.efficientasr:EfficientASR",
        "fewer-heads": "refimpl.methods.fewer_heads:FewerHeads",
        "narrow": "refimpl.methods.narrow:Narrow",
        "local": "refimpl.methods.local:Local",
        "linformer": "refimpl.methods.linformer:Linformer",
        "linear": "refimpl.methods.linear:Linear",
    },
    composed="refimpl.methods.composite:Composite",
)
