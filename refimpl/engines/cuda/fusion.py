"""Pairs of ops as one kernel, for passes whose total alone is timed (docs/adr/0013).

An add and the norm of the sum read the sum once; the bias of a product and the activation behind it are one step. The
vocabulary stays as it is: a pass calls the ops that it always calls. Its first run is traced; the `Plan` says at which
calls an op is put off until the next one, which then launches one kernel for both.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from refimpl.engines.cuda.elementwise import Elementwise
from refimpl.engines.cuda.launch import Source
from refimpl.engines.cuda.linear import LinearMaps
from refimpl.engines.cuda.rows import held, pack_of, packed
from refimpl.engines.protocol import SIZES, Array
from refimpl.errors import UnsupportedError

FUSION = Source(
    "fusion.cu",
    (
        *held("add_layer_norm<T, V, P>", "add_rms_norm<T, V, P>"),
        *packed(
            "bias_activation<T, V, Gelu>", "bias_activation<T, V, GeluTanh>", "bias_activation<T, V, Silu>",
            "bias_activation<T, V, Relu>", "bias_gate<T, V>",
        ),
    ),
)  # fmt: skip

ACTIVATIONS = {"gelu": "Gelu", "gelu_tanh": "GeluTanh", "silu": "Silu", "relu": "Relu"}
PUT_OFF = {  # op -> the ops that it is put off until
    "add": ("layer_norm", "rms_norm"), "linear": (*ACTIVATIONS, "glu"), "conv1d": (*ACTIVATIONS, "glu"),
    "project": ("swiglu",),
}  # fmt: skip
READERS = ("to_numpy", "split_heads", "merge_heads", "reshape")  # no ops, but what they are given must be complete

T = TypeVar("T")
Given = tuple[Any, ...]  # all arguments of a call, by position
Method = Callable[..., Any]
Finish = Callable[[str, Given], Any]  # the second op of a pair and its arguments -> its result


@dataclass(frozen=True)
class Plan:
    """The calls of a pass in order, and the numbers of those that are put off until the next."""

    ops: tuple[str, ...]
    put_off: frozenset[int]


class Fusion(LinearMaps, Elementwise):
    """Passes with pairs of ops as one kernel."""

    def plan(self, run: Callable[[], Any]) -> Plan:
        """Run a pass as usual and find what can be fused in it."""
        tracer = Tracer()
        with self._calls_to(tracer):
            run()
        return Plan(tuple(tracer.ops), frozenset(tracer.put_off))

    def fused(self, run: Callable[[], T]) -> Callable[[], T]:
        """The same pass with pairs of ops as one kernel; `run` is traced now, once, and must do the same each time.

        An add with its norm gives the same bits; a bias with its activation is rounded once instead of twice.

        Raises
        ------
        UnsupportedError
            When the result is called: if the pass then calls other ops, or reads what the plan puts off.
        """
        plan = self.plan(run)

        def planned() -> T:
            calls = Planned(self, plan)
            with self._calls_to(calls):
                result = run()
            calls.end()
            return result

        return planned

    @contextmanager
    def _calls_to(self, handler: Callable[[str, Method, Given], Any]) -> Iterator[None]:
        """Hand every op that is called from outside to `handler`: its name, its method and what it is given."""
        inside = False  # an op of its own accord calls others

        def handed(op: str, method: Method) -> Method:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal inside
                if inside:
                    return method(*args, **kwargs)
                inside = True
                try:
                    return handler(op, method, by_position(method, args, kwargs))
                finally:
                    inside = False

            return call

        ops = {op: handed(op, getattr(self, op)) for op in (*SIZES, *READERS)}
        vars(self).update(ops)
        try:
            yield
        finally:
            for op in ops:
                del vars(self)[op]

    # --- first ops of pairs: what the pass gets, and what the second one does ---------------------------------------

    def put_off(self, op: str, given: Given) -> tuple[Any, Finish]:
        """Begin an op whose rest the next one does."""
        if op == "add":
            return self._put_off_add(*given)
        if not has_bias(given):
            raise differs(f"a {op} that is put off has no bias")
        x, weight, bias, *rest = given
        if op == "project":
            product, (widths,) = self.linear(x, weight), rest
            parts = tuple(Unfinished((*product.shape[:-1], width), product.dtype) for width in widths)
            return parts, lambda second, _: self._finish_product(product, bias, second)
        product = getattr(self, op)(x, weight, None, *rest)
        return Unfinished(product.shape, product.dtype), lambda second, _: self._finish_product(product, bias, second)

    def _put_off_add(self, x: Array, y: Array, scale: float = 1.0) -> tuple[Array, Finish]:
        y, period = self._repeated(x, y)
        x, rows, width, stride = self._rows(x)
        total = self.xp.empty(x.shape, x.dtype)
        if pack_of(width, ((x, stride), (y, width))) != pack_of(width, ((total, width),)):
            return self.add(x, y, scale), lambda norm, given: getattr(self, norm)(*given)  # another order of summing

        def finish(norm: str, given: Given) -> Array:
            _, *columns, eps = given
            columns = [self._operand(total, column, (width,)) for column in columns]
            out = self.xp.empty(total.shape, total.dtype)
            arrays = ((x, stride), *((array, width) for array in (y, total, *columns, out)))
            self._launch_rows(
                FUSION, f"add_{norm}<T, V, P>", rows, width, arrays, stride, period, float(scale), float(eps)
            )
            return out

        return total, finish

    def _finish_product(self, product: Array, bias: Array, op: str) -> Array:
        columns = product.shape[-1]
        bias, rows = self._operand(product, bias, (columns,)), math.prod(product.shape[:-1])
        if op in ACTIVATIONS:
            kernel = f"bias_activation<T, V, {ACTIVATIONS[op]}>"
            self._launch_tiles(FUSION, kernel, rows, columns, ((product, columns), (bias, columns)))
            return product
        width = columns // 2
        out = self.xp.empty((*product.shape[:-1], width), product.dtype)
        arrays = (product, columns), (bias, columns), (out, width)
        self._launch_tiles(FUSION, "bias_gate<T, V>", rows, width, arrays, int(op == "swiglu"))
        return out


class Tracer:
    """Notes the calls of a pass and which of them can be put off.

    The products among these stay alive until the pass ends: a later array in their place would look like them.
    """

    def __init__(self) -> None:
        self.ops: list[str] = []
        self.put_off: set[int] = set()
        self._last: tuple[Given, Any] = (), None
        self._products: dict[int, Array] = {}  # number of the call -> its product, which nothing else may read

    def __call__(self, op: str, method: Method, given: Given) -> Any:
        for call in [call for call, product in self._products.items() if any(map(overlap(product), arrays(given)))]:
            self.put_off.discard(call)
            del self._products[call]
        result = method(*given)
        number, (before, made) = len(self.ops) - 1, self._last
        if number >= 0 and fits(self.ops[number], before, made, op, given):
            self.put_off.add(number)
            if self.ops[number] != "add":
                self._products[number] = made
        self.ops.append(op)
        self._last = given, result
        return result


class Planned:
    """Runs the calls of a pass as a plan says."""

    def __init__(self, engine: Fusion, plan: Plan) -> None:
        self._engine, self._plan, self._number = engine, plan, 0
        self._pending: tuple[Any, Finish] | None = None  # what the pass got from the call before, and the rest of it

    def __call__(self, op: str, method: Method, given: Given) -> Any:
        number, pending = self._number, self._pending
        if number >= len(self._plan.ops) or self._plan.ops[number] != op:
            raise differs(
                f"call {number} is {op}, planned {' '.join(self._plan.ops[number : number + 1]) or 'nothing'}"
            )
        self._number, self._pending = number + 1, None
        if pending is not None:
            made, finish = pending
            if not leads(made, given):
                raise differs(f"call {number}, {op}, reads something else than what call {number - 1} gives")
            return finish(op, given)
        if number not in self._plan.put_off:
            return method(*given)
        self._pending = self._engine.put_off(op, given)
        return self._pending[0]

    def end(self) -> None:
        """Raise where calls are missing."""
        if self._number < len(self._plan.ops):
            raise differs(f"it ends after {self._number} calls, planned {len(self._plan.ops)}")


class Unfinished:
    """What a pass holds of a product that is put off: its shape. Only the op that the plan names may take it."""

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        self.shape, self.dtype, self.ndim, self.size = shape, dtype, len(shape), math.prod(shape)

    def _refuse(self, *_: Any) -> Any:
        raise differs("it reads a product that is put off until the activation")

    __getattr__ = __getitem__ = __array__ = __iter__ = __len__ = __bool__ = _refuse


def fits(first: str, before: Given, made: Any, second: str, given: Given) -> bool:
    """True where the second call alone can do what is left of the first."""
    if second not in PUT_OFF.get(first, ()) or not leads(made, given):
        return False
    return first == "add" or has_bias(before)  # a product without one is complete


def has_bias(given: Given) -> bool:
    """Whether a product, called with x, weight and perhaps a bias, has one."""
    return len(given) > 2 and given[2] is not None


def leads(made: Any, given: Given) -> bool:
    """True where the call is given the result before all else; of `project` both halves, in order."""
    parts = made if isinstance(made, tuple) else (made,)
    return all(part is x for part, x in zip(parts, given, strict=False)) and len({p.shape for p in parts}) == 1


def differs(what: str) -> UnsupportedError:
    """The error for a pass that is not the one that was traced."""
    return UnsupportedError(f"the fused pass is not the one that was traced: {what}; trace it anew, or run it unfused")


def by_position(method: Method, args: Given, kwargs: dict[str, Any]) -> Given:
    """All arguments of a call, those by name in their places."""
    if not kwargs:
        return args
    bound = inspect.signature(method).bind(*args, **kwargs)
    bound.apply_defaults()
    return tuple(bound.arguments.values())


def arrays(values: Any) -> Iterator[Array]:
    """The arrays on a device among values, tuples and lists of them."""
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from arrays(value)
        elif hasattr(getattr(value, "data", None), "ptr") and value.size:
            yield value


def overlap(made: Any) -> Callable[[Array], bool]:
    """Whether an array has memory in common with this one, or with these parts of one."""
    parts = [span(part) for part in arrays((made,))]
    return lambda x: any(span(x)[0] < last and first < span(x)[1] for first, last in parts)


def span(x: Array) -> tuple[int, int]:
    """The addresses from its first byte to behind its last."""
    steps = [(n - 1) * stride for n, stride in zip(x.shape, x.strides, strict=True)]
    return x.data.ptr + sum(min(s, 0) for s in steps), x.data.ptr + sum(max(s, 0) for s in steps) + x.dtype.itemsize
