// Elementwise ops and convolutions: rows by columns.
#include "prelude.cuh"
#include "reduce.cuh"

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
