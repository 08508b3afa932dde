// Elementwise ops. Each thread has one pack of columns in up to ROWS rows: `tiles.cuh`.
//
// Budget: bound by memory. Per element every kernel reads its operands once and writes its result once; operands of one
// row (batch_norm, angles) come from the caches. At most 64 registers, so that 4 blocks of 256 threads share a
// multiprocessor with 64 bytes of every thread under way.
#include "activations.cuh"
#include "tiles.cuh"

// x (rows, width), rows `stride` apart -> F of it (rows, width).
// Ops gelu, gelu_tanh, silu, relu, elu_plus_one of the reference.
template <typename T, int V, typename F>
__global__ void kernel_activation(const T* x, T* out, Index rows, Index width, Index stride) {
    typedef typename Wide<T>::type A;
    const Tile<T, V> tile(rows, width);
    Pack<T, V> held[ROWS];
    tile.read(held, x, stride);
    tile.write(out, width, [&](int i, int j) { return F::template of<T>(A(held[i].at[j])); });
}

// Gated products: a / (1 + exp(-b)) (glu), and silu(b) * a (swiglu) where `swish`.
// a, b (rows, width), rows their strides apart -> out (rows, width).
// Ops glu and swiglu of the reference.
template <typename T, int V>
__global__ void kernel_gate(
    const T* a, const T* b, T* out, Index rows, Index width, Index a_stride, Index b_stride, Index swish
) {
    typedef typename Wide<T>::type A;
    const Tile<T, V> tile(rows, width);
    Pack<T, V> values[ROWS], gates[ROWS];
    tile.read(values, a, a_stride);
    tile.read(gates, b, b_stride);
    tile.write(out, width, [&](int i, int j) {
        const A value = A(values[i].at[j]), gate = A(gates[i].at[j]);
        return swish ? gated<T>(gate, gate) * value : gated<T>(value, gate);
    });
}

// x + scale * y, y repeated every `period` rows.
// x (rows, width), rows `stride` apart, y (period, width) -> out (rows, width).
// Op add of the reference.
template <typename T, int V>
__global__ void kernel_add(
    const T* x, const T* y, T* out, Index rows, Index width, Index stride, Index period, double scale
) {
    typedef typename Wide<T>::type A;
    const Tile<T, V> tile(rows, width);
    Pack<T, V> held[ROWS], other[ROWS];
    tile.read(held, x, stride);
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        if (tile.at(i) < tile.rows) other[i] = load<V>(y + tile.at(i) % int(period) * width + tile.column);
    }
    const A factor = A(scale);
    tile.write(out, width, [&](int i, int j) { return fma(factor, A(other[i].at[j]), A(held[i].at[j])); });
}

// Rows of a table by number; NaN where there is no such row.
// table (count, width), rows `stride` apart, ids (rows,) -> out (rows, width).
// Op embedding of the reference.
template <typename T, int V>
__global__ void kernel_gather(
    const T* table, const Index* ids, T* out, Index rows, Index width, Index stride, Index count
) {
    const Tile<T, V> tile(rows, width);
    Pack<T, V> held[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        if (tile.at(i) >= tile.rows) break;
        const Index id = ids[tile.at(i)];
        if (id >= 0 && id < count) {
            held[i] = load<V>(table + id * stride + tile.column);
        } else {
#pragma unroll
            for (int j = 0; j < V; ++j) held[i].at[j] = T(__int_as_float(0x7fc00000));
        }
    }
    tile.write(out, width, [&](int i, int j) { return held[i].at[j]; });
}

// The same row everywhere: row (width,) -> out (rows, width). What a product with a bias is added to.
template <typename T, int V> __global__ void kernel_repeat(const T* row, T* out, Index rows, Index width) {
    const Tile<T, V> tile(rows, width);
    if (tile.at(0) >= tile.rows) return;
    const Pack<T, V> held = load<V>(row + tile.column);
    tile.write(out, width, [&](int, int j) { return held.at[j]; });
}

// (x - mean) / sqrt(variance + eps) * weight + bias with stored statistics.
// x (rows, width), rows `stride` apart, mean, variance, weight, bias (width,) -> out (rows, width).
// Op batch_norm of the reference. The factor of a column is computed once for the rows of a tile.
template <typename T, int V>
__global__ void kernel_batch_norm(
    const T* x, const T* mean, const T* variance, const T* weight, const T* bias, T* out,
    Index rows, Index width, Index stride, double eps
) {
    typedef typename Wide<T>::type A;
    const Tile<T, V> tile(rows, width);
    if (tile.at(0) >= tile.rows) return;
    Pack<T, V> held[ROWS];
    tile.read(held, x, stride);
    const Pack<T, V> centre = load<V>(mean + tile.column), spread = load<V>(variance + tile.column);
    const Pack<T, V> gain = load<V>(weight + tile.column), shift = load<V>(bias + tile.column);
    A factor[V];
#pragma unroll
    for (int j = 0; j < V; ++j) factor[j] = A(gain.at[j]) / sqrt(A(spread.at[j]) + A(eps));
    tile.write(out, width, [&](int i, int j) {
        return fma(A(held[i].at[j]) - A(centre.at[j]), factor[j], A(shift.at[j]));
    });
}

// Two packs (a0 b0 a1 b1 ...) as (a0 a1 ...) and (b0 b1 ...), and back.
template <typename T, int V> __device__ void unravel(Pack<T, V>& first, Pack<T, V>& second) {
    const Pack<T, V> one = first, other = second;
#pragma unroll
    for (int j = 0; j < V; ++j) {
        first.at[j] = 2 * j < V ? one.at[2 * j % V] : other.at[2 * j % V];
        second.at[j] = 2 * j + 1 < V ? one.at[(2 * j + 1) % V] : other.at[(2 * j + 1) % V];
    }
}
template <typename T, int V> __device__ void ravel(Pack<T, V>& first, Pack<T, V>& second) {
    const Pack<T, V> a = first, b = second;
#pragma unroll
    for (int j = 0; j < V; ++j) {
        first.at[j] = j % 2 ? b.at[j / 2] : a.at[j / 2];
        second.at[j] = (V + j) % 2 ? b.at[(V + j) / 2] : a.at[(V + j) / 2];
    }
}

// Rotate pairs of channels: (2i, 2i + 1) when interleaved, else (i, i + half).
// x (B, heads, length, 2 half) by strides, cosine and sine (length, half) -> out like x, contiguous.
// Op rotary of the reference. A thread has V pairs of one row: two packs, neighbours or half a row apart.
template <typename T, int V>
__global__ void kernel_rotary(
    const T* x, const T* cosine, const T* sine, T* out, Index rows, Index half, Index heads, Index length,
    Index batch_stride, Index head_stride, Index row_stride, Index interleaved
) {
    typedef typename Wide<T>::type A;
    const Tile<T, V> tile(rows, half);
    if (tile.at(0) >= tile.rows) return;
    const int time = tile.row % int(length), map = tile.row / int(length), i = tile.column;
    const int one = interleaved ? 2 * i : i, other = interleaved ? 2 * i + V : i + int(half);
    const T* from = x + map / int(heads) * batch_stride + map % int(heads) * head_stride + time * row_stride;
    T* to = out + tile.row * 2 * half;
    Pack<T, V> first = load<V>(from + one), second = load<V>(from + other);
    const Pack<T, V> c = load<V>(cosine + time * half + i), s = load<V>(sine + time * half + i);
    if (interleaved) unravel(first, second);  // the first of each pair, and the second
#pragma unroll
    for (int j = 0; j < V; ++j) {
        const A a = A(first.at[j]), b = A(second.at[j]);
        first.at[j] = T(a * A(c.at[j]) - b * A(s.at[j]));
        second.at[j] = T(a * A(s.at[j]) + b * A(c.at[j]));
    }
    if (interleaved) ravel(first, second);
    store(to + one, first);
    store(to + other, second);
}
