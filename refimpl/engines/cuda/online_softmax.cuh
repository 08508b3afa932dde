// One row of attention, key by key: what every fused kernel keeps of a row and how it takes in more keys.
//
// With logits s_j and c = log2(e), e^(s_j - m) = 2^(c s_j - c m). A row keeps its maximum m so far, the sum l of 2^(c s_j - c m)
// and the sum o of 2^(c s_j - c m) v_j. Where a tile of keys raises the maximum from m to m', both sums are multiplied by
// 2^(c m - c m') first (arXiv 1805.02867, algorithm 3). At the end the result is o / l, and 0 where no key was seen.
//
// The scale of the logits is folded into c, which the host gives as a positive number: factor = |scale| log2(e).
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
__device__ double power_of_two(double x) { return exp2(x); }

// The maximum as it is subtracted: of a row that has seen nothing yet it is 0, since -inf - -inf is not a number.
template <typename A> __device__ A subtracted(A maximum) { return maximum == minus_infinity<A>() ? A(0) : maximum; }

// 1 / l; 0 for a row that saw nothing.
template <typename A> __device__ A reciprocal(A sum) { return sum == A(0) ? A(0) : A(1) / sum; }
