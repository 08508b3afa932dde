// Fused attention in float16 on tensor cores: the map stays in registers.
//
//     out_i = sum_j p_ij v_j,   p_ij = e^(scale q_i . k_j) / sum_j e^(scale q_i . k_j),
//
// over the keys j that query i sees: i + low <= j <= i + high, j < k_len, and mask_ij. FlashAttention-2 (arXiv
// 2307.08691, algorithm 1): a block owns a tile of queries and walks along the tiles of keys that any of them sees.
//
// A block     4 warps, 64 STRIPES queries of one head; a warp owns STRIPES stripes of 16 queries by all keys, so that
//             no row is shared between warps. With two stripes each fragment of K and V read from shared memory is used
//             twice.
// Products    mma m16n8k16 (float16 in, float32 sums). The sums of S = Q Kᵀ lie in registers just as the left operand
//             of P V has to, so that probabilities never leave their thread: WMMA, whose fragments are opaque, would
//             need shared memory in between.
// Registers   two stripes, D = 128: out 128 of a thread's 255, S 32 (tiles of 32 keys); D = 64: out 64, S 64 (tiles of
//             64 keys), and Q 32, which is read again for every tile where D is larger. A multiprocessor has
//             room for two such blocks.
// Shared      Q, and two stages of K and V: (64 STRIPES + 4 KEYS) (D + 8) halves, 54 KiB for D = 64, 68 KiB for
//             D = 128. Rows are 16 bytes longer than needed, an odd number of 16-byte columns, so that the 8 rows that
//             ldmatrix reads at a time lie in different banks.
// Logits      e^(scale (s - m)) = 2^(c s - c m) with c = scale log2(e), `factor`: one fused multiply-add and one ex2.
//             The rounding of c m is that of all keys of a tile alike. The scale is positive: the host turns q's sign.
// Copies      cp.async of the next K and V runs while this tile is computed: one barrier per tile.
#include "online_softmax.cuh"
#include "reduce.cuh"
#include "tensor_cores.cuh"

const int WARPS = 4;

// Rows `first` to first + ROWS - 1 of x (length, width) -> tile (ROWS, D + 8), zeros outside x.
// Four threads share a row.
template <int ROWS, int D>
__device__ void copy_tile(__half* tile, const __half* x, Index row_stride, int first, int length, int width) {
    int row = threadIdx.x / 4, column = threadIdx.x % 4 * 8;
#pragma unroll
    for (int pass = 0; pass < ROWS; pass += 8 * WARPS, row += 8 * WARPS) {
        const __half* from = x + (first + row) * row_stride + column;
        __half* to = tile + row * (D + 8) + column;
#pragma unroll
        for (int c = 0; c < D; c += 32) {
            bool inside = first + row < length && column + c < width;
            copy_async_16(to + c, inside ? from + c : x, inside ? 16 : 0);
        }
    }
}

// 16 x 16 of a row-major tile as the left operand of mma.
template <int D> __device__ void left_operand(unsigned (&a)[4], const __half* tile, int row, int column) {
    int lane = threadIdx.x % 32;
    ldmatrix_x4(a, tile + (row + lane % 16) * (D + 8) + column + lane / 16 * 8);
}

// 16 keys x 16 columns of K as right operands of mma for S = Q Kᵀ: b[0], b[1] for the first 8 keys, b[2], b[3]
// for the others.
template <int D> __device__ void keys_operand(unsigned (&b)[4], const __half* tile, int key, int column) {
    int lane = threadIdx.x % 32;
    ldmatrix_x4(b, tile + (key + lane / 16 * 8 + lane % 8) * (D + 8) + column + lane / 8 % 2 * 8);
}

// 16 keys x 16 columns of V as right operands of mma for P V: b[0], b[1] for the first 8 columns,
// b[2], b[3] for the others.
template <int D> __device__ void values_operand(unsigned (&b)[4], const __half* tile, int key, int column) {
    int lane = threadIdx.x % 32;
    ldmatrix_x4_trans(b, tile + (key + lane % 16) * (D + 8) + column + lane / 16 * 8);
}

// q (B, H, q_len, width), k, v (B or 1, groups, k_len, width) by strides, width a multiple of 8 up to D, rows aligned
// to 16 bytes -> out (B, H, q_len, width) by strides. Mask by strides (0 where it broadcasts), read where `masked`.
// Ops attention and local_attention of the reference. One block per tile of queries, head and batch.
template <int D, int STRIPES>
__global__ void __launch_bounds__(128) kernel_fused(
    const __half* q, const __half* k, const __half* v, __half* out, const unsigned char* mask,
    Index groups, Index q_len, Index k_len, Index width, Index low, Index high, double factor,
    Index q_batch, Index q_head, Index q_row, Index k_batch, Index k_head, Index k_row,
    Index v_batch, Index v_head, Index v_row, Index o_batch, Index o_head, Index o_row,
    Index masked, Index m_batch, Index m_head, Index m_row, Index m_key
) {
    const int ROWS = 16 * STRIPES * WARPS, KEYS = D <= 64 ? 64 : 32, TILE = KEYS * (D + 8);
    const bool Q_IN_REGISTERS = D <= 64;
    DYNAMIC_SHARED(__half, shared);
    __half *q_tile = shared, *stages = shared + ROWS * (D + 8);  // stage s: K at 2 s TILE, V at (2 s + 1) TILE

    Index head = blockIdx.y, batch = blockIdx.z, group = head / (gridDim.y / groups);
    q += batch * q_batch + head * q_head;
    k += batch * k_batch + group * k_head, v += batch * v_batch + group * v_head;
    int rows = int(q_len), keys = int(k_len), columns = int(width), below = int(low), above = int(high);
    int first_row = (gridDim.x - 1 - blockIdx.x) * ROWS;  // the last rows first: causal ones see most
    int last_row = min(first_row + ROWS, rows) - 1;
    int tile = max(first_row + below, 0) / KEYS;
    int stop = (min(last_row + above + 1, keys) + KEYS - 1) / KEYS;  // behind the last tile

    copy_tile<ROWS, D>(q_tile, q, q_row, first_row, rows, columns);
    copy_async_commit();
    if (tile < stop) {
        copy_tile<KEYS, D>(stages, k, k_row, tile * KEYS, keys, columns);
        copy_tile<KEYS, D>(stages + TILE, v, v_row, tile * KEYS, keys, columns);
    }
    copy_async_commit();
    copy_async_wait<1>();  // Q is there; the first K and V may be under way
    __syncthreads();

    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int stripe_row = warp * 16 * STRIPES;  // the warp's first row in the tile
    int my_row = first_row + stripe_row + lane / 4;  // of stripe 0; a thread has this row and my_row + 8 of each stripe
    unsigned q_held[STRIPES][D / 16][4];
    if (Q_IN_REGISTERS) {
#pragma unroll
        for (int r = 0; r < STRIPES; ++r)
#pragma unroll
            for (int c = 0; c < D / 16; ++c) left_operand<D>(q_held[r][c], q_tile, stripe_row + 16 * r, 16 * c);
    }

    float o[STRIPES][D / 8][4] = {}, maximum[STRIPES][2], sum[STRIPES][2] = {};
#pragma unroll
    for (int r = 0; r < STRIPES; ++r) maximum[r][0] = maximum[r][1] = minus_infinity<float>();

    for (int stage = 0; tile < stop; ++tile, stage ^= 1) {
        copy_async_wait<0>();
        __syncthreads();  // this stage is filled, and nobody reads the other one any more
        const __half *k_tile = stages + 2 * stage * TILE, *v_tile = k_tile + TILE;
        if (tile + 1 < stop) {
            __half* other = stages + 2 * (stage ^ 1) * TILE;
            copy_tile<KEYS, D>(other, k, k_row, (tile + 1) * KEYS, keys, columns);
            copy_tile<KEYS, D>(other + TILE, v, v_row, (tile + 1) * KEYS, keys, columns);
        }
        copy_async_commit();
        int first_key = tile * KEYS, warp_row = first_row + stripe_row, warp_last = warp_row + 16 * STRIPES - 1;
        if (first_key > warp_last + above || first_key + KEYS <= warp_row + below) continue;  // no row sees any

        // Most tiles lie inside what all rows see; of the others each of the thread's logits has a bit.
        bool edge = first_key < warp_last + below || first_key + KEYS - 1 > warp_row + above || first_key + KEYS > keys;
        edge = edge || masked;
        unsigned seen[STRIPES];
        if (edge) {
            const unsigned char* m = mask + blockIdx.z * m_batch + blockIdx.y * m_head;
#pragma unroll
            for (int r = 0; r < STRIPES; ++r) {
                seen[r] = 0;
#pragma unroll 8
                for (int i = 0; i < KEYS / 2; ++i) {
                    int row = my_row + 16 * r + i / 2 % 2 * 8, key = first_key + i / 4 * 8 + lane % 4 * 2 + i % 2;
                    bool sees = key >= row + below && key <= row + above && key < keys && row < rows;
                    if (sees && masked) sees = m[row * m_row + key * m_key];
                    seen[r] |= unsigned(sees) << i;
                }
            }
        }

        float s[STRIPES][KEYS / 8][4] = {};  // S = Q Kᵀ
#pragma unroll
        for (int c = 0; c < D / 16; ++c) {
            unsigned a[STRIPES][4];
#pragma unroll
            for (int r = 0; r < STRIPES; ++r) {
                if (!Q_IN_REGISTERS) left_operand<D>(a[r], q_tile, stripe_row + 16 * r, 16 * c);
            }
#pragma unroll
            for (int n = 0; n < KEYS / 16; ++n) {
                unsigned b[4];
                keys_operand<D>(b, k_tile, 16 * n, 16 * c);
#pragma unroll
                for (int r = 0; r < STRIPES; ++r) {
                    mma_m16n8k16_f16(s[r][2 * n], Q_IN_REGISTERS ? q_held[r][c] : a[r], {b[0], b[1]});
                    mma_m16n8k16_f16(s[r][2 * n + 1], Q_IN_REGISTERS ? q_held[r][c] : a[r], {b[2], b[3]});
                }
            }
        }

        if (edge) {
#pragma unroll
            for (int r = 0; r < STRIPES; ++r)
#pragma unroll
                for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        if (!(seen[r] >> (4 * n + e) & 1)) s[r][n][e] = minus_infinity<float>();
        }

#pragma unroll
        for (int r = 0; r < STRIPES; ++r)
#pragma unroll
            for (int half = 0; half < 2; ++half) {  // rows my_row and my_row + 8, each of four neighbouring threads
                float best = maximum[r][half];
#pragma unroll
                for (int n = 0; n < KEYS / 8; ++n) best = fmaxf(best, fmaxf(s[r][n][2 * half], s[r][n][2 * half + 1]));
                best = fmaxf(best, __shfl_xor_sync(ALL_LANES, best, 1));
                best = fmaxf(best, __shfl_xor_sync(ALL_LANES, best, 2));
                float c = float(factor), minus = subtracted(best) * c;
                float kept = power_of_two(maximum[r][half] * c - minus), added = 0;
                maximum[r][half] = best;
#pragma unroll
                for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
                    for (int e = 2 * half; e < 2 * half + 2; ++e) {
                        s[r][n][e] = power_of_two(s[r][n][e] * c - minus);  // now P; a NaN stays one
                        added += s[r][n][e];
                    }
                sum[r][half] = sum[r][half] * kept + added;  // of this thread's keys
#pragma unroll
                for (int n = 0; n < D / 8; ++n) o[r][n][2 * half] *= kept, o[r][n][2 * half + 1] *= kept;
            }

#pragma unroll
        for (int n = 0; n < KEYS / 16; ++n) {  // O += P V
            unsigned a[STRIPES][4];
#pragma unroll
            for (int r = 0; r < STRIPES; ++r) {
                a[r][0] = two_halves(s[r][2 * n][0], s[r][2 * n][1]);
                a[r][1] = two_halves(s[r][2 * n][2], s[r][2 * n][3]);
                a[r][2] = two_halves(s[r][2 * n + 1][0], s[r][2 * n + 1][1]);
                a[r][3] = two_halves(s[r][2 * n + 1][2], s[r][2 * n + 1][3]);
            }
#pragma unroll
            for (int c = 0; c < D / 16; ++c) {
                unsigned b[4];
                values_operand<D>(b, v_tile, 16 * n, 16 * c);
#pragma unroll
                for (int r = 0; r < STRIPES; ++r) {
                    mma_m16n8k16_f16(o[r][2 * c], a[r], {b[0], b[1]});
                    mma_m16n8k16_f16(o[r][2 * c + 1], a[r], {b[2], b[3]});
                }
            }
        }
    }

    // Through the warp's own rows of the Q tile, so that rows are written 16 bytes at a time.
    __syncwarp();
#pragma unroll
    for (int r = 0; r < STRIPES; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float share = reciprocal(quad_sum(sum[r][half]));
            __half* to = q_tile + (stripe_row + 16 * r + 8 * half + lane / 4) * (D + 8) + lane % 4 * 2;
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
                *reinterpret_cast<unsigned*>(to + 8 * n) =
                    two_halves(o[r][n][2 * half] * share, o[r][n][2 * half + 1] * share);
            }
        }
    __syncwarp();
    const int COLUMNS = D / 8;
    out += blockIdx.z * o_batch + blockIdx.y * o_head;
#pragma unroll
    for (int i = lane; i < 16 * STRIPES * COLUMNS; i += 32) {
        int row = stripe_row + i / COLUMNS, column = i % COLUMNS * 8;
        if (first_row + row < rows && column < columns) {
            *reinterpret_cast<uint4*>(out + (first_row + row) * o_row + column) =
                *reinterpret_cast<const uint4*>(q_tile + row * (D + 8) + column);
        }
    }
}
