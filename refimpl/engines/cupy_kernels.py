"""The CUDA sources of the CuPy engine: what cuBLAS does not do. `source(dtype)` is one module for one dtype.

All are templates over the element type T; `Wide<T>` is what T is computed in: float for half, T otherwise, with one
rounding at the end. Pointers are rows of arrays whose last axis is contiguous; strides count elements. Scalars are
``long long`` (Index) or ``double``, never anything else, so that a launch cannot pass the wrong width.

Two launch shapes. *Rows by columns*: a block of (columns, rows) threads, every thread walks along its row, so that no
index is divided per element. *One block per row*: for sums and maxima; the block's threads are a power of two.
"""

from __future__ import annotations

PRELUDE = r"""
#include <cuda_fp16.h>

typedef long long Index;

template <typename T> struct Wide { typedef T type; };
template <> struct Wide<__half> { typedef float type; };

template <typename A> __device__ A minus_infinity() { return A(__int_as_float(0xff800000)); }

__device__ Index this_row() { return (Index) blockIdx.x * blockDim.y + threadIdx.y; }
"""

REDUCE = r"""
// Sum over the threads of a block, the same in all of them; cells holds blockDim.x values, a power of two.
template <typename A> __device__ A block_sum(A value, A* cells) {
    __syncthreads();  // the cells may still be read
    cells[threadIdx.x] = value;
    for (int half = blockDim.x / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) cells[threadIdx.x] += cells[threadIdx.x + half];
    }
    __syncthreads();
    return cells[0];
}

// The larger of two, and NaN where either is: fmax would drop it.
template <typename A> __device__ A larger(A a, A b) { return a > b || a != a ? a : b; }

// Maximum over the threads of a block, NaN if any is.
template <typename A> __device__ A block_max(A value, A* cells) {
    __syncthreads();
    cells[threadIdx.x] = value;
    for (int half = blockDim.x / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) cells[threadIdx.x] = larger(cells[threadIdx.x], cells[threadIdx.x + half]);
    }
    __syncthreads();
    return cells[0];
}
"""

# --- elementwise: rows by columns -----------------------------------------------------------------------------------

ACTIVATION = r"""
// Activations F: gelu, gelu_tanh, silu, relu.
// x (rows, width), rows `stride` apart -> out (rows, width).
// Ops gelu, gelu_tanh, silu, relu of the reference.
struct Gelu {
    template <typename A> __device__ static A of(A x) { return A(0.5) * x * (1 + erf(x * A(0.70710678118654752440))); }
};
struct GeluTanh {
    template <typename A> __device__ static A of(A x) {
        return A(0.5) * x * (1 + tanh(A(0.79788456080286535588) * (x + A(0.044715) * x * x * x)));
    }
};
struct Silu {
    template <typename A> __device__ static A of(A x) { return x / (1 + exp(-x)); }
};
struct Relu {
    template <typename A> __device__ static A of(A x) { return larger(x, A(0)); }
};

template <typename T, typename F>
__global__ void kernel_activation(const T* x, T* out, Index rows, Index width, Index stride) {
    typedef typename Wide<T>::type A;
    Index row = this_row();
    if (row >= rows) return;
    for (Index c = threadIdx.x; c < width; c += blockDim.x) {
        out[row * width + c] = T(F::of(A(x[row * stride + c])));
    }
}
"""

GATE = r"""
// Gated products: a / (1 + exp(-b)) (glu), and silu(b) * a (swiglu) where `swish`.
// a, b (rows, width), rows their strides apart -> out (rows, width).
// Ops glu and swiglu of the reference.
template <typename T>
__global__ void kernel_gate(
    const T* a, const T* b, T* out, Index rows, Index width, Index a_stride, Index b_stride, Index swish
) {
    typedef typename Wide<T>::type A;
    Index row = this_row();
    if (row >= rows) return;
    for (Index c = threadIdx.x; c < width; c += blockDim.x) {
        A value = A(a[row * a_stride + c]), gate = A(b[row * b_stride + c]);
        A open = 1 + exp(-gate);
        out[row * width + c] = T(swish ? gate / open * value : value / open);
    }
}
"""

ADD = r"""
// x + scale * y, y repeated every `period` rows.
// x (rows, width), rows `stride` apart, y (period, width) -> out (rows, width).
// Op add of the reference.
template <typename T>
__global__ void kernel_add(
    const T* x, const T* y, T* out, Index rows, Index width, Index stride, Index period, double scale
) {
    typedef typename Wide<T>::type A;
    Index row = this_row();
    if (row >= rows) return;
    Index other = row % period;
    for (Index c = threadIdx.x; c < width; c += blockDim.x) {
        out[row * width + c] = T(A(x[row * stride + c]) + A(scale) * A(y[other * width + c]));
    }
}
"""

BATCH_NORM = r"""
// (x - mean) / sqrt(variance + eps) * weight + bias with stored statistics.
// x (rows, width), rows `stride` apart, mean, variance, weight, bias (width,) -> out (rows, width).
// Op batch_norm of the reference.
template <typename T>
__global__ void kernel_batch_norm(
    const T* x, const T* mean, const T* variance, const T* weight, const T* bias, T* out,
    Index rows, Index width, Index stride, double eps
) {
    typedef typename Wide<T>::type A;
    Index row = this_row();
    if (row >= rows) return;
    for (Index c = threadIdx.x; c < width; c += blockDim.x) {
        A centred = A(x[row * stride + c]) - A(mean[c]);
        out[row * width + c] = T(centred / sqrt(A(variance[c]) + A(eps)) * A(weight[c]) + A(bias[c]));
    }
}
"""

DEPTHWISE = r"""
// One filter per channel along time, zero-padded to keep the length.
// x (B, length, width), rows `stride` apart, weight (kernel, width), bias (width,) -> out (B, length, width).
// Op depthwise_conv of the reference.
template <typename T>
__global__ void kernel_depthwise(
    const T* x, const T* weight, const T* bias, T* out,
    Index rows, Index width, Index stride, Index length, Index kernel
) {
    typedef typename Wide<T>::type A;
    Index row = this_row();
    if (row >= rows) return;
    Index shift = row % length - (kernel - 1) / 2, first = row - row % length;  // time of tap 0; row of time 0
    for (Index c = threadIdx.x; c < width; c += blockDim.x) {
        A sum = A(bias[c]);
        for (Index tap = 0; tap < kernel; ++tap) {
            Index time = shift + tap;
            if (time >= 0 && time < length) sum += A(x[(first + time) * stride + c]) * A(weight[tap * width + c]);
        }
        out[row * width + c] = T(sum);
    }
}
"""

WINDOWS = r"""
// The inputs that one output of a convolution reads, side by side, zero outside (im2col).
// x (B, length, width), rows `stride` apart -> out (B, steps, kernel width), step s centred on time s * hop.
// conv1d of the reference is the product of these windows and the weights.
template <typename T>
__global__ void kernel_windows(
    const T* x, T* out, Index rows, Index width, Index stride, Index length, Index steps, Index kernel, Index hop
) {
    Index row = this_row();
    if (row >= rows) return;
    Index shift = row % steps * hop - (kernel - 1) / 2, first = row / steps * length;
    for (Index c = threadIdx.x; c < kernel * width; c += blockDim.x) {
        Index tap = c / width, time = shift + tap;
        bool inside = time >= 0 && time < length;
        out[row * kernel * width + c] = inside ? x[(first + time) * stride + c - tap * width] : T(0.0f);
    }
}
"""

ROTARY = r"""
// Rotate pairs of channels: (2i, 2i + 1) when interleaved, else (i, i + half).
// x (B, heads, length, 2 half) by strides, cosine and sine (length, half) -> out like x, contiguous.
// Op rotary of the reference.
template <typename T>
__global__ void kernel_rotary(
    const T* x, const T* cosine, const T* sine, T* out, Index rows, Index half, Index heads, Index length,
    Index batch_stride, Index head_stride, Index row_stride, Index interleaved
) {
    typedef typename Wide<T>::type A;
    Index row = this_row();
    if (row >= rows) return;
    Index time = row % length, map = row / length;
    const T* from = x + map / heads * batch_stride + map % heads * head_stride + time * row_stride;
    T* to = out + row * 2 * half;
    for (Index i = threadIdx.x; i < half; i += blockDim.x) {
        Index first = interleaved ? 2 * i : i, second = interleaved ? 2 * i + 1 : i + half;
        A a = A(from[first]), b = A(from[second]), c = A(cosine[time * half + i]), s = A(sine[time * half + i]);
        to[first] = T(a * c - b * s);
        to[second] = T(a * s + b * c);
    }
}
"""

# --- maps: scores and probabilities ---------------------------------------------------------------------------------

RELATIVE = r"""
// Add position scores shifted by one column per row: row r of a block of `block` rows adds column block - 1 - r + j.
// scores (B, heads, block, keys) and position (B, heads, block, >= keys + block - 1) by strides -> out, contiguous; out
// may be scores. Op add_relative of the reference, and the shift inside relative_attention.
template <typename S>
__global__ void kernel_relative(
    const S* scores, const S* position, S* out, Index rows, Index keys, Index heads, Index block,
    Index s_batch, Index s_head, Index s_row, Index p_batch, Index p_head, Index p_row
) {
    typedef typename Wide<S>::type A;
    Index row = this_row();
    if (row >= rows) return;
    Index r = row % block, map = row / block;
    const S* s = scores + map / heads * s_batch + map % heads * s_head + r * s_row;
    const S* p = position + map / heads * p_batch + map % heads * p_head + r * p_row + (block - 1 - r);
    for (Index j = threadIdx.x; j < keys; j += blockDim.x) out[row * keys + j] = S(A(s[j]) + A(p[j]));
}
"""

HIDE = r"""
// -inf in place where a query may not look: from key seen + step * row on, and where the mask is 0.
// scores (B, heads, block, keys), contiguous; mask by strides (0 where it broadcasts), read where `masked`.
// The hidden part of op scores of the reference.
template <typename T>
__global__ void kernel_hide(
    T* scores, const unsigned char* mask, Index rows, Index keys, Index heads, Index block, Index seen, Index step,
    Index masked, Index m_batch, Index m_head, Index m_row, Index m_key
) {
    Index row = this_row();
    if (row >= rows) return;
    Index r = row % block, map = row / block, visible = seen + step * r;
    const unsigned char* m = mask + map / heads * m_batch + map % heads * m_head + r * m_row;
    for (Index j = threadIdx.x; j < keys; j += blockDim.x) {
        if (j >= visible || (masked && !m[j * m_key])) scores[row * keys + j] = T(minus_infinity<float>());
    }
}
"""

SOFTMAX = r"""
// Softmax of each row over its first seen + step * row keys where the mask is not 0; zeros elsewhere.
// scores (B, heads, block, keys) by strides -> out (B, heads, block, keys), contiguous; out may be scores where S is T.
// Op softmax of the reference, and the softmax inside attention. One block per row; a row that sees nothing is zero.
template <typename S, typename T>
__global__ void kernel_softmax(
    const S* scores, T* out, const unsigned char* mask, Index keys, Index heads, Index block, Index seen, Index step,
    Index s_batch, Index s_head, Index s_row, Index masked, Index m_batch, Index m_head, Index m_row, Index m_key
) {
    typedef typename Wide<S>::type A;
    __shared__ A cells[256];
    Index row = blockIdx.x, r = row % block, map = row / block, visible = seen + step * r;
    if (visible > keys) visible = keys;
    const S* s = scores + map / heads * s_batch + map % heads * s_head + r * s_row;
    const unsigned char* m = mask + map / heads * m_batch + map % heads * m_head + r * m_row;
    A maximum = minus_infinity<A>();
    for (Index j = threadIdx.x; j < visible; j += blockDim.x) {
        if (!masked || m[j * m_key]) maximum = larger(maximum, A(s[j]));
    }
    maximum = block_max(maximum, cells);
    bool empty = maximum == minus_infinity<A>();
    A sum = 0;
    for (Index j = threadIdx.x; j < visible; j += blockDim.x) {
        if (!masked || m[j * m_key]) sum += exp(A(s[j]) - maximum);
    }
    sum = block_sum(sum, cells);
    for (Index j = threadIdx.x; j < keys; j += blockDim.x) {
        bool shown = !empty && j < visible && (!masked || m[j * m_key]);
        out[row * keys + j] = T(shown ? exp(A(s[j]) - maximum) / sum : A(0));
    }
}
"""

# --- norms: one block per row ---------------------------------------------------------------------------------------

LAYER_NORM = r"""
// (x - mean) / sqrt(variance + eps) * weight + bias with the row's own mean and variance, in two passes.
// x (rows, width), rows `stride` apart, weight, bias (width,) -> out (rows, width).
// Op layer_norm of the reference. One block per row.
template <typename T>
__global__ void kernel_layer_norm(
    const T* x, const T* weight, const T* bias, T* out, Index width, Index stride, double eps
) {
    typedef typename Wide<T>::type A;
    __shared__ A cells[256];
    const T* from = x + blockIdx.x * stride;
    T* to = out + blockIdx.x * width;
    A sum = 0, squares = 0;
    for (Index c = threadIdx.x; c < width; c += blockDim.x) sum += A(from[c]);
    A mean = block_sum(sum, cells) / A(width);
    for (Index c = threadIdx.x; c < width; c += blockDim.x) squares += (A(from[c]) - mean) * (A(from[c]) - mean);
    A deviation = sqrt(block_sum(squares, cells) / A(width) + A(eps));
    for (Index c = threadIdx.x; c < width; c += blockDim.x) {
        to[c] = T((A(from[c]) - mean) / deviation * A(weight[c]) + A(bias[c]));
    }
}
"""

RMS_NORM = r"""
// x / sqrt(mean(x^2) + eps) * weight.
// x (rows, width), rows `stride` apart, weight (width,) -> out (rows, width).
// Op rms_norm of the reference. One block per row.
template <typename T>
__global__ void kernel_rms_norm(const T* x, const T* weight, T* out, Index width, Index stride, double eps) {
    typedef typename Wide<T>::type A;
    __shared__ A cells[256];
    const T* from = x + blockIdx.x * stride;
    T* to = out + blockIdx.x * width;
    A squares = 0;
    for (Index c = threadIdx.x; c < width; c += blockDim.x) squares += A(from[c]) * A(from[c]);
    A root = sqrt(block_sum(squares, cells) / A(width) + A(eps));
    for (Index c = threadIdx.x; c < width; c += blockDim.x) to[c] = T(A(from[c]) / root * A(weight[c]));
}
"""

SOURCE = "".join((
    PRELUDE, REDUCE, ACTIVATION, GATE, ADD, BATCH_NORM, DEPTHWISE, WINDOWS, ROTARY,
    RELATIVE, HIDE, SOFTMAX, LAYER_NORM, RMS_NORM,
))  # fmt: skip

THREADS = 256  # at most, per block; the size of `cells`

C_TYPES = {"float16": "__half", "float32": "float", "float64": "double"}
WIDE = {"float16": "float32", "float32": "float32", "float64": "float64"}  # dtype -> Wide<dtype>


STEPS = (
    "gate", "add", "batch_norm", "depthwise", "windows", "rotary", "relative", "hide", "layer_norm", "rms_norm",
)  # fmt: skip


def instances(dtype: str) -> tuple[str, ...]:
    """The kernels that arrays of `dtype` need, as C++ names."""
    t, wide = C_TYPES[dtype], C_TYPES[WIDE[dtype]]
    names = [f"kernel_{step}<{t}>" for step in STEPS]
    names += [f"kernel_activation<{t}, {f}>" for f in ("Gelu", "GeluTanh", "Silu", "Relu")]
    names += [f"kernel_softmax<{s}, {t}>" for s in dict.fromkeys((t, wide))]  # scores of the fused op stay wide
    return tuple(names)


# --- launch shapes --------------------------------------------------------------------------------------------------

Grid = tuple[int, ...]


def row_threads(width: int) -> int:
    """Threads of a block that owns one row: a power of two from one warp to `THREADS`, no more than the row needs."""
    return min(THREADS, max(32, 1 << (max(width, 1) - 1).bit_length()))


def rows_by_columns(rows: int, width: int) -> tuple[Grid, Grid]:
    """Grid and block for an elementwise kernel: narrow rows share a block."""
    across = row_threads(width)
    down = THREADS // across
    return (-(-rows // down),), (across, down)
