"""CUDA on the CPU: a stand-in for `cupy` that runs the engine's kernels and cuBLAS calls in host memory.

The sources are compiled by g++ and run thread by thread with real barriers; products come from the raw pointers,
strides and flags that cuBLAS would be given; guards around every array catch what is written outside it.
"""

from __future__ import annotations

import ctypes
import math
import subprocess
import time
import types

import numpy as np

SHIM = r"""
#include <cmath>
#include <csetjmp>
#include <cstring>
#include <ucontext.h>
#include <utility>
#include <vector>
using std::erf; using std::exp; using std::sqrt; using std::tanh;
#define __device__
#define __global__
#define __shared__ static
typedef _Float16 __half;
struct Dim { unsigned x, y; };
static Dim blockIdx, blockDim, threadIdx;
static float __int_as_float(int bits) { float x; std::memcpy(&x, &bits, 4); return x; }

struct Thread { ucontext_t context; jmp_buf place; std::vector<char> stack; bool started, done; };
static jmp_buf scheduler;
static Thread* current;
static void __syncthreads() { if (!_setjmp(current->place)) _longjmp(scheduler, 1); }
__attribute__((noinline)) static void resume() {
    if (_setjmp(scheduler)) return;
    if (current->started) _longjmp(current->place, 1);
    current->started = true;
    setcontext(&current->context);
}

template <typename... P, std::size_t... I>
void call(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) { kernel(*(P*) arguments[I]...); }

template <typename... P> struct Job { static void (*kernel)(P...); static void** arguments; };
template <typename... P> void (*Job<P...>::kernel)(P...);
template <typename... P> void** Job<P...>::arguments;
template <typename... P> void body() {
    call(Job<P...>::kernel, Job<P...>::arguments, std::index_sequence_for<P...>());
    current->done = true;
    _longjmp(scheduler, 1);
}

// Run a kernel block by block, its threads in turn up to each barrier; 1 if only some of them reach one.
template <typename... P> int run(void (*kernel)(P...), unsigned* shape, void** arguments) {
    Job<P...>::kernel = kernel, Job<P...>::arguments = arguments;
    blockDim = {shape[1], shape[2]};
    static std::vector<Thread> threads;
    threads.resize(blockDim.x * blockDim.y);
    for (blockIdx = {0, 0}; blockIdx.x < shape[0]; ++blockIdx.x) {
        for (Thread& thread : threads) {
            thread.stack.resize(1 << 16), thread.started = thread.done = false;
            getcontext(&thread.context);
            thread.context.uc_stack.ss_sp = thread.stack.data(), thread.context.uc_stack.ss_size = thread.stack.size();
            makecontext(&thread.context, (void (*)()) body<P...>, 0);
        }
        for (std::size_t finished = 0; finished < threads.size();) {
            finished = 0;
            for (std::size_t i = 0; i < threads.size(); ++i) {
                current = &threads[i], threadIdx = {unsigned(i) % blockDim.x, unsigned(i) / blockDim.x};
                if (!current->done) resume();
                finished += current->done;
            }
            if (finished && finished < threads.size()) return 1;
        }
    }
    return 0;
}
template <typename T> struct Kind { static const char code = 'p'; };
template <> struct Kind<long long> { static const char code = 'i'; };
template <> struct Kind<double> { static const char code = 'd'; };
template <typename... P> const char* kinds(void (*)(P...)) {
    static const char codes[] = {Kind<P>::code..., 0};
    return codes;
}
"""

EXPORT = """
extern "C" int run_{index}(unsigned* shape, void** arguments) {{ return run({name}, shape, arguments); }}
extern "C" const char* kinds_{index}() {{ return kinds({name}); }}
"""

# Around every array lie signalling NaNs: reading them poisons a result, writing what was computed quiets them.
GUARD = 512  # elements
SIGNALS = {np.float16: (np.uint16, 0x7D00), np.float32: (np.uint32, 0x7FA00000), np.float64: (np.uint64, 0x7FF4 << 48)}


class HostArray(np.ndarray):
    """A NumPy array with CuPy's `data.ptr`."""

    @property
    def data(self):
        return types.SimpleNamespace(ptr=self.ctypes.data)


class HostModule:
    """`cupy.RawModule`, compiled by g++."""

    def __init__(self, cupy, code, options, name_expressions):
        self.cupy, self.names = cupy, list(name_expressions)
        folder = cupy.folder / f"module{len(list(cupy.folder.iterdir()))}"
        folder.mkdir()
        (folder / "cuda_fp16.h").write_text(SHIM)
        exports = (EXPORT.format(index=index, name=name) for index, name in enumerate(self.names))
        (folder / "module.cpp").write_text(code + "".join(exports))
        command = [
            "g++",
            *options,
            "-O1",
            "-U_FORTIFY_SOURCE",
            "-shared",
            "-fPIC",
            f"-I{folder}",
            "module.cpp",
            "-o",
            "module.so",
        ]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        self.library = ctypes.CDLL(str(folder / "module.so"))

    def get_function(self, name):
        index = self.names.index(name)
        function, kinds = getattr(self.library, f"run_{index}"), getattr(self.library, f"kinds_{index}")
        kinds.restype = ctypes.c_char_p
        codes = kinds().decode()

        def launch(grid, block, arguments, shared_mem=0):
            given = "".join("p" if isinstance(a, np.ndarray) else a.dtype.kind.replace("f", "d") for a in arguments)
            assert given == codes, f"{name} takes {codes}; given {given}"
            assert all(not isinstance(a, np.generic) or a.itemsize == 8 for a in arguments)
            assert math.prod(block) <= 1024
            shape = (ctypes.c_uint * 3)(*grid, *block, *(1,) * (2 - len(block)))
            boxes = [ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else None for a in arguments]
            held = [np.asarray(a) for a in arguments]
            pointers = [
                ctypes.addressof(box) if box is not None else scalar.ctypes.data
                for box, scalar in zip(boxes, held, strict=True)
            ]
            assert function(shape, (ctypes.c_void_p * len(pointers))(*pointers)) == 0, f"{name}: barrier not met by all"
            self.cupy.check_guards()

        return launch


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
            Device=lambda: types.SimpleNamespace(id=0, synchronize=lambda: None, pci_bus_id="0000:01:00.0"),
            runtime=types.SimpleNamespace(
                CUDA_R_16F=2, CUDA_R_32F=0, CUDA_R_64F=1, getDeviceCount=lambda: 1, memGetInfo=lambda: (10, 20),
                getDeviceProperties=lambda i: {"name": b"emulated"},
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
        size = math.prod(shape)
        memory = np.full(size + 2 * GUARD, np.nan if np.dtype(dtype).kind == "f" else 1, dtype)
        if memory.dtype.type in SIGNALS:
            bits, signal = SIGNALS[memory.dtype.type]
            guards = memory.view(bits)[:GUARD], memory.view(bits)[GUARD + size :]
            for guard in guards:
                guard[...] = signal
            self.guarded = [*self.guarded[-3:], (guards, signal)]  # the last few; more would be slow
        self.allocated.append(size * memory.dtype.itemsize)
        return memory[GUARD : GUARD + size].reshape(shape).view(HostArray)

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
