// Tiles of packs: how a thread of a memory-bound kernel moves 16 bytes at once.
//
// A pack is V neighbours of a row: the 16 bytes that one instruction moves where addresses, strides and widths are
// multiples of that (tiles.py decides), else V = 1. A tile is what one thread of an elementwise kernel has: one pack
// of columns in up to ROWS rows, `step` apart. All its reads are under way before the first value is needed.
#pragma once
#include "packs.cuh"
#include "prelude.cuh"

const int ROWS = 4;  // ROWS_EACH of tiles.py

template <typename T, int V> struct Tile {
    int column, row, rows, step;  // fewer than 2^30 rows and columns: one instruction each

    __device__ Tile(Index all_rows, Index width) {
        const int chunks = (int(width) / V + blockDim.x - 1) / blockDim.x;  // blocks side by side
        column = (blockIdx.x % chunks * blockDim.x + threadIdx.x) * V;
        row = blockIdx.x / chunks * blockDim.y + threadIdx.y;
        step = gridDim.x / chunks * blockDim.y;
        rows = column < int(width) ? int(all_rows) : 0;
    }

    __device__ int at(int i) const { return row + i * step; }

    // held[i] = x[at(i)][column ...], rows `stride` apart
    __device__ void read(Pack<T, V> (&held)[ROWS], const T* x, Index stride) const {
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            if (at(i) < rows) held[i] = load<V>(x + at(i) * stride + column);
        }
    }

    // out[at(i)][column + j] = value(i, j), rows `stride` apart
    template <typename F> __device__ void write(T* out, Index stride, F value) const {
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            if (at(i) >= rows) return;
            Pack<T, V> pack;
#pragma unroll
            for (int j = 0; j < V; ++j) pack.at[j] = T(value(i, j));
            store(out + at(i) * stride + column, pack);
        }
    }
};
