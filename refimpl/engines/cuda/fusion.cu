// Two ops as one: what a fused pass launches (fusion.py).
//
// Layout and budget as in norms.cu and elementwise.cu. An add and a norm apart move 5 rows (x, y, sum; sum, out), here
// 4. A product with its bias and an activation apart move 5 arrays (bias fill; fill and sum of the product; activation
// in and out), here 3 (product; activation in and out).
#include "activations.cuh"
#include "norms.cuh"

// total = x + scale * y, rounded as op add rounds it; a pack of row r of it.
// x (rows, width), rows `stride` apart, y (period, width) -> total (rows, width).
template <typename T, int V> struct Added {
    const T *x, *y;
    T* total;
    typename Wide<T>::type scale;

    __device__ Added(const T* x, const T* y, T* total, Index r, Index width, Index stride, Index period, double scale)
        : x(x + r * stride), y(y + int(r) % int(period) * width), total(total + r * width), scale(scale) {}

    __device__ Pack<T, V> operator()(int column) const {
        typedef typename Wide<T>::type A;
        Pack<T, V> sum = load<V>(x + column);
        const Pack<T, V> other = load<V>(y + column);
#pragma unroll
        for (int j = 0; j < V; ++j) sum.at[j] = T(fma(scale, A(other.at[j]), A(sum.at[j])));
        store(total + column, sum);
        return sum;
    }
};

// Ops add, layer_norm of the sum.
template <typename T, int V, int P>
__global__ void __launch_bounds__(1024, 1) kernel_add_layer_norm(
    const T* x, const T* y, T* total, const T* weight, const T* bias, T* out,
    Index rows, Index width, Index stride, Index period, double scale, double eps
) {
    const Index r = this_row();
    if (r >= rows) return;
    const Added<T, V> added(x, y, total, r, width, stride, period, scale);
    write_layer_norm(Row<T, V, P>(added.total, width, added), weight, bias, out + r * width, width, eps);
}

// Ops add, rms_norm of the sum.
template <typename T, int V, int P>
__global__ void __launch_bounds__(1024, 1) kernel_add_rms_norm(
    const T* x, const T* y, T* total, const T* weight, T* out,
    Index rows, Index width, Index stride, Index period, double scale, double eps
) {
    const Index r = this_row();
    if (r >= rows) return;
    const Added<T, V> added(x, y, total, r, width, stride, period, scale);
    write_rms_norm(Row<T, V, P>(added.total, width, added), weight, out + r * width, width, eps);
}

// F(y + bias) in place: y (rows, width), a product, bias (width,). The bias of op linear, then an activation.
template <typename T, int V, typename F>
__global__ void kernel_bias_activation(T* y, const T* bias, Index rows, Index width) {
    typedef typename Wide<T>::type A;
    const Tile<T, V> tile(rows, width);
    if (tile.at(0) >= tile.rows) return;
    Pack<T, V> held[ROWS];
    tile.read(held, y, width);
    const Pack<T, V> b = load<V>(bias + tile.column);
    tile.write(y, width, [&](int i, int j) { return F::template of<T>(A(held[i].at[j]) + A(b.at[j])); });
}

// Gated products of y + bias: y (rows, 2 width), a product, bias (2 width,) -> out (rows, width).
// The bias of linear, then glu: a / (1 + exp(-b)), a the first half; or where `swish` the bias of project, then swiglu:
// silu(b) * a, b the first half.
template <typename T, int V>
__global__ void kernel_bias_gate(const T* y, const T* bias, T* out, Index rows, Index width, Index swish) {
    typedef typename Wide<T>::type A;
    const Tile<T, V> tile(rows, width);
    if (tile.at(0) >= tile.rows) return;
    const Index value_at = swish ? width : 0, gate_at = width - value_at;
    Pack<T, V> values[ROWS], gates[ROWS];
    tile.read(values, y + value_at, 2 * width);
    tile.read(gates, y + gate_at, 2 * width);
    const Pack<T, V> value_bias = load<V>(bias + value_at + tile.column);
    const Pack<T, V> gate_bias = load<V>(bias + gate_at + tile.column);
    tile.write(out, width, [&](int i, int j) {
        const A value = A(values[i].at[j]) + A(value_bias.at[j]), gate = A(gates[i].at[j]) + A(gate_bias.at[j]);
        return swish ? gated<T>(gate, gate) * value : gated<T>(value, gate);
    });
}
