// What decides in filtered attention, in float64 as in the reference, so that the same keys are kept in every dtype.
#include "prelude.cuh"

// Keeps all: 256 times it is more than estimates differ in heads of up to 32,768 numbers.
const double WIDEST = 1 << 22;

// Of each head scale sigma_q sigma_k, which scores are multiples of, and by how much estimates / 256 may lie below the
// largest: floor(theta / (256 scale sigma_q sigma_k)).
// q_scale (B, heads), k_scale (B or 1, heads / per_group) and thresholds (heads,) -> steps, margins (B, heads).
// Part of op filtered_attention of the reference. A thread per head.
template <typename S>
__global__ void kernel_margins(
    const S* q_scale, const S* k_scale, const double* thresholds, double* steps, int* margins, Index maps, Index heads,
    Index per_group, Index k_batch, double scale
) {
    Index map = (Index) blockIdx.x * blockDim.x + threadIdx.x;
    if (map >= maps) return;
    Index b = map / heads, h = map % heads;
    double step = scale * double(q_scale[map]) * double(k_scale[b * k_batch + h / per_group]);
    double margin = floor(thresholds[h] / (256.0 * step));
    steps[map] = step;
    margins[map] = margin < WIDEST ? int(margin) : int(WIDEST);  // NaN, of a head that is not finite, keeps all
}
