// What the kernels of filtered attention share: tiles, estimates and products of codes, and which keys are kept.
#pragma once
#include "online_softmax.cuh"
#include "packs.cuh"
#include "reduce.cuh"
#include "tensor_cores.cuh"

const int TILE = 16;   // rows of a warp: those of a fragment
const int CHUNK = 32;  // keys that it looks at together: bits of a word
const int KEYS = 64;   // keys of a tile in shared memory
const int PAD = 16;    // bytes behind a row of codes: eight rows then begin in different banks
const int ROOM = 40;   // numbers from one row of weights to the next, likewise
// Blocks of a multiprocessor that the registers of a thread leave room for: 128, 168 or 255 of them.
#if __CUDA_ARCH__ >= 900
template <typename A> constexpr int RESIDENT = sizeof(A) == 4 ? 4 : 2;
#else
template <typename A> constexpr int RESIDENT = sizeof(A) == 4 ? 3 : 2;
#endif
const int LOWEST = -2147483647 - 1;  // no estimate
#define LOG2_E 1.4426950408889634

// --- what a block works on ------------------------------------------------------------------------------------------

struct Part { int b, group, first, from, stop; };  // rows `first` on of a key head, keys from .. stop - 1

__device__ Part part_of(
    Index groups, Index rows, Index q_len, Index k_len, Index tiles, Index splits, Index span, Index causal
) {
    unsigned block = blockIdx.x, split = block % unsigned(splits);
    block /= unsigned(splits);
    Part part;
    part.first = block % unsigned(tiles) * blockDim.y * TILE;
    block /= unsigned(tiles);
    part.group = block % unsigned(groups), part.b = block / unsigned(groups);
    int last = min(part.first + int(blockDim.y) * TILE, int(rows)) - 1, length = q_len;
    bool one_head = part.first / length == last / length;
    part.from = split * span;
    part.stop = causal && one_head ? last % length + 1 + k_len - q_len : k_len;  // keys that the last row sees
    part.stop = min(part.stop, part.from + int(span));
    return part;
}

// The rows of the heads that share keys: row n is position n % length of head n / length.
template <typename T> struct Rows {
    T* base;
    Index head, position, length;
    __device__ T* at(Index n) const { return base + n / length * head + n % length * position; }
};

// What a row sees: keys before `reach`, none where there is no such row, and of those what the mask shows.
struct View {
    int reach;
    const unsigned char* mask;
    __device__ bool of(int key, Index m_key) const { return key < reach && (!mask || mask[key * m_key]); }
};

// Copy rows of codes to shared memory, zeros behind them; `packed` if 16 at a time. A null row is all zeros.
template <typename F>
__device__ void load_codes(
    signed char* to, int rows, int width, int stride, Index packed, int thread, int threads, F row
) {
    int per_row = (stride - PAD) / 16;
    for (int i = thread; i < rows * per_row; i += threads) {
        int r = i / per_row, c = i % per_row * 16;
        const signed char* from = row(r);
        Pack<signed char, 16> pack;
        if (packed && from && c < width) {
            pack = load<16>(from + c);
        } else {
            for (int n = 0; n < 16; ++n) pack.at[n] = from && c + n < width ? from[c + n] : 0;
        }
        store<16>(to + r * stride + c, pack);
    }
}

// Walk along the keys from .. stop - 1: the codes of KEYS of them at a time in shared memory, those of key `n` copied
// from row(n), beside what fetch(tile) puts there; then meet(tile, chunk) for each CHUNK of the tile.
template <typename R, typename G, typename F> __device__ void walk(
    int from, int stop, signed char* keys, int width, int stride, Index packed, R row, G fetch, F meet
) {
    int thread = threadIdx.y * 32 + threadIdx.x, threads = 32 * blockDim.y;
    for (int tile = from; tile < stop; tile += KEYS) {
        __syncthreads();  // nobody reads the tile before any more
        load_codes(keys, KEYS, width, stride, packed, thread, threads, [&](int r) { return row(tile + r); });
        fetch(tile);
        __syncthreads();
#pragma unroll 1
        for (int chunk = 0; chunk < KEYS; chunk += CHUNK) meet(tile, chunk);
    }
}

// --- estimates and products -----------------------------------------------------------------------------------------

// 16 times the upper nibbles of four codes: x & ~15, or with NEAREST min(x + 8, 127) & ~15.
template <bool NEAREST> __device__ unsigned upper(unsigned codes) {
    if (!NEAREST) return codes & 0xf0f0f0f0;
    unsigned sum = ((codes & 0x7f7f7f7f) + 0x08080808) ^ (codes & 0x80808080);  // byte by byte
    unsigned over = sum & ~codes & 0x80808080;  // 120 and more: 128 instead of 127
    return (sum & 0xf0f0f0f0) - (over >> 3);
}

__device__ unsigned word(const signed char* codes) { return *reinterpret_cast<const unsigned*>(codes); }

// 16 rows times 32 keys: element e of fragment n is row g + 8 (e / 2), key 8 n + 2 t + e % 2,
// g = lane / 4, t = lane % 4.
template <bool NEAREST, bool WHOLE> __device__ void multiply(
    const signed char* queries, const signed char* keys, int stride, int (&estimates)[4][4], int (&products)[4][4]
) {
    int g = threadIdx.x / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) estimates[n][e] = products[n][e] = 0;
    }
    for (int c = 4 * t; c < stride - PAD; c += 32) {
        const signed char* q = queries + g * stride + c;
        unsigned a[4] = {word(q), word(q + 8 * stride), word(q + 16), word(q + 8 * stride + 16)}, high[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) high[i] = upper<NEAREST>(a[i]);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const signed char* k = keys + (8 * n + g) * stride + c;
            unsigned b[2] = {word(k), word(k + 16)}, upper_b[2] = {upper<NEAREST>(b[0]), upper<NEAREST>(b[1])};
            mma_m16n8k32_s8(estimates[n], high, upper_b);
            if (WHOLE) mma_m16n8k32_s8(products[n], a, b);
        }
    }
}

// --- kept keys ------------------------------------------------------------------------------------------------------

// A warp that weighs keys: its rows, and of the two that a lane looks after what they see, keep and have added up.
template <typename T, typename A> struct Weigher {
    Rows<const T> q;
    const T* k;
    int first, rows, width, stride;
    Index k_row, m_key;
    const signed char* codes;  // (TILE, stride) in shared memory
    A* weights;                // (TILE, ROOM) in shared memory
    bool exact;                // scores from floating-point rows
    View view[2];
    int least[2], count[2];
    A unit[2], maximum[2], sum[2], alpha[2];
    unsigned kept[2];  // bits of the 32 keys

    // Keep keys from `key` on, whose codes begin at `of_keys`, and find their scores: s (16, 32).
    // False if none is kept.
    template <bool NEAREST> __device__ bool keep(const signed char* of_keys, int key, A (&s)[4][4]) {
        int estimates[4][4], products[4][4], t = threadIdx.x % 4;
        multiply<NEAREST, true>(codes, of_keys, stride, estimates, products);
        kept[0] = kept[1] = 0;
#pragma unroll
        for (int n = 0; n < 4; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                int place = 8 * n + 2 * t + e % 2;
                bool keeps = estimates[n][e] >= least[e / 2] && view[e / 2].of(key + place, m_key);
                kept[e / 2] |= unsigned(keeps) << place;
                s[n][e] = A(products[n][e]);
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            kept[half] |= __shfl_xor_sync(ALL_LANES, kept[half], 1);
            kept[half] |= __shfl_xor_sync(ALL_LANES, kept[half], 2);
        }
        if (!__any_sync(ALL_LANES, kept[0] | kept[1])) return false;
        if (exact) multiply_rows(key, s);
        return true;
    }

    // A number of row g of a half, which four lanes have, in all lanes.
    template <typename N> __device__ static N of_row(N value, int g) { return __shfl_sync(ALL_LANES, value, 4 * g); }

    __device__ void multiply_rows(int key, A (&s)[4][4]) {
#pragma unroll 1
        for (int r = 0; r < TILE; ++r) {
            unsigned left = of_row(r < 8 ? kept[0] : kept[1], r % 8);
            if (!left) continue;
            const T* row = q.at(first + r);
            for (; left; left &= left - 1) {
                int place = __ffs(left) - 1;
                A dot = 0;
                for (int c = threadIdx.x; c < width; c += 32) dot += A(row[c]) * A(k[Index(key + place) * k_row + c]);
                dot = warp_sum(dot);
                if (threadIdx.x == 0) weights[r * ROOM + place] = dot;
            }
        }
        __syncwarp();
        int g = threadIdx.x / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int n = 0; n < 4; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                int place = 8 * n + 2 * t + e % 2;
                if (kept[e / 2] >> place & 1) s[n][e] = weights[(g + 8 * (e / 2)) * ROOM + place];
            }
        }
        __syncwarp();
    }

    // Turn scores of kept keys into exp(s - maximum), others into zeros; alpha is what earlier sums are multiplied by.
    __device__ void soften(A (&s)[4][4]) {
        int t = threadIdx.x % 4;
        A shift[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            A most = maximum[half];
#pragma unroll
            for (int n = 0; n < 4; ++n) {
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; ++e) {
                    if (kept[half] >> (8 * n + 2 * t + e % 2) & 1) most = larger(most, s[n][e]);
                }
            }
            most = quad_largest(most);
            bool none = maximum[half] == minus_infinity<A>();
            alpha[half] = none ? A(0) : exp2((maximum[half] - most) * unit[half]);
            shift[half] = subtracted(most);
            maximum[half] = most, sum[half] *= alpha[half];
            if (t == 0) count[half] += __popc(kept[half]);
        }
#pragma unroll
        for (int n = 0; n < 4; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                bool keeps = kept[e / 2] >> (8 * n + 2 * t + e % 2) & 1;
                s[n][e] = keeps ? exp2((s[n][e] - shift[e / 2]) * unit[e / 2]) : A(0);
                sum[e / 2] += s[n][e];
            }
        }
    }

    // Add how many keys the rows have kept to those of their heads, of which the first is `head`.
    __device__ void add_counts(unsigned long long* counts, Index head, Index q_len) const {
        for (int half = 0; half < 2; ++half) {
            Index n = first + threadIdx.x / 4 + 8 * half;
            if (threadIdx.x % 4 == 0 && count[half]) {
                atomicAdd(counts + head + n / q_len, (unsigned long long) count[half]);
            }
        }
    }

    // The sums of rows g and g + 8 over all lanes that have a part of them.
    __device__ void end() {
#pragma unroll
        for (int half = 0; half < 2; ++half) sum[half] = quad_sum(sum[half]);
    }
};

// A warp before its first key: codes of its rows in shared memory, what they see, and the least estimates
// that they keep.
template <typename T, typename A> __device__ Weigher<T, A> weigher(
    const Part& part, const T* q, const T* k, const signed char* q_codes, const int* most, const double* steps,
    const int* margins, const unsigned char* mask, signed char* own, A* weights, Index heads, Index per_group,
    Index q_len, Index k_len, Index width, Index causal, Index exact, Index masked, Index packed, double scale,
    Index q_batch, Index q_head, Index q_row, Index k_batch, Index k_head, Index k_row, Index c_batch, Index c_head,
    Index c_row, Index m_batch, Index m_head, Index m_row, Index m_key
) {
    Weigher<T, A> warp;
    Index head = part.group * per_group;
    warp.q = {q + part.b * q_batch + head * q_head, q_head, q_row, q_len};
    warp.k = k + part.b * k_batch + part.group * k_head;
    warp.first = part.first + threadIdx.y * TILE, warp.rows = per_group * q_len, warp.k_row = k_row, warp.m_key = m_key;
    warp.width = width, warp.stride = (int(width) + 31) / 32 * 32 + PAD;
    warp.codes = own, warp.weights = weights, warp.exact = exact;
    Rows<const signed char> codes = {q_codes + part.b * c_batch + head * c_head, c_head, c_row, q_len};
    load_codes(own, TILE, width, warp.stride, packed, threadIdx.x, 32, [&](int r) {
        return warp.first + r < warp.rows ? codes.at(warp.first + r) : nullptr;
    });
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        Index n = warp.first + threadIdx.x / 4 + 8 * half;
        bool there = n < warp.rows;
        Index h = head + (there ? n / q_len : 0), i = n % q_len, map = part.b * heads + h;
        warp.view[half].reach = !there ? 0 : causal ? i + 1 + k_len - q_len : k_len;
        warp.view[half].mask = masked ? mask + part.b * m_batch + h * m_head + i * m_row : nullptr;
        int largest = there ? most[map * q_len + i] : LOWEST;
        warp.least[half] = largest == LOWEST ? LOWEST : largest - 256 * margins[map];
        warp.unit[half] = (exact ? A(scale) : A(steps[map])) * A(LOG2_E);
        warp.maximum[half] = minus_infinity<A>(), warp.sum[half] = 0, warp.count[half] = 0;
    }
    return warp;
}

// --- the end --------------------------------------------------------------------------------------------------------

// Write a warp's rows, whose sums (TILE, stride) it has in shared memory: divided by those of the weights, or where
// keys are split as they are, with maximum and sum; and add how many keys were kept.
template <typename T, typename A> __device__ void finish(
    Weigher<T, A>& warp, const Part& part, const A* sums, int stride, T* out, A* parts, A* stats,
    unsigned long long* counts, Index maps, Index heads, Index per_group, Index q_len, Index splits, Index v_width,
    Index o_batch, Index o_head, Index o_row
) {
    __syncwarp();
    warp.end();
    warp.add_counts(counts, part.b * heads + part.group * per_group, q_len);
    Rows<T> to = {out + part.b * o_batch + part.group * per_group * o_head, o_head, o_row, q_len};
    Index before = (blockIdx.x % splits * maps + part.b * heads + part.group * per_group) * q_len;  // rows of parts
#pragma unroll 1
    for (int r = 0; r < TILE; ++r) {
        A sum = warp.of_row(r < 8 ? warp.sum[0] : warp.sum[1], r % 8);
        A maximum = warp.of_row(r < 8 ? warp.maximum[0] : warp.maximum[1], r % 8);
        Index n = warp.first + r;
        if (n >= warp.rows) continue;
        if (splits > 1) {
            for (int c = threadIdx.x; c < v_width; c += 32) parts[(before + n) * v_width + c] = sums[r * stride + c];
            if (threadIdx.x == 0) stats[2 * (before + n)] = maximum, stats[2 * (before + n) + 1] = sum;
        } else {
            T* row = to.at(n);
            for (int c = threadIdx.x; c < v_width; c += 32) row[c] = T(sum == 0 ? A(0) : sums[r * stride + c] / sum);
        }
    }
}
