"""The Transformer forward pass: stem, layers of (attention sublayer, feed-forward sublayer), head.

Four layer recipes; the method decides what happens inside a sublayer:

    post-norm (BERT)     x = norm(x + attention(x));       x = norm(x + feed_forward(x))
    pre-norm (Whisper)   x = x + attention(norm(x));       x = x + feed_forward(norm(x))
    conformer            x = x + feed_forward(norm(x)) / 2; x = x + attention(norm(x)); x = x + convolution(norm(x));
                         x = norm(x + feed_forward(norm(x)) / 2)
    emformer             as pre-norm, then x = norm(x)

The Emformer (arXiv 2010.10759) streams: it takes its input chunk by chunk. The rows of a chunk and of the right context
behind it pass the layers together and see each other and the left context, whose keys and values a cache holds; the
rows of the right context give no output and leave nothing in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refimpl.cache import Cache
from refimpl.components import CONVOLUTION, HEAD, NORM, RESIDUAL, STEM
from refimpl.config import ModelConfig
from refimpl.engines import engine as get_engine
from refimpl.engines.protocol import Array, Engine
from refimpl.errors import ConfigError, InputError, ShapeError, UnsupportedError
from refimpl.images import resized_positions
from refimpl.methods import parameters
from refimpl.methods.dense import Dense
from refimpl.methods.programs import PROGRAMS
from refimpl.methods.steps import Layer
from refimpl.methods.subject import Progress, Subject
from refimpl.parameters.composition import canonical
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
    cache: Cache | None = None,
) -> Run:
    """Run `model` on `inputs` with an attention method.

    Parameters
    ----------
    model : Model
        From ``refimpl.load_model``.
    inputs : array
        What the model's stem reads: ids (B, T), frames (B, rows, features) or patches (B, T - 1, features). A streaming
        model takes any number of chunks, of which the last may be shorter, and the right context of the last.
    method, params
        A name of the catalogue and its parameters. What the method has to find first (a sharing strategy) it finds on
        these inputs.
    engine : str or Engine
    causal : bool, optional
        Overrides the model's own.
    mask : array of bool, optional
        Broadcasts to (B, H, T, S); True where a query may look. S is T, and more where a cache holds positions.
    record : bool, default True
        Note every op; without it only the total is timed.
    cache : Cache, optional
        From `Runner.new_cache`: keys and values of earlier positions, behind which these are appended. A streaming
        model makes its own where none is given.

    Raises
    ------
    ConfigError, ShapeError, InputError
        Unknown method or parameter; inputs or a mask that do not fit the model; NaN or ids outside the vocabulary; a
        cache that is too short.
    """
    runner = Runner(model, engine)
    return runner(inputs, method, params, causal=causal, mask=mask, record=record, cache=cache)


@dataclass(frozen=True)
class Prepared:
    """A method made ready for a model.

    Attributes
    ----------
    method : str
    parameters : dataclass
        Complete: with whatever had to be found first.
    weights : Weights
        As the method reads them, on the engine's device.
    config : ModelConfig
    """

    method: str
    parameters: Any
    weights: Weights
    config: ModelConfig

    def program(self) -> Dense:
        """A fresh program for one pass."""
        return PROGRAMS[self.method](self.config, self.parameters)


class Runner:
    """A model placed on an engine, ready for repeated passes."""

    def __init__(self, model: Model, engine: str | Engine) -> None:
        self.model = model
        self.engine = get_engine(engine) if isinstance(engine, str) else engine
        self.config = model.config
        self.weights = _placed(model.weights, self.engine)
        self._dtype = _float_dtype(model.weights)
        self._tables: tuple[Array, ...] = ()
        self._table_length = 0
        self._resized: Array | None = None
        self._prepared: dict[tuple[str, Any, tuple[int | None, bool | None]], Prepared] = {}

    def prepare(
        self,
        method: str,
        params: Mapping[str, Any] | None = None,
        inputs: Array | None = None,
        progress: Progress | None = None,
        causal: bool | None = None,
    ) -> Prepared:
        """Make a method ready: find what it needs beforehand, derive its weights; once per method and parameters.

        A method whose preparation fits one length alone is prepared once per length; one that looks at its inputs, once
        for causal passes and once for others.

        Parameters
        ----------
        method, params
            A name of the catalogue and its parameters.
        inputs : array, optional
            To calibrate on, where the method does that.
        progress : callable, optional
            Called with a message and the fraction done.
        causal : bool, optional
            Overrides the model's own in the passes that it is prepared for.

        Raises
        ------
        ConfigError
            Unknown method or parameter; parameters that do not fit the model; nothing to calibrate on.
        """
        method, given = canonical(method), parameters(method, params, self.config)
        key = (method, given, self._passes_of(given, inputs, causal))
        if key not in self._prepared:
            subject = Subject(self.model, self.engine, inputs, causal=causal)
            kind = PROGRAMS[method]
            complete = kind.complete(given, replace(subject, progress=progress) if progress else subject)
            weights = kind.derive(self.model.weights, self.config, complete)
            placed = self.weights if weights is self.model.weights else _placed(weights, self.engine)
            self._prepared[key] = Prepared(method, complete, placed, self.config)
        return self._prepared[key]

    def _passes_of(self, given: Any, inputs: Array | None, causal: bool | None) -> tuple[int | None, bool | None]:
        """The length, and whether causal, of the passes that a method is prepared for, each where it matters."""
        per_length = inputs is not None and getattr(given, "PER_LENGTH", False)
        length = sequence_length(self.config, inputs) if per_length else None
        if not per_length and not getattr(given, "PER_CAUSALITY", False):
            return length, None
        return length, self.config.causal if causal is None else causal

    def new_cache(
        self, capacity: int, method: str | Prepared = "dense", params: Mapping[str, Any] | None = None, batch: int = 1
    ) -> Cache:
        """An empty cache for `capacity` positions of `batch` sequences under a method.

        That of a streaming model has room for the right context beside them.

        Raises
        ------
        ConfigError
            If the model cannot keep keys and values, or the method is unknown.
        """
        self.config.check_cache(causal=True)
        ready = self.prepare(method, params) if isinstance(method, str) else method
        return self._cache(ready.program(), capacity, batch)

    def _cache(self, steps: Dense, capacity: int, batch: int, room: int = 0) -> Cache:
        config = self.config
        window = config.left_context if config.streams else None
        return Cache(self.engine, steps.stored(), batch, capacity, self._dtype, window, config.right_context, room)

    def __call__(
        self,
        inputs: Array,
        method: str | Prepared | Dense = "dense",
        params: Mapping[str, Any] | None = None,
        *,
        causal: bool | None = None,
        mask: Array | None = None,
        record: bool = True,
        cache: Cache | None = None,
    ) -> Run:
        """See `forward`; `method` may also be prepared, or a fresh program that reads the exact model's weights."""
        check_inputs(self.config, inputs)
        if isinstance(method, str):
            method = self.prepare(method, params, inputs, causal=causal)
        causal = self.config.causal if causal is None else causal
        if not self.config.streams:
            return self._pass(inputs, method, causal, mask, record, cache)
        if causal or mask is not None:
            raise ConfigError(f"{self.config.name} sees whole chunks: neither a causal mask nor another one fits")
        return self._stream(inputs, method, record, cache)

    def _stream(self, inputs: Array, method: Prepared | Dense, record: bool, cache: Cache | None) -> Run:
        """Chunk after chunk of a streaming model, each a pass of its own."""
        config, length = self.config, sequence_length(self.config, inputs)
        if not isinstance(method, Prepared) and length > config.chunk:
            raise ConfigError(f"{config.name} runs in chunks of {config.chunk}; a bare program runs one of them")
        program = method.program() if isinstance(method, Prepared) else method
        if cache is None:
            cache = self._cache(program, config.own_cache, len(inputs), room=config.chunk)
        cache.check(program.stored(), len(inputs), length)  # before the first chunk changes it
        if cache.length == 0:
            config.check_chunks(length)
        runs = []
        for first in range(0, length, config.chunk):
            stop = min(first + config.chunk, length)
            chunk = inputs[:, first * config.stack : config.stem_length(stop), :]  # (B, rows, features)
            runs.append(self._pass(chunk, method, False, None, record, cache))
        return _joined(runs)

    def _pass(
        self, inputs: Array, method: Prepared | Dense, causal: bool, mask: Array | None, record: bool,
        cache: Cache | None,
    ) -> Run:  # fmt: skip
        """All positions at once, or one chunk."""
        steps = method.program() if isinstance(method, Prepared) else method
        work = self._work(inputs, steps, method, causal, mask, cache)
        recorder = Recorder(self.engine) if record else None
        at: At = recorder.at if recorder else lambda component: self.engine
        start = self.engine.mark()
        x = work(at, steps)
        stop = self.engine.mark()
        if cache is not None:
            cache.advance(sequence_length(self.config, inputs))
        output = self.engine.to_numpy(x)
        return Run(output, self.engine.elapsed_s(start, stop), recorder.calls() if recorder else [])

    def recorded(
        self, inputs: Array, method: Prepared, *, causal: bool | None = None, cache: Cache | None = None,
        fused: bool = False,
    ) -> Callable[[], Run]:  # fmt: skip
        """A pass written down once, that each call runs again: a CUDA graph, or on the CPU a step of `recorded_step`.

        Behind the positions that the cache holds now, which stay as they are. Nothing is noted of single ops. With
        `fused`, pairs of ops of a graph are one kernel (docs/adr/0013).

        Raises
        ------
        UnsupportedError
            If the engine records no such pass, the model streams, or the method reads a result on the host on its way.
        ConfigError, ShapeError, InputError
            As in `forward`.
        """
        check_inputs(self.config, inputs)
        if hasattr(self.engine, "step_recorder") and cache is not None and sequence_length(self.config, inputs) == 1:
            return self._step_again(inputs, self.recorded_step(method, cache, causal=causal), cache)
        if not hasattr(self.engine, "record"):
            raise UnsupportedError(
                f"the engine '{self.engine.name}' records no such pass: take 'cupy', or 'numba' to decode"
            )
        if self.config.streams:
            raise UnsupportedError(f"{self.config.name} streams: its passes differ with the cache, so no graph fits")
        causal = self.config.causal if causal is None else causal
        work = self._work(inputs, method.program(), method, causal, None, cache)

        def once() -> Array:
            return work(lambda component: self.engine, method.program())

        replay = self.engine.record(self.engine.fused(once) if fused else once)  # type: ignore[attr-defined]

        def run() -> Run:
            output, seconds = replay()
            return Run(self.engine.to_numpy(output), seconds, [])

        return run

    def recorded_step(self, method: Prepared, cache: Cache, *, causal: bool | None = None) -> Callable[[Array], Run]:
        """Decoding in which a step is one compiled call, on the Numba engine (docs/adr/0014).

        What is returned takes the next ids (B, 1), appends to the cache and gives the logits (B, 1, V), to the last bit
        those of an ordinary step; the step after it overwrites them.

        Raises
        ------
        UnsupportedError
            If the engine records no steps, or the method has an op for which there is no instruction.
        ConfigError, ShapeError, InputError
            As in `forward`; each step raises them, too.
        """
        if not hasattr(self.engine, "step_recorder"):
            raise UnsupportedError(f"the engine '{self.engine.name}' records no steps: take 'numba'")
        if self.config.stem != "tokens":
            raise UnsupportedError(f"{self.config.name} reads {self.config.reads}: steps of tokens can be recorded")
        ids, first = np.zeros((cache.batch, 1), np.int64), cache.length
        causal = self.config.causal if causal is None else causal
        steps = method.program()
        work = self._work(ids, steps, method, causal, None, cache)
        positions = getattr(self.weights.stem, "positions", None)
        tables = self._tables if positions is None else (*self._tables, positions)
        recorder = self.engine.step_recorder(first, tables)
        step = recorder.finished(ids, work(lambda component: recorder, steps))

        def run(ids: Array) -> Run:
            check_inputs(self.config, ids)
            if ids.shape[1] != 1:
                raise ShapeError(f"a recorded step takes ids (B, 1), one position; given {ids.shape}")
            cache.check(steps.stored(), len(ids), 1)
            check_length(self.config, self.weights, cache.length + 1)
            start = self.engine.mark()
            output = step(ids, cache.length)
            stop = self.engine.mark()
            cache.advance(1)
            return Run(output, self.engine.elapsed_s(start, stop), [])

        return run

    def _step_again(self, ids: Array, step: Callable[[Array], Run], cache: Cache) -> Callable[[], Run]:
        """The same step at the same place, as often as it is called."""
        first = cache.length

        def run() -> Run:
            cache.truncate(first)
            done = step(ids)
            cache.truncate(first)
            return done

        return run

    def _work(
        self, inputs: Array, steps: Dense, method: Prepared | Dense, causal: bool, mask: Array | None,
        cache: Cache | None,
    ) -> Callable[[At, Dense], Array]:  # fmt: skip
        """What a pass does with its checked inputs, which are on the device then; takes a fresh program."""
        weights = method.weights if isinstance(method, Prepared) else self.weights
        length, first = sequence_length(self.config, inputs), 0
        if cache is not None:
            self.config.check_cache(causal)
            cache.check(steps.stored(), len(inputs), length)
            first = cache.length
        check_length(self.config, self.weights, first + length)
        tables = self._tables_for(first, length, cache.capacity if cache else length)
        x = self.engine.asarray(inputs if self.config.stem == "tokens" else inputs.astype(self._dtype, copy=False))
        if mask is not None:
            mask = self.engine.asarray(whole_mask(mask, (len(inputs), self.config.heads, length, first + length)))

        def work(at: At, steps: Dense) -> Array:
            if cache is not None:
                cache.make_room(at)
            h = self._stem(at, x, first)  # (B, T, d)
            for index, of_layer in enumerate(weights.layers):
                layer = Layer(index, self.config, of_layer, causal, mask, tables, cache)
                h = LAYERS[self.config.recipe](at, h, layer, steps)
            if self.config.right_context:
                h = h[:, :length, :]  # (B, T, d)
            if self.config.final_norm:
                h = _norm(at, h, weights.final_norm, self.config)
            if self.config.head:
                h = steps.head(at, h, weights)
            if self.config.d_out:
                h = at(HEAD).linear(h, weights.output.weight, weights.output.bias)  # (B, T, d_out)
                h = _norm(at, h, weights.output_norm, self.config)
            return h

        return work

    def decode(
        self,
        ids: Array,
        method: str | Prepared,
        cache: Cache,
        params: Mapping[str, Any] | None = None,
        *,
        causal: bool | None = None,
        record: bool = True,
    ) -> Run:
        """Feed tokens one by one: ids (B, steps) -> logits (B, steps, V); seconds and calls of all steps together.

        A streaming model is fed chunk by chunk: frames as `forward` takes them -> (B, T, d_out).
        """
        ready = self.prepare(method, params, ids) if isinstance(method, str) else method
        if self.config.streams:
            return self(ids, ready, causal=causal, record=record, cache=cache)
        runs = [
            self(ids[:, step : step + 1], ready, causal=causal, record=record, cache=cache)
            for step in range(ids.shape[1])
        ]
        return _joined(runs)

    def stem(self, inputs: Array) -> Array:
        """The hidden states that enter the first layer: (B, T, d), on the engine's device; errors as in `forward`."""
        check_inputs(self.config, inputs)
        check_length(self.config, self.weights, sequence_length(self.config, inputs))
        x = self.engine.asarray(inputs if self.config.stem == "tokens" else inputs.astype(self._dtype, copy=False))
        return self._stem(lambda component: self.engine, x, 0)

    def _stem(self, at: At, x: Array, first: int) -> Array:
        """Inputs to hidden states (B, T, d), of which the first is at position `first`."""
        stem, ops = self.weights.stem, at(STEM)
        if self.config.stem == "tokens":
            h = ops.embedding(stem.embedding, x)  # (B, T, d)
            if self.config.token_types:
                h = ops.add(h, stem.token_types[0, :])
        elif self.config.stem == "frames":
            h = x
            for convolution, stride in zip(stem.convolutions, self.config.strides, strict=True):
                h = getattr(ops, self.config.activation)(ops.conv1d(h, convolution.weight, convolution.bias, stride))
        elif self.config.stem == "stacked":
            h = ops.linear(x, stem.frames.weight)  # (B, rows, d / stack)
            h = ops.reshape(h, (x.shape[0], x.shape[1] // self.config.stack, self.config.d_model))  # (B, T, d)
        else:
            patches = ops.linear(x, stem.patches.weight, stem.patches.bias)  # (B, T - 1, d)
            ids = self.engine.asarray(np.zeros((x.shape[0], 1), np.int64))
            h = ops.concat((ops.embedding(stem.class_token, ids), patches), axis=1)  # (B, T, d)
        if self.config.position in ("learned", "sinusoidal"):
            h = ops.add(h, self._positions_for(first, h.shape[1]))
        return _norm(at, h, stem.norm, self.config) if self.config.embedding_norm else h

    def _positions_for(self, first: int, length: int) -> Array:
        """The rows (T, d) of the position table; that of an image model is resized to the grid of the image."""
        table = self.weights.stem.positions
        if self.config.stem != "patches" or length == table.shape[0]:
            return table[first : first + length, :]
        if self._resized is None or self._resized.shape[0] != length:
            self._resized = self.engine.asarray(resized_positions(self.model.weights.stem.positions, length))
        return self._resized

    def _tables_for(self, first: int, length: int, most: int) -> tuple[Array, ...]:
        """The tables that layers read for positions `first` to first + length - 1, made once for `most` positions."""
        if self._table_length < most or (self.config.position == "relative" and self._table_length != most):
            tables = position_tables(self.config, most, self._dtype)
            self._tables, self._table_length = tuple(self.engine.asarray(table) for table in tables), most
        if self.config.position == "relative" or not self._tables:
            return self._tables
        return tuple(table[first : first + length, :] for table in self._tables)


# --- layers -----------------------------------------------------------------------------------------------------


def _post_norm_layer(at: At, x: Array, layer: Layer, steps: Dense) -> Array:
    w, config = layer.weights, layer.config
    x = _norm(at, at(RESIDUAL).add(x, steps.attention(at, x, layer)), w.attention_norm, config)
    return _norm(at, at(RESIDUAL).add(x, steps.feed_forward(at, x, w.feed_forward, layer)), w.feed_forward_norm, config)


def _pre_norm_layer(at: At, x: Array, layer: Layer, steps: Dense) -> Array:
    w, config = layer.weights, layer.config
    x = at(RESIDUAL).add(x, steps.attention(at, _norm(at, x, w.attention_norm, config), layer))
    return at(RESIDUAL).add(x, steps.feed_forward(at, _norm(at, x, w.feed_forward_norm, config), w.feed_forward, layer))


def _conformer_layer(at: At, x: Array, layer: Layer, steps: Dense) -> Array:
    w, config = layer.weights, layer.config

    def half_step(x: Array, norm: Weights, weights: Weights) -> Array:
        return at(RESIDUAL).add(x, steps.feed_forward(at, _norm(at, x, norm, config), weights, layer), scale=0.5)

    x = half_step(x, w.first_feed_forward_norm, w.first_feed_forward)
    x = at(RESIDUAL).add(x, steps.attention(at, _norm(at, x, w.attention_norm, config), layer))
    x = at(RESIDUAL).add(x, _convolution(at, _norm(at, x, w.convolution_norm, config), w.convolution, config))
    return _norm(at, half_step(x, w.feed_forward_norm, w.feed_forward), w.final_norm, config)


def _emformer_layer(at: At, x: Array, layer: Layer, steps: Dense) -> Array:
    return _norm(at, _pre_norm_layer(at, x, layer, steps), layer.weights.final_norm, layer.config)


LAYERS = {
    "post-norm": _post_norm_layer,
    "pre-norm": _pre_norm_layer,
    "conformer": _conformer_layer,
    "emformer": _emformer_layer,
}


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


def _joined(runs: list[Run]) -> Run:
    """Runs of consecutive positions as one."""
    output = np.concatenate([run.output for run in runs], axis=1)  # (B, T, d)
    return Run(output, sum(run.seconds for run in runs), [call for run in runs for call in run.calls])


# --- inputs and tables ------------------------------------------------------------------------------------------


def sequence_length(config: ModelConfig, inputs: Array) -> int:
    """T, the positions that leave the stem."""
    return config.positions(int(inputs.shape[1]))


def check_inputs(config: ModelConfig, inputs: Array) -> None:
    """Raise ShapeError or InputError where `inputs` do not fit the model's stem."""
    wanted = "(B, T) ids" if config.stem == "tokens" else f"(B, rows, {config.features})"
    if inputs.ndim != (2 if config.stem == "tokens" else 3) or 0 in inputs.shape[1:]:
        raise ShapeError(f"inputs have shape {inputs.shape}; {config.name} reads {config.reads}: {wanted}")
    if config.stem == "tokens":
        if inputs.dtype.kind not in "iu":
            raise InputError(f"inputs are {inputs.dtype}; token ids must be whole numbers")
        if inputs.size and (inputs.min() < 0 or inputs.max() >= config.vocab):
            raise InputError(f"token ids must lie in 0 to {config.vocab - 1}; given {inputs.min()} to {inputs.max()}")
    elif inputs.shape[2] != config.features:
        raise ShapeError(f"inputs have {inputs.shape[2]} features; {config.name} reads {config.features}")
    elif config.stem == "stacked" and (inputs.shape[1] % config.stack or sequence_length(config, inputs) < 1):
        raise ShapeError(
            f"inputs have {inputs.shape[1]} rows; {config.name} reads {config.stack} a position: give "
            f"{config.stack} (T + {config.right_context}) for T positions"
        )
    elif not np.isfinite(inputs).all():
        raise InputError("inputs hold NaN or infinite values")


def whole_mask(mask: Array, shape: tuple[int, int, int, int]) -> Array:
    """A mask with all four axes; ShapeError where it is not of bool or does not broadcast to (B, H, T, S)."""
    axes = tuple(mask.shape)
    fits = len(axes) <= 4 and all(n in (1, most) for n, most in zip(axes[::-1], shape[::-1], strict=False))
    if mask.dtype != np.bool_ or not fits:
        raise ShapeError(
            f"the mask is {mask.dtype} {axes}; give one of bool, True where a query may look, that broadcasts to "
            f"(B, H, T, S) = {shape}"
        )
    return mask.reshape((1,) * (4 - len(axes)) + axes)


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
