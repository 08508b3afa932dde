// SVD-softmax's part between two products: the N largest of V previews, their full views, and a softmax of long rows.
// Shim et al., "SVD-Softmax", NIPS 2017: I = the N largest previews; z_i += R[i, W:] . g[W:] for i in I;
// softmax of all.
//
// A row of 800,000 numbers occupies the whole device only if many blocks share it: a row is cut into `blocks` parts of
// `span` numbers, block `part` of the row has the numbers from part * span on. What blocks know of each other goes
// through memory, from one launch to the next.
//
// top:      DIGITS launches that count digits, one that counts what reaches the threshold, one that writes ids
// bytes:    (DIGITS + 2) V sizeof(T) per row, of which all but the first pass come from the second-level cache
//           (50 MB on an H100: 15 rows of 800,000 float32); 8 KiB of shared memory per block
// refine:   n K sizeof(T) per row: a warp reads the rows of four candidates at once, 16 bytes per lane
// softmax:  2 V sizeof(T) read and V sizeof(T) written per row
#include "online_softmax.cuh"
#include "packs.cuh"
#include "reduce.cuh"

// --- top ------------------------------------------------------------------------------------------------------------
// Radix select from the highest digit: the n-th largest number begins with the digit at which the counts, added up from
// the largest digit down, reach n; the next launch looks only at numbers that begin so.

const int DIGIT = 11;  // bits
const int BINS = 1 << DIGIT;

// Whole numbers in the order of the numbers: negative ones have all bits turned, others the sign. -0 is 0.
template <typename U> __device__ U in_order(U bits) {
    const U sign = U(1) << (8 * sizeof(U) - 1);
    if (bits == sign) bits = 0;
    return bits & sign ? U(~bits) : U(bits | sign);
}
__device__ unsigned key_of(__half x) { return in_order<unsigned short>(__half_as_ushort(x)); }
__device__ unsigned key_of(float x) { return in_order<unsigned>(__float_as_uint(x)); }
__device__ unsigned long long key_of(double x) { return in_order<unsigned long long>(__double_as_longlong(x)); }

// What is known of a row's n-th largest number: the digits before the current one, and its rank among those that have
// them.
struct Found { unsigned long long digits; Index rank; };

template <typename T> __device__ int low_bit(Index digit) {
    int low = 8 * sizeof(T) - DIGIT * int(digit + 1);
    return low > 0 ? low : 0;
}
template <typename T> __device__ int digit_bits(Index digit) {
    return 8 * sizeof(T) - DIGIT * int(digit) < DIGIT ? 8 * sizeof(T) - DIGIT * int(digit) : DIGIT;
}

// The sum over the threads before this one; cells holds a number per warp.
__device__ int sum_before(int value, int* cells) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, sum = value;
    for (int by = 1; by < 32; by *= 2) {
        int other = __shfl_up_sync(ALL_LANES, sum, by);
        if (lane >= by) sum += other;
    }
    if (lane == 31) cells[warp] = sum;
    __syncthreads();
    for (int w = 0; w < warp; ++w) sum += cells[w];
    return sum - value;
}

// `found` with one digit more, by the counts of that digit. All blocks of a row come to the same result.
template <typename T> __device__ Found next_digit(Found found, const int* counts, Index digit) {
    __shared__ int cells[32];
    __shared__ Found next;
    int per_thread = BINS / blockDim.x, first = BINS - 1 - threadIdx.x * per_thread, sum = 0;  // from the largest down
    for (int i = 0; i < per_thread; ++i) sum += counts[first - i];
    Index before = sum_before(sum, cells);
    if (before < found.rank && found.rank <= before + sum) {
        int bin = first;
        for (; before + counts[bin] < found.rank; --bin) before += counts[bin];
        next.digits = found.digits << digit_bits<T>(digit) | (unsigned long long) bin;
        next.rank = found.rank - before;
    }
    __syncthreads();
    return next;
}

// Count digit `digit` of the numbers that begin with the digits found before.
// z (rows, width), rows `stride` apart -> histograms (digits, rows, BINS), which were zero; found (digits + 1, rows).
// First step of op top of the reference. Blocks of a row in a line.
template <typename T>
__global__ void kernel_digits(
    const T* z, int* histograms, Found* found, Index rows, Index width, Index stride, Index n, Index blocks, Index span,
    Index digit
) {
    __shared__ int counts[BINS];
    Index row = blockIdx.x / blocks, part = blockIdx.x % blocks;
    Found known = {0, n};
    if (digit > 0) {
        if (digit > 1) known = found[(digit - 1) * rows + row];
        known = next_digit<T>(known, histograms + ((digit - 1) * rows + row) * BINS, digit - 1);
        if (part == 0 && threadIdx.x == 0) found[digit * rows + row] = known;
    }
    for (int bin = threadIdx.x; bin < BINS; bin += blockDim.x) counts[bin] = 0;
    __syncthreads();
    int low = low_bit<T>(digit), bits = digit_bits<T>(digit);
    Index stop = (part + 1) * span < width ? (part + 1) * span : width;
#pragma unroll 8
    for (Index i = part * span + threadIdx.x; i < stop; i += blockDim.x) {
        auto key = key_of(z[row * stride + i]) >> low;
        if (digit == 0 || (key >> bits) == known.digits) atomicAdd(&counts[int(key & ((1 << bits) - 1))], 1);
    }
    __syncthreads();
    int* total = histograms + (digit * rows + row) * BINS;
    for (int bin = threadIdx.x; bin < BINS; bin += blockDim.x) {
        if (counts[bin]) atomicAdd(&total[bin], counts[bin]);
    }
}

// The last digit, and of each warp's stretch of the row how many numbers are larger than the n-th largest, and equal.
// z (rows, width) -> found[digits] (rows), counts (rows, blocks * warps, 2). Second step of op top.
template <typename T>
__global__ void kernel_reaching(
    const T* z, const int* histograms, Found* found, int* counts, Index rows, Index width, Index stride, Index n,
    Index blocks, Index span, Index digits
) {
    Index row = blockIdx.x / blocks, part = blockIdx.x % blocks;
    Found known = {0, n};
    if (digits > 1) known = found[(digits - 1) * rows + row];
    known = next_digit<T>(known, histograms + ((digits - 1) * rows + row) * BINS, digits - 1);
    if (part == 0 && threadIdx.x == 0) found[digits * rows + row] = known;
    int warps = blockDim.x / 32, warp = threadIdx.x / 32, larger = 0, equal = 0;
    Index first = part * span + warp * (span / warps), last = first + span / warps;
    if (last > width) last = width;
#pragma unroll 4
    for (Index i = first + threadIdx.x % 32; i < last; i += 32) {
        auto key = key_of(z[row * stride + i]);
        larger += key > known.digits, equal += key == known.digits;
    }
    larger = warp_sum(larger), equal = warp_sum(equal);
    int* mine = counts + ((row * blocks + part) * warps + warp) * 2;
    if (threadIdx.x % 32 == 0) mine[0] = larger, mine[1] = equal;
}

// Write where the n largest stand: every warp knows how many of them lie before its stretch, and of equal numbers those
// with the lower index are taken until there are n.
// z (rows, width), found (rows), counts -> ids (rows, n), ascending. Last step of op top.
template <typename T>
__global__ void kernel_place(
    const T* z, const Found* found, const int* counts, Index* ids, Index width, Index stride, Index n, Index blocks,
    Index span
) {
    Index row = blockIdx.x / blocks, part = blockIdx.x % blocks;
    int warps = blockDim.x / 32, lane = threadIdx.x % 32;
    Index stretch = part * warps + threadIdx.x / 32;  // among those of the row
    const int* of_row = counts + row * blocks * warps * 2;
    int larger = 0, equal = 0;
    for (Index other = lane; other < stretch; other += 32) larger += of_row[2 * other], equal += of_row[2 * other + 1];
    larger = warp_sum(larger), equal = warp_sum(equal);
    Found known = found[row];
    Index first = stretch * (span / warps), last = first + span / warps;
    if (last > width) last = width;
    unsigned before = (1u << lane) - 1;
    for (Index i = first; i < last; i += 32) {
        bool inside = i + lane < last;
        auto key = inside ? key_of(z[row * stride + i + lane]) : 0;
        bool above = inside && key > known.digits, tied = inside && key == known.digits;
        unsigned all_above = __ballot_sync(ALL_LANES, above), all_tied = __ballot_sync(ALL_LANES, tied);
        Index ties = equal + __popc(all_tied & before), taken = ties < known.rank ? ties : known.rank;
        if (above || (tied && ties < known.rank)) ids[row * n + larger + __popc(all_above & before) + taken] = i + lane;
        larger += __popc(all_above), equal += __popc(all_tied);
    }
}

// --- refine ---------------------------------------------------------------------------------------------------------

const int TOGETHER = 4;  // candidates of a warp: so many rows of the matrix are on their way from memory at once

// z[i] += weight[i] . g for the ids i of each row, or = where `replace`. Ids that are no rows of weight are left out.
// z (rows, V), ids (rows, n), weight (V, depth), g (rows, depth), rows of each its stride apart -> z in place.
// Op refine of the reference. A warp per TOGETHER candidates, `blocks` blocks per row.
template <typename T, typename A, bool VECTOR>
__global__ void kernel_refine(
    T* z, const Index* ids, const T* weight, const T* g, Index width, Index n, Index depth, Index z_stride,
    Index weight_stride, Index g_stride, Index replace, Index blocks
) {
    const int N = VECTOR ? 16 / sizeof(T) : 1;
    Index row = blockIdx.x / blocks, part = blockIdx.x % blocks;
    int lane = threadIdx.x % 32;
    Index first = (part * (blockDim.x / 32) + threadIdx.x / 32) * TOGETHER;
    const T *x = g + row * g_stride, *from[TOGETHER];
    Index id[TOGETHER];
    A sum[TOGETHER];
    for (int k = 0; k < TOGETHER; ++k) {
        id[k] = first + k < n ? ids[row * n + first + k] : -1;
        from[k] = weight + (id[k] >= 0 && id[k] < width ? id[k] : 0) * weight_stride;
        sum[k] = 0;
    }
    for (Index c = N * lane; c < depth; c += 32 * N) {
        Pack<T, N> factor = load<N>(x + c), entry[TOGETHER];
#pragma unroll
        for (int k = 0; k < TOGETHER; ++k) entry[k] = load<N>(from[k] + c);
#pragma unroll
        for (int k = 0; k < TOGETHER; ++k) {
#pragma unroll
            for (int i = 0; i < N; ++i) sum[k] += A(entry[k].at[i]) * A(factor.at[i]);
        }
    }
#pragma unroll
    for (int k = 0; k < TOGETHER; ++k) {
        A product = warp_sum(sum[k]);
        if (lane == k && id[k] >= 0 && id[k] < width) {
            T* to = z + row * z_stride + id[k];
            *to = T(replace ? product : A(*to) + product);
        }
    }
}

// --- softmax of long rows -------------------------------------------------------------------------------------------

// The largest number of each part of a row, and the sum of exp(number - largest).
// z (rows, width), rows `stride` apart -> stats (rows, blocks, 2). First step of op softmax of the reference.
template <typename T, typename A>
__global__ void kernel_part_sums(const T* z, A* stats, Index width, Index stride, Index blocks, Index span) {
    __shared__ A cells[256];
    Index row = blockIdx.x / blocks, part = blockIdx.x % blocks;
    const T* from = z + row * stride;
    Index stop = (part + 1) * span < width ? (part + 1) * span : width;
    A maximum = minus_infinity<A>(), sum = 0;
#pragma unroll 4
    for (Index i = part * span + threadIdx.x; i < stop; i += blockDim.x) maximum = larger(maximum, A(from[i]));
    maximum = of_block(maximum, cells, Larger());
    A shift = subtracted(maximum);
#pragma unroll 4
    for (Index i = part * span + threadIdx.x; i < stop; i += blockDim.x) sum += exp(A(from[i]) - shift);
    sum = of_block(sum, cells, Sum());
    if (threadIdx.x == 0) stats[2 * blockIdx.x] = maximum, stats[2 * blockIdx.x + 1] = sum;
}

// exp(number - maximum) / sum by the parts' maxima and sums; zeros in a row of -inf.
// z (rows, width), rows `stride` apart, stats (rows, blocks, 2) -> out (rows, width). Last step of op softmax.
template <typename T, typename A>
__global__ void kernel_long_softmax(
    const T* z, const A* stats, T* out, Index width, Index stride, Index blocks, Index span
) {
    __shared__ A cells[256];
    Index row = blockIdx.x / blocks, part = blockIdx.x % blocks;
    const A* of_row = stats + row * blocks * 2;
    A maximum = minus_infinity<A>(), sum = 0;
    for (Index other = threadIdx.x; other < blocks; other += blockDim.x) maximum = larger(maximum, of_row[2 * other]);
    maximum = of_block(maximum, cells, Larger());
    A shift = subtracted(maximum);
    for (Index other = threadIdx.x; other < blocks; other += blockDim.x) {
        sum += of_row[2 * other + 1] * exp(of_row[2 * other] - shift);
    }
    sum = of_block(sum, cells, Sum());
    Index stop = (part + 1) * span < width ? (part + 1) * span : width;
#pragma unroll 4
    for (Index i = part * span + threadIdx.x; i < stop; i += blockDim.x) {
        out[row * width + i] = T(sum == 0 ? A(0) : exp(A(z[row * stride + i]) - shift) / sum);
    }
}
