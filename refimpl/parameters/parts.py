"""The parts of a forward pass that methods replace, and which method replaces which."""

from __future__ import annotations

PARTS: dict[str, str] = {
    "weights": "the weights of attention sublayers",
    "keys": "which layers have keys and values of their own",
    "map": "how queries and keys become weights of the values",
    "context": "where a layer's map comes from, and how it meets the values",
    "feed-forward": "the feed-forward sublayers",
    "head": "the language head",
}
ATTENTION = ("weights", "keys", "map", "context")

# A method that is not listed replaces the whole attention.
REPLACES: dict[str, tuple[str, ...]] = {
    "dense": (),
    "flash": ("map", "context"),
    "reuse": ("weights", "keys", "context"),
    "folding": (*ATTENTION, "feed-forward"),
    "svd-softmax": ("head",),
    "attmemo": ATTENTION,
    "latte": ("map",),
    "kvsharer": ("weights", "keys"),
    "headshare": ("weights",),
    "efficientasr": (*ATTENTION, "feed-forward"),
    "local": ("map", "context"),
}
