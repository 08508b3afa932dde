// One row of attention, key by key: what every fused kernel keeps of a row and how it takes in more keys.
//
// A row keeps the maximum m of its logits s_j so far, the sum l of e^(s_j - m) and the sum o of e^(s_j - m) v_j. Where
// more keys raise the maximum from m to m', both sums are first multiplied by e^(m - m') (arXiv 1805.02867,
// algorithm 3). At the end the result is o / l, and 0 where no key was seen.
#pragma once
#include "prelude.cuh"

#ifdef EMULATED
__device__ float power_of_two(float x) { return exp2f(x); }
#else
// One instruction, relative error 2^-22, where exp2f also takes care of subnormal results.
__device__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif

// e^x for x <= 0. The difference of two logits is taken before it is multiplied by log2(e), so that this product rounds
// least where e^x is largest.
__device__ float exponential(float x) { return power_of_two(x * 1.4426950408889634f); }
__device__ double exponential(double x) { return exp(x); }

// The maximum as it is subtracted: of a row that has seen nothing yet it is 0, since -inf - -inf is not a number.
template <typename A> __device__ A subtracted(A maximum) { return maximum == minus_infinity<A>() ? A(0) : maximum; }

// 1 / l; 0 for a row that saw nothing.
template <typename A> __device__ A reciprocal(A sum) { return sum == A(0) ? A(0) : A(1) / sum; }
