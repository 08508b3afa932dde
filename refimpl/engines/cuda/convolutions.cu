// Convolutions along time: depthwise, and the windows that make a dense one a matrix product.
//
// Budget: per output, depthwise reads RUN + kernel - 1 inputs and kernel weights for RUN outputs, from the caches;
// from memory every input once. Sums and a window of RUN inputs are in registers: 2 RUN V numbers.
#include "tiles.cuh"

const int RUN = 4;  // of depthwise, consecutive times of one thread: RUN of tiles.py

// One filter per channel along time, zero-padded to keep the length.
// x (B, length, width), rows `stride` apart, weight (kernel, width), bias (width,) -> out (B, length, width).
// Op depthwise_conv of the reference. runs = B ceil(length / RUN); a thread has one pack of channels of one run.
template <typename T, int V>
__global__ void kernel_depthwise(
    const T* x, const T* weight, const T* bias, T* out,
    Index runs, Index width, Index stride, Index length, Index kernel
) {
    typedef typename Wide<T>::type A;
    const Tile<T, V> tile(runs, width);
    if (tile.at(0) >= tile.rows) return;
    const int per = (int(length) + RUN - 1) / RUN, first = tile.row % per * RUN;  // time of the first output
    const Index start = tile.row / per * length;                                  // row of time 0
    const int shift = first - (int(kernel) - 1) / 2;                              // time that tap 0 of it reads
    A sums[RUN][V], window[RUN][V];  // the input of time shift + t is in window[t % RUN]
    const Pack<T, V> origin = load<V>(bias + tile.column);
    auto read = [&](int t, A(&into)[V]) {
        const int time = shift + t;
        Pack<T, V> pack;
        const bool inside = time >= 0 && time < int(length);
        if (inside) pack = load<V>(x + (start + time) * stride + tile.column);
#pragma unroll
        for (int j = 0; j < V; ++j) into[j] = inside ? A(pack.at[j]) : A(0);
    };
#pragma unroll
    for (int r = 0; r < RUN; ++r) {
        if (r < RUN - 1) read(r, window[r]);
#pragma unroll
        for (int j = 0; j < V; ++j) sums[r][j] = A(origin.at[j]);
    }
    for (int begin = 0; begin < int(kernel); begin += RUN) {
#pragma unroll
        for (int u = 0; u < RUN; ++u) {  // tap begin + u: its slots of the window are known when compiling
            if (begin + u >= int(kernel)) break;
            read(begin + u + RUN - 1, window[(u + RUN - 1) % RUN]);
            const Pack<T, V> w = load<V>(weight + (begin + u) * width + tile.column);
#pragma unroll
            for (int r = 0; r < RUN; ++r) {
#pragma unroll
                for (int j = 0; j < V; ++j) sums[r][j] += window[(u + r) % RUN][j] * A(w.at[j]);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < RUN; ++r) {
        if (first + r >= int(length)) return;
        Pack<T, V> pack;
#pragma unroll
        for (int j = 0; j < V; ++j) pack.at[j] = T(sums[r][j]);
        store(out + (start + first + r) * width + tile.column, pack);
    }
}

// The inputs that one output of a convolution reads, side by side, zero outside (im2col).
// x (B, length, width), rows `stride` apart -> out (B, steps, kernel width), step s centred on time s * hop.
// conv1d of the reference is the product of these windows and the weights. A pack lies within one tap.
template <typename T, int V>
__global__ void kernel_windows(
    const T* x, T* out, Index rows, Index wide, Index stride, Index width, Index length, Index steps, Index hop
) {
    const Tile<T, V> tile(rows, wide);  // wide = kernel width
    const int kernel = int(wide) / int(width), tap = tile.column / int(width), channel = tile.column % int(width);
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        if (tile.at(i) >= tile.rows) return;
        const int time = tile.at(i) % int(steps) * int(hop) - (kernel - 1) / 2 + tap;
        Pack<T, V> pack;
        if (time >= 0 && time < int(length)) {
            pack = load<V>(x + (tile.at(i) / int(steps) * length + time) * stride + channel);
        } else {
#pragma unroll
            for (int j = 0; j < V; ++j) pack.at[j] = T(0.0f);
        }
        store(out + tile.at(i) * wide + tile.column, pack);
    }
}
