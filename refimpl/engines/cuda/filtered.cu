// Filtered attention (LATTE, arXiv 2404.07519) and the codes that it works on.
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
//     add        per row its kept keys alone: p from shared memory, v from the first-level cache, 32 lanes side by side
// With few queries, keys are split between blocks (`splits`), whose sums `merge` adds up.
//
// bytes:    codes of keys once per block of rows (first-level misses: second-level cache), values of kept keys alone
// work:     3 T S D int8 multiply-adds on tensor cores, rho T S D in floating point; the map never exists
// budget:   shared memory per block, D = Dv = 64, float32: 5 KiB queries, 5 KiB keys, 10 KiB weights, 16 KiB sums
#include "packs.cuh"
#include "prelude.cuh"
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

// --- quantisation ---------------------------------------------------------------------------------------------------

// Without their sign, bits of floating-point numbers are in the order of the numbers, NaN above all.
__device__ unsigned size_bits(float x) { return __float_as_uint(x) & 0x7fffffff; }
__device__ unsigned long long size_bits(double x) { return __double_as_longlong(x) & 0x7fffffffffffffff; }
template <typename T> struct Bits { typedef unsigned type; };
template <> struct Bits<double> { typedef unsigned long long type; };
__device__ float of_bits(unsigned bits) { return __uint_as_float(bits); }
__device__ double of_bits(unsigned long long bits) { return __longlong_as_double(bits); }

template <typename U> __device__ U block_most(U value, U* cells) {
    __syncthreads();
    cells[threadIdx.x] = value;
    for (int half = blockDim.x / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) cells[threadIdx.x] = max(cells[threadIdx.x], cells[threadIdx.x + half]);
    }
    __syncthreads();
    return cells[0];
}

// The largest |x| of a block's part of a head. x (maps, length, width) by strides.
template <typename T, int N> __device__ typename Bits<T>::type part_most(
    const T* x, Index length, Index width, Index row_stride, Index part, Index span
) {
    typedef typename Wide<T>::type A;
    typedef typename Bits<T>::type M;
    __shared__ M cells[256];
    M most = 0;
    unsigned per_row = width / N, stop = min((part + 1) * span, length * per_row);  // 64-bit division takes long
    for (unsigned i = part * span + threadIdx.x; i < stop; i += blockDim.x) {
        Pack<T, N> pack = load<N>(x + i / per_row * row_stride + i % per_row * N);
#pragma unroll
        for (int n = 0; n < N; ++n) most = max(most, size_bits(A(pack.at[n])));
    }
    return block_most(most, cells);
}

// The largest |x| of each head as bits, in `most` (maps), which was zero.
// First step of op quantize of the reference where heads are long. Blocks of a head in a line.
template <typename T, bool VECTOR>
__global__ void kernel_most(
    const T* x, typename Bits<T>::type* most, Index heads, Index length, Index width, Index batch_stride, Index head_stride,
    Index row_stride, Index parts, Index span
) {
    Index map = blockIdx.x / parts, part = blockIdx.x % parts;
    x += map / heads * batch_stride + map % heads * head_stride;
    auto found = part_most<T, VECTOR ? 16 / sizeof(T) : 1>(x, length, width, row_stride, part, span);
    if (threadIdx.x == 0) atomicMax(most + map, found);
}

// round(x / sigma) with sigma = max |x| / 127, each rounded as the reference does. A head that is too small to divide by
// has sigma 1; one that is not finite the codes 0.
// x (B, heads, length, width) by strides -> codes, contiguous, sigmas (B, heads). Op quantize of the reference. Where a
// head is one block's, that finds the maximum too.
template <typename T, bool VECTOR>
__global__ void kernel_codes(
    const T* x, const typename Bits<T>::type* most, signed char* codes, T* sigmas, Index heads, Index length, Index width,
    Index batch_stride, Index head_stride, Index row_stride, Index parts, Index span, double tiny
) {
    typedef typename Wide<T>::type A;
    const int N = VECTOR ? 16 / sizeof(T) : 1;
    Index map = blockIdx.x / parts, part = blockIdx.x % parts;
    x += map / heads * batch_stride + map % heads * head_stride;
    codes += map * length * width;
    auto bits = parts > 1 ? most[map] : part_most<T, N>(x, length, width, row_stride, 0, span);
    A sigma = A(T(of_bits(bits) / A(127)));
    if (sigma < A(tiny)) sigma = 1;
    bool finite = sigma - sigma == 0;
    if (part == 0 && threadIdx.x == 0) sigmas[map] = T(sigma);
    unsigned per_row = width / N, stop = min((part + 1) * span, length * per_row);
    for (unsigned i = part * span + threadIdx.x; i < stop; i += blockDim.x) {
        Pack<T, N> pack = load<N>(x + i / per_row * row_stride + i % per_row * N);
        Pack<signed char, N> code;
#pragma unroll
        for (int n = 0; n < N; ++n) code.at[n] = finite ? int(rint(A(T(A(pack.at[n]) / sigma)))) : 0;
        store<N>(codes + Index(i) * N, code);
    }
}

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
__device__ void load_codes(signed char* to, int rows, int width, int stride, Index packed, int thread, int threads, F row) {
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

// --- estimates and products -----------------------------------------------------------------------------------------

// 16 times the upper nibbles of four codes: x & ~15, or with NEAREST min(x + 8, 127) & ~15.
template <bool NEAREST> __device__ unsigned upper(unsigned codes) {
    if (!NEAREST) return codes & 0xf0f0f0f0;
    unsigned sum = ((codes & 0x7f7f7f7f) + 0x08080808) ^ (codes & 0x80808080);  // byte by byte
    unsigned over = sum & ~codes & 0x80808080;  // 120 and more: 128 instead of 127
    return (sum & 0xf0f0f0f0) - (over >> 3);
}

__device__ unsigned word(const signed char* codes) { return *reinterpret_cast<const unsigned*>(codes); }

// 16 rows times 32 keys: element e of fragment n is row g + 8 (e / 2), key 8 n + 2 t + e % 2, g = lane / 4, t = lane % 4.
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

template <typename N> __device__ N quad_largest(N value) {
    value = larger(value, __shfl_xor_sync(WARP, value, 1));
    return larger(value, __shfl_xor_sync(WARP, value, 2));
}

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
    int stride = (int(width) + 31) / 32 * 32 + PAD, thread = threadIdx.y * 32 + threadIdx.x;
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
    for (int tile = part.from; tile < part.stop; tile += KEYS) {
        __syncthreads();
        load_codes(keys, KEYS, width, stride, packed, thread, 32 * blockDim.y, [&](int r) {
            return tile + r < k_len ? k + Index(tile + r) * k_row : nullptr;
        });
        __syncthreads();
        for (int chunk = 0; chunk < KEYS; chunk += CHUNK) {
            multiply<NEAREST, false>(own, keys + chunk * stride, stride, estimates, none);
#pragma unroll
            for (int n = 0; n < 4; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    int key = tile + chunk + 8 * n + 2 * (threadIdx.x % 4) + e % 2;
                    if (view[e / 2].of(key, m_key)) best[e / 2] = max(best[e / 2], estimates[n][e]);
                }
            }
        }
    }
    for (int half = 0; half < 2; ++half) {
        int found = quad_largest(best[half]);
        Index n = first + threadIdx.x / 4 + 8 * half;
        if (threadIdx.x % 4 == 0 && found != LOWEST) {
            atomicMax(most + (part.b * heads + part.group * per_group) * q_len + n, found);
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

    // Keep keys from `key` on, whose codes begin at `of_keys`, and find their scores: s (16, 32). False if none is kept.
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
            kept[half] |= __shfl_xor_sync(WARP, kept[half], 1);
            kept[half] |= __shfl_xor_sync(WARP, kept[half], 2);
        }
        if (!__any_sync(WARP, kept[0] | kept[1])) return false;
        if (exact) multiply_rows(key, s);
        return true;
    }

    // A number of row g of a half, which four lanes have, in all lanes.
    template <typename N> __device__ static N of_row(N value, int g) { return __shfl_sync(WARP, value, 4 * g); }

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
            shift[half] = most == minus_infinity<A>() ? A(0) : most;
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

    // The sums of rows g and g + 8 over all lanes that have a part of them.
    __device__ void end() {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            sum[half] += __shfl_xor_sync(WARP, sum[half], 1);
            sum[half] += __shfl_xor_sync(WARP, sum[half], 2);
        }
    }
};

// A warp before its first key: codes of its rows in shared memory, what they see, and the least estimates that they keep.
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
// q, k, codes, mask as in maxima, v (B, groups, k_len, v_width) by strides, most from maxima, steps and margins (B, heads)
// -> out (B, heads, q_len, v_width) by strides and counts (B, heads), added to. Where keys are split: parts
// (splits, B heads q_len, v_width) and stats (splits, B heads q_len, 2), the maximum and the sum, instead of out.
// Op filtered_attention of the reference. Blocks of (32, warps).
template <typename T, typename A, int W, bool NEAREST>
__global__ void __launch_bounds__(128, RESIDENT<A>) kernel_filtered(
    const T* q, const T* k, const signed char* q_codes, const signed char* k_codes, const int* most, const double* steps,
    const int* margins, const unsigned char* mask, const T* v, T* out, A* parts, A* stats, unsigned long long* counts,
    Index maps, Index heads, Index groups, Index q_len, Index k_len, Index width, Index tiles, Index splits, Index span,
    Index causal, Index exact, Index masked, Index packed, double scale, Index q_batch, Index q_head, Index q_row,
    Index k_batch, Index k_head, Index k_row, Index c_batch, Index c_head, Index c_row, Index kc_batch, Index kc_head,
    Index kc_row, Index m_batch, Index m_head, Index m_row, Index m_key, Index v_width, Index v_batch, Index v_head,
    Index v_row, Index o_batch, Index o_head, Index o_row
) {
    DYNAMIC_SHARED(signed char, shared);
    int stride = (int(width) + 31) / 32 * 32 + PAD, thread = threadIdx.y * 32 + threadIdx.x;
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
    for (int tile = part.from; tile < part.stop; tile += KEYS) {
        __syncthreads();
        load_codes(keys, KEYS, width, stride, packed, thread, 32 * blockDim.y, [&](int r) {
            return tile + r < k_len ? k_codes + Index(tile + r) * kc_row : nullptr;
        });
        __syncthreads();
#pragma unroll 1
        for (int chunk = 0; chunk < KEYS; chunk += CHUNK) {
            if (!warp.template keep<NEAREST>(keys + chunk * stride, tile + chunk, s)) continue;
            warp.soften(s);
#pragma unroll
            for (int n = 0; n < 4; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e) weights[(g + 8 * (e / 2)) * ROOM + 8 * n + 2 * t + e % 2] = s[n][e];
            }
            __syncwarp();
            add_values<T, A, W>(warp, sums, v + Index(tile + chunk) * v_row, v_row, v_width);
            __syncwarp();
        }
    }
    __syncwarp();
    warp.end();
    for (int half = 0; half < 2; ++half) {
        Index n = warp.first + g + 8 * half, head = part.group * per_group + n / q_len;
        if (t == 0 && warp.count[half]) atomicAdd(counts + part.b * heads + head, (unsigned long long) warp.count[half]);
    }
    Rows<T> to = {out + part.b * o_batch + part.group * per_group * o_head, o_head, o_row, q_len};
    Index before = (blockIdx.x % splits * maps + part.b * heads + part.group * per_group) * q_len;  // rows of parts
#pragma unroll 1
    for (int r = 0; r < TILE; ++r) {
        A sum = warp.of_row(r < 8 ? warp.sum[0] : warp.sum[1], r % 8), maximum = warp.of_row(r < 8 ? warp.maximum[0] : warp.maximum[1], r % 8);
        Index n = warp.first + r;
        if (n >= warp.rows) continue;
        if (splits > 1) {
            for (int c = threadIdx.x; c < v_width; c += 32) parts[(before + n) * v_width + c] = sums[r * v_width + c];
            if (threadIdx.x == 0) stats[2 * (before + n)] = maximum, stats[2 * (before + n) + 1] = sum;
        } else {
            T* row = to.at(n);
            for (int c = threadIdx.x; c < v_width; c += 32) row[c] = T(sum == 0 ? A(0) : sums[r * v_width + c] / sum);
        }
    }
}

// Add up what blocks that shared the keys of a row have found.
// parts (splits, B heads q_len, v_width), stats (splits, B heads q_len, 2) -> out (B, heads, q_len, v_width) by strides.
// Last step of op filtered_attention of the reference. One block per row.
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

// The weights of kept keys, zeros elsewhere, for methods that hand a map on; and how many were kept. Keys are met twice:
// first for the maximum and the sum of each row.
// As filtered, -> weights (B, heads, q_len, k_len), contiguous. Op filtered_map of the reference. Blocks of (32, warps).
template <typename T, typename A, bool NEAREST>
__global__ void __launch_bounds__(128, 2) kernel_filtered_map(
    const T* q, const T* k, const signed char* q_codes, const signed char* k_codes, const int* most, const double* steps,
    const int* margins, const unsigned char* mask, T* out, unsigned long long* counts, Index heads, Index groups,
    Index q_len, Index k_len, Index width, Index tiles, Index causal, Index exact, Index masked, Index packed,
    double scale, Index q_batch, Index q_head, Index q_row, Index k_batch, Index k_head, Index k_row, Index c_batch,
    Index c_head, Index c_row, Index kc_batch, Index kc_head, Index kc_row, Index m_batch, Index m_head, Index m_row,
    Index m_key
) {
    DYNAMIC_SHARED(signed char, shared);
    int stride = (int(width) + 31) / 32 * 32 + PAD, thread = threadIdx.y * 32 + threadIdx.x;
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
    for (int pass = 0; pass < 2; ++pass) {
        for (int tile = 0; tile < (pass ? int(k_len) : part.stop); tile += KEYS) {
            __syncthreads();
            load_codes(keys, KEYS, width, stride, packed, thread, 32 * blockDim.y, [&](int r) {
                return tile + r < part.stop ? k_codes + Index(tile + r) * kc_row : nullptr;
            });
            __syncthreads();
#pragma unroll 1
            for (int chunk = 0; chunk < KEYS; chunk += CHUNK) {
                bool some = warp.template keep<NEAREST>(keys + chunk * stride, tile + chunk, s);
                if (!pass) {
                    if (some) warp.soften(s);
                    continue;
                }
#pragma unroll
                for (int n = 0; n < 4; ++n) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        int half = e / 2, place = 8 * n + 2 * t + e % 2;
                        int key = tile + chunk + place;
                        bool keeps = warp.kept[half] >> place & 1;
                        A shift = warp.maximum[half] == minus_infinity<A>() ? A(0) : warp.maximum[half];
                        A weight = keeps ? exp2((s[n][e] - shift) * warp.unit[half]) * factor[half] : A(0);
                        if (key < k_len && warp.first + g + 8 * half < warp.rows) to[half][key] = T(weight);
                    }
                }
            }
        }
        if (pass) break;
        warp.end();
        for (int half = 0; half < 2; ++half) {
            factor[half] = warp.sum[half] == 0 ? A(0) : 1 / warp.sum[half];
            Index head = part.group * per_group + (warp.first + g + 8 * half) / q_len;
            if (t == 0 && warp.count[half]) {
                atomicAdd(counts + part.b * heads + head, (unsigned long long) warp.count[half]);
            }
        }
    }
}
