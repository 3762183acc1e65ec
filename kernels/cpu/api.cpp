// The time loop on the CPU: the cells of ../cells/, the same structs that run on a GPU, walked by a schedule made for caches and
// vector registers. Built as gpurnn._native where a C++ compiler is found; gpurnn/cpu_ops.py calls it through ctypes.
//
// The walk is compiled once for each kind of processor and chosen when it runs. Legend and layout: ../common.cuh.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <system_error>
#include <vector>

#include "threads.h"

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

constexpr double inverse_factorial(int k) { return k < 2 ? 1.0 : inverse_factorial(k - 1) / k; }

// Each kind of processor: bytes of a vector, registers for sums.
#define LANES 16
#ifdef __x86_64__
#define SUMS 12
#else
#define SUMS 24
#endif
namespace plain {
#include "time_loop.h"
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
#include "time_loop.h"
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
#include "time_loop.h"
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
    const size_t sizes[] = {sizeof(Pass), sizeof(Product), sizeof(Update), sizeof(Rows), 4};
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

EXPORT int gpurnn_native_time_loop(const Pass* passes, int directions, int threads, int back, int level) {
    return guarded([=] { BEST(time_loop)(passes, directions, threads, back); });
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

EXPORT int gpurnn_native_dropout_mask(ptrdiff_t N, uint64_t seed, unsigned layer, unsigned call, uint64_t threshold,
                                      bool* mask, int threads, int level) {
    return guarded([=] { BEST(dropout_mask)(N, seed, layer, call, threshold, mask, threads); });
}
