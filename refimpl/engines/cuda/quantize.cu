// Codes of eight bits: round(x / sigma), sigma = max |x| / 127 of each head (LATTE, arXiv 2404.07519).
//
// A short head is one block's, which reads it twice, the second time from the caches. A long one is shared by blocks:
// the first launch finds its largest size by an atomic maximum of bits, the second writes codes.
//
// bytes:    2 T D sizeof(T) read and T D written per head; 16 bytes per lane where rows allow
#include "packs.cuh"
#include "reduce.cuh"

// Without their sign, bits of floating-point numbers are in the order of the numbers, NaN above all.
__device__ unsigned size_bits(float x) { return __float_as_uint(x) & 0x7fffffff; }
__device__ unsigned long long size_bits(double x) { return __double_as_longlong(x) & 0x7fffffffffffffff; }
template <typename T> struct Bits { typedef unsigned type; };
template <> struct Bits<double> { typedef unsigned long long type; };
__device__ float of_bits(unsigned bits) { return __uint_as_float(bits); }
__device__ double of_bits(unsigned long long bits) { return __longlong_as_double(bits); }

// The largest |x| of a block's part of a head. x (maps, length, width) by strides.
template <typename T, int N> __device__ typename Bits<T>::type part_most(
    const T* x, Index length, Index width, Index row_stride, Index part, Index span
) {
    typedef typename Wide<T>::type A;
    typedef typename Bits<T>::type M;
    __shared__ M cells[256];
    M most = 0;
    unsigned per_row = width / N, stop = min((part + 1) * span, length * per_row);  // 64-bit division takes long
    for (unsigned i = part * span + threadIdx.x; i < stop; i += blockDim.x) {
        Pack<T, N> pack = load<N>(x + i / per_row * row_stride + i % per_row * N);
#pragma unroll
        for (int n = 0; n < N; ++n) most = max(most, size_bits(A(pack.at[n])));
    }
    return of_block(most, cells, Larger());
}

// The largest |x| of each head as bits, in `most` (maps), which was zero.
// First step of op quantize of the reference where heads are long. Blocks of a head in a line.
template <typename T, bool VECTOR>
__global__ void kernel_most(
    const T* x, typename Bits<T>::type* most, Index heads, Index length, Index width, Index batch_stride,
    Index head_stride, Index row_stride, Index parts, Index span
) {
    Index map = blockIdx.x / parts, part = blockIdx.x % parts;
    x += map / heads * batch_stride + map % heads * head_stride;
    auto found = part_most<T, VECTOR ? 16 / sizeof(T) : 1>(x, length, width, row_stride, part, span);
    if (threadIdx.x == 0) atomicMax(most + map, found);
}

// round(x / sigma) with sigma = max |x| / 127, each rounded as the reference does. A head that is too small to divide
// by has sigma 1; one that is not finite the codes 0.
// x (B, heads, length, width) by strides -> codes, contiguous, sigmas (B, heads). Op quantize of the reference. Where a
// head is one block's, that finds the maximum too.
template <typename T, bool VECTOR>
__global__ void kernel_codes(
    const T* x, const typename Bits<T>::type* most, signed char* codes, T* sigmas, Index heads, Index length,
    Index width, Index batch_stride, Index head_stride, Index row_stride, Index parts, Index span, double tiny
) {
    typedef typename Wide<T>::type A;
    const int N = VECTOR ? 16 / sizeof(T) : 1;
    Index map = blockIdx.x / parts, part = blockIdx.x % parts;
    x += map / heads * batch_stride + map % heads * head_stride;
    codes += map * length * width;
    auto bits = parts > 1 ? most[map] : part_most<T, N>(x, length, width, row_stride, 0, span);
    A sigma = A(T(of_bits(bits) / A(127)));
    if (sigma < A(tiny)) sigma = 1;
    bool finite = sigma - sigma == 0;
    if (part == 0 && threadIdx.x == 0) sigmas[map] = T(sigma);
    unsigned per_row = width / N, stop = min((part + 1) * span, length * per_row);
    for (unsigned i = part * span + threadIdx.x; i < stop; i += blockDim.x) {
        Pack<T, N> pack = load<N>(x + i / per_row * row_stride + i % per_row * N);
        Pack<signed char, N> code;
#pragma unroll
        for (int n = 0; n < N; ++n) code.at[n] = finite ? int(rint(A(T(A(pack.at[n]) / sigma)))) : 0;
        store<N>(codes + Index(i) * N, code);
    }
}
