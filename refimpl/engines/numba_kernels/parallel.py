"""How kernels are compiled and how their rows are shared out among Numba's threads.

A *step* does the work for rows `first` to `last`; a *kernel* is what the engine calls, and shares the rows of
its step out. Rows are given as a flat array and a stride in elements, so that one compiled kernel serves
contiguous arrays and column slices alike. The parts into which rows are cut depend on sizes alone, never on
the number of threads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import from_dtype, njit, typeof, types
from numba.core import cgutils
from numba.extending import lower_builtin, type_callable

from . import threads
from .vector import MOST_RANGES, run_parts

# A kernel from the disk cache crashes without: Numba (0.68) forgets that it links in a loop which needs
# threads.
threads.start()

# "numpy": x / 0 is inf, which needs no branch. "contract": products and sums fuse; inf and NaN keep their
# meaning.
STEP: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract"}}
KERNEL: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}


def read(ndim: int) -> Callable[[Any], Any]:
    """An array of the call's float type that a kernel only reads: any strides, read-only or not."""
    return lambda number: types.Array(number, ndim, "A", readonly=True)


def write(ndim: int) -> Callable[[Any], Any]:
    """An array of the call's float type that a kernel writes, of any strides."""
    return lambda number: types.Array(number, ndim, "A")


def any_strides(*arguments: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Compile a kernel once for each float type, whatever the layout of its arrays, when it is first called.

    Numba by itself compiles anew for contiguous, strided and read-only arrays. `arguments` are Numba types or
    functions of the float type, which is that of the first array. What is compiled is called without Numba's search for
    a version that fits the arguments, which takes as long as a small kernel: the engine has checked their types.
    """

    def decorate(kernel: Callable[..., None]) -> Callable[..., None]:
        versions, entries = {}, {}  # by dtype: what Numba compiled, and what is called of it

        def compiled(dtype: Any) -> Callable[..., None]:
            number = from_dtype(dtype)
            signature = types.void(*[kind if isinstance(kind, types.Type) else kind(number) for kind in arguments])
            versions[dtype] = njit(signature, **KERNEL)(kernel)
            entries[dtype] = versions[dtype].get_compile_result(signature).entry_point
            return entries[dtype]

        @functools.wraps(kernel)
        def call(x: Any, *others: Any) -> None:
            (entries.get(x.dtype) or compiled(x.dtype))(x, *others)

        return call

    return decorate


def share(step: Callable[..., None], operands: tuple[Any, ...], rows: int, parts: int) -> None:
    """Call ``step(*operands, first, last)`` for the `parts` ranges that make up the rows, several at once.

    In a kernel the loop over the parts is `run_parts`, which knows the step by its address: inside a
    ``prange`` of its own every step would be compiled six times (2 s a kernel instead of 0.5 s).
    """
    step = getattr(step, "py_func", step)
    for part in range(parts):
        step(*operands, part * rows // parts, (part + 1) * rows // parts)


@type_callable(share)
def _type_share(context: Any) -> Callable[..., Any]:
    def typing(step: Any, operands: Any, rows: Any, parts: Any) -> Any:
        context.resolve_function_type(step, (*operands, types.intp, types.intp), {})  # compiles the step
        return types.none

    return typing


@lower_builtin(share, types.Dispatcher, types.BaseTuple, types.Integer, types.Integer)
def _lower_share(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    values = [*cgutils.unpack_tuple(builder, args[1]), *args[2:]]  # the operands, rows, parts
    call = cgutils.alloca_once(builder, ir.LiteralStructType([value.type for value in values]))
    builder.store(cgutils.make_anonymous_struct(builder, values), call)
    task = _task(context, builder.module, sig, call.type)
    with builder.if_else(builder.icmp_signed("==", args[3], args[3].type(1))) as (one, many):
        with one:
            builder.call(task, [cgutils.intp_t(0), call])
        with many:
            taken = cgutils.alloca_once(builder, ir.ArrayType(cgutils.intp_t, MOST_RANGES), zfill=True)
            _run_parts(context, builder, [args[3], task, call, taken])
    return context.get_dummy_value()


def _task(context: Any, module: ir.Module, sig: Any, call_type: ir.Type) -> ir.Function:
    """The C function ``void (intp part, call *)`` that calls the step on one part."""
    step_types = (*sig.args[1], types.intp, types.intp)
    compiled = sig.args[0].dispatcher.overloads[step_types]
    context.active_code_library.add_linking_library(compiled.library)
    kind = ir.FunctionType(ir.VoidType(), [cgutils.intp_t, call_type])
    task = ir.Function(module, kind, module.get_unique_name("task"))
    task.linkage = "internal"
    builder = ir.IRBuilder(task.append_basic_block())
    *operands, rows, parts = cgutils.unpack_tuple(builder, builder.load(task.args[1]))
    first = builder.sdiv(builder.mul(task.args[0], rows), parts)
    last = builder.sdiv(builder.mul(builder.add(task.args[0], cgutils.intp_t(1)), rows), parts)
    context.call_internal_no_propagate(builder, compiled.fndesc, compiled.signature, [*operands, first, last])
    builder.ret_void()
    return task


def _run_parts(context: Any, builder: ir.IRBuilder, args: list[ir.Value]) -> None:
    """Call the compiled loop over threads: number of parts, task, its argument, counts."""
    function = typeof(run_parts)
    signature = context.typing_context.resolve_function_type(function, (types.intp,) * 4, {})
    implementation = context.get_function(function, signature)
    context.add_linking_libs(implementation.libs)
    implementation(builder, [args[0], *(builder.ptrtoint(arg, cgutils.intp_t) for arg in args[1:])])
