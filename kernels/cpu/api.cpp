// The interface of the compiled CPU code: the structs and functions that gpurnn/backends/cpu calls through ctypes. It is built as
// gpurnn._native where a C++ compiler is found.
//
// parts.h is compiled once for each instruction set; every call chooses one of them. The cells are those of ../cells/, the same
// structs that run on a GPU. Legend and layout: ../common.cuh.

#include "interface.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif

namespace {

// For each instruction set: the bytes of a vector register, and how many registers a matrix product may use as accumulators.
// x86-64 has 16 vector registers without AVX-512; AVX-512 and aarch64 have 32.
#define VECTOR_BYTES 16
#ifdef __x86_64__
#define ACCUMULATORS 12
#else
#define ACCUMULATORS 24
#endif
namespace baseline {
#include "parts.h"
}
#undef VECTOR_BYTES
#undef ACCUMULATORS

#if defined(__x86_64__) && defined(__GNUC__)
#define X86

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define VECTOR_BYTES 32
#define ACCUMULATORS 12
namespace avx2 {
#include "parts.h"
}
#undef VECTOR_BYTES
#undef ACCUMULATORS
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx2,fma,f16c")
#endif
#define VECTOR_BYTES 64
#define ACCUMULATORS 24
namespace avx512 {
#include "parts.h"
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
    unsigned a, b, c = 0, d;
    const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;  // not every compiler's __builtin_cpu_supports knows it
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !f16c) return 0;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") ? 2 : 1;
#else
    return 0;
#endif
}

// The sizes of the structs, then the interface's number, which changes with every struct and function here. The caller compares
// them with its own, and refuses a library built from other sources.
EXPORT int gpurnn_native_bytes(int which) {
    const size_t sizes[] = {sizeof(Pass), sizeof(Product), sizeof(Update), sizeof(CrossEntropy), sizeof(Stage), 16};
    return (int)sizes[which];
}

#ifdef X86
#define DISPATCH(function) (level == 2 ? avx512::function : level == 1 ? avx2::function : baseline::function)
#else
#define DISPATCH(function) baseline::function
#endif

EXPORT int gpurnn_native_time_loop(const Pass* passes, int directions, int threads, int backward, int level) {
    return guarded([=] { DISPATCH(time_loop)(passes, directions, threads, backward); });
}

EXPORT int gpurnn_native_pack(const Pass* pass, void* to, int threads, size_t* bytes, int level) {
    return guarded([=] { *bytes = DISPATCH(pack_weights)(*pass, to, threads); });
}

EXPORT int gpurnn_native_pack_linear(const Stage* stage, void* to, size_t* bytes, int level) {
    return guarded([=] { *bytes = DISPATCH(pack_stage)(*stage, to); });
}

EXPORT int gpurnn_native_fingerprint(const void* const* arrays, const size_t* bytes, int count, uint64_t* mark, int threads, int level) {
    return guarded([=] {
        *mark = 0;
        for (int i = 0; i < count; ++i) *mark = DISPATCH(fingerprint)((const char*)arrays[i], bytes[i], *mark, threads);
    });
}

EXPORT int gpurnn_native_step(const Stage* stages, int count, int level) {
    return guarded([=] { DISPATCH(run_step)(stages, count); });
}

EXPORT int gpurnn_native_multiply(const Product* job, int threads, int level) {
    return guarded([=] { DISPATCH(multiply)(job, threads); });
}

EXPORT int gpurnn_native_add_rows(const void* rows, ptrdiff_t N, int M, ptrdiff_t row, int dtype, void* sums, int threads,
                                  int level) {
    return guarded([=] { DISPATCH(add_rows_any)(rows, N, M, row, dtype, sums, threads); });
}

EXPORT int gpurnn_native_update(const Update* job, int threads, int level) {
    return guarded([=] { DISPATCH(update)(job, threads); });
}

EXPORT int gpurnn_native_round(const float* numbers, ptrdiff_t N, int dtype, void* to, int threads, int level) {
    return guarded([=] { DISPATCH(round_all)(numbers, N, dtype, to, threads); });
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
