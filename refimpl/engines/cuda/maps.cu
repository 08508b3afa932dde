// Scores and probabilities of materialised maps.
#include "online_softmax.cuh"
#include "packs.cuh"
#include "reduce.cuh"

// Add position scores shifted by one column per row: row r of a block of `block` rows adds column block - 1 - r + j.
// scores (B, heads, block, keys) and position (B, heads, block, >= keys + block - 1) by strides -> out, contiguous; out
// may be scores. Where `packed`, scores and out move 16 bytes at a time; position rows start anywhere.
// Op add_relative of the reference, and the shift inside relative_attention.
template <typename S>
__global__ void kernel_relative(
    const S* scores, const S* position, S* out, Index rows, Index keys, Index heads, Index block,
    Index s_batch, Index s_head, Index s_row, Index p_batch, Index p_head, Index p_row, Index packed
) {
    typedef typename Wide<S>::type A;
    const int N = 16 / sizeof(S);
    Index row = this_row();
    if (row >= rows) return;
    Index r = row % block, map = row / block;
    const S* s = scores + map / heads * s_batch + map % heads * s_head + r * s_row;
    const S* p = position + map / heads * p_batch + map % heads * p_head + r * p_row + (block - 1 - r);
    if (!packed) {
        for (Index j = threadIdx.x; j < keys; j += blockDim.x) out[row * keys + j] = S(A(s[j]) + A(p[j]));
        return;
    }
    for (Index j = threadIdx.x * N; j < keys; j += blockDim.x * N) {
        Pack<S, N> sums = load<N>(s + j);
#pragma unroll
        for (int e = 0; e < N; ++e) sums.at[e] = S(A(sums.at[e]) + A(p[j + e]));
        store(out + row * keys + j, sums);
    }
}

// -inf in place where a query may not look: from key seen + step * row on, and where the mask is 0.
// scores (B, heads, block, keys), contiguous; mask by strides (0 where it broadcasts), read where `masked`.
// The hidden part of op scores of the reference.
template <typename T>
__global__ void kernel_hide(
    T* scores, const unsigned char* mask, Index rows, Index keys, Index heads, Index block, Index seen, Index step,
    Index masked, Index m_batch, Index m_head, Index m_row, Index m_key
) {
    Index row = this_row();
    if (row >= rows) return;
    Index r = row % block, map = row / block, visible = seen + step * r;
    const unsigned char* m = mask + map / heads * m_batch + map % heads * m_head + r * m_row;
    for (Index j = threadIdx.x; j < keys; j += blockDim.x) {
        if (j >= visible || (masked && !m[j * m_key])) scores[row * keys + j] = T(minus_infinity<float>());
    }
}

// Softmax of each row over its first seen + step * row keys where the mask is not 0; zeros elsewhere.
//
//     p_j = e^(s_j - m) / sum_j e^(s_j - m),  m = max_j s_j;  0 in a row that sees nothing
//
// scores (B, heads, block, keys) by strides -> out (B, heads, block, keys), contiguous; out may be scores where S is T.
// Op softmax of the reference, and the softmax inside attention by blocks. Its time is that of one read and one write:
//
// Short rows  `softmax`: a row stays in the registers of its team, 16 numbers in each thread: a warp for up to 512
//             keys, as many warps as it takes for up to 16,384. Warps share a block only where each has a row of its
//             own.
// Long rows   `softmax_long`: the block walks along the row twice, first for maximum and sum together (arXiv
//             1805.02867, algorithm 3), then to write; the second read is one of the second-level cache where the rows
//             fit it.
// Where `packed`, rows start at multiples of 16 bytes and move 16 bytes at a time; else neighbours read neighbours.
const int HELD = 16;  // numbers of a row in each thread

// What f makes of the values of all threads of a team: blockDim.x of them, in whole warps; cells holds one
// for each warp.
template <typename A, typename F> __device__ A of_team(A value, A* cells, F f) {
    for (int by = 16; by; by /= 2) value = f(value, __shfl_xor_sync(ALL_LANES, value, by));
    if (blockDim.x == 32) return value;
    __syncthreads();  // the cells may still be read
    if (threadIdx.x % 32 == 0) cells[threadIdx.x / 32] = value;
    __syncthreads();
    value = cells[0];
    for (int warp = 1; warp < blockDim.x / 32; ++warp) value = f(value, cells[warp]);
    return value;
}

template <typename S, typename T>
__global__ void __launch_bounds__(1024) kernel_softmax(
    const S* scores, T* out, const unsigned char* mask, Index rows, Index keys, Index heads, Index block, Index seen,
    Index step, Index s_batch, Index s_head, Index s_row, Index packed,
    Index masked, Index m_batch, Index m_head, Index m_row, Index m_key
) {
    typedef typename Wide<S>::type A;
    const int N = 16 / sizeof(S), PACKS = HELD / N;
    __shared__ A cells[32];
    Index row = this_row(), r = row % block, map = row / block;
    if (row >= rows) return;  // all of a warp, or of a block
    int visible = int(min(keys, max(seen + step * r, Index(0)))), apart = packed ? 1 : blockDim.x;
    const S* s = scores + map / heads * s_batch + map % heads * s_head + r * s_row;
    const unsigned char* m = mask + map / heads * m_batch + map % heads * m_head + r * m_row;

    Pack<S, N> held[PACKS];  // loads first, so that all are under way at once
#pragma unroll
    for (int i = 0; i < PACKS; ++i) {
        int first = packed ? (i * blockDim.x + threadIdx.x) * N : i * N * blockDim.x + threadIdx.x;
        if (packed && first < visible) held[i] = load<N>(s + first);
#pragma unroll
        for (int e = 0; e < N; ++e) {
            if (!packed && first + e * apart < visible) held[i].at[e] = s[first + e * apart];
        }
    }
    A x[PACKS][N], best = minus_infinity<A>(), sum = 0;
    unsigned shown = 0;  // a bit for each number
#pragma unroll
    for (int i = 0; i < PACKS; ++i) {
        int first = packed ? (i * blockDim.x + threadIdx.x) * N : i * N * blockDim.x + threadIdx.x;
#pragma unroll
        for (int e = 0; e < N; ++e) {
            int j = first + e * apart;
            bool show = j < visible && (!masked || m[j * m_key]);
            x[i][e] = show ? A(held[i].at[e]) : minus_infinity<A>();
            shown |= unsigned(show) << (i * N + e);
            best = larger(best, x[i][e]);
        }
    }
    best = of_team(best, cells, Larger());
    A minus = subtracted(best);
#pragma unroll
    for (int i = 0; i < PACKS; ++i)
#pragma unroll
        for (int e = 0; e < N; ++e) x[i][e] = exp(x[i][e] - minus), sum += shown >> (i * N + e) & 1 ? x[i][e] : A(0);
    A share = reciprocal(of_team(sum, cells, Sum()));

    T* to = out + row * keys;
#pragma unroll
    for (int i = 0; i < PACKS; ++i) {
        int first = packed ? (i * blockDim.x + threadIdx.x) * N : i * N * blockDim.x + threadIdx.x;
        Pack<T, N> pack;
#pragma unroll
        for (int e = 0; e < N; ++e) {
            pack.at[e] = T(shown >> (i * N + e) & 1 ? x[i][e] * share : A(0));
            if (!packed && first + e * apart < keys) to[first + e * apart] = pack.at[e];
        }
        if (packed && first < keys) store(to + first, pack);
    }
}

template <typename S, typename T>
__global__ void __launch_bounds__(1024) kernel_softmax_long(
    const S* scores, T* out, const unsigned char* mask, Index keys, Index heads, Index block, Index seen,
    Index step, Index s_batch, Index s_head, Index s_row, Index packed,
    Index masked, Index m_batch, Index m_head, Index m_row, Index m_key
) {
    typedef typename Wide<S>::type A;
    const int N = 16 / sizeof(S);
    __shared__ A cells[32];
    Index row = blockIdx.x, r = row % block, map = row / block, visible = min(keys, max(seen + step * r, Index(0)));
    const S* s = scores + map / heads * s_batch + map % heads * s_head + r * s_row;
    const unsigned char* m = mask + map / heads * m_batch + map % heads * m_head + r * m_row;
    T* to = out + row * keys;
    Index apart = packed ? 1 : blockDim.x, start = packed ? threadIdx.x * N : threadIdx.x;

    A best = minus_infinity<A>(), sum = 0;
    for (Index first = start; first < visible; first += Index(blockDim.x) * N) {
        Pack<S, N> pack;
        if (packed) pack = load<N>(s + first);
        A x[N], before = best;
#pragma unroll
        for (int e = 0; e < N; ++e) {
            Index j = first + e * apart;
            bool show = j < visible && (!masked || m[j * m_key]);
            x[e] = show ? A(packed ? pack.at[e] : s[j]) : minus_infinity<A>();
            best = larger(best, x[e]);
        }
        A minus = subtracted(best);
        sum *= exp(before - minus);
#pragma unroll
        for (int e = 0; e < N; ++e) sum += exp(x[e] - minus);
    }
    A most = of_team(best, cells, Larger()), minus = subtracted(most);
    A share = reciprocal(of_team(sum * exp(best - minus), cells, Sum()));

    for (Index first = start; first < keys; first += Index(blockDim.x) * N) {
        Pack<S, N> pack;
        if (packed && first < visible) pack = load<N>(s + first);
        Pack<T, N> shares;
#pragma unroll
        for (int e = 0; e < N; ++e) {
            Index j = first + e * apart;
            bool show = j < visible && (!masked || m[j * m_key]);
            shares.at[e] = T(show ? exp(A(packed ? pack.at[e] : s[j]) - minus) * share : A(0));
            if (!packed && j < keys) to[j] = shares.at[e];
        }
        if (packed) store(to + first, shares);
    }
}
