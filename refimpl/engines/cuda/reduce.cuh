// Sums and maxima over the threads of a block.
#pragma once
#include "prelude.cuh"

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
