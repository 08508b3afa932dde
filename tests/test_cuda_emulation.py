"""The emulation of CUDA itself: small kernels against NumPy, and errors where a device would give anything."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from cuda_emulation import HostCupy, missing

import refimpl

TENSOR_CORES = Path(refimpl.__file__).parent / "engines" / "cuda" / "tensor_cores.cuh"

SOURCE = (
    """#include <cuda_fp16.h>\n"""
    + TENSOR_CORES.read_text()
    + r"""
const unsigned ALL = 0xffffffffu;

// x (blocks, n) -> out (blocks,): sums by shuffles.
template <typename T> __global__ void __launch_bounds__(256) kernel_sum(const T* x, T* out, int n) {
    __shared__ T cells[8];
    T sum = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += x[(long long) blockIdx.x * n + i];
    for (int by = 16; by > 0; by /= 2) sum += __shfl_xor_sync(ALL, sum, by);
    if (threadIdx.x % 32 == 0) cells[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    sum = threadIdx.x < blockDim.x / 32 ? cells[threadIdx.x] : T(0);
    for (int by = 16; by > 0; by /= 2) sum += __shfl_down_sync(ALL, sum, by);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

// Every value of every kind of shuffle and vote, (9, threads).
__global__ void kernel_shuffles(const int* x, int* out) {
    const int i = threadIdx.x, n = blockDim.x;
    out[i] = __shfl_sync(ALL, x[i], 5);
    out[n + i] = __shfl_sync(ALL, x[i], 3, 8);
    out[2 * n + i] = __shfl_xor_sync(ALL, x[i], 6);
    out[3 * n + i] = __shfl_up_sync(ALL, x[i], 3);
    out[4 * n + i] = __shfl_down_sync(ALL, x[i], 3, 16);
    out[5 * n + i] = __ballot_sync(ALL, x[i] % 3 == 0);
    out[6 * n + i] = __any_sync(ALL, x[i] == 70) * 2 + __all_sync(ALL, x[i] < 70);
    out[7 * n + i] = __syncthreads_count(x[i] % 2);
    const unsigned mask = i % 32 < 16 ? 0xffffu : 0xffff0000u;
    if (i % 32 < 16) out[8 * n + i] = __shfl_xor_sync(mask, x[i], 1);
    else out[8 * n + i] = __shfl_xor_sync(mask, x[i], 2);
    __syncwarp();
}

// Where every thread of a grid of three dimensions is.
__global__ void kernel_where(int* out) {
    const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    const int i = block * blockDim.x * blockDim.y * blockDim.z + thread;
    out[i] = (blockIdx.z * 10 + blockIdx.y) * 10 + blockIdx.x;
    out[i] = ((out[i] * 10 + threadIdx.z) * 10 + threadIdx.y) * 10 + threadIdx.x;
}

// A histogram in dynamic shared memory, added to the global one.
__global__ void kernel_histogram(const unsigned char* x, unsigned* counts, int* extremes, int n, int bins) {
    DYNAMIC_SHARED(unsigned, local);
    for (int i = threadIdx.x; i < bins; i += blockDim.x) local[i] = 0;
    __syncthreads();
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
        atomicAdd(&local[x[i]], 1u);
        atomicMax(extremes, int(x[i])), atomicMin(extremes + 1, int(x[i])), atomicOr(extremes + 2, int(x[i]));
    }
    __syncthreads();
    for (int i = threadIdx.x; i < bins; i += blockDim.x) atomicAdd(&counts[i], local[i]);
    if (threadIdx.x == 0) atomicCAS(extremes + 3, int(blockIdx.x), int(blockIdx.x) + 1);
}

// out (M, N) += a (M, K) b (K, N) with one warp per 16 by 8 tile, a and b through asynchronous copies in two buffers.
__global__ void kernel_product(const __half* a, const __half* b, float* out, int N, int K) {
    __shared__ __align__(16) __half tile[2][16 * 16], right[2][16 * 8];
    const int lane = threadIdx.x, row = blockIdx.y * 16, column = blockIdx.x * 8, g = lane / 4, t = lane % 4;
    auto copy = [&](int k) {
        const int buffer = k / 16 % 2;
        copy_async_16(&tile[buffer][lane * 8], &a[(row + lane / 2) * K + k + lane % 2 * 8]);
        if (lane < 16) copy_async_16(&right[buffer][lane * 8], &b[(k + lane) * N + column]);
        copy_async_commit();
    };
    float d[4] = {0, 0, 0, 0};
    copy(0);
    for (int k = 0; k < K; k += 16) {
        if (k + 16 < K) copy(k + 16);
        else copy_async_commit();
        copy_async_wait<1>();
        __syncwarp();
        unsigned left[4], other[4];  // the second half of the warp reads the same rows again
        ldmatrix_x4(left, &tile[k / 16 % 2][lane % 16 * 16 + lane / 16 * 8]);
        ldmatrix_x4_trans(other, &right[k / 16 % 2][lane % 16 * 8]);
        mma_m16n8k16_f16(d, left, {other[0], other[1]});
        __syncwarp();
    }
    for (int i = 0; i < 4; ++i) out[(row + g + i / 2 * 8) * N + column + t * 2 + i % 2] = d[i];
}

// One tile, registers by hand: int8 a (16, 32) and b (8, 32), transposed.
__global__ void kernel_tile(const unsigned* a, const unsigned* b, int* out) {
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    const unsigned left[4] = {a[g * 8 + t], a[(g + 8) * 8 + t], a[g * 8 + t + 4], a[(g + 8) * 8 + t + 4]};
    const unsigned right[2] = {b[g * 8 + t], b[g * 8 + t + 4]};
    int d[4] = {1, 2, 3, 4};
    mma_m16n8k32_s8(d, left, right);
    for (int i = 0; i < 4; ++i) out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

// What ldmatrix reads from memory (32, 8): (8, 32) registers.
__global__ void kernel_ldmatrix(const uint4* x, unsigned* out) {
    DYNAMIC_SHARED(uint4, rows);
    rows[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    unsigned r[4];
    ldmatrix_x4(r, rows + threadIdx.x);
    for (int i = 0; i < 4; ++i) out[i * 32 + threadIdx.x] = r[i];
    ldmatrix_x4_trans(r, rows + threadIdx.x);
    for (int i = 0; i < 4; ++i) out[(4 + i) * 32 + threadIdx.x] = r[i];
}

__global__ void kernel_dp4a(const int* a, const int* b, int* signed_out, unsigned* unsigned_out) {
    signed_out[threadIdx.x] = __dp4a(a[threadIdx.x], b[threadIdx.x], 7);
    unsigned_out[threadIdx.x] = __dp4a(unsigned(a[threadIdx.x]), unsigned(b[threadIdx.x]), 7u);
}

__global__ void kernel_vectors(const float4* x, __half2* out, float scale, bool twice, unsigned add, double more) {
    const float4 v = __ldg(x + threadIdx.x);
    __half2 low = __floats2half2_rn(v.x, v.y), high = __floats2half2_rn(v.z, v.w);
    const __half2 factor = __float2half2_rn(scale), sum = __float2half2_rn(float(add) + float(more));
    low = __hfma2(low, factor, sum), high = __hadd2(__hmul2(high, factor), sum);
    if (twice) low = __hadd2(low, low), high = __hadd2(high, high);
    out[2 * threadIdx.x] = low;
    const float2 wide = __half22float2(high);
    out[2 * threadIdx.x + 1] = __floats2half2_rn(wide.x, wide.y);
}

// --- errors ---

__global__ void kernel_deadlock(int* out) {
    if (threadIdx.x % 32 < 16) __syncthreads();
    else out[0] = __shfl_xor_sync(ALL, out[0], 1);
}
__global__ void kernel_two_collectives(int* out) {
    if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(ALL, 1, 1);
    else out[threadIdx.x] = __shfl_down_sync(ALL, 1, 1);
}
__global__ void kernel_two_masks(int* out) {
    out[threadIdx.x] = __shfl_xor_sync(threadIdx.x < 16 ? 0xffffffu : ALL, 1, 1);
}
__global__ void kernel_not_in_mask(int* out) { out[threadIdx.x] = __shfl_xor_sync(0xffffu, 1, 1); }
__global__ void kernel_two_barriers(int* out) {
    if (threadIdx.x < 32) __syncthreads();
    else
        __syncthreads();
}
__global__ void kernel_static_overflow(int* out) {
    __shared__ int cells[32];
    cells[threadIdx.x] = 1;
    __syncthreads();
    out[threadIdx.x] = cells[threadIdx.x ^ 1];
}
__global__ void kernel_dynamic_overflow(int* out) {
    DYNAMIC_SHARED(int, cells);
    cells[threadIdx.x] = 1;
}
__global__ void kernel_global_overflow(int* out) { out[threadIdx.x] = 1; }
__global__ void kernel_unaligned(int* out) { out[0] = reinterpret_cast<int4*>(out + threadIdx.x)->x; }
__global__ void kernel_nowhere(int* out) { *(volatile int*) (out - (1ll << 45)) = 1; }
__global__ void kernel_divides(int* out) { out[0] = out[0] / out[1]; }

// --- what is left out shows as NaN or as another result ---

__global__ void kernel_uninitialised(float* out) {
    __shared__ float cells[64];
    DYNAMIC_SHARED(float, more);
    if (threadIdx.x < 32) cells[threadIdx.x] = more[threadIdx.x] = 1;
    __syncthreads();
    out[threadIdx.x] = cells[threadIdx.x];
    out[blockDim.x + threadIdx.x] = more[threadIdx.x];
}
__global__ void kernel_no_wait(const float4* x, float4* out, int wait) {
    __shared__ float4 cells[32];
    copy_async_16(cells + threadIdx.x, x + threadIdx.x, threadIdx.x == 31 ? 4 : 16);
    copy_async_commit();
    if (wait) copy_async_wait<0>();
    out[threadIdx.x] = cells[threadIdx.x];
}
// Shifts a row to the right (by 1) or to the left (-1) through shared memory, with or without the barrier.
__global__ void kernel_shift(const float* x, float* out, int by, bool barrier) {
    __shared__ float cells[64];
    cells[threadIdx.x] = x[threadIdx.x];
    if (barrier) __syncthreads();
    out[blockIdx.x * blockDim.x + threadIdx.x] = cells[(threadIdx.x + blockDim.x - by) % blockDim.x];
}
__global__ void kernel_ended_lane(float* out) {
    if (threadIdx.x >= 20) return;
    out[threadIdx.x] = __shfl_down_sync(ALL, 1.0f, 4);
}
"""
)
KERNELS = [
    "kernel_sum<float>", "kernel_sum<double>", "kernel_sum<int>",
    *(f"kernel_{name}" for name in (
        "shuffles", "where", "histogram", "product", "tile", "ldmatrix", "dp4a", "vectors",
        "deadlock", "two_collectives", "two_masks", "not_in_mask", "two_barriers", "static_overflow",
        "dynamic_overflow", "global_overflow", "unaligned", "nowhere", "divides",
        "uninitialised", "no_wait", "shift", "ended_lane",
    )),
]  # fmt: skip


@pytest.fixture(scope="module")
def cupy(tmp_path_factory):
    if reason := missing():
        pytest.skip(reason)
    return HostCupy(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="module")
def kernel(cupy):
    module = cupy.RawModule(
        code=SOURCE, options=("--std=c++17", "--use_fast_math", "-DUNUSED=1"), name_expressions=KERNELS
    )
    return lambda name: module.get_function(f"kernel_{name}")


def integers(*shape, low=0, high=256, dtype=np.int32, seed=0):
    return np.random.default_rng([seed, *shape]).integers(low, high, shape).astype(dtype)


def normal(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("threads", [32, 64, 256])
@pytest.mark.parametrize(("name", "dtype"), [("float", np.float32), ("double", np.float64), ("int", np.int32)])
def test_shuffles_sum_rows(cupy, kernel, name, dtype, threads):
    x = integers(5, 777, low=-99, dtype=dtype)  # sums are exact
    out = cupy.empty((5,), dtype)
    kernel(f"sum<{name}>")((5,), (threads,), (cupy.asarray(x), out, np.int32(777)))
    np.testing.assert_array_equal(out, x.sum(1))


@pytest.mark.parametrize("warps", [1, 3])
def test_shuffles_and_votes_are_those_of_cuda(cupy, kernel, warps):
    x, lane = integers(32 * warps, high=100), np.arange(32)
    x[0] = 70
    out = cupy.empty((9, 32 * warps), np.int32)
    kernel("shuffles")((1,), (32 * warps,), (cupy.asarray(x), out))
    for warp in range(warps):
        v = x[32 * warp : 32 * warp + 32]
        expected = [
            np.full(32, v[5]), v[lane // 8 * 8 + 3], v[lane ^ 6], v[np.where(lane < 3, lane, lane - 3)],
            v[np.where(lane % 16 + 3 > 15, lane, lane + 3)],
            np.full(32, (1 << lane[v % 3 == 0].astype(np.uint64)).sum().astype(np.uint32).view(np.int32)),
            np.full(32, 2 * (v == 70).any() + (v < 70).all()), np.full(32, (x % 2).sum()),
            v[np.where(lane < 16, lane ^ 1, lane ^ 2)],
        ]  # fmt: skip
        np.testing.assert_array_equal(out[:, 32 * warp : 32 * warp + 32], expected)


def test_grids_and_blocks_have_three_dimensions(cupy, kernel):
    grid, block = (2, 3, 4), (5, 3, 2)
    out = cupy.empty((*grid[::-1], *block[::-1]), np.int32)
    kernel("where")(grid, block, (out,))
    indices = np.indices(out.shape)
    np.testing.assert_array_equal(out, sum(10 ** (5 - i) * indices[i] for i in range(6)))


def test_atomics_count_a_histogram(cupy, kernel):
    x = integers(5000, low=3, high=60, dtype=np.uint8)
    counts, extremes = cupy.zeros((64,), np.uint32), cupy.asarray(np.asarray([0, 255, 0, 0], np.int32))
    arguments = (cupy.asarray(x), counts, extremes, np.int32(5000), np.int32(64))
    kernel("histogram")((3,), (128,), arguments, shared_mem=256)
    np.testing.assert_array_equal(counts, np.bincount(x, minlength=64))
    np.testing.assert_array_equal(extremes, [x.max(), x.min(), np.bitwise_or.reduce(x), 3])


def test_tensor_cores_multiply_halves(cupy, kernel):
    a, b = normal(48, 80, dtype=np.float16), normal(80, 24, dtype=np.float16)
    out = cupy.empty((48, 24), np.float32)
    kernel("product")((3, 3), (32,), (cupy.asarray(a), cupy.asarray(b), out, np.int32(24), np.int32(80)))
    np.testing.assert_allclose(out, a.astype(float) @ b.astype(float), rtol=0, atol=80 * 2.0**-22)


def test_tensor_cores_multiply_int8(cupy, kernel):
    a, b = integers(16, 32, low=-128, high=128, dtype=np.int8), integers(8, 32, low=-128, high=128, dtype=np.int8)
    out = cupy.empty((16, 8), np.int32)
    kernel("tile")((1,), (32,), (cupy.asarray(a.view(np.uint32)), cupy.asarray(b.view(np.uint32)), out))
    start = np.tile([[1, 2], [3, 4]], (1, 4)).repeat(8, 0)
    np.testing.assert_array_equal(out, a.astype(int) @ b.T.astype(int) + start)


def test_ldmatrix_deals_rows_and_columns(cupy, kernel):
    x = integers(4, 8, 8, high=65536, dtype=np.uint16)  # four matrices
    out = cupy.empty((8, 32), np.uint32)
    kernel("ldmatrix")((1,), (32,), (cupy.asarray(x.view(np.uint32)), out), shared_mem=512)
    plain = [m.reshape(-1).view(np.uint32) for m in x]
    turned = [np.ascontiguousarray(m.T).reshape(-1).view(np.uint32) for m in x]
    np.testing.assert_array_equal(out, plain + turned)


def test_dp4a_is_a_product_of_four_bytes(cupy, kernel):
    a, b = integers(64, 4, dtype=np.uint8), integers(64, 4, dtype=np.uint8, seed=1)
    arrays = [cupy.asarray(v.view(np.int32)[:, 0]) for v in (a, b)]
    with_sign, without = cupy.empty((64,), np.int32), cupy.empty((64,), np.uint32)
    kernel("dp4a")((1,), (64,), (*arrays, with_sign, without))
    np.testing.assert_array_equal(with_sign, (a.view(np.int8).astype(int) * b.view(np.int8)).sum(1) + 7)
    np.testing.assert_array_equal(without, (a.astype(int) * b).sum(1) + 7)


def test_vectors_halves_and_scalars_of_every_type(cupy, kernel):
    x = integers(20, 4, low=-9, high=9, dtype=np.float32)
    out = cupy.empty((20, 4), np.float16)
    scalars = np.float32(0.5), np.bool_(True), np.uint32(3), np.float64(0.25)
    kernel("vectors")((1,), (20,), (cupy.asarray(x), out, *scalars))
    np.testing.assert_array_equal(out, 2 * (0.5 * x + 3.25))
    for wrong in (np.float64(0.5), np.float16(0.5), 0.5):
        with pytest.raises(AssertionError, match="kernel_vectors takes"):
            kernel("vectors")((1,), (20,), (cupy.asarray(x), out, wrong, *scalars[1:]))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("deadlock", "deadlock"), ("two_collectives", "different collectives"), ("two_masks", "different masks"),
        ("not_in_mask", "not in the mask"), ("two_barriers", "different barriers"),
        ("static_overflow", "out of an array's bounds"), ("unaligned", "not aligned"),
        ("dynamic_overflow", "outside the dynamic shared memory"), ("nowhere", "memory that is not there"),
        ("global_overflow", "written outside an array"), ("divides", "divided by zero"),
    ],
)  # fmt: skip
def test_what_a_device_would_not_say_is_an_error(cupy, kernel, name, message):
    out = cupy.zeros((32,), np.int32)
    with pytest.raises(AssertionError, match=message) as caught:
        kernel(name)((1,), (64,), (out,), shared_mem=252)
    cupy.guarded.clear()
    assert name == "global_overflow" or f"kernel_{name}" in str(caught.value)
    test_shuffles_sum_rows(cupy, kernel, "float", np.float32, 256)  # the next kernel runs as if nothing had been


def test_launches_beyond_the_limits_are_errors(cupy, kernel):
    out = cupy.zeros((32,), np.int32)
    shift = kernel("global_overflow")
    for grid, block in (((0,), (32,)), ((1, 65536), (32,)), ((1,), (1025,)), ((1,), (1, 1, 65)), ((1,), (32, 33))):
        with pytest.raises(AssertionError):
            shift(grid, block, (out,))
    with pytest.raises(AssertionError, match="shared memory"):
        shift((1,), (32,), (out,), shared_mem=49153)
    shift.max_dynamic_shared_size_bytes = 100_000
    shift((1,), (32,), (out,), shared_mem=100_000)
    assert out.all()


def test_uninitialised_shared_memory_shows(cupy, kernel):
    out = cupy.zeros((2, 64), np.float32)
    for threads in (32, 64):  # what the first launch wrote is not there in the second
        kernel("uninitialised")((2,), (threads,), (out,), shared_mem=256)
    np.testing.assert_array_equal(np.isnan(out), [[False] * 32 + [True] * 32] * 2)


def test_an_asynchronous_copy_that_is_not_waited_for_shows(cupy, kernel):
    x, out = normal(32, 4), cupy.empty((32, 4), np.float32)
    kernel("no_wait")((1,), (32,), (cupy.asarray(x), out, np.int32(1)))
    x[31, 1:] = 0  # only 4 bytes of the last 16 are read
    np.testing.assert_array_equal(out, x)
    kernel("no_wait")((1,), (32,), (cupy.asarray(x), out, np.int32(0)))
    assert np.isnan(out).all()


@pytest.mark.parametrize("by", [1, -1])
def test_a_missing_barrier_shows_in_one_of_two_blocks(cupy, kernel, by):
    x = normal(64)
    for barrier in (True, False):
        out = cupy.empty((2, 64), np.float32)
        kernel("shift")((2,), (64,), (cupy.asarray(x), out, np.int32(by), np.bool_(barrier)))
        assert (out == np.roll(x, by)).all() == barrier


def test_a_shuffle_from_a_lane_that_has_ended_is_not_a_number(cupy, kernel):
    out = cupy.zeros((20,), np.float32)
    kernel("ended_lane")((1,), (32,), (out,))
    np.testing.assert_array_equal(np.isnan(out), np.arange(20) >= 16)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("architecture", ["compute_80", "compute_90"])
def test_the_device_compiles_the_same_source(tmp_path, architecture):
    (tmp_path / "module.cu").write_text(SOURCE)
    command = ["nvcc", f"-arch={architecture}", "-std=c++17", "-ptx", "-diag-suppress=177,550", "module.cu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ptx = (tmp_path / "module.ptx").read_text()
    for instruction in (
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32",
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16",
        "cp.async.cg.shared.global", "cp.async.wait_group", "dp4a", "shfl.sync.bfly",
    ):  # fmt: skip
        assert instruction in ptx
