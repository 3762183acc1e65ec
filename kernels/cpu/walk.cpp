// The time loop on the CPU: the cells of ../cells/, the same structs that run on a GPU, walked by a schedule made for caches and
// vector registers. Built as gpurnn._native where a C++ compiler is found; gpurnn/cpu_ops.py calls it through ctypes.
//
// The walk is compiled once for each kind of processor and chosen when it runs. Legend and layout: ../common.cuh.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__) || defined(_M_X64)
#include <xmmintrin.h>
#endif
#ifdef __linux__
#include <sched.h>
#endif
#ifndef _WIN32
#include <unistd.h>
#endif

#ifdef _WIN32
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

// One layer and direction, forward or backward. All arrays are C-contiguous but for the strides named *_row, in numbers.
struct Pass {
    int cell;           // 0 RnnTanh, 1 RnnRelu, 2 LstmCell, 3 GruCell, 4 GruOriginal
    int wide;           // double, else float
    int T, B, I, H, P;  // P: size of h, less than H with a projection
    int reverse;        // whether the walk goes backwards in time
    int keep;           // whether gates are kept for the way back
    ptrdiff_t kept_row, output_row, doutput_row;
    const int* lengths;     // [B] or null
    const void* x;          // forward: [T, B, I]
    const void* weight_ih;  // [G*H, I]
    const void* weight_hh;  // [G*H, P]
    const void* weight_hr;  // [P, H] of a projection, or null
    const void* bias_ih;    // [G*H] or null, both or none
    const void* bias_hh;
    void* kept;      // [T, B, kept_row], without keep one step, [1, B, kept_row]; forward, out: what the cell keeps, and
                     // p = r h or m; backward, out: the derivatives in its place
    void* h;         // [T+1, B, P], the initial state in its slot
    void* c;         // [T+1, B, H] or null; without keep two slots in turn, [2, B, H], the first holds the initial state
    void* output;    // forward, out: [T, B, output_row] or null, zero past the end
    void* doutput;   // backward, in: [T, B, doutput_row] or null
    void* dh;        // backward, in: derivative by the final state, out: by the initial one; [B, P]
    void* dc;        // [B, H] or null
    void* dh_steps;  // with a projection, out: the derivatives by every h, [T, B, P], else null
};

// A product of two matrices of any strides, in numbers; neighbours of a row of C lie side by side.
struct Product {
    int wide, accumulate;
    ptrdiff_t M, N, K;  // C[M, N] = A[M, K] B[K, N], or added to C
    ptrdiff_t a_row, a_column, b_row, b_column, c_row;
    const void *A, *B;
    void* C;
};

// An optimiser's step over flat arrays of N numbers.
struct Update {
    int rule;            // 0 Sgd, 1 RmsProp, 2 Adam
    int wide;
    ptrdiff_t N;
    double scalars[8];   // in the order of the kernel in ../sums/optimize.cu
    const void* grads;
    void* params;
    void* arrays[3];     // the optimiser's state, in that order too; null where it does without
};

// Cross-entropy of rows of logits, there or back: as in ../loss.cu.
struct Rows {
    int wide;
    ptrdiff_t count, V;
    double smoothing;
    const void* logits;      // [N, V]
    const int64_t* rows;     // [count], which of the N count, or null for all
    const int64_t* labels;   // [count]
    double* losses;          // [count]; forward, out
    void* highest;           // [count]; forward, out
    double* total;           // [count]; forward, out
    const void* scale;       // backward: [N]
    void* dlogits;           // backward, out: [N, V], may be logits
};

// Bits below byte k of a whole number of four bytes in memory.
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
#define BYTE(k) (24 - 8 * (k))
#else
#define BYTE(k) (8 * (k))
#endif

constexpr int SQUARES = 1 << 12;  // numbers whose squares are one sum

namespace {

// Room for numbers that begins where a cache line does. Not touched before it is used: its pages go to whoever fills it.
template <typename T>
class Lines {
    std::unique_ptr<T[]> memory;

public:
    explicit Lines(size_t size = 0) : memory(new T[size + 64 / sizeof(T)]) {}
    T* begin() const { return (T*)(((uintptr_t)memory.get() + 63) / 64 * 64); }
};

// Where threads wait for one another, once.
class Meeting {
    std::atomic<int> missing;

public:
    explicit Meeting(int threads) : missing(threads) {}
    void wait() {
        missing.fetch_sub(1, std::memory_order_acq_rel);
        while (missing.load(std::memory_order_acquire) > 0) std::this_thread::yield();
    }
};

// Which processor this thread is on, and how it leaves that one where another thread of the process works on it, too. The system
// often begins a new thread beside its parent, and may leave it there for longer than a whole walk takes.
#ifdef __linux__
int processor() { return sched_getcpu(); }
int process() { return (int)getpid(); }

void leave(int processor) {
    cpu_set_t some;
    if (processor < 0 || sched_getaffinity(process(), sizeof some, &some) || CPU_COUNT(&some) < 2) return;
    CPU_CLR(processor, &some);
    sched_setaffinity(0, sizeof some, &some);
}
#else
int processor() { return -1; }
#ifdef _WIN32
int process() { return 0; }
#else
int process() { return (int)getpid(); }
#endif
void leave(int) {}
#endif

// A thread that sleeps until there is work for it.
class Helper {
    std::mutex mutex;
    std::condition_variable changed;
    void (*call)(const void* work, int number) = nullptr;
    const void* work = nullptr;
    std::atomic<int>* missing = nullptr;
    int number, caller = -1;
    bool over = false;
    std::thread thread;  // the last: it begins when the rest is there

    void run() {
        std::unique_lock<std::mutex> lock(mutex);
        for (;;) {
            changed.wait(lock, [this] { return call || over; });
            if (over) return;
            if (processor() == caller) leave(caller);
            call(work, number);
            call = nullptr;
            missing->fetch_sub(1, std::memory_order_release);
        }
    }

public:
    explicit Helper(int number) : number(number), thread([this] { run(); }) {}
    ~Helper() {
        {
            std::lock_guard<std::mutex> lock(mutex);
            over = true;
        }
        changed.notify_one();
        thread.join();
    }
    void start(void (*what)(const void*, int), const void* with, std::atomic<int>* count, int from) {
        {
            std::lock_guard<std::mutex> lock(mutex);
            call = what, work = with, missing = count, caller = from;
        }
        changed.notify_one();
    }
};

// The helpers of one calling thread, from its first call for them until it ends. A fork leaves them behind: the child's are new,
// and what it has of the parent's is not touched.
struct Helpers {
    std::vector<std::unique_ptr<Helper>>* all = nullptr;
    int owner = 0;

    // So many helpers; throws where memory or threads are refused.
    std::vector<std::unique_ptr<Helper>>& reserve(int count) {
        if (!all || owner != process()) all = new std::vector<std::unique_ptr<Helper>>, owner = process();
        all->reserve(count);
        while ((int)all->size() < count) all->emplace_back(new Helper((int)all->size() + 1));
        return *all;
    }
    ~Helpers() {
        if (owner == process()) delete all;
    }
};
thread_local Helpers helpers;

// While one lives, this thread counts numbers below the smallest normal one (2^-126, in double 2^-1022) as zero, as GPUs do in
// float: with them a processor takes up to a hundred times as long.
class FlushToZero {
#if defined(__x86_64__) || defined(_M_X64)
    unsigned before = _mm_getcsr();

public:
    FlushToZero() { _mm_setcsr(before | 0x8040); }  // FTZ, of results, and DAZ, of operands
    ~FlushToZero() { _mm_setcsr(before); }
#elif defined(__aarch64__)
    uint64_t before;

public:
    FlushToZero() {
        asm volatile("mrs %0, fpcr" : "=r"(before));
        asm volatile("msr fpcr, %0" ::"r"(before | 1 << 24));
    }
    ~FlushToZero() { asm volatile("msr fpcr, %0" ::"r"(before)); }
#else
public:
    FlushToZero() {}
    ~FlushToZero() {}
#endif
};

// What the first of several threads has thrown.
class Failure {
    std::atomic<bool> any{false};
    std::exception_ptr first;

public:
    void note() {
        if (!any.exchange(true)) first = std::current_exception();
    }
    // When all of them have ended.
    void rethrow() const {
        if (first) std::rethrow_exception(first);
    }
};

// work(0) ... work(threads - 1) at once. Throws what one of them has thrown; those that meet must not throw before.
template <typename Work>
void on_threads(int threads, const Work& work) {
    std::atomic<int> missing(threads - 1);
    Failure failure;
    const auto run = [&](int number) {
        const FlushToZero flush;
        try {
            work(number);
        } catch (...) {
            failure.note();
        }
    };
    if (threads > 1) {
        const int mine = processor();
        typedef decltype(run) Run;
        const auto call = [](const void* run, int number) { (*(Run*)run)(number); };
        auto& all = helpers.reserve(threads - 1);  // before anybody begins: they wait for one another
        for (int i = 0; i < threads - 1; ++i) all[i]->start(call, &run, &missing, mine);
    }
    run(0);
    while (missing.load(std::memory_order_acquire) > 0) std::this_thread::yield();
    failure.rethrow();
}

constexpr double inverse_factorial(int k) { return k < 2 ? 1.0 : inverse_factorial(k - 1) / k; }

// Each kind of processor: bytes of a vector, registers for sums.
#define LANES 16
#ifdef __x86_64__
#define SUMS 12
#else
#define SUMS 24
#endif
namespace plain {
#include "walk.h"
}
#undef LANES
#undef SUMS

#if defined(__x86_64__) && defined(__GNUC__)
#define X86

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define LANES 32
#define SUMS 12
namespace avx2 {
#include "walk.h"
}
#undef LANES
#undef SUMS
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx2,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx2,fma")
#endif
#define LANES 64
#define SUMS 24
namespace avx512 {
#include "walk.h"
}
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

}  // namespace

// What this build and this machine can do: 0 vectors of 128 bits, 1 AVX2, 2 AVX-512.
EXPORT int gpurnn_native_level() {
#ifdef X86
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") ? 2 : 1;
#else
    return 0;
#endif
}

// For the caller to see that both mean the same by these structs, and by the functions: the last number changes with them.
EXPORT int gpurnn_native_bytes(int which) {
    const size_t sizes[] = {sizeof(Pass), sizeof(Product), sizeof(Update), sizeof(Rows), 3};
    return (int)sizes[which];
}

#ifdef X86
#define BEST(function) (level == 2 ? avx512::function : level == 1 ? avx2::function : plain::function)
#else
#define BEST(function) plain::function
#endif

// What the functions below return: no exception may leave them, as Python would end.
enum { DONE, NO_MEMORY, NO_THREAD, OTHER };

template <typename Work>
static int guarded(const Work& work) {
    try {
        work();
        return DONE;
    } catch (const std::bad_alloc&) {
        return NO_MEMORY;
    } catch (const std::length_error&) {  // of a vector
        return NO_MEMORY;
    } catch (const std::system_error&) {  // of a thread
        return NO_THREAD;
    } catch (...) {
        return OTHER;
    }
}

EXPORT int gpurnn_native_walk(const Pass* passes, int directions, int threads, int back, int level) {
    return guarded([=] { BEST(walk)(passes, directions, threads, back); });
}

EXPORT int gpurnn_native_multiply(const Product* job, int threads, int level) {
    return guarded([=] { BEST(multiply)(job, threads); });
}

EXPORT int gpurnn_native_add_rows(const void* rows, ptrdiff_t N, int M, ptrdiff_t row, int wide, void* sums, int threads,
                                  int level) {
    return guarded([=] { BEST(add_rows_any)(rows, N, M, row, wide, sums, threads); });
}

EXPORT int gpurnn_native_update(const Update* job, int threads, int level) {
    return guarded([=] { BEST(update)(job, threads); });
}

EXPORT int gpurnn_native_add_squares(const void* numbers, ptrdiff_t N, int wide, double* sums, int threads, int level) {
    return guarded([=] { BEST(add_squares_any)(numbers, N, wide, sums, threads); });
}

EXPORT int gpurnn_native_cross_entropy(const Rows* job, int threads, int back, int level) {
    return guarded([=] { BEST(cross_entropy)(job, threads, back); });
}

EXPORT int gpurnn_native_keep_mask(ptrdiff_t N, uint64_t seed, unsigned layer, unsigned call, uint64_t threshold, bool* keep,
                                   int threads, int level) {
    return guarded([=] { BEST(keep_mask)(N, seed, layer, call, threshold, keep, threads); });
}
