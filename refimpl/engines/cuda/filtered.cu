// Filtered attention (LATTE, arXiv 2404.07519).
//
//     m~_ij = 256 q^h_i . k^h_j                      of upper nibbles, for all visible pairs
//     keep j  iff  m~_ij >= max_j m~_ij - margin
//     o_i = sum over kept j of softmax(step q_i . k_j of the codes) v_j
//
// 16 times a nibble is a byte with its lower half cut off, so that one instruction on four codes prepares the estimate,
// and the tensor cores multiply bytes: 256 q^h . k^h comes out whole. A row's maximum must be known before a key can be
// dropped, hence two launches; the second computes the estimates again, which is cheaper than to keep them. There it
// also multiplies the whole codes, with the same operands in registers: the identity 256 hh + 16 (hl + lh) + ll would
// need two more products to save one, as no tensor core of this generation has a product of nibbles.
//
// A warp has 16 rows, a block up to four warps, which share a tile of 64 keys. Rows are the queries of all heads that
// share a key head, so that decoding with grouped queries fills them. Of 32 keys at a time
//     multiply   estimates (16, 32) and products (16, 32), in the registers of the tensor cores
//     weigh      kept keys as one bit each of a word per row, scores, running maximum and sum as in flash attention
//     add        per row its kept keys alone: p from shared memory, v from the first-level cache, 32 lanes side by
//                side; in float16 the tensor cores add all of them sooner: filtered_half.cu
// With few queries, keys are split between blocks (`splits`), whose sums `merge` adds up.
//
// bytes:    codes of keys once per block of rows (first-level misses: second-level cache), values of kept keys alone
// work:     3 T S D int8 multiply-adds on tensor cores, rho T S D in floating point; the map never exists
// budget:   shared memory per block, D = Dv = 64, float32: 5 KiB queries, 5 KiB keys, 10 KiB weights, 16 KiB sums
#include "filtered.cuh"

// --- the largest estimate -------------------------------------------------------------------------------------------

// The largest estimate of each row over the keys that it sees, in `most` (B, heads, q_len), which was LOWEST.
// q (B, heads, q_len, width), k (B, groups, k_len, width), mask (B, heads, q_len, k_len) by strides.
// First step of op filtered_attention of the reference. Blocks of (32, warps).
template <bool NEAREST>
__global__ void kernel_maxima(
    const signed char* q, const signed char* k, const unsigned char* mask, int* most, Index heads, Index groups,
    Index q_len, Index k_len, Index width, Index tiles, Index splits, Index span, Index causal, Index masked,
    Index packed, Index q_batch, Index q_head, Index q_row, Index k_batch, Index k_head, Index k_row, Index m_batch,
    Index m_head, Index m_row, Index m_key
) {
    DYNAMIC_SHARED(signed char, shared);
    int stride = (int(width) + 31) / 32 * 32 + PAD;
    Index per_group = heads / groups, rows = per_group * q_len;
    Part part = part_of(groups, rows, q_len, k_len, tiles, splits, span, causal);
    Rows<const signed char> queries = {q + part.b * q_batch + part.group * per_group * q_head, q_head, q_row, q_len};
    Index first = part.first + threadIdx.y * TILE;  // row of this warp
    signed char *own = shared + threadIdx.y * TILE * stride, *keys = shared + blockDim.y * TILE * stride;
    load_codes(own, TILE, width, stride, packed, threadIdx.x, 32, [&](int r) {
        return first + r < rows ? queries.at(first + r) : nullptr;
    });
    View view[2];
    int best[2] = {LOWEST, LOWEST}, estimates[4][4], none[4][4];
    for (int half = 0; half < 2; ++half) {
        Index n = first + threadIdx.x / 4 + 8 * half, head = part.group * per_group + n / q_len, i = n % q_len;
        view[half].reach = n >= rows ? 0 : causal ? i + 1 + k_len - q_len : k_len;
        view[half].mask = masked ? mask + part.b * m_batch + head * m_head + i * m_row : nullptr;
    }
    k += part.b * k_batch + part.group * k_head;
    auto row = [&](int key) { return key < k_len ? k + Index(key) * k_row : nullptr; };
    walk(part.from, part.stop, keys, width, stride, packed, row, [](int) {}, [&](int tile, int chunk) {
        multiply<NEAREST, false>(own, keys + chunk * stride, stride, estimates, none);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                int key = tile + chunk + 8 * n + 2 * (threadIdx.x % 4) + e % 2;
                if (view[e / 2].of(key, m_key)) best[e / 2] = max(best[e / 2], estimates[n][e]);
            }
        }
    });
    for (int half = 0; half < 2; ++half) {
        int found = quad_largest(best[half]);
        Index n = first + threadIdx.x / 4 + 8 * half;
        if (threadIdx.x % 4 == 0 && found != LOWEST) {
            atomicMax(most + (part.b * heads + part.group * per_group) * q_len + n, found);
        }
    }
}

// --- attention ------------------------------------------------------------------------------------------------------

template <int W> constexpr int AHEAD = W < 4 ? 4 : 2;  // rows of values that are on their way from memory at once

// Add weighted values of kept keys to the sums (TILE, v_width) of a warp's rows, after multiplying these by alpha.
template <typename T, typename A, int W>
__device__ void add_values(const Weigher<T, A>& warp, A* sums, const T* v, Index v_row, int v_width) {
#pragma unroll 1
    for (int r = 0; r < TILE; ++r) {
        unsigned kept = warp.of_row(r < 8 ? warp.kept[0] : warp.kept[1], r % 8);
        A alpha = warp.of_row(r < 8 ? warp.alpha[0] : warp.alpha[1], r % 8);
        if (!kept) continue;  // its alpha is 1
        for (int c = W * threadIdx.x; c < v_width; c += 32 * W) {
            Pack<A, W> sum = load<W>(sums + r * v_width + c);
#pragma unroll
            for (int i = 0; i < W; ++i) sum.at[i] *= alpha;
            for (unsigned left = kept; left;) {
                A weight[AHEAD<W>];
                Pack<T, W> value[AHEAD<W>];
                int count = 0;
#pragma unroll
                for (int n = 0; n < AHEAD<W>; ++n) {
                    if (left) {
                        int place = __ffs(left) - 1;
                        weight[n] = warp.weights[r * ROOM + place];
                        value[n] = load<W>(v + place * v_row + c);
                        left &= left - 1, ++count;
                    }
                }
#pragma unroll
                for (int n = 0; n < AHEAD<W>; ++n) {
#pragma unroll
                    for (int i = 0; i < W; ++i) {
                        if (n < count) sum.at[i] += weight[n] * A(value[n].at[i]);
                    }
                }
            }
            store<W>(sums + r * v_width + c, sum);
        }
    }
}

// Softmax over the kept keys of each row, times their values; and how many were kept.
// q, k, codes, mask as in maxima, v (B, groups, k_len, v_width) by strides, most from maxima, steps and margins
// (B, heads) -> out (B, heads, q_len, v_width) by strides and counts (B, heads), added to. Where keys are split: parts
// (splits, B heads q_len, v_width) and stats (splits, B heads q_len, 2), the maximum and the sum, instead of out.
// Op filtered_attention of the reference. Blocks of (32, warps).
template <typename T, typename A, int W, bool NEAREST>
__global__ void __launch_bounds__(128, RESIDENT<A>) kernel_filtered(
    const T* q, const T* k, const signed char* q_codes, const signed char* k_codes, const int* most,
    const double* steps, const int* margins, const unsigned char* mask, const T* v, T* out, A* parts, A* stats,
    unsigned long long* counts, Index maps, Index heads, Index groups, Index q_len, Index k_len, Index width,
    Index tiles, Index splits, Index span, Index causal, Index exact, Index masked, Index packed, double scale,
    Index q_batch, Index q_head, Index q_row, Index k_batch, Index k_head, Index k_row, Index c_batch, Index c_head,
    Index c_row, Index kc_batch, Index kc_head, Index kc_row, Index m_batch, Index m_head, Index m_row, Index m_key,
    Index v_width, Index v_batch, Index v_head, Index v_row, Index o_batch, Index o_head, Index o_row
) {
    DYNAMIC_SHARED(signed char, shared);
    int stride = (int(width) + 31) / 32 * 32 + PAD;
    signed char *own = shared + threadIdx.y * TILE * stride, *keys = shared + blockDim.y * TILE * stride;
    A* weights = reinterpret_cast<A*>(keys + KEYS * stride) + threadIdx.y * TILE * ROOM;
    A* sums = reinterpret_cast<A*>(keys + KEYS * stride) + blockDim.y * TILE * ROOM + threadIdx.y * TILE * v_width;
    Index per_group = heads / groups;
    Part part = part_of(groups, per_group * q_len, q_len, k_len, tiles, splits, span, causal);
    Weigher<T, A> warp = weigher<T, A>(
        part, q, k, q_codes, most, steps, margins, mask, own, weights, heads, per_group, q_len, k_len, width, causal,
        exact, masked, packed, scale, q_batch, q_head, q_row, k_batch, k_head, k_row, c_batch, c_head, c_row, m_batch,
        m_head, m_row, m_key
    );
    for (int c = threadIdx.x; c < TILE * v_width; c += 32) sums[c] = 0;
    k_codes += part.b * kc_batch + part.group * kc_head;
    v += part.b * v_batch + part.group * v_head;
    A s[4][4];
    int g = threadIdx.x / 4, t = threadIdx.x % 4;
    auto row = [&](int key) { return key < k_len ? k_codes + Index(key) * kc_row : nullptr; };
    walk(part.from, part.stop, keys, width, stride, packed, row, [](int) {}, [&](int tile, int chunk) {
        if (!warp.template keep<NEAREST>(keys + chunk * stride, tile + chunk, s)) return;
        warp.soften(s);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) weights[(g + 8 * (e / 2)) * ROOM + 8 * n + 2 * t + e % 2] = s[n][e];
        }
        __syncwarp();
        add_values<T, A, W>(warp, sums, v + Index(tile + chunk) * v_row, v_row, v_width);
        __syncwarp();
    });
    finish<T, A>(
        warp, part, sums, v_width, out, parts, stats, counts, maps, heads, per_group, q_len, splits, v_width, o_batch,
        o_head, o_row
    );
}

// Add up what blocks that shared the keys of a row have found.
// parts (splits, B heads q_len, v_width), stats (splits, B heads q_len, 2) -> out (B, heads, q_len, v_width) by
// strides. Last step of op filtered_attention of the reference. One block per row.
template <typename T, typename A>
__global__ void kernel_merge(
    const A* parts, const A* stats, const double* steps, T* out, Index maps, Index heads, Index q_len, Index splits,
    Index v_width, Index exact, double scale, Index o_batch, Index o_head, Index o_row
) {
    Index row = blockIdx.x, map = row / q_len, rows = maps * q_len;
    A unit = (exact ? A(scale) : A(steps[map])) * A(LOG2_E), maximum = minus_infinity<A>(), total = 0;
    for (Index split = 0; split < splits; ++split) maximum = larger(maximum, stats[2 * (split * rows + row)]);
    T* to = out + map / heads * o_batch + map % heads * o_head + row % q_len * o_row;
    for (Index split = 0; split < splits; ++split) {
        A own = stats[2 * (split * rows + row)];
        if (own != minus_infinity<A>()) total += stats[2 * (split * rows + row) + 1] * exp2((own - maximum) * unit);
    }
    for (Index c = threadIdx.x; c < v_width; c += blockDim.x) {
        A sum = 0;
        for (Index split = 0; split < splits; ++split) {
            A own = stats[2 * (split * rows + row)];
            if (own == minus_infinity<A>()) continue;
            sum += parts[(split * rows + row) * v_width + c] * exp2((own - maximum) * unit);
        }
        to[c] = T(total == 0 ? A(0) : sum / total);
    }
}

// --- the map --------------------------------------------------------------------------------------------------------

// The weights of kept keys, zeros elsewhere, for methods that hand a map on; and how many were kept. Keys are met
// twice: first for the maximum and the sum of each row.
// As filtered, -> weights (B, heads, q_len, k_len), contiguous. Op filtered_map of the reference.
// Blocks of (32, warps).
template <typename T, typename A, bool NEAREST>
__global__ void __launch_bounds__(128, 2) kernel_filtered_map(
    const T* q, const T* k, const signed char* q_codes, const signed char* k_codes, const int* most,
    const double* steps, const int* margins, const unsigned char* mask, T* out, unsigned long long* counts, Index heads,
    Index groups, Index q_len, Index k_len, Index width, Index tiles, Index causal, Index exact, Index masked,
    Index packed, double scale, Index q_batch, Index q_head, Index q_row, Index k_batch, Index k_head, Index k_row,
    Index c_batch, Index c_head, Index c_row, Index kc_batch, Index kc_head, Index kc_row, Index m_batch, Index m_head,
    Index m_row, Index m_key
) {
    DYNAMIC_SHARED(signed char, shared);
    int stride = (int(width) + 31) / 32 * 32 + PAD;
    signed char *own = shared + threadIdx.y * TILE * stride, *keys = shared + blockDim.y * TILE * stride;
    A* weights = reinterpret_cast<A*>(keys + KEYS * stride) + threadIdx.y * TILE * ROOM;
    Index per_group = heads / groups;
    Part part = part_of(groups, per_group * q_len, q_len, k_len, tiles, 1, k_len, causal);
    Weigher<T, A> warp = weigher<T, A>(
        part, q, k, q_codes, most, steps, margins, mask, own, weights, heads, per_group, q_len, k_len, width, causal,
        exact, masked, packed, scale, q_batch, q_head, q_row, k_batch, k_head, k_row, c_batch, c_head, c_row, m_batch,
        m_head, m_row, m_key
    );
    k_codes += part.b * kc_batch + part.group * kc_head;
    A s[4][4], factor[2];
    int g = threadIdx.x / 4, t = threadIdx.x % 4;
    T* to[2];
    for (int half = 0; half < 2; ++half) {
        Index n = warp.first + g + 8 * half;
        to[half] = out + ((part.b * heads + part.group * per_group) * q_len + n) * k_len;
    }
    auto row = [&](int key) { return key < part.stop ? k_codes + Index(key) * kc_row : nullptr; };
    walk(0, part.stop, keys, width, stride, packed, row, [](int) {}, [&](int tile, int chunk) {
        if (warp.template keep<NEAREST>(keys + chunk * stride, tile + chunk, s)) warp.soften(s);
    });
    warp.end();
    warp.add_counts(counts, part.b * heads + part.group * per_group, q_len);
    for (int half = 0; half < 2; ++half) factor[half] = reciprocal(warp.sum[half]);
    walk(0, k_len, keys, width, stride, packed, row, [](int) {}, [&](int tile, int chunk) {
        warp.template keep<NEAREST>(keys + chunk * stride, tile + chunk, s);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                int half = e / 2, place = 8 * n + 2 * t + e % 2, key = tile + chunk + place;
                bool keeps = warp.kept[half] >> place & 1;
                A distance = s[n][e] - subtracted(warp.maximum[half]);
                A weight = keeps ? exp2(distance * warp.unit[half]) * factor[half] : A(0);
                if (key < k_len && warp.first + g + 8 * half < warp.rows) to[half][key] = T(weight);
            }
        }
    });
}
