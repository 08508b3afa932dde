// AttMemo's look-ups (arXiv 2301.09262): the nearest stored feature, and copies of whole records.
//
// nearest:  a warp per feature; every feature is read once for all queries of the batch.
//           bytes: N w sizeof(T); FLOPs: 3 B N w. Two launches, the second of one block per query.
// move:     records are copied 16 bytes per lane, four of them on their way at once; bytes: each read and written once.
#include "packs.cuh"
#include "reduce.cuh"

// --- nearest --------------------------------------------------------------------------------------------------------

template <typename A> struct Nearest { A squared; Index row; };

// Whether a comes before b: the smaller distance, NaN before all, of equal ones the lower row.
template <typename A> __device__ bool before(const Nearest<A>& a, const Nearest<A>& b) {
    if (a.squared == b.squared || (a.squared != a.squared && b.squared != b.squared)) return a.row < b.row;
    return a.squared < b.squared || a.squared != a.squared;
}

struct First {
    template <typename N> __device__ N operator()(const N& a, const N& b) const { return before(b, a) ? b : a; }
};

// The nearest of each block's points, sum((point - x)^2) and its row.
// x (B, width), points (count, width), rows their strides apart -> found (B, blocks). First step of op nearest of the
// reference. A warp goes through the points of its block for one query after the other: the second finds them nearby.
template <typename T, typename A>
__global__ void kernel_distances(
    const T* x, const T* points, Nearest<A>* found, Index batch, Index count, Index width, Index x_stride,
    Index point_stride, Index blocks, Index span
) {
    __shared__ Nearest<A> cells[256];
    int lane = threadIdx.x % 32, warps = blockDim.x / 32;
    Index first = blockIdx.x * span, last = first + span < count ? first + span : count;
    for (Index b = 0; b < batch; ++b) {
        Nearest<A> best = {-minus_infinity<A>(), count};
        const T* query = x + b * x_stride;
        for (Index row = first + threadIdx.x / 32; row < last; row += warps) {
            const T* point = points + row * point_stride;
            A sum = 0;
#pragma unroll 4
            for (Index c = lane; c < width; c += 32) {
                A difference = A(point[c]) - A(query[c]);
                sum += difference * difference;
            }
            Nearest<A> here = {warp_sum(sum), row};
            if (before(here, best)) best = here;
        }
        best = of_block(best, cells, First());
        if (threadIdx.x == 0) found[b * blocks + blockIdx.x] = best;
    }
}

// The nearest of all blocks' points.
// found (B, blocks) -> distances, rows (B). Last step of op nearest. One block per query.
template <typename T, typename A>
__global__ void kernel_nearest(const Nearest<A>* found, T* distances, Index* rows, Index blocks) {
    __shared__ Nearest<A> cells[256];
    Nearest<A> best = found[blockIdx.x * blocks];
    for (Index other = threadIdx.x; other < blocks; other += blockDim.x) {
        if (before(found[blockIdx.x * blocks + other], best)) best = found[blockIdx.x * blocks + other];
    }
    best = of_block(best, cells, First());
    if (threadIdx.x == 0) distances[blockIdx.x] = T(sqrt(best.squared)), rows[blockIdx.x] = best.row;
}

// --- copies of records ----------------------------------------------------------------------------------------------

const int COPIES = 4;  // of a thread

// to[pairs[2 i]] = from[pairs[2 i + 1]], records of `size` numbers behind each other.
// Ops take_rows, scatter and fetch of the reference. `blocks` blocks per record.
template <typename T, bool VECTOR>
__global__ void kernel_move(const T* from, T* to, const Index* pairs, Index size, Index blocks) {
    const int N = VECTOR ? 16 / sizeof(T) : 1;
    Index pair = blockIdx.x / blocks, part = blockIdx.x % blocks;
    from += pairs[2 * pair + 1] * size, to += pairs[2 * pair] * size;
    Index first = (part * blockDim.x * COPIES + threadIdx.x) * N, step = (Index) blockDim.x * N;
    Pack<T, N> pack[COPIES];
#pragma unroll
    for (int n = 0; n < COPIES; ++n) {
        if (first + n * step < size) pack[n] = load<N>(from + first + n * step);
    }
#pragma unroll
    for (int n = 0; n < COPIES; ++n) {
        if (first + n * step < size) store<N>(to + first + n * step, pack[n]);
    }
}
