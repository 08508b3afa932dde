"""The parts of a forward pass. Predicted and measured figures are joined by these names."""

from __future__ import annotations

STEM = "stem"
QKV = "qkv"
POSITIONS = "positions"
CACHE = "cache"
MEMO = "memo"
SCORES = "scores"
SOFTMAX = "softmax"
WEIGHTED_SUM = "weighted-sum"
ATTENTION = "attention"
OUTPUT = "output"
FEED_FORWARD = "feed-forward"
CONVOLUTION = "convolution"
NORM = "norm"
RESIDUAL = "residual"
HEAD = "head"

# In the order in which a layer meets them; the value says what belongs to the component.
COMPONENTS: dict[str, str] = {
    STEM: "input to hidden states: token embedding, strided convolutions or patches, absolute positions",
    QKV: "query, key and value projections, from one product that reads the input once",
    POSITIONS: "relative-position term: projected table, its scores, the shifted sum; rotary angles",
    CACHE: "new keys and values written into the cache of past positions",
    MEMO: "attention maps looked up instead of computed: embedding, search, fetching of stored maps",
    SCORES: "query-key products, scaled and masked: the T x T logits",
    SOFTMAX: "row softmax of the logits: the attention map",
    WEIGHTED_SUM: "attention map times values",
    ATTENTION: "scores, softmax and weighted sum as one fused op; the map never exists",
    OUTPUT: "output projection of the attention sublayer",
    FEED_FORWARD: "feed-forward sublayers with their activation",
    CONVOLUTION: "Conformer convolution module: pointwise, GLU, depthwise, norm, activation, pointwise",
    NORM: "layer and RMS norms",
    RESIDUAL: "residual additions",
    HEAD: "language head: hidden states to vocabulary logits; or the last linear map of an encoder",
}
