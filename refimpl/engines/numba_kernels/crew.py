"""Threads that stay awake between the small products of decoding.

A step of decoding is hundreds of products of 50 to 500 microseconds, a few small ops apart. To wake a sleeping
thread takes as long as such a product, and on a virtual machine the thread often wakes on the core of its caller and
waits there for its turn. So these threads look for work for a moment before they sleep, and give their core to whoever
wants it while they look. Nobody waits for one that sleeps: parts of the work are taken one by one, first those of the
own share, which lie side by side in memory, then what is left of other shares. Who does a part never changes a result.

The crew and its callers speak through one array of integers, the *board*, each number on a cache line of its own:

    open     the number of the task that may be joined, or 0
    joined   threads that work on it
    busy     1 while a caller uses the crew
    tasks    how many there were
    quit     1 when the threads are to end
    yielder  address of the system's function that lets other threads run
    members  threads, the caller included
    parts, function, argument   of the task: ``function(part, argument)`` for every part
    next     for each member the next part of its share
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import platform
import threading
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .vector import invoke

_LINE = 64  # bytes of a cache line
_OPEN, _JOINED, _BUSY, _TASKS, _QUIT, _YIELDER, _MEMBERS, _PARTS, _FUNCTION, _ARGUMENT, _NEXT = range(
    0, 11 * _LINE, _LINE
)
_LOOKS = 40  # at the board before a thread offers its core to others: some 2 us
_OFFERS = 400  # without work before a thread sleeps: some 1 ms, more than the ops between two products take
# What tells a processor that a loop waits: an intrinsic of LLVM and its argument.
_PAUSES = {
    "x86_64": ("llvm.x86.sse2.pause", ()), "amd64": ("llvm.x86.sse2.pause", ()),
    "aarch64": ("llvm.aarch64.hint", (1,)), "arm64": ("llvm.aarch64.hint", (1,)),
}  # fmt: skip


def _place(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return builder.inttoptr(address, ir.IntType(64).as_pointer())


@intrinsic
def _load(typingctx: Any, address: Any) -> Any:
    """Read an int64 that other threads write."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.load_atomic(_place(builder, args[0]), "seq_cst", 8)

    return types.int64(types.intp), codegen


@intrinsic
def _store(typingctx: Any, address: Any, value: Any) -> Any:
    """Write an int64 that other threads read."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        builder.store_atomic(args[1], _place(builder, args[0]), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.intp, types.int64), codegen


@intrinsic
def _add(typingctx: Any, address: Any, value: Any) -> Any:
    """Add to an int64, as one step among threads; what it was before."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.atomic_rmw("add", _place(builder, args[0]), args[1], "seq_cst")

    return types.int64(types.intp, types.int64), codegen


@intrinsic
def _swap(typingctx: Any, address: Any, value: Any) -> Any:
    """Write an int64, as one step among threads; what it was before."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.atomic_rmw("xchg", _place(builder, args[0]), args[1], "seq_cst")

    return types.int64(types.intp, types.int64), codegen


@intrinsic
def _pause(typingctx: Any) -> Any:
    """Tell the processor that this is a loop that waits."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        name, arguments = _PAUSES.get(platform.machine().lower(), ("", ()))
        if name:
            number = ir.IntType(32)
            kind = ir.FunctionType(ir.VoidType(), [number] * len(arguments))
            function = cgutils.get_or_insert_function(builder.module, kind, name)
            builder.call(function, [number(argument) for argument in arguments])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _call(typingctx: Any, function: Any) -> Any:
    """Call the C function ``int (*)(void)`` at an address."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        kind = ir.FunctionType(ir.IntType(32), [])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.intp), codegen


@njit(nogil=True, cache=True)
def _work(board: int, member: int) -> None:
    """Do parts of the open task until none is left: of the own share, then of those after it."""
    members, parts = _load(board + _MEMBERS), _load(board + _PARTS)
    function, argument = _load(board + _FUNCTION), _load(board + _ARGUMENT)
    for k in range(members):
        owner = (member + k) % members
        stop = (owner + 1) * parts // members
        part = _add(board + _NEXT + owner * _LINE, 1)
        while part < stop:
            invoke(np.intp(function), np.intp(part), np.intp(argument))
            part = _add(board + _NEXT + owner * _LINE, 1)


@njit(nogil=True, cache=True)
def run_on_crew(parts: int, function: int, argument: int, board: int) -> None:
    """Call ``function(part, argument)``, both given by address, for all parts, with the members that are awake."""
    if board == 0 or _swap(board + _BUSY, 1):  # no crew, or another caller has it
        for part in range(parts):
            invoke(function, part, argument)
        return
    members = _load(board + _MEMBERS)
    _store(board + _PARTS, parts)
    _store(board + _FUNCTION, function)
    _store(board + _ARGUMENT, argument)
    for member in range(members):
        _store(board + _NEXT + member * _LINE, member * parts // members)
    _store(board + _OPEN, _add(board + _TASKS, 1) + 1)
    _work(board, 0)
    _store(board + _OPEN, 0)
    looks = 0
    while _load(board + _JOINED):  # who joins later sees that nothing is open
        _pause()
        looks += 1
        if looks % _LOOKS == 0:
            _call(np.intp(_load(board + _YIELDER)))
    _store(board + _BUSY, 0)


@njit(nogil=True, cache=True)
def _serve(board: int, member: int) -> None:
    """Join tasks as they open; return when none has opened for a while."""
    served, idle = 0, 0
    while idle < _LOOKS * _OFFERS and not _load(board + _QUIT):
        task = _load(board + _OPEN)
        if task != 0 and task != served:
            _add(board + _JOINED, 1)
            if _load(board + _OPEN) == task:
                _work(board, member)
                served = task
            _add(board + _JOINED, -1)
            idle = 0
        else:
            _pause()
            idle += 1
            if idle % _LOOKS == 0:
                _call(np.intp(_load(board + _YIELDER)))


_BOARDS: list[Any] = []  # never freed: a kernel may still look at the board of a crew that has ended


class Crew:
    """Threads of Python that run compiled code only, started when they are first needed.

    Parameters
    ----------
    members : int
        Threads that work at once, the caller included.
    """

    def __init__(self, members: int) -> None:
        memory = np.zeros(_NEXT // 8 + (members + 1) * _LINE // 8, np.int64)
        self._memory = memory
        _BOARDS.append(memory)
        self.board = -(-memory.ctypes.data // _LINE) * _LINE
        self._asleep: list[threading.Lock] = []
        self._threads: list[threading.Thread] = []
        self._write(_MEMBERS, members)
        self._write(_YIELDER, _yielder())
        self._write(_QUIT, 1)
        _serve(self.board, 0)  # compiles here, not in several threads at once, and returns
        self._write(_QUIT, 0)
        for member in range(1, members):
            thread = threading.Thread(target=self._live, args=(member,), name=f"effref-crew-{member}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def wake(self) -> int:
        """Wake who sleeps; the address of the board, which kernels are given."""
        while self._asleep:
            with contextlib.suppress(IndexError):  # another caller was faster
                self._asleep.pop().release()
        return self.board

    def end(self) -> None:
        """End the threads."""
        self._write(_QUIT, 1)
        for thread in self._threads:
            while thread.is_alive():
                self.wake()
                thread.join(0.001)

    def _live(self, member: int) -> None:
        bed = threading.Lock()
        bed.acquire()
        while not self._read(_QUIT):
            _serve(self.board, member)
            self._asleep.append(bed)
            bed.acquire()

    def _read(self, place: int) -> int:
        return int(self._memory[(self.board + place - self._memory.ctypes.data) // 8])

    def _write(self, place: int, value: int) -> None:
        self._memory[(self.board + place - self._memory.ctypes.data) // 8] = value


def _yielder() -> int:
    """Address of the function by which a thread offers its core to others."""
    library = ctypes.WinDLL("kernel32") if os.name == "nt" else ctypes.CDLL(None)  # type: ignore[attr-defined,unused-ignore]
    function = library.SwitchToThread if os.name == "nt" else library.sched_yield
    return int(ctypes.cast(function, ctypes.c_void_p).value or 0)


_crew: Crew | None = None
_size = 0


def board(members: int) -> int:
    """The board of a crew of so many threads, all of them awake or on their way; 0 where one thread is all."""
    global _crew, _size
    if members != _size:
        dismiss()
        _crew, _size = (Crew(members) if members > 1 else None), members
    return _crew.wake() if _crew else 0


def dismiss() -> None:
    """End the crew; the next call of `board` starts another."""
    global _crew, _size
    if _crew:
        _crew.end()
    _crew, _size = None, 0


def _forget() -> None:
    """After a fork the threads are the parent's; the child starts its own."""
    global _crew, _size
    _crew, _size = None, 0


atexit.register(dismiss)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
