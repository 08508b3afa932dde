// Filtered attention (LATTE, arXiv 2404.07519) in float16, as in filtered.cu but for the sum of values.
//
//     o (16, Dv) = alpha o + p (16, 32) v (32, Dv)
//
// Tensor cores multiply the weights of 16 rows and 32 keys by all their values sooner than 32 lanes walk along the keys
// that single rows keep: a tenth of 512 pairs, at some ten instructions each, is more than the 4 Dv / 8 products and
// the loads and stores of the sums. Weights of dropped keys are zeros, so that a value that is not finite reaches the
// rows of its tile (0 times NaN), as in the reference. Where none of the 32 keys is kept, nothing is done.
//
// work:     3 T S D int8 and T S Dv float16 multiply-adds on tensor cores
// budget:   shared memory per block, D = Dv = 64: 5 KiB queries, 5 KiB keys, 9 KiB values, 10 KiB weights (for scores
//           from floating-point rows), 18 KiB sums; 128 registers on an H100, where four blocks share a multiprocessor
#include "filtered.cuh"

const int VALUE_PAD = 8;  // numbers behind a row of values and of sums: eight rows then begin in different banks

// Copy rows of values to shared memory, 16 bytes at a time; rows from `count` on are zeros.
__device__ void load_values(__half* to, const __half* v, Index v_row, int count, int v_width) {
    int per_row = v_width / 8;
    for (int i = threadIdx.y * 32 + threadIdx.x; i < KEYS * per_row; i += 32 * blockDim.y) {
        int r = i / per_row, c = i % per_row * 8;
        Pack<__half, 8> pack;
        for (int n = 0; n < 8; ++n) pack.at[n] = __half(0.0f);
        if (r < count) pack = load<8>(v + r * v_row + c);
        store<8>(to + r * (v_width + VALUE_PAD) + c, pack);
    }
}

// Multiply the sums (TILE, v_width) of a warp's rows by alpha and add p v: p (16, 32) as soften leaves it,
// v (32, v_width).
__device__ void add_products(
    const Weigher<__half, float>& warp, const float (&p)[4][4], float* sums, const __half* v, int v_width
) {
    int lane = threadIdx.x, g = lane / 4, t = lane % 4, stride = v_width + VALUE_PAD;
    unsigned a[2][4];  // p as the left operand: keys 16 k + 2 t and 16 k + 2 t + 8 on, rows g and g + 8
#pragma unroll
    for (int k = 0; k < 2; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float* two = p[2 * k + i / 2] + 2 * (i % 2);
            a[k][i] = two_halves(two[0], two[1]);
        }
    }
    for (int c = 0; c < v_width; c += 8) {
        float* upper = sums + g * stride + c + 2 * t;
        float* lower = upper + 8 * stride;
        Pack<float, 2> first = load<2>(upper), second = load<2>(lower);
        float d[4] = {
            first.at[0] * warp.alpha[0], first.at[1] * warp.alpha[0], second.at[0] * warp.alpha[1],
            second.at[1] * warp.alpha[1]
        };
        unsigned b[4];  // four matrices of eight keys each
        ldmatrix_x4_trans(b, v + lane * stride + c);
        mma_m16n8k16_f16(d, a[0], {b[0], b[1]});
        mma_m16n8k16_f16(d, a[1], {b[2], b[3]});
        store<2>(upper, Pack<float, 2>{{d[0], d[1]}}), store<2>(lower, Pack<float, 2>{{d[2], d[3]}});
    }
}

// As filtered of filtered.cu, for values whose rows are multiples of 16 bytes.
// Op filtered_attention of the reference. Blocks of (32, warps).
template <bool NEAREST>
__global__ void __launch_bounds__(128, RESIDENT<float>) kernel_filtered_half(
    const __half* q, const __half* k, const signed char* q_codes, const signed char* k_codes, const int* most,
    const double* steps, const int* margins, const unsigned char* mask, const __half* v, __half* out, float* parts,
    float* stats, unsigned long long* counts, Index maps, Index heads, Index groups, Index q_len, Index k_len,
    Index width, Index tiles, Index splits, Index span, Index causal, Index exact, Index masked, Index packed,
    double scale, Index q_batch, Index q_head, Index q_row, Index k_batch, Index k_head, Index k_row, Index c_batch,
    Index c_head, Index c_row, Index kc_batch, Index kc_head, Index kc_row, Index m_batch, Index m_head, Index m_row,
    Index m_key, Index v_width, Index v_batch, Index v_head, Index v_row, Index o_batch, Index o_head, Index o_row
) {
    DYNAMIC_SHARED(signed char, shared);
    int stride = (int(width) + 31) / 32 * 32 + PAD, v_stride = int(v_width) + VALUE_PAD;
    signed char *own = shared + threadIdx.y * TILE * stride, *keys = shared + blockDim.y * TILE * stride;
    __half* values = reinterpret_cast<__half*>(keys + KEYS * stride);
    float* weights = reinterpret_cast<float*>(values + KEYS * v_stride) + threadIdx.y * TILE * ROOM;
    float* sums = weights + (blockDim.y - threadIdx.y) * TILE * ROOM + threadIdx.y * TILE * v_stride;
    Index per_group = heads / groups;
    Part part = part_of(groups, per_group * q_len, q_len, k_len, tiles, splits, span, causal);
    Weigher<__half, float> warp = weigher<__half, float>(
        part, q, k, q_codes, most, steps, margins, mask, own, weights, heads, per_group, q_len, k_len, width, causal,
        exact, masked, packed, scale, q_batch, q_head, q_row, k_batch, k_head, k_row, c_batch, c_head, c_row, m_batch,
        m_head, m_row, m_key
    );
    for (int c = threadIdx.x; c < TILE * v_stride; c += 32) sums[c] = 0;
    k_codes += part.b * kc_batch + part.group * kc_head;
    v += part.b * v_batch + part.group * v_head;
    float s[4][4];
    auto row = [&](int key) { return key < k_len ? k_codes + Index(key) * kc_row : nullptr; };
    auto fetch = [&](int tile) { load_values(values, v + tile * v_row, v_row, int(k_len) - tile, v_width); };
    walk(part.from, part.stop, keys, width, stride, packed, row, fetch, [&](int tile, int chunk) {
        if (!warp.template keep<NEAREST>(keys + chunk * stride, tile + chunk, s)) return;
        warp.soften(s);
        add_products(warp, s, sums, values + chunk * v_stride, v_width);
    });
    finish<__half, float>(
        warp, part, sums, v_stride, out, parts, stats, counts, maps, heads, per_group, q_len, splits, v_width, o_batch,
        o_head, o_row
    );
}
