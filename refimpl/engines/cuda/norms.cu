// Norms: one block per row.
#include "prelude.cuh"
#include "reduce.cuh"

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
