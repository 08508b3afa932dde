// Fused attention in float32 without tensor cores (whose TF32 keeps 10 bits): one launch, no map in memory.
//
//     out_i = sum_j p_ij v_j,   p_ij = e^(scale q_i . k_j) / sum_j e^(scale q_i . k_j),
//
// over the keys j that query i sees: i + low <= j <= i + high, j < k_len, and mask_ij; with an online softmax (arXiv
// 1805.02867, algorithm 3) over tiles of keys, as FlashAttention-2 has it (arXiv 2307.08691, algorithm 1).
//
// A block     256 threads as 16 x 16, 64 queries of one head by tiles of 64 keys. Thread (x, y) owns the queries
//             4 y .. 4 y + 3, and of these the logits of the keys x, x + 16, x + 32, x + 48, and the columns
//             4 x .. 4 x + 3 of each 64 of out. So a row belongs to 16 neighbours in one warp, which shuffles can
//             reach.
// Products    4 x 4 per thread from registers: 8 loads of 16 bytes for 64 multiply-adds. Keys 16 apart, in rows of
//             D + 4 numbers, lie in different banks.
// Shared      Q, K, V: 3 * 64 (D + 4), and P: 64 * 68 floats: 68 KiB for D = 64 (two blocks on a multiprocessor of an
//             H100, by registers too), 116 KiB for D = 128 (one).
// Scale       is multiplied into Q, so that logits round as those of the reference do.
#include "online_softmax.cuh"
#include "packs.cuh"
#include "tensor_cores.cuh"

const int TILE = 64;  // queries, and keys

// Rows `first` to first + 63 of x (length, width), times `scale` -> tile (64, D + 4), zeros outside x.
template <int D>
__device__ void copy_tile(
    float* tile, const float* x, Index row_stride, int first, int length, int width, float scale, bool packed
) {
    int step = packed ? 4 : 1;
    for (int i = threadIdx.x * step; i < TILE * D; i += 256 * step) {
        int row = i / D, column = i % D;
        bool inside = first + row < length && column < width;
        const float* from = x + (first + row) * row_stride + column;
        if (packed) {
            Pack<float, 4> four = {};
            if (inside) four = load<4>(from);
#pragma unroll
            for (int e = 0; e < 4; ++e) four.at[e] *= scale;
            store(tile + row * (D + 4) + column, four);
        } else {
            tile[row * (D + 4) + column] = inside ? *from * scale : 0;
        }
    }
}

// q (B, H, q_len, width), k, v (B or 1, groups, k_len, width) by strides, width up to D; read 16 bytes at a time where
// `packed` -> out (B, H, q_len, width) by strides. Mask by strides (0 where it broadcasts), read where `masked`.
// Ops attention and local_attention of the reference. One block per tile of queries, head and batch.
template <typename T, int D>
__global__ void __launch_bounds__(256) kernel_fused_float(
    const T* q, const T* k, const T* v, T* out, const unsigned char* mask,
    Index groups, Index q_len, Index k_len, Index width, Index low, Index high, double scale, Index packed,
    Index q_batch, Index q_head, Index q_row, Index k_batch, Index k_head, Index k_row,
    Index v_batch, Index v_head, Index v_row, Index o_batch, Index o_head, Index o_row,
    Index masked, Index m_batch, Index m_head, Index m_row, Index m_key
) {
    DYNAMIC_SHARED(float, shared);
    const int PITCH = D + 4, P_PITCH = TILE + 4, C = D / 64;
    float *q_tile = shared, *k_tile = q_tile + TILE * PITCH, *v_tile = k_tile + TILE * PITCH;
    float* p_tile = v_tile + TILE * PITCH;
    Index head = blockIdx.y, batch = blockIdx.z, group = head / (gridDim.y / groups);
    q += batch * q_batch + head * q_head, out += batch * o_batch + head * o_head;
    k += batch * k_batch + group * k_head, v += batch * v_batch + group * v_head;
    mask += batch * m_batch + head * m_head;
    int rows = int(q_len), keys = int(k_len), columns = int(width), below = int(low), above = int(high);
    int x = threadIdx.x % 16, y = threadIdx.x / 16;
    int first_row = (gridDim.x - 1 - blockIdx.x) * TILE, last_row = min(first_row + TILE, rows) - 1;
    int first_key = max(first_row + below, 0) / TILE * TILE, stop = min(last_row + above + 1, keys);

    copy_tile<D>(q_tile, q, q_row, first_row, rows, columns, float(scale), packed);
    float o[4][C][4] = {}, maximum[4], sum[4] = {};
#pragma unroll
    for (int r = 0; r < 4; ++r) maximum[r] = minus_infinity<float>();

    for (; first_key < stop; first_key += TILE) {
        __syncthreads();  // nobody reads the tile before any more
        copy_tile<D>(k_tile, k, k_row, first_key, keys, columns, 1, packed);
        copy_tile<D>(v_tile, v, v_row, first_key, keys, columns, 1, packed);
        __syncthreads();

        float s[4][4] = {};  // S = Q Kᵀ
#pragma unroll 4
        for (int d = 0; d < D; d += 4) {
            Pack<float, 4> a[4], b[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                a[i] = load<4>(q_tile + (4 * y + i) * PITCH + d), b[i] = load<4>(k_tile + (x + 16 * i) * PITCH + d);
            }
#pragma unroll
            for (int r = 0; r < 4; ++r)
#pragma unroll
                for (int n = 0; n < 4; ++n)
#pragma unroll
                    for (int e = 0; e < 4; ++e) s[r][n] += a[r].at[e] * b[n].at[e];
        }

        bool edge = first_key < last_row + below || first_key + TILE - 1 > first_row + above || first_key + TILE > keys;
        if (edge || masked) {
#pragma unroll
            for (int r = 0; r < 4; ++r)
#pragma unroll
                for (int n = 0; n < 4; ++n) {
                    int row = first_row + 4 * y + r, key = first_key + x + 16 * n;
                    bool seen = key >= row + below && key <= row + above && key < keys && row < rows;
                    if (seen && masked) seen = mask[row * m_row + key * m_key];
                    if (!seen) s[r][n] = minus_infinity<float>();
                }
        }

#pragma unroll
        for (int r = 0; r < 4; ++r) {
            float best = fmaxf(maximum[r], fmaxf(fmaxf(s[r][0], s[r][1]), fmaxf(s[r][2], s[r][3])));
#pragma unroll
            for (int by = 8; by; by /= 2) best = fmaxf(best, __shfl_xor_sync(ALL_LANES, best, by));
            float minus = subtracted(best), kept = exponential(maximum[r] - minus);
            maximum[r] = best, sum[r] *= kept;
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                float p = exponential(s[r][n] - minus);
                sum[r] += p, p_tile[(4 * y + r) * P_PITCH + x + 16 * n] = p;
            }
#pragma unroll
            for (int c = 0; c < C; ++c)
#pragma unroll
                for (int e = 0; e < 4; ++e) o[r][c][e] *= kept;
        }
        __syncwarp();  // rows of P are written and read by the same warp

#pragma unroll 2
        for (int key = 0; key < TILE; key += 4) {  // O += P V
            Pack<float, 4> a[4];
#pragma unroll
            for (int r = 0; r < 4; ++r) a[r] = load<4>(p_tile + (4 * y + r) * P_PITCH + key);
#pragma unroll
            for (int n = 0; n < 4; ++n)
#pragma unroll
                for (int c = 0; c < C; ++c) {
                    Pack<float, 4> b = load<4>(v_tile + (key + n) * PITCH + 64 * c + 4 * x);
#pragma unroll
                    for (int r = 0; r < 4; ++r)
#pragma unroll
                        for (int e = 0; e < 4; ++e) o[r][c][e] += a[r].at[n] * b.at[e];
                }
        }
    }

#pragma unroll
    for (int r = 0; r < 4; ++r) {
        float total = sum[r];
#pragma unroll
        for (int by = 8; by; by /= 2) total += __shfl_xor_sync(ALL_LANES, total, by);
        float share = reciprocal(total);
        int row = first_row + 4 * y + r;
        if (row >= rows) continue;
#pragma unroll
        for (int c = 0; c < C; ++c) {
            int column = 64 * c + 4 * x;
            Pack<float, 4> four;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                four.at[e] = o[r][c][e] * share;
                if (!packed && column + e < columns) out[row * o_row + column + e] = four.at[e];
            }
            if (packed && column < columns) store(out + row * o_row + column, four);
        }
    }
}
