"""The cost of a forward pass in closed form: which ops run, how often, with which FLOPs, bytes and memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from costmodel import memory
from costmodel.methods import COSTS
from costmodel.methods.dense import Dense
from costmodel.methods.steps import Setting, linear, times
from costmodel.ops import Cost, Op, Quantity
from costmodel.streaming import cached_positions, chunks_of, earlier_outputs
from refimpl.components import CACHE, COMPONENTS, CONVOLUTION, HEAD, NORM, RESIDUAL, STEM
from refimpl.config import DTYPES, ModelConfig, Workload
from refimpl.parameters.composition import canonical, parameters_of


@dataclass(frozen=True)
class Estimate:
    """What one forward pass costs.

    Attributes
    ----------
    ops : list of Op
        Every op with its sizes and number of calls; equal to what a recorded run executes.
    params_bytes, resident_bytes, cache_bytes, peak_bytes : int, array or expression
        Weights as they are kept, and as memory holds them during the pass, where a shared one lies once for each use;
        keys and values in the cache at the end; resident weights, cache and everything else at the fullest moment.
    """

    method: str
    parameters: Any
    config: ModelConfig
    workload: Workload
    ops: list[Op]
    params_bytes: Quantity
    resident_bytes: Quantity
    cache_bytes: Quantity
    peak_bytes: Quantity
    itemsize: int = field(default=4)

    @property
    def tokens(self) -> Quantity:
        """Positions worked on, over the whole batch."""
        return self.workload.batch * self.workload.seq * self.workload.steps

    @property
    def companion_bytes(self) -> int:
        """Weights of the parts of the product that no pass runs, at the same bytes per element."""
        return self.itemsize * sum(companion.parameters for companion in self.config.companions)

    @property
    def appended_bytes(self) -> Quantity:
        """Bytes of new keys and values written into the cache."""
        return sum(op.cost(self.itemsize).bytes_written for op in self.ops if op.name == "append")

    @cached_property
    def total(self) -> Cost:
        """FLOPs and bytes of the whole pass."""
        return sum((op.cost(self.itemsize) for op in self.ops), Cost())

    def by_component(self) -> dict[str, Cost]:
        """FLOPs and bytes per component, in the order of ``refimpl.components``."""
        costs: dict[str, Cost] = {}
        for op in self.ops:
            costs[op.component] = costs.get(op.component, Cost()) + op.cost(self.itemsize)
        return {name: costs[name] for name in COMPONENTS if name in costs}

    def calls(self) -> dict[str, Quantity]:
        """Op calls per component."""
        calls: dict[str, Quantity] = {}
        for op in self.ops:
            calls[op.component] = calls.get(op.component, 0) + op.calls
        return {name: calls[name] for name in COMPONENTS if name in calls}

    def tally(self) -> Counter[tuple[str, str, tuple[tuple[str, int], ...]]]:
        """How often each (component, op, sizes) runs: comparable with ``refimpl.recorder.tally``."""
        counts: Counter[tuple[str, str, tuple[tuple[str, int], ...]]] = Counter()
        for op in self.ops:
            counts[op.component, op.name, tuple(op.sizes.items())] += op.calls
        return +counts


def estimate(method: str, config: ModelConfig, workload: Workload, params: Any = None) -> Estimate:
    """The closed-form cost of one forward pass of `config` under `method`.

    Parameters
    ----------
    method : str
        A name of the catalogue, or several joined by ``+``, as ``reuse+svd-softmax``.
    config : ModelConfig
    workload : Workload
        Its `seq` and `batch` may be arrays: every figure is then an array of the same shape.
    params : mapping or parameters, optional
        The method's parameters, by name or as their class holds them; of several methods by method.

    Raises
    ------
    ConfigError
        Unknown method or parameter, parameters that do not fit the model, methods that cannot be combined.
    """
    method = canonical(method)
    cost, parameters = COSTS[method], parameters_of(method, params)
    parameters.check(config)
    workload.check(config)
    settings = steps_of(config, workload)
    programs = [cost(setting, parameters) for setting in settings]
    last, itemsize = programs[-1], DTYPES[workload.dtype]
    parameters_kept = _parameters(last, workload)
    resident = (parameters_kept + last.copied_parameters()) * itemsize
    kept, allotted = (last.stored() * last.setting.B * n * itemsize for n in _cached_positions(config, workload))
    peak = memory.largest(*(moment for program in programs for moment in _live(program, workload)))
    masks = memory.largest(*(program.mask_bytes() * ((program.setting.calls > 0) * 1) for program in programs))
    return Estimate(
        method=method,
        parameters=parameters,
        config=config,
        workload=workload,
        ops=[op for program in programs for op in _ops(program)],
        params_bytes=parameters_kept * itemsize + last.index_bytes(),
        resident_bytes=resident,
        cache_bytes=kept,
        peak_bytes=resident + allotted + _tables(last.setting) * itemsize + masks + peak * itemsize,
        itemsize=itemsize,
    )


def steps_of(config: ModelConfig, workload: Workload) -> list[Setting]:
    """What each step of a pass meets: one step in a prefill, `steps` with a growing cache in decoding.

    A streaming model's steps are its chunks, alike ones together.
    """
    if config.streams:
        return chunks_of(config, workload)
    B, T, causal = workload.batch, workload.seq, int(workload.is_causal(config))
    return [
        Setting(config, B, T, causal, workload.kv_len + step * T, workload.fills_cache)
        for step in range(workload.steps)
    ]


def _ops(program: Dense) -> list[Op]:
    """Every op of one step, as often as there are such steps."""
    s = program.setting
    sublayers = [*program.attention(), *program.feed_forward()]
    ops = [*_moved(s, sublayers), *_stem(s), *sublayers, *_layer_rest(s), *program.head(), *_output(s)]
    return times(s.calls, ops)


def _moved(s: Setting, ops: list[Op]) -> list[Op]:
    """What is appended to in each position, for those that a full cache is moved by."""
    if not s.moved:
        return []
    appended = [op for op in ops if op.component == CACHE]
    return [replace(op, sizes={"elements": op.sizes["elements"] // s.T * s.moved}) for op in appended]


def _live(program: Dense, workload: Workload) -> list[Quantity]:
    """Elements alive at the fullest moments of one step; none where it does not run."""
    s = program.setting
    moments = [
        *program.attention_live(),
        *(program.held() + moment for moment in program.feed_forward_live()),
        program.held() + memory.convolution(s),
        program.head_live(),
        memory.stem(s),
    ]
    waiting = earlier_outputs(s, workload) if s.config.streams else 0
    return [(moment + waiting) * ((s.calls > 0) * 1) for moment in moments]


def _cached_positions(config: ModelConfig, workload: Workload) -> tuple[Quantity, Quantity]:
    """Positions that the cache keeps for what follows, and those that it is allotted for."""
    if config.streams:
        return cached_positions(config, workload)
    positions = workload.kv_len + workload.steps * workload.seq
    return (positions, positions) if workload.fills_cache else (0, 0)


def _stem(s: Setting) -> list[Op]:
    c = s.config
    whole = {"elements": s.rows * c.d_model}
    ops: list[Op] = []
    if c.stem == "tokens":
        ops.append(Op(STEM, "embedding", {"rows": s.rows, "width": c.d_model}))
        if c.token_types:
            ops.append(Op(STEM, "add", {**whole, "operand": c.d_model, "scaled": 0}))
    elif c.stem == "frames":
        ops += _strided_convolutions(s)
    elif c.stem == "stacked":
        sizes = {"rows": s.rows * c.stack, "d_in": c.features, "d_out": c.d_model // c.stack, "bias": 0}
        ops.append(Op(STEM, "linear", sizes))
    else:
        patches = s.B * (s.T - 1)
        sizes = {"rows": patches, "d_in": c.features, "d_out": c.d_model, "bias": 1}
        ops += [
            Op(STEM, "linear", sizes),
            Op(STEM, "embedding", {"rows": s.B, "width": c.d_model}),
            Op(STEM, "concat", whole),
        ]
    if c.position in ("learned", "sinusoidal"):
        ops.append(Op(STEM, "add", {**whole, "operand": s.T * c.d_model, "scaled": 0}))
    if c.embedding_norm:
        ops.append(_norm(s, 1))
    return ops


def _strided_convolutions(s: Setting) -> list[Op]:
    """Each keeps the width d; the rows shrink by its stride until T are left."""
    c = s.config
    ops, width, length = [], c.features, c.stem_length(s.T)
    for stride in c.strides:
        rows_in, length = s.B * length, length // stride
        sizes = {"rows": s.B * length, "rows_in": rows_in, "d_in": width, "d_out": c.d_model, "kernel": 3}
        ops += [Op(STEM, "conv1d", sizes), Op(STEM, c.activation, {"elements": s.B * length * c.d_model})]
        width = c.d_model
    return ops


def _layer_rest(s: Setting) -> list[Op]:
    """Norms, residuals and the Conformer's convolution module of all layers, and the final norm."""
    c = s.config
    conformer, norms = c.recipe == "conformer", {"conformer": 5, "emformer": 3}.get(c.recipe, 2)
    sum_of_both = {"elements": s.rows * c.d_model, "operand": s.rows * c.d_model}
    ops = [
        _norm(s, c.layers * norms),
        Op(RESIDUAL, "add", {**sum_of_both, "scaled": 0}, calls=c.layers * 2),
    ]
    if conformer:
        ops.append(Op(RESIDUAL, "add", {**sum_of_both, "scaled": 1}, calls=c.layers * 2))
        ops += times(c.layers, _convolution(s))
    if c.final_norm:
        ops.append(Op(NORM, f"{c.norm}_norm", {"rows": s.outputs, "width": c.d_model}))
    return ops


def _output(s: Setting) -> list[Op]:
    """The last linear map and its norm."""
    c = s.config
    if not c.d_out:
        return []
    return [
        Op(HEAD, "linear", {"rows": s.outputs, "d_in": c.d_model, "d_out": c.d_out, "bias": 1}),
        Op(NORM, f"{c.norm}_norm", {"rows": s.outputs, "width": c.d_out}),
    ]


def _norm(s: Setting, calls: Quantity) -> Op:
    return Op(NORM, f"{s.config.norm}_norm", {"rows": s.rows, "width": s.config.d_model}, calls)


def _convolution(s: Setting) -> list[Op]:
    d = s.config.d_model
    whole, channels = {"elements": s.rows * d}, {"rows": s.rows, "width": d}
    return [
        linear(s, CONVOLUTION, d, 2 * d, s.bias),
        Op(CONVOLUTION, "glu", whole),
        Op(CONVOLUTION, "depthwise_conv", {**channels, "kernel": s.config.conv_kernel}),
        Op(CONVOLUTION, "batch_norm", channels),
        Op(CONVOLUTION, "silu", whole),
        linear(s, CONVOLUTION, d, d, s.bias),
    ]


def _parameters(program: Dense, workload: Workload) -> Quantity:
    """Number of weights: the closed form of ``refimpl.weights.layout.shapes``, as the method keeps them."""
    c = program.setting.config
    norm = _norm_parameters(c, c.d_model)
    rest = (3 if c.recipe == "emformer" else 2) * norm
    if c.recipe == "conformer":
        rest += 3 * norm + 3 * c.d_model * (c.d_model + int(c.bias)) + (c.conv_kernel + 5) * c.d_model
    sublayers = program.attention_parameters() + program.feed_forward_parameters() + program.head_parameters()
    output = c.d_out * (c.d_model + 1) + _norm_parameters(c, c.d_out)
    return sublayers + c.layers * rest + _stem_parameters(c, workload) + (norm if c.final_norm else 0) + output


def _norm_parameters(c: ModelConfig, width: Quantity) -> Quantity:
    return width * (2 if c.norm == "layer" else 1)


def _stem_parameters(c: ModelConfig, workload: Workload) -> Quantity:
    d = c.d_model
    if c.stem == "tokens":
        count = (c.vocab + c.token_types) * d
    elif c.stem == "frames":
        widths = (c.features,) + (d,) * (len(c.strides) - 1)
        count = sum((3 * width + 1) * d for width in widths[: len(c.strides)])
    elif c.stem == "stacked":
        count = c.features * d // c.stack
    else:
        count = (c.features + 2) * d
    if c.position in ("learned", "sinusoidal"):
        count += (c.max_positions or workload.seq) * d
    return count + (_norm_parameters(c, d) if c.embedding_norm else 0)


def _tables(s: Setting) -> Quantity:
    """Elements of the tables that depend on the length alone."""
    c = s.config
    if c.position == "relative":
        return (2 * s.T - 1) * c.d_model
    return 2 * s.S * (c.head_dim // 2) if c.position == "rotary" else 0
