"""Counts FLOPs and bytes while the unchanged NumPy engine runs: an oracle for the formulas of ``costmodel.ops``.

`Counted` is an ndarray whose arithmetic adds to a ledger. The operands of an op are watched: every element that takes
part in arithmetic, a gather, a concatenation or a selection is marked in a shadow of the operand, so bytes read are the
elements used, each once. Bytes written are the elements of the result, or
those that were set where it was built by parts.

One op is not audited as the engine computes it, since the engine's plain equation computes all scores and hides those
that are filtered: `filtered_rows` is the same row by row on kept keys alone, and its result must be that of the engine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np

import costmodel
from costmodel.closed_form import Estimate
from costmodel.ops import FORMULAS, visible_pairs
from refimpl.engines.numpy_engine import NumpyEngine, upper_nibble
from refimpl.engines.protocol import OUTCOMES, SIZES
from refimpl.recorder import Call

FREE = {  # selections and comparisons cost no FLOP
    "equal", "not_equal", "less", "greater", "less_equal", "greater_equal", "isfinite", "isnan", "logical_or",
    "bitwise_and", "logical_and", "logical_not",
}  # fmt: skip

IN_PLACE = ("append", "refine", "scatter")  # ops that write into their first operand


@dataclass
class Ledger:
    """What one op has done so far."""

    matmul_flops: int = 0
    vector_flops: int = 0
    gathered_bytes: int = 0
    written: dict[int, int] = field(default_factory=dict)  # address of an array built by parts -> elements set
    watched: list[tuple[int, int, np.ndarray]] = field(default_factory=list)  # address, itemsize, shadow

    def watch(self, operand: np.ndarray) -> Counted:
        """A copy of an operand whose use is noted."""
        copy = np.ascontiguousarray(operand).copy().view(Counted)
        copy.ledger = self
        self.watched.append((_address(copy), copy.itemsize, np.zeros(max(copy.size, 1), bool)))
        return copy

    def touch(self, array: Any) -> None:
        """Mark the elements of a view of an operand."""
        if not isinstance(array, np.ndarray) or array.size == 0:
            return
        address = _address(array)
        for start, itemsize, shadow in self.watched:
            offset = (address - start) // itemsize
            if 0 <= address - start < shadow.size * itemsize:
                strides = tuple(stride // itemsize for stride in array.strides)
                np.lib.stride_tricks.as_strided(shadow[offset:], array.shape, strides)[...] = True

    @property
    def bytes_read(self) -> int:
        return sum(itemsize * int(shadow.sum()) for _, itemsize, shadow in self.watched) + self.gathered_bytes


class Counted(np.ndarray):
    """An array whose arithmetic is counted in its ledger."""

    ledger: Ledger | None = None

    def __array_finalize__(self, parent: Any) -> None:
        self.ledger = getattr(parent, "ledger", None)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        ledger = next(x.ledger for x in inputs if isinstance(x, Counted))
        for x in inputs:
            ledger.touch(x)
        plain = [np.asarray(x) if isinstance(x, np.ndarray) else x for x in inputs]
        if "out" in kwargs:
            kwargs["out"] = tuple(np.asarray(x) if isinstance(x, Counted) else x for x in kwargs["out"])
        result = getattr(ufunc, method)(*plain, **kwargs)
        if ufunc is np.matmul:
            ledger.matmul_flops += 2 * result.size * plain[0].shape[-1]
        elif ufunc.__name__ not in FREE:
            ledger.vector_flops += plain[0].size if method == "reduce" else np.size(result)
        return _counted(result, ledger)

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if function is np.argsort:  # comparisons cost no FLOP, and indices are no numbers to count with
            self.ledger.touch(args[0])
            return function(np.asarray(args[0]), *args[1:], **kwargs)
        if function in (np.concatenate, np.stack, np.where):
            for x in args[0] if isinstance(args[0], (list, tuple)) else args:
                self.ledger.touch(x)
            return _counted(super().__array_function__(function, types, args, kwargs), self.ledger)
        return super().__array_function__(function, types, args, kwargs)

    def __setitem__(self, index: Any, value: Any) -> None:
        address = _address(self)
        self.ledger.touch(value)
        if address in self.ledger.written:
            self.ledger.written[address] += self.view(np.ndarray)[index].size
        self.view(np.ndarray)[index] = np.asarray(value)


def _counted(result: Any, ledger: Ledger) -> Any:
    if not isinstance(result, np.ndarray):
        result = np.asarray(result)
    array = result.view(Counted)
    array.ledger = ledger
    return array


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def _namespace(ledger: Ledger) -> SimpleNamespace:
    """NumPy, whose arrays built by parts note what is set, and whose gathers are counted."""

    def built(create: Any) -> Any:
        def make(*args: Any, **kwargs: Any) -> Counted:
            array = _counted(np.asarray(create(*args, **kwargs)), ledger)
            ledger.written[_address(array)] = 0
            return array

        return make

    def take(table: Any, ids: Any, axis: int) -> Any:
        ledger.touch(ids)
        rows = np.take(np.asarray(table), np.asarray(ids), axis=axis)
        ledger.gathered_bytes += rows.nbytes
        return _counted(rows, ledger)

    own = {"full": built(np.full), "zeros": built(np.zeros), "zeros_like": built(np.zeros_like), "take": take}
    return SimpleNamespace(**{**{name: getattr(np, name) for name in dir(np) if not name.startswith("_")}, **own})


class AuditedEngine(NumpyEngine):
    """The NumPy engine; after every op its counted cost must equal the formula, as integers."""

    def __init__(self) -> None:
        super().__init__()
        self.audited = 0

    def __getattribute__(self, name: str) -> Any:
        if name not in SIZES:
            return super().__getattribute__(name)

        def audited(*args: Any, **kwargs: Any) -> Any:
            result = audit(name, *args, **kwargs)
            self.audited += 1
            return result

        return audited


def audit(op: str, *args: Any, **kwargs: Any) -> Any:
    """Run one op of the NumPy engine and assert that its formula is what was counted."""
    ledger = Ledger()
    if op == "fetch":
        return _audited_fetch(*args)
    if op == "search_graph":  # Faiss counts the points that it compares itself
        return NumpyEngine().search_graph(*args)
    itemsize = next(x.itemsize for x in _arrays(args) if x.dtype.kind == "f")
    engine = NumpyEngine(_namespace(ledger))
    watched = [_watch(x, ledger) for x in args]
    watched_kwargs = {name: _watch(x, ledger) for name, x in kwargs.items()}
    if op in IN_PLACE:
        ledger.written[_address(watched[0])] = 0
    if op in ("filtered_attention", "filtered_map"):
        operands = watched if op == "filtered_attention" else [*watched[:2], None, *watched[2:]]
        result = filtered_rows(ledger, *operands, **watched_kwargs)
        _assert_same(result, getattr(NumpyEngine(), op)(*args, **kwargs))
    else:
        result = getattr(engine, op)(*watched, **watched_kwargs)
    parts = result if isinstance(result, tuple) else (result,)
    if op in IN_PLACE:
        (elements,) = ledger.written.values()
        bytes_written = elements * itemsize
    else:
        bytes_written = sum(_written(part, ledger) * part.itemsize for part in parts)
    counted = {
        "matmul_flops": ledger.matmul_flops,
        "vector_flops": ledger.vector_flops,
        "bytes_read": ledger.bytes_read,
        "bytes_written": bytes_written,
    }
    sizes = sizes_of(op, result, *args, **kwargs)
    cost = FORMULAS[op](itemsize, **sizes)
    found = {name: getattr(cost, name) for name in counted}
    assert found == counted, f"{op} {sizes}: the formula has {found}, counted was {counted}"
    if op in IN_PLACE:  # once more, on the caller's own operand
        return getattr(NumpyEngine(), op)(*args, **kwargs)
    plain = tuple(np.array(part) for part in parts)
    return plain if isinstance(result, tuple) else plain[0]


def sizes_of(op: str, result: Any, *args: Any, **kwargs: Any) -> dict[str, int]:
    """The sizes that arguments and result tell, as a recorder notes them."""
    outcomes = OUTCOMES[op](result) if op in OUTCOMES else {}
    return SIZES[op](*args, **kwargs) | {name: int(np.asarray(array).sum()) for name, array in outcomes.items()}


def filtered_rows(
    ledger: Ledger, q: Any, k: Any, v: Any, q_codes: Any, k_codes: Any, q_scale: Any, k_scale: Any, thresholds: Any,
    scale: float, causal: bool = False, mask: Any = None, nibble: str = "floor", stage2: str = "int8",
) -> tuple[Any, Any]:  # fmt: skip
    """`filtered_attention`, or without values `filtered_map`, row by row, of which every step is counted; taking the
    nibble of a code is free."""
    (batch, heads, q_len, width), k_len, group = q.shape, k.shape[2], q.shape[1] // k.shape[1]
    width = k_len if v is None else width
    plain = [np.asarray(x).astype(np.float64) for x in (q_codes, k_codes)]
    wide_q, wide_k = (_counted(x, ledger) for x in plain)
    high_q, high_k = (
        _counted(upper_nibble(np, np.asarray(x), nibble).astype(float), ledger) for x in (q_codes, k_codes)
    )
    context, kept = np.zeros((batch, heads, q_len, width), q.dtype), np.zeros((batch, heads), np.int64)
    if v is None:  # of a causal map what is visible
        rows = range(q_len)
        seen_keys = sum(max(0, min(k_len, i + 1 + k_len - q_len)) if causal else k_len for i in rows)
        ledger.written[_address(context)] = batch * heads * seen_keys
    for operand in (q_codes, k_codes, *([] if v is None else [v])):  # any value may be kept
        ledger.touch(operand)
    if stage2 == "float":
        ledger.touch(q)
        ledger.touch(k)
    for b, h in np.ndindex(batch, heads):
        of_keys = (b % len(k), h // group)
        step = scale * q_scale[b, h, 0] * k_scale[of_keys][0]  # (1,): numbers would not be counted
        margin = np.floor(thresholds[h : h + 1] / (256.0 * step))
        for i in range(q_len):
            seen = max(0, min(k_len, i + 1 + k_len - q_len)) if causal else k_len
            estimates = high_k[of_keys][:seen] @ high_q[b, h, i]  # (seen,)
            if mask is not None:
                part = mask[b % mask.shape[0], h % mask.shape[1], i % mask.shape[2]][: seen if mask.shape[3] > 1 else 1]
                estimates = np.where(part, estimates, -np.inf)
            largest = np.max(estimates) if seen else _counted(-np.inf, ledger)
            least = largest - margin
            (keys,) = np.nonzero(np.asarray((estimates >= least) & (np.asarray(estimates) > -np.inf)))
            out = _counted(np.zeros(width), ledger)
            query = q[b, h, i] * scale if stage2 == "float" else wide_q[b, h, i]
            total: Any = 1.0
            if keys.size:
                of_kept = (k if stage2 == "float" else wide_k)[of_keys][keys]
                logits = of_kept @ query  # (kept,)
                logits = logits if stage2 == "float" else logits * step
                weights = np.exp(logits - np.max(logits))
                total, out = np.sum(weights), weights if v is None else weights @ v[of_keys][keys]
            if v is None:
                context[b, h, i, keys] = out / total if keys.size else 0
            else:
                context[b, h, i] = out / total
            kept[b, h] += keys.size
    return context, kept


def _assert_same(ours: tuple[Any, Any], theirs: tuple[Any, Any]) -> None:
    np.testing.assert_array_equal(ours[1], theirs[1])
    eps = np.finfo(theirs[0].dtype).eps  # some hundred roundings of numbers that large
    np.testing.assert_allclose(ours[0], theirs[0], rtol=100 * eps, atol=100 * eps * np.abs(theirs[0]).max(initial=0))


def _audited_fetch(records: Any, rows: tuple[int | None, ...], transfer: str) -> np.ndarray:
    """Bytes of the records that are copied; what is mapped moves none."""
    batch = NumpyEngine().fetch(records, rows, transfer)
    copied = sum(batch[b].nbytes for b, row in enumerate(rows) if row is not None) if transfer == "copy" else 0
    cost = FORMULAS["fetch"](batch.itemsize, **SIZES["fetch"](records, rows, transfer))
    counted = cost.bytes_read, cost.bytes_written, cost.flops
    assert counted == (copied, copied, 0), f"fetch {rows} {transfer}"
    return batch


def _written(part: np.ndarray, ledger: Ledger) -> int:
    return ledger.written.get(_address(part), 0) or part.size


def _watch(x: Any, ledger: Ledger) -> Any:
    if isinstance(x, tuple):
        return tuple(_watch(item, ledger) for item in x)
    return ledger.watch(x) if isinstance(x, np.ndarray) else x


def _arrays(args: Any) -> list[np.ndarray]:
    flat = [x for arg in args for x in (arg if isinstance(arg, tuple) else (arg,))]
    return [x for x in flat if isinstance(x, np.ndarray)]


def as_kept(estimate: Estimate, calls: list[Call]) -> Estimate:
    """The estimate of one step, told as fractions how many pairs each layer kept, where that depends on the data."""
    filtering = [dict(call.sizes) for call in calls if "kept" in dict(call.sizes)]
    if not filtering:
        return estimate
    members = dict(getattr(estimate.parameters, "members", [("latte", estimate.parameters)]))
    leaders = members["reuse"].leaders(estimate.config.layers) if "reuse" in members else range(estimate.config.layers)
    parts = [[Fraction(1)] * estimate.config.heads for _ in leaders]
    for layer, sizes in zip(sorted(set(leaders)), filtering, strict=True):
        pairs = sizes["maps"] * visible_pairs(sizes["q_len"], sizes["k_len"], sizes["causal"])
        parts[layer] = [Fraction(sizes["kept"], pairs)] * sizes["heads"]
    members["latte"] = {"kept": parts, "stage2": members["latte"].stage2}
    params = members if len(members) > 1 else members["latte"]
    return costmodel.estimate(estimate.method, estimate.config, estimate.workload, params)
