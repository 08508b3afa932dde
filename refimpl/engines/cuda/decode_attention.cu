// Attention of few queries over many keys: every byte of the cache is read once.
//
//     out_i = sum_j p_ij v_j,   p_ij = e^(scale q_i . k_j) / sum_j e^(scale q_i . k_j)
//
// A step of decoding does two FLOPs for each element of the cache and each query head that uses it: time is what the
// memory takes. So the keys are cut into ranges, one for a block (Flash-Decoding, Dao et al., PyTorch blog, October
// 2023), as many as keep all multiprocessors reading, and all query heads of a key head are computed from one load of
// its keys and values (grouped queries, arXiv 2305.13245).
//
// A team      L = 16-byte columns of a row, at most a warp: each lane holds one column (two in float64 of D = 128), so
//             that a warp reads 512 contiguous bytes. A team takes every n-th key of the range, a few at a time: their
//             loads are all under way before the first is used. q . k is summed over the team's lanes by shuffles.
// Registers   R queries (those of all heads in the group): per lane R columns of out, R maxima and sums.
// Shared      q times the scale: R D values; and at the end one row of each warp, to add them up.
// Ranges      leave their maximum m, sum l and unscaled out o; `combine` adds e^(m - max m) o and e^(m - max m) l.
#include "online_softmax.cuh"
#include "packs.cuh"

const int WARPS = 4;

template <typename A> __device__ A greater_of(A a, A b) { return b > a ? b : a; }  // a where b is not a number

// q (B, H, q_len, width), k, v (B or 1, groups, k_len, width) by strides, width a multiple of 16 bytes up to D, rows
// aligned to 16 bytes. A key head has H / groups * q_len queries, of which a block takes R, at most. Query t sees keys
// t + low to t + high of those from `first` to stop - 1, where the mask is not 0. One block per range of `share` keys,
// part of a key head's queries and batch. With one range -> out, else -> partial
// (B, H, q_len, ranges, width + 2): o, m and l.
template <typename T, typename A, int D, int R>
__global__ void __launch_bounds__(128) kernel_decode(
    const T* q, const T* k, const T* v, T* out, const unsigned char* mask, A* partial,
    Index heads, Index groups, Index q_len, Index width, Index low, Index high, Index first, Index stop, Index share,
    double scale,
    Index q_batch, Index q_head, Index q_row, Index k_batch, Index k_head, Index k_row,
    Index v_batch, Index v_head, Index v_row, Index o_batch, Index o_head, Index o_row,
    Index masked, Index m_batch, Index m_head, Index m_row, Index m_key
) {
    const int V = 16 / sizeof(T), ALL = D / V, L = ALL < 32 ? ALL : 32, C = ALL / L;  // elements and columns of a lane
    const int TEAMS = WARPS * 32 / L, KEYS = R <= 4 ? 4 : 2;  // keys that a team has under way
    __shared__ A queries[R][D], sums[WARPS][D + 2];
    __shared__ int lowest[R], highest[R];  // keys that a query sees
    __shared__ Index mask_row[R];
    int per_group = int(heads / groups), parts = gridDim.y / int(groups), columns = int(width);
    int group = blockIdx.y / parts, row0 = blockIdx.y % parts * R, rows = min(per_group * int(q_len) - row0, R);
    Index batch = blockIdx.z;
    k += batch * k_batch + group * k_head, v += batch * v_batch + group * v_head;
    mask += batch * m_batch;

    for (int i = threadIdx.x; i < R * D; i += 32 * WARPS) {
        int row = i / D, c = i % D;
        Index head = group * per_group + (row0 + row) / q_len;
        bool inside = row < rows && c < columns;
        queries[row][c] =
            inside ? A(q[batch * q_batch + head * q_head + (row0 + row) % q_len * q_row + c]) * A(scale) : A(0);
    }
    if (threadIdx.x < R) {
        int row = threadIdx.x, t = (row0 + row) % int(q_len);
        lowest[row] = t + int(low), highest[row] = row < rows ? min(t + int(high), int(stop) - 1) : -1;
        mask_row[row] = (group * per_group + (row0 + row) / int(q_len)) * m_head + t * m_row;
    }
    __syncthreads();

    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, team = threadIdx.x / L, column = lane % L * V;
    int begin = int(first + blockIdx.x * share), end = int(min(begin + share, stop));
    A o[R][C][V] = {}, maximum[R], sum[R] = {};
#pragma unroll
    for (int r = 0; r < R; ++r) maximum[r] = minus_infinity<A>();

    for (int base = begin; base < end; base += TEAMS * KEYS) {
        Pack<T, V> held_k[KEYS][C], held_v[KEYS][C];
#pragma unroll
        for (int i = 0; i < KEYS; ++i)
#pragma unroll
            for (int c = 0; c < C; ++c) {
                int key = base + i * TEAMS + team, at = column + c * L * V;
                held_k[i][c] = held_v[i][c] = Pack<T, V>{};
                if (key < end && at < columns) {
                    held_k[i][c] = load<V>(k + key * k_row + at);
                    held_v[i][c] = load<V>(v + key * v_row + at);
                }
            }
#pragma unroll
        for (int r = 0; r < R; ++r) {
            A s[KEYS];
#pragma unroll
            for (int i = 0; i < KEYS; ++i) {
                s[i] = 0;
#pragma unroll
                for (int c = 0; c < C; ++c)
#pragma unroll
                    for (int e = 0; e < V; ++e) s[i] += queries[r][column + c * L * V + e] * A(held_k[i][c].at[e]);
#pragma unroll
                for (int by = L / 2; by; by /= 2) s[i] += __shfl_xor_sync(ALL_LANES, s[i], by);
                int key = base + i * TEAMS + team;
                bool seen = key < end && key >= lowest[r] && key <= highest[r];
                if (seen && masked) seen = mask[mask_row[r] + key * m_key];
                if (!seen) s[i] = minus_infinity<A>();
            }
            A best = maximum[r];
#pragma unroll
            for (int i = 0; i < KEYS; ++i) best = greater_of(best, s[i]);
            A minus = subtracted(best), kept = exponential(maximum[r] - minus);
            maximum[r] = best, sum[r] *= kept;
#pragma unroll
            for (int c = 0; c < C; ++c)
#pragma unroll
                for (int e = 0; e < V; ++e) o[r][c][e] *= kept;
#pragma unroll
            for (int i = 0; i < KEYS; ++i) {
                A p = exponential(s[i] - minus);
                sum[r] += p;
#pragma unroll
                for (int c = 0; c < C; ++c)
#pragma unroll
                    for (int e = 0; e < V; ++e) o[r][c][e] += p * A(held_v[i][c].at[e]);
            }
        }
    }

#pragma unroll
    for (int r = 0; r < R; ++r) {
        A best = maximum[r];  // the teams of a warp first
#pragma unroll
        for (int by = L; by < 32; by *= 2) best = greater_of(best, __shfl_xor_sync(ALL_LANES, best, by));
        A kept = exponential(maximum[r] - subtracted(best));
        sum[r] *= kept;
#pragma unroll
        for (int by = L; by < 32; by *= 2) sum[r] += __shfl_xor_sync(ALL_LANES, sum[r], by);
#pragma unroll
        for (int c = 0; c < C; ++c)
#pragma unroll
            for (int e = 0; e < V; ++e) {
                A value = o[r][c][e] * kept;
#pragma unroll
                for (int by = L; by < 32; by *= 2) value += __shfl_xor_sync(ALL_LANES, value, by);
                if (lane < L) sums[warp][column + c * L * V + e] = value;
            }
        if (lane == 0) sums[warp][D] = best, sums[warp][D + 1] = sum[r];
        __syncthreads();
        A most = minus_infinity<A>(), total = 0, weights[WARPS];
#pragma unroll
        for (int w = 0; w < WARPS; ++w) most = greater_of(most, sums[w][D]);
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            weights[w] = exponential(sums[w][D] - subtracted(most));
            total += weights[w] * sums[w][D + 1];
        }
        Index head = group * per_group + (row0 + r) / int(q_len), t = (row0 + r) % int(q_len);
        Index range = ((batch * heads + head) * q_len + t) * gridDim.x + blockIdx.x;
        for (int c = threadIdx.x; r < rows && c < columns; c += 32 * WARPS) {
            A value = 0;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) value += weights[w] * sums[w][c];
            if (gridDim.x == 1) out[batch * o_batch + head * o_head + t * o_row + c] = T(value * reciprocal(total));
            else partial[range * (columns + 2) + c] = value;
        }
        if (r < rows && gridDim.x > 1 && threadIdx.x == 0) {
            partial[range * (columns + 2) + columns] = most;
            partial[range * (columns + 2) + columns + 1] = total;
        }
        __syncthreads();  // the next row takes the place of this one
    }
}

// The sums of all ranges. partial (B, H, q_len, ranges, width + 2) -> out (B, H, q_len, width) by strides.
// One block per row.
template <typename T, typename A>
__global__ void __launch_bounds__(128) kernel_combine(
    const A* partial, T* out, Index heads, Index q_len, Index width, Index ranges, Index o_batch, Index o_head,
    Index o_row
) {
    Index row = blockIdx.x, t = row % q_len, map = row / q_len;
    partial += row * ranges * (width + 2);
    A most = minus_infinity<A>(), total = 0;
    for (int i = 0; i < ranges; ++i) most = greater_of(most, partial[i * (width + 2) + width]);
    most = subtracted(most);
    for (int i = 0; i < ranges; ++i) {
        const A* range = partial + i * (width + 2);
        total += exponential(range[width] - most) * range[width + 1];
    }
    for (int c = threadIdx.x; c < width; c += blockDim.x) {
        A value = 0;
        for (int i = 0; i < ranges; ++i) {
            const A* range = partial + i * (width + 2);
            value += exponential(range[width] - most) * range[c];
        }
        out[map / heads * o_batch + map % heads * o_head + t * o_row + c] = T(value * reciprocal(total));
    }
}
