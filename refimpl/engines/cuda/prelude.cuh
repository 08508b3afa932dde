// What all kernels share: types, and where a thread stands.
//
// All kernels are templates over the element type T; Wide<T> is what T is computed in: float for half, T otherwise,
// with one rounding at the end. Pointers are rows of arrays whose last axis is contiguous; strides count elements.
// Scalars are `Index` or `double`, never anything else, so that a launch cannot pass the wrong width.
//
// Two launch shapes. *Rows by columns*: a block of (columns, rows) threads, every thread walks along its row, so that
// no index is divided per element. *One block per row*: for sums and maxima; the block's threads are a power of two.
#pragma once
#include <cuda_fp16.h>

typedef long long Index;

template <typename T> struct Wide { typedef T type; };
template <> struct Wide<__half> { typedef float type; };

enum : unsigned { ALL_LANES = 0xffffffff };  // of a warp

template <typename A> __device__ A minus_infinity() { return A(__int_as_float(0xff800000)); }

__device__ Index this_row() { return (Index) blockIdx.x * blockDim.y + threadIdx.y; }
