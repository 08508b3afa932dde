// Scores and probabilities of materialised maps.
#include "prelude.cuh"
#include "reduce.cuh"

// Add position scores shifted by one column per row: row r of a block of `block` rows adds column block - 1 - r + j.
// scores (B, heads, block, keys) and position (B, heads, block, >= keys + block - 1) by strides -> out, contiguous; out
// may be scores. Op add_relative of the reference, and the shift inside relative_attention.
template <typename S>
__global__ void kernel_relative(
    const S* scores, const S* position, S* out, Index rows, Index keys, Index heads, Index block,
    Index s_batch, Index s_head, Index s_row, Index p_batch, Index p_head, Index p_row
) {
    typedef typename Wide<S>::type A;
    Index row = this_row();
    if (row >= rows) return;
    Index r = row % block, map = row / block;
    const S* s = scores + map / heads * s_batch + map % heads * s_head + r * s_row;
    const S* p = position + map / heads * p_batch + map % heads * p_head + r * p_row + (block - 1 - r);
    for (Index j = threadIdx.x; j < keys; j += blockDim.x) out[row * keys + j] = S(A(s[j]) + A(p[j]));
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
// scores (B, heads, block, keys) by strides -> out (B, heads, block, keys), contiguous; out may be scores where S is T.
// Op softmax of the reference, and the softmax inside attention. One block per row; a row that sees nothing is zero.
template <typename S, typename T>
__global__ void kernel_softmax(
    const S* scores, T* out, const unsigned char* mask, Index keys, Index heads, Index block, Index seen, Index step,
    Index s_batch, Index s_head, Index s_row, Index masked, Index m_batch, Index m_head, Index m_row, Index m_key
) {
    typedef typename Wide<S>::type A;
    __shared__ A cells[256];
    Index row = blockIdx.x, r = row % block, map = row / block, visible = seen + step * r;
    if (visible > keys) visible = keys;
    const S* s = scores + map / heads * s_batch + map % heads * s_head + r * s_row;
    const unsigned char* m = mask + map / heads * m_batch + map % heads * m_head + r * m_row;
    A maximum = minus_infinity<A>();
    for (Index j = threadIdx.x; j < visible; j += blockDim.x) {
        if (!masked || m[j * m_key]) maximum = larger(maximum, A(s[j]));
    }
    maximum = block_max(maximum, cells);
    bool empty = maximum == minus_infinity<A>();
    A sum = 0;
    for (Index j = threadIdx.x; j < visible; j += blockDim.x) {
        if (!masked || m[j * m_key]) sum += exp(A(s[j]) - maximum);
    }
    sum = block_sum(sum, cells);
    for (Index j = threadIdx.x; j < keys; j += blockDim.x) {
        bool shown = !empty && j < visible && (!masked || m[j * m_key]);
        out[row * keys + j] = T(shown ? exp(A(s[j]) - maximum) / sum : A(0));
    }
}
