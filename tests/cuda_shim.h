// The part of CUDA that the engine's kernels use, for g++: one host thread runs a block's threads as coroutines.
//
// Threads run one after the other up to where they wait: at a collective of their warp (shuffle, vote, mma, ldmatrix)
// or at the barrier of the block. A warp goes on when all its live lanes that the mask names are there, a block when
// all its live threads are. Even blocks run their threads upwards, odd ones downwards, so that a missing barrier shows.
// Shared memory is NaN when a block starts. What never appears on a device is an error, not a result.
#pragma once
#include <link.h>
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#ifndef __x86_64__
#include <ucontext.h>
#endif

#include <type_traits>
#include <utility>

#define __device__
#define __host__
#define __global__
#define __constant__ static
#define __shared__ static thread_local  // a segment of its own, which is found and poisoned
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __forceinline__ inline __attribute__((always_inline))
#define DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(emulation::dynamic_shared)

// --- types ----------------------------------------------------------------------------------------------------------

#define VECTOR(name, T, alignment) \
    struct alignas(alignment) name##2 { T x, y; }; \
    struct name##3 { T x, y, z; }; \
    struct alignas(2 * alignment > 16 ? 16 : 2 * alignment) name##4 { T x, y, z, w; }; \
    static inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
    static inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
    static inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
VECTOR(char, signed char, 2)
VECTOR(uchar, unsigned char, 2)
VECTOR(short, short, 4)
VECTOR(ushort, unsigned short, 4)
VECTOR(int, int, 8)
VECTOR(uint, unsigned, 8)
VECTOR(float, float, 8)
VECTOR(longlong, long long, 16)
VECTOR(ulonglong, unsigned long long, 16)
VECTOR(double, double, 16)
#undef VECTOR
struct dim3 { unsigned x = 1, y = 1, z = 1; };

typedef _Float16 __half;
typedef __half half;
struct alignas(4) __half2 { __half x, y; };
typedef __half2 half2;

static dim3 blockIdx, blockDim, gridDim, threadIdx;
static const int warpSize = 32;

// --- threads, warps, barriers ---------------------------------------------------------------------------------------

namespace emulation {

// Where a thread is while others run: `begin` it on a stack, `change` from one to another.
#ifdef __x86_64__
typedef void* Place;  // the top of its stack, where its registers are
extern "C" void emulation_change(Place* from, Place to) __asm__("emulation_change");
__asm__(
    ".local emulation_change\nemulation_change:\n"
    "pushq %rbx\npushq %rbp\npushq %r12\npushq %r13\npushq %r14\npushq %r15\nmovq %rsp, (%rdi)\n"
    "movq %rsi, %rsp\npopq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbp\npopq %rbx\nret\n");
static void change(Place& from, Place& to) { emulation_change(&from, to); }
static void begin(Place& place, char* stack, int bytes, void (*life)()) {
    void** top = (void**) (stack + bytes) - 8;
    memset(top, 0, 64);
    top[6] = (void*) life;
    place = top;
}
#else
struct Place { ucontext_t context; jmp_buf registers; bool begun; };
__attribute__((noinline)) static void change(Place& from, Place& to) {
    from.begun = true;
    if (_setjmp(from.registers)) return;
    if (to.begun) _longjmp(to.registers, 1);
    to.begun = true;
    setcontext(&to.context);
}
static void begin(Place& place, char* stack, int bytes, void (*life)()) {
    getcontext(&place.context);
    place.context.uc_stack.ss_sp = stack, place.context.uc_stack.ss_size = bytes;
    place.begun = false;
    makecontext(&place.context, life, 0);
}
#endif

struct Thread;
typedef void (*Collective)(Thread* lanes, unsigned present);  // what a warp does together

struct Copy { void* to; const void* from; int bytes, group; };

struct Thread {
    char* stack;
    Place place;
    dim3 index;
    unsigned mask;  // of the collective that it waits at
    Collective collective;
    void* slot;  // its operands and results there
    Copy* copies;
    int copy_count, copy_space, group;
};
struct Warp { unsigned live, ready, waiting; };  // bits of lanes; live, not ready, not waiting: at the barrier

const int STACK_BYTES = 256 << 10, PAGE_BYTES = 4096, GUARD_BYTES = 1024;
const unsigned short POISON = 0x7ff4;  // repeated, a NaN of every width

const int HOST = 1024;  // the place that started the block
static Thread threads[HOST + 1];
static Warp warps[32];
static int warp_count, current, barrier_line, votes, vote_result, voters;
static bool upwards;
static jmp_buf home;
static char message[256];
static void (*job)();
static char* dynamic_shared;
static int dynamic_bytes, dynamic_space = -1;

__attribute__((noreturn)) static void fail(const char* what) {
    snprintf(message, sizeof message, "%s (block %u %u %u, thread %u %u %u)", what, blockIdx.x, blockIdx.y, blockIdx.z,
             threadIdx.x, threadIdx.y, threadIdx.z);
    _longjmp(home, 1);
}

static void poison(void* to, size_t bytes) {
    for (size_t i = 0; i + 2 <= bytes; i += 2) memcpy((char*) to + i, &POISON, 2);
}

static unsigned bit(int lane) { return 1u << lane; }

// Do together what the lanes of a warp wait for; all of them that can go on are ready then.
static void release(Warp& warp, Thread* lanes) {
    for (unsigned left = warp.waiting; left;) {
        int first = __builtin_ctz(left);
        left &= ~bit(first);
        unsigned mask = lanes[first].mask, present = mask & warp.live;
        if (present & ~warp.waiting) continue;  // one is still missing
        for (unsigned rest = present; rest; rest &= rest - 1) {
            Thread& lane = lanes[__builtin_ctz(rest)];
            if (lane.collective != lanes[first].collective) fail("threads of one warp meet different collectives");
            if (lane.mask != mask) fail("threads of one warp meet a collective with different masks");
        }
        lanes[first].collective(lanes, present);
        left &= ~present, warp.waiting &= ~present, warp.ready |= present;
    }
    if (!warp.ready) fail("deadlock: some lanes of a warp wait at a collective, others elsewhere");
}

// The thread to run next, -1 when all have ended.
static int next() {
    for (int w = current / 32;;) {
        Warp& warp = warps[w];
        if (!warp.ready && warp.waiting) release(warp, threads + 32 * w);
        if (warp.ready) {
            int lane = upwards ? __builtin_ctz(warp.ready) : 31 - __builtin_clz(warp.ready);
            warp.ready &= ~bit(lane);
            return 32 * w + lane;
        }
        w += upwards ? 1 : -1;
        if (w >= 0 && w < warp_count) continue;
        unsigned any = 0;  // every live thread is at the barrier
        for (int i = 0; i < warp_count; ++i) any |= warps[i].ready = warps[i].live;
        if (!any) return -1;
        vote_result = votes, votes = barrier_line = voters = 0;
        w = upwards ? 0 : warp_count - 1;
    }
}

// Let another thread run; returns when it is the turn of `from` again.
static void go(Place& from, int to) {
    current = to, threadIdx = threads[to].index;
    change(from, threads[to].place);
}
static void leave() {
    int from = current, to = next();
    if (to < 0) to = HOST;
    if (to != from) go(threads[from].place, to);
}

static int barrier(int line, int vote = 0) {
    if (barrier_line && barrier_line != line) fail("threads of one block meet different barriers");
    barrier_line = line, votes += vote != 0;
    leave();
    return vote_result;
}
static int live_threads() {
    int count = 0;
    for (int w = 0; w < warp_count; ++w) count += __builtin_popcount(warps[w].live);
    return count;
}

static void together(unsigned mask, Collective collective, void* slot) {
    Thread& thread = threads[current];
    if (!(mask & bit(current % 32))) fail("a thread is not in the mask of its collective");
    thread.mask = mask, thread.collective = collective, thread.slot = slot;
    warps[current / 32].waiting |= bit(current % 32);
    leave();
}

static void life() {
    for (;;) {
        job();
        warps[current / 32].live &= ~bit(current % 32);
        leave();
    }
}

static void prepare(Thread& thread) {
    if (!thread.stack) {
        const int protection = PROT_READ | PROT_WRITE, flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        void* stack = mmap(nullptr, STACK_BYTES, protection, flags, -1, 0);
        if (stack == MAP_FAILED) abort();
        mprotect(stack, PAGE_BYTES, PROT_NONE);
        thread.stack = (char*) stack;
    }
    begin(thread.place, thread.stack, STACK_BYTES, life);
}

// The static shared arrays: the thread-local segment of this library.
static thread_local char anchor;
struct Segment { char* start; size_t bytes; };
static int find_segment(dl_phdr_info* library, size_t, void* found) {
    Segment* segment = (Segment*) found;
    for (int i = 0; i < library->dlpi_phnum; ++i) {
        const ElfW(Phdr)& part = library->dlpi_phdr[i];
        char* start = (char*) library->dlpi_tls_data;
        if (part.p_type != PT_TLS || !start || &anchor < start || &anchor >= start + part.p_memsz) continue;
        segment->start = start, segment->bytes = part.p_memsz;
        return 1;
    }
    return 0;
}
static Segment static_shared() {
    static Segment segment;
    static char* of;
    anchor = 1;  // the segment is made when it is first used
    if (of != &anchor) of = &anchor, dl_iterate_phdr(find_segment, &segment);
    return segment;
}

static void signalled(int number) {
    fail(number == SIGSEGV || number == SIGBUS ? "memory that is not there, or too much on a thread's stack"
         : number == SIGFPE ? "an integer divided by zero"
                            : "an address out of an array's bounds or not aligned for its type");
}
const int SIGNALS[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP};

struct Signals {  // errors instead of crashes while a kernel runs
    struct sigaction before[5];
    stack_t stack_before;
    Signals() {
        static char stack[64 << 10];
        stack_t mine = {};
        mine.ss_sp = stack, mine.ss_size = sizeof stack;
        sigaltstack(&mine, &stack_before);
        struct sigaction action = {};
        action.sa_handler = signalled, action.sa_flags = SA_NODEFER | SA_ONSTACK;
        for (int i = 0; i < 5; ++i) sigaction(SIGNALS[i], &action, &before[i]);
    }
    ~Signals() {
        for (int i = 0; i < 5; ++i) sigaction(SIGNALS[i], &before[i], nullptr);
        sigaltstack(&stack_before, nullptr);
    }
};

static void start_block(int count) {
    static int ready;  // threads that have a stack and wait for work
    Segment shared = static_shared();
    poison(shared.start, shared.bytes);
    poison(dynamic_shared, dynamic_bytes + GUARD_BYTES);
    if (message[0]) ready = 0, message[0] = 0;  // a failed block left its threads where they were
    for (; ready < count; ++ready) prepare(threads[ready]);
    for (int w = 0; w < warp_count; ++w) {
        int lanes = count - 32 * w;
        warps[w].live = warps[w].ready = lanes >= 32 ? ~0u : bit(lanes) - 1;
        warps[w].waiting = 0;
    }
    for (int i = 0; i < count; ++i) threads[i].copy_count = threads[i].group = 0;
    barrier_line = votes = 0;
}

__attribute__((noinline)) static int run_block(int count) {
    start_block(count);
    if (_setjmp(home)) return 1;  // something failed
    current = upwards ? 0 : 32 * (warp_count - 1);
    go(threads[HOST].place, next());
    for (int i = 0; i + 2 <= GUARD_BYTES; i += 2) {
        if (memcmp(dynamic_shared + dynamic_bytes + i, &POISON, 2)) {
            snprintf(message, sizeof message, "written outside the dynamic shared memory");
            return 1;
        }
    }
    return 0;
}

template <typename... P> struct Job {
    static void (*kernel)(P...);
    static void** arguments;
    template <std::size_t... I> static void call(std::index_sequence<I...>) { kernel(*(P*) arguments[I]...); }
    static void run() { call(std::index_sequence_for<P...>()); }
};
template <typename... P> void (*Job<P...>::kernel)(P...);
template <typename... P> void** Job<P...>::arguments;

// Run a kernel block by block; null, or what went wrong.
template <typename... P>
const char* run(void (*kernel)(P...), const unsigned* shape, void** arguments, int shared_bytes) {
    Job<P...>::kernel = kernel, Job<P...>::arguments = arguments, job = Job<P...>::run;
    gridDim.x = shape[0], gridDim.y = shape[1], gridDim.z = shape[2];
    blockDim.x = shape[3], blockDim.y = shape[4], blockDim.z = shape[5];
    if (shared_bytes > dynamic_space) {
        free(dynamic_shared);
        dynamic_shared = (char*) aligned_alloc(1024, (shared_bytes + GUARD_BYTES + 1023) / 1024 * 1024);
        dynamic_space = shared_bytes;
    }
    dynamic_bytes = (shared_bytes + 1) / 2 * 2;
    int count = blockDim.x * blockDim.y * blockDim.z, i = 0;
    warp_count = (count + 31) / 32;
    for (unsigned z = 0; z < blockDim.z; ++z)
        for (unsigned y = 0; y < blockDim.y; ++y)
            for (unsigned x = 0; x < blockDim.x; ++x) {
                dim3& index = threads[i++].index;
                index.x = x, index.y = y, index.z = z;
            }
    Signals signals;
    for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z)
        for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
                upwards = (blockIdx.x + blockIdx.y + blockIdx.z) % 2 == 0;
                if (run_block(count)) return message;
            }
    return nullptr;
}

template <typename T> struct Kind;  // as NumPy writes it
template <typename T> struct Kind<T*> { static constexpr const char* code = "p "; };
template <> struct Kind<long long> { static constexpr const char* code = "i8 "; };
template <> struct Kind<unsigned long long> { static constexpr const char* code = "u8 "; };
template <> struct Kind<int> { static constexpr const char* code = "i4 "; };
template <> struct Kind<unsigned> { static constexpr const char* code = "u4 "; };
template <> struct Kind<float> { static constexpr const char* code = "f4 "; };
template <> struct Kind<double> { static constexpr const char* code = "f8 "; };
template <> struct Kind<bool> { static constexpr const char* code = "b1 "; };
template <typename... P> const char* kinds(void (*)(P...)) {
    static char codes[4 * sizeof...(P) + 1];
    codes[0] = 0;
    const char* each[] = {Kind<P>::code..., ""};
    for (const char* code : each) strcat(codes, code);
    return codes;
}

// --- collectives of a warp ------------------------------------------------------------------------------------------

template <typename Slot> Slot& slot(Thread* lanes, int lane) { return *(Slot*) lanes[lane].slot; }
template <typename F> void each(unsigned present, F f) {
    for (; present; present &= present - 1) f(__builtin_ctz(present));
}

enum Direction { INDEX, XOR, UP, DOWN };
template <typename T> struct Shuffle { T value, result; int source; };
template <Direction direction, typename T> void shuffle_all(Thread* lanes, unsigned present) {
    each(present, [&](int lane) {
        Shuffle<T>& mine = slot<Shuffle<T>>(lanes, lane);
        if (present & bit(mine.source)) mine.result = slot<Shuffle<T>>(lanes, mine.source).value;
        else poison(&mine.result, sizeof(T));  // that lane has ended or takes no part
    });
}
template <Direction direction, typename T> T shuffle(unsigned mask, T value, int by, int width) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8, "a type that cannot be shuffled");
    if (width < 1 || width > 32 || width & (width - 1)) fail("a shuffle's width is a power of two up to 32");
    int lane = current % 32, start = lane & ~(width - 1), source = lane;
    if (direction == INDEX) source = start + (by & (width - 1));
    if (direction == XOR && (lane ^ by) < start + width) source = lane ^ by;
    if (direction == UP && lane - by >= start) source = lane - by;
    if (direction == DOWN && lane + by < start + width) source = lane + by;
    Shuffle<T> mine = {value, value, source & 31};
    together(mask, shuffle_all<direction, T>, &mine);
    return mine.result;
}

struct Vote { bool value; unsigned result; };
static void vote_all(Thread* lanes, unsigned present) {
    unsigned ballot = 0;
    each(present, [&](int lane) { ballot |= slot<Vote>(lanes, lane).value ? bit(lane) : 0; });
    each(present, [&](int lane) { slot<Vote>(lanes, lane).result = ballot; });
}
static unsigned vote(unsigned mask, bool value) {
    Vote mine = {value, 0};
    together(mask, vote_all, &mine);
    return mine.result;
}
static void meet(Thread*, unsigned) {}

}  // namespace emulation

#define __syncthreads() ((void) emulation::barrier(__LINE__))
#define __syncthreads_count(predicate) emulation::barrier(__LINE__, predicate)
#define __syncthreads_or(predicate) int(emulation::barrier(__LINE__, predicate) != 0)
#define __syncthreads_and(predicate) int(emulation::barrier(__LINE__, !(predicate)) == 0)

template <typename T> T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    return emulation::shuffle<emulation::INDEX>(mask, value, source, width);
}
template <typename T> T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    return emulation::shuffle<emulation::XOR>(mask, value, bits, width);
}
template <typename T> T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
    return emulation::shuffle<emulation::UP>(mask, value, by, width);
}
template <typename T> T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
    return emulation::shuffle<emulation::DOWN>(mask, value, by, width);
}
static inline unsigned __ballot_sync(unsigned mask, int predicate) { return emulation::vote(mask, predicate); }
static inline int __any_sync(unsigned mask, int predicate) { return emulation::vote(mask, predicate) != 0; }
static inline int __all_sync(unsigned mask, int predicate) { return emulation::vote(mask, !predicate) == 0; }
static inline void __syncwarp(unsigned mask = ~0u) { emulation::together(mask, emulation::meet, nullptr); }

// --- atomics: threads change only where they wait -------------------------------------------------------------------

namespace emulation {
template <typename T> struct Same { typedef T type; };
template <typename T, typename F> T atomic(T* address, F change) {
    T old = *address;
    *address = change(old);
    return old;
}
}  // namespace emulation
#define ATOMIC(name, allowed, change) \
    template <typename T> T atomic##name(T* address, typename emulation::Same<T>::type value) { \
        static_assert(allowed && (sizeof(T) == 4 || sizeof(T) == 8), "atomic" #name " is not there for this type"); \
        return emulation::atomic(address, [=](T old) -> T { return change; }); \
    }
ATOMIC(Add, (!std::is_same<T, long long>::value), old + value)
ATOMIC(Sub, std::is_integral<T>::value && sizeof(T) == 4, old - value)
ATOMIC(Max, std::is_integral<T>::value, old > value ? old : value)
ATOMIC(Min, std::is_integral<T>::value, old < value ? old : value)
ATOMIC(And, std::is_integral<T>::value, old & value)
ATOMIC(Or, std::is_integral<T>::value, old | value)
ATOMIC(Xor, std::is_integral<T>::value, old ^ value)
ATOMIC(Exch, (!std::is_same<T, double>::value), value)
#undef ATOMIC
template <typename T>
T atomicCAS(T* address, typename emulation::Same<T>::type expected, typename emulation::Same<T>::type value) {
    static_assert(std::is_integral<T>::value && sizeof(T) >= 2, "atomicCAS is not there for this type");
    return emulation::atomic(address, [=](T old) { return old == expected ? value : old; });
}
static inline void __threadfence() {}
static inline void __threadfence_block() {}

// --- arithmetic -----------------------------------------------------------------------------------------------------

// glibc declares some of these names itself
#define __expf(x) expf(x)
#define __exp2f(x) exp2f(x)
#define __exp10f(x) exp10f(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
static inline float rsqrtf(float x) { return 1 / sqrtf(x); }
static inline double rsqrt(double x) { return 1 / sqrt(x); }
static inline float __fdividef(float x, float y) { return x / y; }
static inline float __frcp_rn(float x) { return 1 / x; }
static inline float __frsqrt_rn(float x) { return float(1 / sqrt(double(x))); }
static inline float __fsqrt_rn(float x) { return sqrtf(x); }
static inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
static inline float __fadd_rn(float x, float y) { return x + y; }
static inline float __fsub_rn(float x, float y) { return x - y; }
static inline float __fmul_rn(float x, float y) { return x * y; }
static inline float __fdiv_rn(float x, float y) { return x / y; }
static inline float __saturatef(float x) { return x > 0 ? x < 1 ? x : 1 : 0; }
static inline int __float2int_rn(float x) { return int(nearbyintf(x)); }
static inline int __float2int_rz(float x) { return int(x); }
static inline int __float2int_rd(float x) { return int(floorf(x)); }
static inline float __int2float_rn(int x) { return float(x); }

template <typename A, typename B> typename std::common_type<A, B>::type min(A a, B b) {
    typedef typename std::common_type<A, B>::type C;
    if constexpr (std::is_floating_point<C>::value) return std::fmin(C(a), C(b));
    else return C(a) < C(b) ? C(a) : C(b);
}
template <typename A, typename B> typename std::common_type<A, B>::type max(A a, B b) {
    typedef typename std::common_type<A, B>::type C;
    if constexpr (std::is_floating_point<C>::value) return std::fmax(C(a), C(b));
    else return C(a) > C(b) ? C(a) : C(b);
}

namespace emulation {
template <typename To, typename From> To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "types of one width");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
}  // namespace emulation
static inline int __float_as_int(float x) { return emulation::bits<int>(x); }
static inline float __int_as_float(int x) { return emulation::bits<float>(x); }
static inline unsigned __float_as_uint(float x) { return emulation::bits<unsigned>(x); }
static inline float __uint_as_float(unsigned x) { return emulation::bits<float>(x); }
static inline long long __double_as_longlong(double x) { return emulation::bits<long long>(x); }
static inline double __longlong_as_double(long long x) { return emulation::bits<double>(x); }
static inline unsigned short __half_as_ushort(__half x) { return emulation::bits<unsigned short>(x); }
static inline __half __ushort_as_half(unsigned short x) { return emulation::bits<__half>(x); }
static inline short __half_as_short(__half x) { return emulation::bits<short>(x); }

static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
static inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __ffsll(long long x) { return __builtin_ffsll(x); }
template <typename Lane, typename Sum> Sum dp4a(Sum a, Sum b, Sum c) {
    for (int i = 0; i < 4; ++i) c += Sum(Lane(a >> 8 * i)) * Sum(Lane(b >> 8 * i));
    return c;
}
static inline int __dp4a(int a, int b, int c) { return dp4a<signed char>(a, b, c); }
static inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) { return dp4a<unsigned char>(a, b, c); }

template <typename T> T __ldg(const T* address) { return *address; }
template <typename T> T __ldcs(const T* address) { return *address; }
template <typename T> T __ldcg(const T* address) { return *address; }
template <typename T> void __stcs(T* address, T value) { *address = value; }
template <typename T> void __stcg(T* address, T value) { *address = value; }

// --- half -----------------------------------------------------------------------------------------------------------

static inline float __half2float(__half x) { return float(x); }
static inline __half __float2half(float x) { return __half(x); }
static inline __half __float2half_rn(float x) { return __half(x); }
static inline __half __hadd(__half x, __half y) { return __half(float(x) + float(y)); }
static inline __half __hsub(__half x, __half y) { return __half(float(x) - float(y)); }
static inline __half __hmul(__half x, __half y) { return __half(float(x) * float(y)); }
static inline __half __hfma(__half x, __half y, __half z) { return __half(double(x) * double(y) + double(z)); }
static inline __half __hmax(__half x, __half y) { return __half(fmaxf(float(x), float(y))); }
static inline __half __hmin(__half x, __half y) { return __half(fminf(float(x), float(y))); }
static inline __half2 make_half2(__half x, __half y) { return {x, y}; }
static inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
static inline __half2 __half2half2(__half x) { return {x, x}; }
static inline __half2 __float2half2_rn(float x) { return {__half(x), __half(x)}; }
static inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
static inline __half2 __float22half2_rn(float2 x) { return {__half(x.x), __half(x.y)}; }
static inline float2 __half22float2(__half2 x) { return {float(x.x), float(x.y)}; }
static inline float __low2float(__half2 x) { return float(x.x); }
static inline float __high2float(__half2 x) { return float(x.y); }
static inline __half __low2half(__half2 x) { return x.x; }
static inline __half __high2half(__half2 x) { return x.y; }
static inline __half2 __hadd2(__half2 x, __half2 y) { return {__hadd(x.x, y.x), __hadd(x.y, y.y)}; }
static inline __half2 __hsub2(__half2 x, __half2 y) { return {__hsub(x.x, y.x), __hsub(x.y, y.y)}; }
static inline __half2 __hmul2(__half2 x, __half2 y) { return {__hmul(x.x, y.x), __hmul(x.y, y.y)}; }
static inline __half2 __hmax2(__half2 x, __half2 y) { return {__hmax(x.x, y.x), __hmax(x.y, y.y)}; }
static inline __half2 __hmin2(__half2 x, __half2 y) { return {__hmin(x.x, y.x), __hmin(x.y, y.y)}; }
static inline __half2 __hfma2(__half2 x, __half2 y, __half2 z) {
    return {__hfma(x.x, y.x, z.x), __hfma(x.y, y.y, z.y)};
}

// --- tensor cores and asynchronous copies: refimpl/engines/cuda/tensor_cores.cuh says which lane holds what ----------

namespace emulation {

template <typename T> struct Product { T* d; const unsigned *a, *b; };

// D (16, 8) += A (16, k) B (k, 8); a register holds 4 / sizeof(E) neighbours along k.
template <typename T, typename E, int k> void multiply_all(Thread* lanes, unsigned present) {
    if (present != ~0u) fail("mma without all lanes of the warp");
    const int per = 4 / sizeof(E), half = k / 2;  // the upper half of k has registers of its own
    typedef T Row __attribute__((vector_size(8 * sizeof(T))));
    T a[16][k];
    Row b[k], c[16];
    for (int lane = 0; lane < 32; ++lane) {
        const Product<T>& mine = slot<Product<T>>(lanes, lane);
        for (int part = 0; part < 2; ++part) {
            const int row = lane / 4, column = lane % 4 * per + half * part;
            E upper[per], lower[per], right[per];
            memcpy(upper, mine.a + 2 * part, 4), memcpy(lower, mine.a + 2 * part + 1, 4);
            memcpy(right, mine.b + part, 4);
            for (int i = 0; i < per; ++i) {
                a[row][column + i] = T(upper[i]), a[row + 8][column + i] = T(lower[i]);
                b[column + i][row] = T(right[i]);
            }
        }
    }
    auto cell = [&](int lane, int i) -> T& { return ((T*) &c[lane / 4 + i / 2 * 8])[lane % 4 * 2 + i % 2]; };
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i) cell(lane, i) = slot<Product<T>>(lanes, lane).d[i];
    for (int row = 0; row < 16; ++row)
        for (int j = 0; j < k; ++j) c[row] += a[row][j] * b[j];
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i) slot<Product<T>>(lanes, lane).d[i] = cell(lane, i);
}
template <typename T, typename E, int k>
void multiply(T (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    Product<T> mine = {d, a, b};
    together(~0u, multiply_all<T, E, k>, &mine);
}

struct Rows { unsigned* r; const unsigned short* row; };
template <bool transposed> void load_all(Thread* lanes, unsigned present) {
    if (present != ~0u) fail("ldmatrix without all lanes of the warp");
    for (int matrix = 0; matrix < 4; ++matrix) {
        unsigned short cells[8][8];
        for (int i = 0; i < 8; ++i) {
            const unsigned short* row = slot<Rows>(lanes, 8 * matrix + i).row;
            if ((size_t) row % 16) fail("a row of ldmatrix is not aligned to 16 bytes");
            memcpy(cells[i], row, 16);
        }
        for (int lane = 0; lane < 32; ++lane) {
            const int g = lane / 4, t = lane % 4 * 2;
            const unsigned low = transposed ? cells[t][g] : cells[g][t];
            const unsigned high = transposed ? cells[t + 1][g] : cells[g][t + 1];
            slot<Rows>(lanes, lane).r[matrix] = low | high << 16;
        }
    }
}
template <bool transposed> void load(unsigned (&r)[4], const void* row) {
    unsigned read[4];  // r may be what another lane's row points to
    Rows mine = {read, (const unsigned short*) row};
    together(~0u, load_all<transposed>, &mine);
    memcpy(r, read, sizeof read);
}

// Copies happen when they are waited for; until then their place is NaN.
static void copy_later(void* to, const void* from, int bytes) {
    if ((size_t) to % 16 || (bytes && (size_t) from % 16)) fail("an asynchronous copy is not aligned to 16 bytes");
    if (bytes < 0 || bytes > 16) fail("an asynchronous copy reads 0 to 16 bytes");
    Thread& thread = threads[current];
    if (thread.copy_count == thread.copy_space) {
        thread.copy_space = thread.copy_space ? 2 * thread.copy_space : 64;
        thread.copies = (Copy*) realloc(thread.copies, thread.copy_space * sizeof(Copy));
    }
    poison(to, 16);
    thread.copies[thread.copy_count++] = {to, from, bytes, thread.group};
}
static void copy_until(int group) {
    Thread& thread = threads[current];
    int kept = 0;
    for (int i = 0; i < thread.copy_count; ++i) {
        const Copy& copy = thread.copies[i];
        if (copy.group >= group) {
            thread.copies[kept++] = copy;
            continue;
        }
        memcpy(copy.to, copy.from, copy.bytes);
        memset((char*) copy.to + copy.bytes, 0, 16 - copy.bytes);
    }
    thread.copy_count = kept;
}

}  // namespace emulation

static inline void mma_m16n8k16_f16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    emulation::multiply<float, __half, 16>(d, a, b);
}
static inline void mma_m16n8k32_s8(int (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    emulation::multiply<int, signed char, 32>(d, a, b);
}
static inline void ldmatrix_x4(unsigned (&r)[4], const void* row) { emulation::load<false>(r, row); }
static inline void ldmatrix_x4_trans(unsigned (&r)[4], const void* row) { emulation::load<true>(r, row); }
static inline void copy_async_16(void* shared, const void* global, int bytes = 16) {
    emulation::copy_later(shared, global, bytes);
}
static inline void copy_async_commit() { ++emulation::threads[emulation::current].group; }
template <int N> void copy_async_wait() {
    emulation::copy_until(emulation::threads[emulation::current].group - N);
}
