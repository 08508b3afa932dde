// Activations F: F::of<T>(x) computes in Wide<T> for arrays of T. Ops gelu, gelu_tanh, silu, relu, elu_plus_one of the
// reference.
#pragma once
#include "prelude.cuh"
#include "reduce.cuh"

// exp and division: to the last bit or so; a few bits of float fewer where half keeps 11 of 24 anyway.
template <typename T> struct Quick {
    template <typename A> __device__ static A exponential(A x) { return exp(x); }
    template <typename A> __device__ static A quotient(A x, A y) { return x / y; }
};
template <> struct Quick<__half> {
    __device__ static float exponential(float x) { return __expf(x); }
    __device__ static float quotient(float x, float y) { return __fdividef(x, y); }
};

// x / (1 + exp(-gate)): a gated value, and silu where they are the same
template <typename T, typename A> __device__ A gated(A x, A gate) {
    return Quick<T>::quotient(x, 1 + Quick<T>::exponential(-gate));
}

struct Gelu {
    template <typename T, typename A> __device__ static A of(A x) {
        return A(0.5) * x * (1 + erf(x * A(0.70710678118654752440)));
    }
};
struct GeluTanh {  // (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), without the difference of near ones for large -u
    template <typename T, typename A> __device__ static A of(A x) {
        return gated<T>(x, 2 * A(0.79788456080286535588) * (x + A(0.044715) * x * x * x));
    }
};
struct Silu {
    template <typename T, typename A> __device__ static A of(A x) { return gated<T>(x, x); }
};
struct Relu {
    template <typename T, typename A> __device__ static A of(A x) { return larger(x, A(0)); }
};
struct EluPlusOne {
    template <typename T, typename A> __device__ static A of(A x) { return x > 0 ? x + 1 : Quick<T>::exponential(x); }
};
