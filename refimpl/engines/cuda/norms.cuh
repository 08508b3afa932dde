// Norms of rows that are held in registers: read once, written once.
#pragma once
#include "reduce.cuh"
#include "tiles.cuh"

// Sum over the threads of a row: a warp, or a block of several; the same bits in all of them.
template <typename A> __device__ A row_sum(A value) {
    __shared__ A cells[32];
    value = warp_sum(value);
    if (blockDim.x == 32) return value;
    __syncthreads();  // the cells may still be read
    if (threadIdx.x % 32 == 0) cells[threadIdx.x / 32] = value;
    __syncthreads();
    return warp_sum(threadIdx.x % 32 < blockDim.x / 32 ? cells[threadIdx.x % 32] : A(0));
}

// A row: thread t of blockDim.x holds its packs t, t + blockDim.x, ..., P of them; what is beyond is read again.
template <typename T, int V, int P> struct Row {
    typedef typename Wide<T>::type A;
    Pack<T, V> held[P];
    const T* from;
    int packs;

    // `value(column)` is the pack that begins there, and what `from` holds by then
    template <typename F> __device__ Row(const T* row, Index width, F value) : from(row), packs(int(width) / V) {
#pragma unroll
        for (int i = 0; i < P; ++i) {
            if (at(i) < packs) held[i] = value(at(i) * V);
        }
        for (int p = at(P); p < packs; p += blockDim.x) value(p * V);
    }

    __device__ int at(int i) const { return threadIdx.x + i * blockDim.x; }

    // f(pack, column) of all packs of this thread
    template <typename F> __device__ void each(F f) const {
#pragma unroll
        for (int i = 0; i < P; ++i) {
            if (at(i) < packs) f(held[i], at(i) * V);
        }
        for (int p = at(P); p < packs; p += blockDim.x) f(load<V>(from + p * V), p * V);
    }

    // sum = add(sum, x) over the row
    template <typename F> __device__ A sum(F add) const {
        A sum = 0;
        each([&](const Pack<T, V>& pack, int) {
#pragma unroll
            for (int j = 0; j < V; ++j) sum = add(sum, A(pack.at[j]));
        });
        return row_sum(sum);
    }
};

// (x - mean) / sqrt(variance + eps) * weight + bias: the mean first, then squares of what is left of it.
template <typename T, int V, int P>
__device__ void write_layer_norm(
    const Row<T, V, P>& row, const T* weight, const T* bias, T* out, Index width, double eps
) {
    typedef typename Wide<T>::type A;
    const A mean = row.sum([](A sum, A x) { return sum + x; }) / A(width);
    const A variance = row.sum([=](A sum, A x) { return fma(x - mean, x - mean, sum); }) / A(width);
    const A factor = 1 / sqrt(variance + A(eps));
    row.each([&](const Pack<T, V>& x, int column) {
        const Pack<T, V> w = load<V>(weight + column), b = load<V>(bias + column);
        Pack<T, V> y;
#pragma unroll
        for (int j = 0; j < V; ++j) y.at[j] = T(fma((A(x.at[j]) - mean) * factor, A(w.at[j]), A(b.at[j])));
        store(out + column, y);
    });
}

// x / sqrt(mean(x^2) + eps) * weight.
template <typename T, int V, int P>
__device__ void write_rms_norm(const Row<T, V, P>& row, const T* weight, T* out, Index width, double eps) {
    typedef typename Wide<T>::type A;
    const A squares = row.sum([](A sum, A x) { return fma(x, x, sum); });
    const A factor = 1 / sqrt(squares / A(width) + A(eps));
    row.each([&](const Pack<T, V>& x, int column) {
        const Pack<T, V> w = load<V>(weight + column);
        Pack<T, V> y;
#pragma unroll
        for (int j = 0; j < V; ++j) y.at[j] = T(A(x.at[j]) * factor * A(w.at[j]));
        store(out + column, y);
    });
}
