"""The ops of the steps that attention methods are put together from; the mirror of ``refimpl.methods.steps``."""

from __future__ import annotations

from dataclasses import dataclass, replace

from costmodel.ops import Op, Quantity
from refimpl.components import CACHE, FEED_FORWARD, OUTPUT, POSITIONS, QKV, SCORES, SOFTMAX, WEIGHTED_SUM
from refimpl.config import ModelConfig


@dataclass(frozen=True)
class Setting:
    """A model at work: the letters of the formulas."""

    config: ModelConfig
    B: Quantity
    T: Quantity  # new positions
    causal: int
    past: Quantity = 0  # positions that the cache holds before
    cached: bool = False  # new keys and values are appended to a cache
    ahead: Quantity = 0  # of the T, the last ones that only look ahead: they give no output and are not kept
    moved: Quantity = 0  # positions in the cache that are moved to its front first
    calls: Quantity = 1  # how often a step like this one runs

    @property
    def S(self) -> Quantity:
        """Keys that the queries meet."""
        return self.past + self.T

    @property
    def rows(self) -> Quantity:
        """B T."""
        return self.B * self.T

    @property
    def outputs(self) -> Quantity:
        """Rows that leave the last layer."""
        return self.B * (self.T - self.ahead)

    @property
    def bias(self) -> int:
        return int(self.config.bias)

    @property
    def mask(self) -> int:
        """Elements of a mask; the workloads here have none beside the causal one."""
        return 0


def times(calls: Quantity, ops: list[Op]) -> list[Op]:
    """The ops of one layer, as often as there are such layers."""
    return [replace(op, calls=op.calls * calls) for op in ops]


def linear(s: Setting, component: str, d_in: Quantity, d_out: Quantity, bias: int, op: str = "linear") -> Op:
    """A linear map of all B T rows."""
    return Op(component, op, {"rows": s.rows, "d_in": d_in, "d_out": d_out, "bias": bias})


def project_heads(s: Setting) -> list[Op]:
    """Q, K and V of all heads."""
    c = s.config
    return [
        linear(s, QKV, c.d_model, c.d_attention + 2 * c.d_kv, s.bias, "project"),
        *place(s, c.heads, c.kv_heads),
        *append(s, c.kv_heads, c.kv_heads),
    ]


def append(s: Setting, *heads: Quantity) -> list[Op]:
    """New keys, and new values, of so many heads written into the cache, where there is one."""
    if not s.cached:
        return []
    return [Op(CACHE, "append", {"elements": s.rows * count * s.config.head_dim}) for count in heads]


def place(s: Setting, heads: Quantity, kv_heads: Quantity) -> list[Op]:
    """Positions put into queries and keys: rotary angles, or the two biases of relative positions."""
    c = s.config
    if c.position == "rotary":
        angles = s.T * (c.head_dim // 2)
        return [
            Op(POSITIONS, "rotary", {"elements": s.rows * count * c.head_dim, "angles": angles})
            for count in (heads, kv_heads)
        ]
    if c.position == "relative":
        width = heads * c.head_dim
        return [Op(POSITIONS, "add", {"elements": s.rows * width, "operand": width, "scaled": 0}, calls=2)]
    return []


def position_keys(s: Setting, heads: Quantity) -> Op:
    """The projected table of relative positions; it does not depend on the batch."""
    c = s.config
    sizes = {"rows": 2 * s.T - 1, "d_in": c.d_model, "d_out": heads * c.head_dim, "bias": 0}
    return Op(POSITIONS, "linear", sizes)


def logits(s: Setting, heads: Quantity, kv_heads: Quantity) -> list[Op]:
    """Query-key products, with the relative-position term where the model has one."""
    c = s.config
    maps = s.B * heads
    content = {
        "maps": maps, "kv_maps": s.B * kv_heads, "q_len": s.T, "k_len": s.S, "head_dim": c.head_dim,
        "causal": s.causal, "mask": s.mask,
    }  # fmt: skip
    ops = [Op(SCORES, "scores", content)]
    if c.position == "relative":
        position = {**content, "kv_maps": heads, "k_len": 2 * s.T - 1, "causal": 0, "mask": 0}
        ops += [
            position_keys(s, heads),
            Op(POSITIONS, "scores", position),
            Op(POSITIONS, "add_relative", {"maps": maps, "length": s.T}),
        ]
    return ops


def softmax(s: Setting, heads: Quantity) -> Op:
    """Row softmax of the logits of these heads."""
    return Op(SOFTMAX, "softmax", {"maps": s.B * heads, "q_len": s.T, "k_len": s.S, "causal": s.causal})


def weighted_sum(s: Setting, heads: Quantity, kv_heads: Quantity) -> Op:
    """Maps of these heads times their values."""
    sizes = {
        "maps": s.B * heads, "kv_maps": s.B * kv_heads, "q_len": s.T, "k_len": s.S,
        "head_dim": s.config.head_dim, "causal": s.causal,
    }  # fmt: skip
    return Op(WEIGHTED_SUM, "weighted_sum", sizes)


def project_output(s: Setting) -> Op:
    """The output projection."""
    return linear(s, OUTPUT, s.config.d_attention, s.config.d_model, s.bias)


def feed_forward(s: Setting) -> list[Op]:
    """One feed-forward sublayer."""
    c = s.config
    hidden = {"elements": s.rows * c.d_ff}
    if c.gated:
        up = [linear(s, FEED_FORWARD, c.d_model, 2 * c.d_ff, s.bias, "project"), Op(FEED_FORWARD, "swiglu", hidden)]
    else:
        up = [linear(s, FEED_FORWARD, c.d_model, c.d_ff, s.bias), Op(FEED_FORWARD, c.activation, hidden)]
    return [*up, linear(s, FEED_FORWARD, c.d_ff, c.d_model, s.bias)]


def feed_forwards(c: ModelConfig) -> int:
    """Feed-forward sublayers of a layer."""
    return 2 if c.recipe == "conformer" else 1


def attention_parameters(c: ModelConfig) -> Quantity:
    """Weights of an attention sublayer."""
    bias = int(c.bias)
    count = (c.d_attention + 2 * c.d_kv) * (c.d_model + bias) + c.d_model * (c.d_attention + bias)
    return count + position_parameters(c)


def position_parameters(c: ModelConfig) -> Quantity:
    """The map of relative positions and its two biases."""
    return c.d_attention * (c.d_model + 2) if c.position == "relative" else 0


def feed_forward_parameters(c: ModelConfig) -> Quantity:
    """Weights of a feed-forward sublayer."""
    bias = int(c.bias)
    return (2 if c.gated else 1) * c.d_ff * (c.d_model + bias) + c.d_model * (c.d_ff + bias)
