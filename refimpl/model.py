"""The Transformer forward pass: stem, layers of (attention sublayer, feed-forward sublayer), head.

Three layer recipes; the method decides what happens inside a sublayer:

    post-norm (BERT)     x = norm(x + attention(x));       x = norm(x + feed_forward(x))
    pre-norm (Whisper)   x = x + attention(norm(x));       x = x + feed_forward(norm(x))
    conformer            x = x + feed_forward(norm(x)) / 2; x = x + attention(norm(x)); x = x + convolution(norm(x));
                         x = norm(x + feed_forward(norm(x)) / 2)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl.components import CONVOLUTION, NORM, RESIDUAL, STEM
from refimpl.config import ModelConfig
from refimpl.engines import engine as get_engine
from refimpl.engines.protocol import Array, Engine
from refimpl.errors import InputError, ShapeError
from refimpl.methods import program
from refimpl.methods.dense import Dense
from refimpl.methods.steps import Layer
from refimpl.recorder import At, Call, Recorder, breakdown
from refimpl.weights import Model
from refimpl.weights.layout import Weights


@dataclass(frozen=True)
class Run:
    """One forward pass.

    Attributes
    ----------
    output : ndarray
        Hidden states (B, T, d), or logits (B, T, V) where the model has a head.
    seconds : float
        From the first op to the last.
    calls : list of Call
        Every op with its component, sizes and seconds; empty when nothing was recorded.
    """

    output: Array
    seconds: float
    calls: list[Call]

    @property
    def breakdown(self) -> dict[str, float]:
        """Seconds per component."""
        return breakdown(self.calls)


def forward(
    model: Model,
    inputs: Array,
    method: str = "dense",
    params: Mapping[str, Any] | None = None,
    engine: str | Engine = "numpy",
    *,
    causal: bool | None = None,
    mask: Array | None = None,
    record: bool = True,
) -> Run:
    """Run `model` on `inputs` with an attention method.

    Parameters
    ----------
    model : Model
        From ``refimpl.load_model``.
    inputs : array
        What the model's stem reads: ids (B, T), frames (B, rows, features) or patches (B, T - 1, features).
    method, params
        A name of the catalogue and its parameters.
    engine : str or Engine
    causal : bool, optional
        Overrides the model's own.
    mask : array of bool, optional
        Broadcasts to (B, H, T, T); True where a query may look.
    record : bool, default True
        Note every op; without it only the total is timed.

    Raises
    ------
    ConfigError, ShapeError, InputError
        Unknown method or parameter; inputs that do not fit the model; NaN or ids outside the vocabulary.
    """
    return Runner(model, engine)(inputs, method, params, causal=causal, mask=mask, record=record)


class Runner:
    """A model placed on an engine, ready for repeated passes."""

    def __init__(self, model: Model, engine: str | Engine) -> None:
        self.engine = get_engine(engine) if isinstance(engine, str) else engine
        self.config = model.config
        self.weights = _placed(model.weights, self.engine)
        self._dtype = _float_dtype(model.weights)
        self._tables: dict[int, tuple[Array, ...]] = {}

    def __call__(
        self,
        inputs: Array,
        method: str | Dense = "dense",
        params: Mapping[str, Any] | None = None,
        *,
        causal: bool | None = None,
        mask: Array | None = None,
        record: bool = True,
    ) -> Run:
        """See `forward`; `method` may be a fresh program instead of a name."""
        check_inputs(self.config, inputs)
        steps = program(method, self.config, params) if isinstance(method, str) else method
        x = self.engine.asarray(inputs if self.config.stem == "tokens" else inputs.astype(self._dtype, copy=False))
        mask = None if mask is None else self.engine.asarray(mask)
        causal = self.config.causal if causal is None else causal
        length = sequence_length(self.config, inputs)
        check_length(self.config, self.weights, length)
        tables = self._tables_for(length)
        recorder = Recorder(self.engine) if record else None
        at: At = recorder.at if recorder else lambda component: self.engine
        start = self.engine.mark()
        x = self._stem(at, x)
        for index, weights in enumerate(self.weights.layers):
            layer = Layer(index, self.config, weights, causal, mask, tables)
            x = LAYERS[self.config.recipe](at, x, layer, steps)
        if self.config.final_norm:
            x = _norm(at, x, self.weights.final_norm, self.config)
        if self.config.head:
            x = steps.head(at, x, self.weights.stem.embedding)
        stop = self.engine.mark()
        output = self.engine.to_numpy(x)
        return Run(output, self.engine.elapsed_s(start, stop), recorder.calls() if recorder else [])

    def _stem(self, at: At, x: Array) -> Array:
        stem, ops = self.weights.stem, at(STEM)
        if self.config.stem == "tokens":
            h = ops.embedding(stem.embedding, x)  # (B, T, d)
            if self.config.token_types:
                h = ops.add(h, stem.token_types[0, :])
        elif self.config.stem == "frames":
            h = x
            for convolution, stride in zip(stem.convolutions, self.config.strides, strict=True):
                h = getattr(ops, self.config.activation)(ops.conv1d(h, convolution.weight, convolution.bias, stride))
        else:
            patches = ops.linear(x, stem.patches.weight, stem.patches.bias)  # (B, T - 1, d)
            ids = self.engine.asarray(np.zeros((x.shape[0], 1), np.int64))
            h = ops.concat((ops.embedding(stem.class_token, ids), patches), axis=1)  # (B, T, d)
        if self.config.position in ("learned", "sinusoidal"):
            h = ops.add(h, stem.positions[: h.shape[1], :])
        return _norm(at, h, stem.norm, self.config) if self.config.embedding_norm else h

    def _tables_for(self, length: int) -> tuple[Array, ...]:
        """The tables that the layers read, made once per length."""
        if length not in self._tables:
            tables = position_tables(self.config, length, self._dtype)
            self._tables = {length: tuple(self.engine.asarray(table) for table in tables)}
        return self._tables[length]


# --- layers -----------------------------------------------------------------------------------------------------


def _post_norm_layer(at: At, x: Array, layer: Layer, steps: Dense) -> Array:
    w, config = layer.weights, layer.config
    x = _norm(at, at(RESIDUAL).add(x, steps.attention(at, x, layer)), w.attention_norm, config)
    return _norm(at, at(RESIDUAL).add(x, steps.feed_forward(at, x, w.feed_forward)), w.feed_forward_norm, config)


def _pre_norm_layer(at: At, x: Array, layer: Layer, steps: Dense) -> Array:
    w, config = layer.weights, layer.config
    x = at(RESIDUAL).add(x, steps.attention(at, _norm(at, x, w.attention_norm, config), layer))
    return at(RESIDUAL).add(x, steps.feed_forward(at, _norm(at, x, w.feed_forward_norm, config), w.feed_forward))


def _conformer_layer(at: At, x: Array, layer: Layer, steps: Dense) -> Array:
    w, config = layer.weights, layer.config

    def half_step(x: Array, norm: Weights, weights: Weights) -> Array:
        return at(RESIDUAL).add(x, steps.feed_forward(at, _norm(at, x, norm, config), weights), scale=0.5)

    x = half_step(x, w.first_feed_forward_norm, w.first_feed_forward)
    x = at(RESIDUAL).add(x, steps.attention(at, _norm(at, x, w.attention_norm, config), layer))
    x = at(RESIDUAL).add(x, _convolution(at, _norm(at, x, w.convolution_norm, config), w.convolution, config))
    return _norm(at, half_step(x, w.feed_forward_norm, w.feed_forward), w.final_norm, config)


LAYERS = {"post-norm": _post_norm_layer, "pre-norm": _pre_norm_layer, "conformer": _conformer_layer}


def _convolution(at: At, x: Array, w: Weights, config: ModelConfig) -> Array:
    """Pointwise to 2 d, GLU, depthwise, batch norm, Swish, pointwise (arXiv 2005.08100, section 2.2)."""
    ops, norm = at(CONVOLUTION), w.batch_norm
    h = ops.glu(ops.linear(x, w.expand.weight, w.expand.bias))  # (B, T, d)
    h = ops.depthwise_conv(h, w.depthwise.weight, w.depthwise.bias)
    h = ops.silu(ops.batch_norm(h, norm.mean, norm.variance, norm.weight, norm.bias, config.eps))
    return ops.linear(h, w.contract.weight, w.contract.bias)


def _norm(at: At, x: Array, w: Weights, config: ModelConfig) -> Array:
    if config.norm == "rms":
        return at(NORM).rms_norm(x, w.weight, config.eps)
    return at(NORM).layer_norm(x, w.weight, w.bias, config.eps)


# --- inputs and tables ------------------------------------------------------------------------------------------


def sequence_length(config: ModelConfig, inputs: Array) -> int:
    """T, the positions that leave the stem."""
    length = int(inputs.shape[1])
    if config.stem == "patches":
        return length + 1
    for stride in config.strides:
        length = -(-length // stride)
    return length


def check_inputs(config: ModelConfig, inputs: Array) -> None:
    """Raise ShapeError or InputError where `inputs` do not fit the model's stem."""
    wanted = "(B, T) ids" if config.stem == "tokens" else f"(B, rows, {config.features})"
    if inputs.ndim != (2 if config.stem == "tokens" else 3) or 0 in inputs.shape[1:]:
        raise ShapeError(f"inputs have shape {inputs.shape}; {config.name} reads {config.stem}: {wanted}")
    if config.stem == "tokens":
        if inputs.dtype.kind not in "iu":
            raise InputError(f"inputs are {inputs.dtype}; token ids must be whole numbers")
        if inputs.size and (inputs.min() < 0 or inputs.max() >= config.vocab):
            raise InputError(f"token ids must lie in 0 to {config.vocab - 1}; given {inputs.min()} to {inputs.max()}")
    elif inputs.shape[2] != config.features:
        raise ShapeError(f"inputs have {inputs.shape[2]} features; {config.name} reads {config.features}")
    elif not np.isfinite(inputs).all():
        raise InputError("inputs hold NaN or infinite values")


def check_length(config: ModelConfig, weights: Weights, length: int) -> None:
    """Raise InputError where the position table of the weights is shorter than the input."""
    table = getattr(weights.stem, "positions", None)
    if table is not None and length > table.shape[0]:
        raise InputError(f"{length} positions; the position table of {config.name} has {table.shape[0]}")


def position_tables(config: ModelConfig, length: int, dtype: Any) -> tuple[Array, ...]:
    """Tables that depend on the length alone.

    Returns
    -------
    relative : one array (2T - 1, d), row r the sinusoid of the offset T - 1 - r (Transformer-XL, arXiv 1901.02860)
    rotary : cos and sin (T, D / 2) of ``p * base ** (-2 i / D)``
    otherwise : nothing
    """
    if config.position == "relative":
        return (sinusoids(np.arange(length - 1, -length, -1), config.d_model).astype(dtype),)
    if config.position == "rotary":
        half = config.head_dim // 2
        angles = np.outer(np.arange(length), config.rope_base ** (-np.arange(half) / half))  # (T, D / 2)
        return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)
    return ()


def sinusoids(positions: Array, width: int) -> Array:
    """Interleaved sine and cosine (arXiv 1706.03762, section 3.5): (positions, width), float64."""
    rates = np.exp(np.arange(0, width, 2) * (-math.log(10_000.0) / width))
    angles = np.outer(positions, rates)  # (positions, ceil(width / 2))
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(len(positions), -1)[:, :width]


def _placed(node: Any, engine: Engine) -> Any:
    """The tree of weights with every array on the engine's device."""
    if isinstance(node, list):
        return [_placed(child, engine) for child in node]
    if isinstance(node, Weights):
        return Weights(**{name: _placed(child, engine) for name, child in vars(node).items()})
    return engine.asarray(node)


def _float_dtype(weights: Weights) -> Any:
    return weights.layers[0].attention.qkv.weight.dtype
