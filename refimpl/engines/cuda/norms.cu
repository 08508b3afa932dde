// Norms over the last axis. x (rows, width), rows `stride` apart, weight, bias (width,) -> out (rows, width).
//
// Layout: a row belongs to one warp, blockDim.y of them to a block, or to all threads of a block (tiles.py chooses).
// Budget: the row is read once, as packs that stay in registers, P of 16 bytes per thread, and written once; weights
// come from the caches. At most 64 registers, so that a block may have 1,024 threads: rows to 64 KiB are held.
#include "norms.cuh"

// Op layer_norm of the reference.
template <typename T, int V, int P>
__global__ void __launch_bounds__(1024, 1) kernel_layer_norm(
    const T* x, const T* weight, const T* bias, T* out, Index rows, Index width, Index stride, double eps
) {
    const Index r = this_row();
    if (r >= rows) return;
    const T* from = x + r * stride;
    const Row<T, V, P> row(from, width, [=](int column) { return load<V>(from + column); });
    write_layer_norm(row, weight, bias, out + r * width, width, eps);
}

// Op rms_norm of the reference.
template <typename T, int V, int P>
__global__ void __launch_bounds__(1024, 1) kernel_rms_norm(
    const T* x, const T* weight, T* out, Index rows, Index width, Index stride, double eps
) {
    const Index r = this_row();
    if (r >= rows) return;
    const T* from = x + r * stride;
    const Row<T, V, P> row(from, width, [=](int column) { return load<V>(from + column); });
    write_rms_norm(row, weight, out + r * width, width, eps);
}
