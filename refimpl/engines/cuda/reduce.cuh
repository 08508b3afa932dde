// Sums and maxima over the threads of a block, over the lanes of a warp, and over four neighbours.
#pragma once
#include "prelude.cuh"

// The larger of two, and NaN where either is: fmax would drop it.
template <typename A> __device__ A larger(A a, A b) { return a > b || a != a ? a : b; }

struct Sum { template <typename A> __device__ A operator()(A a, A b) const { return a + b; } };
struct Larger { template <typename A> __device__ A operator()(A a, A b) const { return larger(a, b); } };

// What f makes of the values of a block's threads, the same in all of them; cells holds blockDim.x values,
// a power of two.
template <typename A, typename F> __device__ A of_block(A value, A* cells, F f) {
    __syncthreads();  // the cells may still be read
    cells[threadIdx.x] = value;
    for (int half = blockDim.x / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) cells[threadIdx.x] = f(cells[threadIdx.x], cells[threadIdx.x + half]);
    }
    __syncthreads();
    return cells[0];
}

template <typename A> __device__ A warp_sum(A value) {
    for (int by = 16; by; by /= 2) value += __shfl_xor_sync(ALL_LANES, value, by);
    return value;
}

// Over the lanes 4 g to 4 g + 3, which share a row of a fragment (tensor_cores.cuh).
template <typename A> __device__ A quad_sum(A value) {
    value += __shfl_xor_sync(ALL_LANES, value, 1);
    return value + __shfl_xor_sync(ALL_LANES, value, 2);
}
template <typename A> __device__ A quad_largest(A value) {
    value = larger(value, __shfl_xor_sync(ALL_LANES, value, 1));
    return larger(value, __shfl_xor_sync(ALL_LANES, value, 2));
}
