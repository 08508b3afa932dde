// Tensor cores, asynchronous copies and dynamic shared memory, for kernels that NVRTC compiles.
//
// All of a warp calls mma_* and ldmatrix_*, which need compute capability 8.0 (ldmatrix 7.5). Registers, with
// g = lane / 4 and t = lane % 4 (PTX ISA, "Matrix multiply-accumulate operation using mma instruction"):
//
//   D (16, 8), 32 bits       d[0], d[1] = D[g][2t, 2t + 1]                 d[2], d[3] = D[g + 8][2t, 2t + 1]
//   A (16, 16), f16 by two   a[0], a[1] = A[g, g + 8][2t, 2t + 1]          a[2], a[3] = A[g, g + 8][2t + 8, 2t + 9]
//   B (16, 8), f16 by two    b[0] = B[2t, 2t + 1][g]                       b[1] = B[2t + 8, 2t + 9][g]
//   A (16, 32), s8 by four   a[0], a[1] = A[g, g + 8][4t .. 4t + 3]        a[2], a[3] = A[g, g + 8][4t + 16 .. 4t + 19]
//   B (32, 8), s8 by four    b[0] = B[4t .. 4t + 3][g]                     b[1] = B[4t + 16 .. 4t + 19][g]
//
// ldmatrix reads matrices of 8 rows of 16 bytes: lane 8 m + i gives the address of row i of matrix m, a multiple of 16
// in shared memory, and gets r[m] = M_m[g][2t, 2t + 1] (16 bits each); transposed r[m] = M_m[2t, 2t + 1][g].
//
// DYNAMIC_SHARED(type, name) declares `type* name`, the shared memory whose bytes the launch gives (shared_mem);
// aligned to 16 bytes; write it once in a kernel and cut the parts from it.
//
// Under EMULATED these names are those of tests/cuda_shim.h.
#ifndef TENSOR_CORES_CUH
#define TENSOR_CORES_CUH
#ifndef EMULATED

extern __shared__ uint4 dynamic_shared_memory[];
#define DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(dynamic_shared_memory)

__device__ __forceinline__ unsigned shared_address(const void* address) {
    return static_cast<unsigned>(__cvta_generic_to_shared(address));
}

// D (16, 8) += A (16, 16) B (16, 8): products of f16 summed in f32.
__device__ __forceinline__ void mma_m16n8k16_f16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])
    );
#else
    __trap();
#endif
}

// D (16, 8) += A (16, 32) B (32, 8): products of int8 summed in int32, which wraps.
__device__ __forceinline__ void mma_m16n8k32_s8(int (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])
    );
#else
    __trap();
#endif
}

__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(shared_row))
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&r)[4], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(shared_row))
                 : "memory");
}

// Copy 16 bytes, both addresses multiples of 16; of the global ones `bytes` are read and the rest is zero.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, int bytes = 16) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "r"(bytes)
                 : "memory");
#else
    __trap();
#endif
}

// End a group of this thread's copies.
__device__ __forceinline__ void copy_async_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Wait until this thread's groups but the latest N are there; other threads see them after a barrier.
template <int N> __device__ __forceinline__ void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

#endif

// Two numbers of f16 as a register of a fragment.
__device__ unsigned two_halves(float low, float high) {
    __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<unsigned*>(&pair);
}

#endif
