// The interface of the compiled CPU code: the structs and functions that gpurnn/cpu_ops.py calls through ctypes. It is built as
// gpurnn._native where a C++ compiler is found.
//
// time_loop.h and the files it includes are compiled once for each instruction set; every call chooses one of them. The cells
// are those of ../cells/, the same structs that run on a GPU. Legend and layout: ../common.cuh.

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

// The time loop of one layer and direction, forward or backward. Arrays are C-contiguous; strides named *_row count elements.
struct Pass {
    const char* cell;   // the name of a struct in ../cells/all.cuh
    int is_double;      // element type: double, else float
    int T, B, I, H, P;  // P: size of h, less than H with a projection
    int reverse;        // whether the loop runs from T - 1 to 0
    int save;           // whether gates and c are saved for the backward pass
    ptrdiff_t gates_row, output_row, doutput_row;
    const int* lengths;     // [B] or null
    const void* x;          // forward: [T, B, I]
    const void* weight_ih;  // [G*H, I]
    const void* weight_hh;  // [G*H, P]
    const void* weight_hr;  // [P, H] of a projection, or null
    const void* bias_ih;    // [G*H]; both biases are null or neither is
    const void* bias_hh;
    void* gates;     // [T, B, gates_row]; without save one timestep, [1, B, gates_row]. forward, out: what the cell saves, then
                     // p = r h or m = o tanh(c'); backward, out: dgates in their place
    void* h;         // [T+1, B, P], with the initial state in its slot
    void* c;         // [T+1, B, H] or null; without save two slots in turn, [2, B, H], the first holds the initial state
    void* output;    // forward, out: [T, B, output_row] or null, zero past each sequence's end
    void* doutput;   // backward, in: [T, B, doutput_row] or null
    void* dh;        // [B, P]; backward, in: gradient of the final state, out: of the initial state
    void* dc;        // [B, H] or null; likewise
    void* dh_steps;  // backward, out: [T, B, P], the gradient of every h of a projection, else null
};

// A matrix product, C[M, N] = A[M, K] B[K, N] or C += A B. Strides are any, in elements; those of C's columns are 1.
struct Product {
    int is_double, accumulate;
    ptrdiff_t M, N, K;
    ptrdiff_t a_row, a_column, b_row, b_column, c_row;
    const void *A, *B;
    void* C;
};

// An optimizer's update of N parameters.
struct Update {
    int rule;            // 0 Sgd, 1 RmsProp, 2 Adam
    int is_double;
    ptrdiff_t N;
    double scalars[8];   // in the order of the kernel in ../sums/optimize.cu
    const void* grads;
    void* params;
    void* arrays[3];     // the optimizer's state, in the same order; null where it has none
};

// Cross-entropy of rows of logits, forward or backward, as in ../sums/loss.cu.
struct CrossEntropy {
    int is_double;
    ptrdiff_t count, V;
    double smoothing;
    const void* logits;      // [N, V]
    const int64_t* rows;     // [count], the rows that count, or null for all N
    const int64_t* labels;   // [count]
    double* losses;          // [count]; forward, out
    void* highest;           // [count]; forward, out: each row's largest logit
    double* total;           // [count]; forward, out: each row's sum of exp(logit - highest)
    const void* scale;       // backward: [N]
    void* dlogits;           // backward, out: [N, V]; may be logits
};

namespace {

// 1 / k!, for the series in vector.h. It is defined once and not in each instruction set's namespace, where copies of it change
// what GCC 12 inlines.
constexpr double inverse_factorial(int k) { return k < 2 ? 1.0 : inverse_factorial(k - 1) / k; }

// For each instruction set: the bytes of a vector register, and how many registers a matrix product may use as accumulators.
// x86-64 has 16 vector registers without AVX-512; AVX-512 and aarch64 have 32.
#define VECTOR_BYTES 16
#ifdef __x86_64__
#define ACCUMULATORS 12
#else
#define ACCUMULATORS 24
#endif
namespace baseline {
#include "time_loop.h"
}
#undef VECTOR_BYTES
#undef ACCUMULATORS

#if defined(__x86_64__) && defined(__GNUC__)
#define X86

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define VECTOR_BYTES 32
#define ACCUMULATORS 12
namespace avx2 {
#include "time_loop.h"
}
#undef VECTOR_BYTES
#undef ACCUMULATORS
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx2,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx2,fma")
#endif
#define VECTOR_BYTES 64
#define ACCUMULATORS 24
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

// The best instruction set of this build on this machine: 0 baseline (128-bit vectors), 1 AVX2, 2 AVX-512.
EXPORT int gpurnn_native_level() {
#ifdef X86
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") ? 2 : 1;
#else
    return 0;
#endif
}

// The sizes of the structs, then the interface's number, which changes with every struct and function here. The caller compares
// them with its own, and refuses a library built from other sources.
EXPORT int gpurnn_native_bytes(int which) {
    const size_t sizes[] = {sizeof(Pass), sizeof(Product), sizeof(Update), sizeof(CrossEntropy), 5};
    return (int)sizes[which];
}

#ifdef X86
#define DISPATCH(function) (level == 2 ? avx512::function : level == 1 ? avx2::function : baseline::function)
#else
#define DISPATCH(function) baseline::function
#endif

// What the functions below return. No exception may leave them: it would end the Python process.
enum { DONE, NO_MEMORY, NO_THREAD, OTHER_ERROR };

template <typename Work>
static int guarded(const Work& work) {
    try {
        work();
        return DONE;
    } catch (const std::bad_alloc&) {
        return NO_MEMORY;
    } catch (const std::length_error&) {  // from a vector
        return NO_MEMORY;
    } catch (const std::system_error&) {  // from a thread
        return NO_THREAD;
    } catch (...) {
        return OTHER_ERROR;
    }
}

EXPORT int gpurnn_native_time_loop(const Pass* passes, int directions, int threads, int backward, int level) {
    return guarded([=] { DISPATCH(time_loop)(passes, directions, threads, backward); });
}

EXPORT int gpurnn_native_multiply(const Product* job, int threads, int level) {
    return guarded([=] { DISPATCH(multiply)(job, threads); });
}

EXPORT int gpurnn_native_add_rows(const void* rows, ptrdiff_t N, int M, ptrdiff_t row, int is_double, void* sums, int threads,
                                  int level) {
    return guarded([=] { DISPATCH(add_rows_any)(rows, N, M, row, is_double, sums, threads); });
}

EXPORT int gpurnn_native_update(const Update* job, int threads, int level) {
    return guarded([=] { DISPATCH(update)(job, threads); });
}

EXPORT int gpurnn_native_add_squares(const void* values, ptrdiff_t N, int is_double, double* sums, int threads, int level) {
    return guarded([=] { DISPATCH(add_squares_any)(values, N, is_double, sums, threads); });
}

EXPORT int gpurnn_native_cross_entropy(const CrossEntropy* job, int threads, int backward, int level) {
    return guarded([=] { DISPATCH(cross_entropy)(job, threads, backward); });
}

EXPORT int gpurnn_native_dropout_mask(ptrdiff_t N, uint64_t seed, unsigned layer, unsigned call, uint64_t threshold,
                                      bool* mask, int threads, int level) {
    return guarded([=] { DISPATCH(dropout_mask)(N, seed, layer, call, threshold, mask, threads); });
}
