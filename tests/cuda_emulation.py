"""CUDA on the CPU: a stand-in for `cupy` that runs the engine's kernels and cuBLAS calls in host memory.

The sources are compiled by g++ and run thread by thread with real barriers; products come from the raw pointers,
strides and flags that cuBLAS would be given; guards around every array catch what is written outside it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import math
import os
import re
import shutil
import subprocess
import tempfile
import time
import types
from pathlib import Path

import numpy as np

SHIM = Path(__file__).parent / "cuda_shim.h"
HEADERS = ("cuda_fp16.h", "cuda_runtime.h")  # what the sources include; the shim stands for all of them

EXPORT = """
extern "C" const char* run_{index}(const unsigned* shape, void** arguments, int shared_bytes) {{
    return emulation::run({name}, shape, arguments, shared_bytes);
}}
extern "C" const char* kinds_{index}() {{ return emulation::kinds({name}); }}
"""

FLAGS = (
    "-DEMULATED", "-O1", "-U_FORTIFY_SOURCE", "-fno-strict-aliasing", "-shared", "-fPIC",
    "-fstack-clash-protection", "-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error",
)  # fmt: skip
SHARED_BYTES = 227 << 10  # of one block, on an H100

# Around every array lie signalling NaNs: reading them poisons a result, writing what was computed quiets them. Around
# integers lie bytes that hardly any result has.
GUARD = 512  # elements
SIGNALS = {
    np.dtype(np.float16): (np.uint16, 0x7D00),
    np.dtype(np.float32): (np.uint32, 0x7FA00000),
    np.dtype(np.float64): (np.uint64, 0x7FF4 << 48),
}
ALIGNMENT = 256  # bytes, of CuPy's arrays


def missing() -> str | None:
    """What this machine lacks to run kernels on the CPU; None where it can."""
    if shutil.which("g++") is None:
        return "no g++ to run the kernels on the CPU"
    probe = ["g++", "-x", "c++", "-fsyntax-only", "-"]
    if subprocess.run(probe, input="_Float16 x;", capture_output=True, text=True, check=False).returncode:
        return "this g++ has no _Float16, which stands for half here: version 13 has, on x86-64 also 12"
    return None


class HostArray(np.ndarray):
    """A NumPy array with CuPy's `data.ptr`."""

    @property
    def data(self):
        return types.SimpleNamespace(ptr=self.ctypes.data)

    def set(self, host, stream=None):
        assert (host.shape, host.dtype) == (self.shape, self.dtype)
        assert all(array.flags.c_contiguous for array in (host, self))
        self[...] = host


@functools.cache
def half_instructions() -> tuple[str, ...]:
    """The option for the CPU's own conversions of half, many times faster, where it has them."""
    cpu = Path("/proc/cpuinfo")
    return ("-mf16c",) if cpu.exists() and " f16c " in cpu.read_text() else ()


def compiler_options(options) -> list[str]:
    """Those of NVRTC's options that g++ knows."""
    kept = []
    for before, option in itertools.pairwise(("", *options)):
        if before in ("-I", "-D") or re.match(r"-I|-D|--?std=", option):
            kept.append(option)
    return kept


@functools.cache
def compiled(folder: Path, code: str, options: tuple[str, ...], names: tuple[str, ...]) -> ctypes.CDLL:
    """The library of the kernels `names`; one that lies in the folder is not compiled again."""
    code += "".join(EXPORT.format(index=index, name=name) for index, name in enumerate(names))
    flags = [*compiler_options(options), *half_instructions(), *FLAGS]
    key = hashlib.sha256("\0".join((SHIM.read_text(), code, *flags)).encode()).hexdigest()[:24]
    library = folder / f"{key}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            for header in HEADERS:
                Path(work, header).write_text(f'#include "{SHIM}"\n')
            Path(work, "module.cpp").write_text(f'#include "{SHIM}"\n#line 1 "module.cu"\n{code}')
            command = ["g++", *flags, f"-I{work}", "module.cpp", "-o", "module.so"]
            done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            os.replace(Path(work, "module.so"), library)
    return ctypes.CDLL(str(library))


class HostModule:
    """`cupy.RawModule`, compiled by g++."""

    def __init__(self, cupy, code, options, name_expressions):
        self.cupy, self.names = cupy, tuple(name_expressions)
        self.library = compiled(cupy.folder, code, tuple(options), self.names)

    def get_function(self, name):
        return HostKernel(self.cupy, self.library, name, self.names.index(name))


class HostKernel:
    """`cupy.RawKernel`: the call checks what a device would not."""

    def __init__(self, cupy, library, name, index):
        self.cupy, self.name, self.max_dynamic_shared_size_bytes = cupy, name, 48 << 10
        self.function, kinds = getattr(library, f"run_{index}"), getattr(library, f"kinds_{index}")
        self.function.restype = kinds.restype = ctypes.c_char_p
        self.kinds = kinds().decode().split()

    def __call__(self, grid, block, args, *, shared_mem=0):
        given = ["p" if isinstance(a, np.ndarray) else getattr(a, "dtype", np.dtype(object)).str[1:] for a in args]
        assert given == self.kinds, f"{self.name} takes {self.kinds}; given {given}"
        grid, block = ((*shape, 1, 1)[:3] for shape in (grid, block))
        assert all(1 <= g <= most for g, most in zip(grid, (2**31 - 1, 65535, 65535), strict=True)), grid
        assert all(1 <= b <= most for b, most in zip(block, (1024, 1024, 64), strict=True)), block
        assert math.prod(block) <= 1024, block
        allowed = self.max_dynamic_shared_size_bytes
        assert shared_mem <= allowed <= SHARED_BYTES, f"{self.name}: {shared_mem} bytes of shared memory, of {allowed}"
        held = [ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else np.asarray(a) for a in args]
        pointers = [h.ctypes.data if isinstance(h, np.ndarray) else ctypes.addressof(h) for h in held]
        shape = (ctypes.c_uint * 6)(*grid, *block)
        error = self.function(shape, (ctypes.c_void_p * len(pointers))(*pointers), int(shared_mem))
        assert error is None, f"{self.name}: {error.decode()}"
        self.cupy.check_guards()


class HostBlas:
    """`gemmStridedBatchedEx` by the letter: column-major matrices at addresses."""

    CUBLAS_OP_N, CUBLAS_OP_T, CUBLAS_GEMM_DEFAULT = 0, 1, -1
    CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_64F = 68, 70

    def __init__(self, cupy):
        self.cupy, self.calls = cupy, 0

    def gemmStridedBatchedEx(
        self, handle, turn_a, turn_b, m, n, k, alpha, a, a_kind, lda, a_step, b, b_kind, ldb, b_step,
        beta, c, c_kind, ldc, c_step, count, compute, algorithm,
    ):  # fmt: skip
        self.calls += 1
        assert handle == 1
        assert compute == (70 if a_kind == 1 else 68)
        assert min(m, n, k, count) > 0
        assert lda >= (k if turn_a else m)
        assert ldb >= (n if turn_b else k)
        assert ldc >= m
        wide = np.float64 if compute == 70 else np.float32
        factors = [
            ctypes.cast(p, ctypes.POINTER(np.ctypeslib.as_ctypes_type(wide))).contents.value for p in (alpha, beta)
        ]
        for i in range(count):
            x = self._matrix(a, a_kind, i * a_step, lda, *((k, m) if turn_a else (m, k)))
            y = self._matrix(b, b_kind, i * b_step, ldb, *((n, k) if turn_b else (k, n)))
            z = self._matrix(c, c_kind, i * c_step, ldc, m, n)
            product = (x.T if turn_a else x).astype(wide) @ (y.T if turn_b else y).astype(wide)
            product *= wide(factors[0])
            z[...] = product if factors[1] == 0 else product + wide(factors[1]) * z
        self.cupy.check_guards()

    @staticmethod
    def _matrix(address, kind, offset, leading, rows, columns):
        dtype = np.dtype({2: np.float16, 0: np.float32, 1: np.float64}[kind])
        size = (columns - 1) * leading + rows
        memory = (ctypes.c_char * (size * dtype.itemsize)).from_address(address + offset * dtype.itemsize)
        flat = np.frombuffer(memory, dtype)
        return np.lib.stride_tricks.as_strided(flat, (rows, columns), (dtype.itemsize, leading * dtype.itemsize))


class HostCupy(types.ModuleType):
    """`cupy` as far as the engine uses it; what is not here is NumPy's."""

    def __init__(self, folder):
        super().__init__("cupy")
        self.folder, self.guarded, self.allocated = folder, [], []
        event = type(
            "Event", (), {"record": lambda e: setattr(e, "s", time.perf_counter()), "synchronize": lambda e: 0}
        )
        self.cuda = types.SimpleNamespace(
            cublas=HostBlas(self), nvrtc=None, Event=event, get_elapsed_time=lambda a, b: 1e3 * (b.s - a.s),
            device=types.SimpleNamespace(get_cublas_handle=lambda: 1),
            alloc_pinned_memory=bytearray, get_current_stream=lambda: None,
            Device=lambda: types.SimpleNamespace(id=0, synchronize=lambda: None, pci_bus_id="0000:01:00.0"),
            runtime=types.SimpleNamespace(
                CUDA_R_16F=2, CUDA_R_32F=0, CUDA_R_64F=1, getDeviceCount=lambda: 1, memGetInfo=lambda: (10, 20),
                getDeviceProperties=lambda i: {
                    "name": b"emulated", "major": 9, "minor": 0, "multiProcessorCount": 4,
                    "sharedMemPerBlockOptin": SHARED_BYTES,
                },
            ),
        )  # fmt: skip

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        found = getattr(np, name)
        if isinstance(found, type):  # a dtype
            return found

        def wrapped(*args, **kwargs):
            result = found(*args, **kwargs)
            return result.view(HostArray) if isinstance(result, np.ndarray) else result

        return wrapped

    def RawModule(self, code, options, name_expressions):
        return HostModule(self, code, options, name_expressions)

    def get_default_memory_pool(self):
        return types.SimpleNamespace(
            free_bytes=lambda: 5, used_bytes=lambda: 2, total_bytes=lambda: 7, get_limit=lambda: 0
        )

    def empty(self, shape, dtype=np.float64):
        dtype, size = np.dtype(dtype), math.prod(shape)
        space = np.empty((size + 2 * GUARD) * dtype.itemsize + ALIGNMENT, np.uint8)
        start = -space.ctypes.data % ALIGNMENT
        memory = space[start : space.size - ALIGNMENT + start].view(dtype)
        bits, signal = SIGNALS.get(dtype, (np.uint8, 0xA5))
        per = dtype.itemsize // np.dtype(bits).itemsize
        guards = memory.view(bits)[: GUARD * per], memory.view(bits)[(GUARD + size) * per :]
        for guard in guards:
            guard[...] = signal
        self.guarded = [*self.guarded[-3:], (guards, signal)]  # the last few; more would be slow
        self.allocated.append(size * dtype.itemsize)
        values = memory[GUARD : GUARD + size]
        values[...] = np.nan if dtype.kind == "f" else 1
        return values.reshape(shape).view(HostArray)

    def zeros(self, shape, dtype=np.float64):
        out = self.empty(shape, dtype)
        out[...] = 0
        return out

    def asarray(self, host):
        out = self.empty(host.shape, host.dtype)
        out[...] = host
        return out

    def asnumpy(self, array):
        return np.array(array)

    def check_guards(self):
        for guards, signal in self.guarded:
            assert all((guard == signal).all() for guard in guards), "written outside an array"
