// The interface of the compiled CPU code: the structs and functions that gpurnn/backends/cpu calls through ctypes. It is built as
// gpurnn._native where a C++ compiler is found.
//
// parts.h is compiled once for each instruction set; every call chooses one of them. The cells are those of ../cells/, the same
// structs that run on a GPU. Legend and layout: ../common.cuh.
//
// This file is the whole library. To be compiled in several pieces at once, it is one of them where GPURNN_PIECE is defined: 0 is
// the interface, 1 + n the instruction set of level n.

#include "interface.h"

#include "pieces.h"

#ifdef GPURNN_PIECE
namespace gpurnn {
#else
namespace {
#endif

// For each instruction set: the bytes of a vector register, and how many registers a matrix product may use as accumulators.
// x86-64 has 16 vector registers without AVX-512; AVX-512 and aarch64 have 32.
#if IN_PIECE(1)
#define VECTOR_BYTES 16
#ifdef __x86_64__
#define ACCUMULATORS 12
#else
#define ACCUMULATORS 24
#endif
namespace baseline {
#include "parts.h"
FUNCTIONS
}
#undef VECTOR_BYTES
#undef ACCUMULATORS
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#define X86

#if IN_PIECE(2)
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
FUNCTIONS
}
#undef VECTOR_BYTES
#undef ACCUMULATORS
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#if IN_PIECE(3)
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx2,fma,f16c")
#endif
#define VECTOR_BYTES 64
#define ACCUMULATORS 24
namespace avx512 {
#include "parts.h"
FUNCTIONS
}
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
#endif

}  // namespace

#if IN_PIECE(0)

// The best instruction set of this build on this machine: 0 baseline (128-bit vectors), 1 AVX2, 2 AVX-512.
EXPORT int gpurnn_native_level() {
#ifdef X86
    return processor().avx512 ? 2 : processor().avx2 ? 1 : 0;
#else
    return 0;
#endif
}

// The sizes of the structs, then the interface's number, which changes with every struct and function here. The caller compares
// them with its own, and refuses a library built from other sources.
EXPORT int gpurnn_native_bytes(int which) {
    const size_t sizes[] = {sizeof(Pass), sizeof(Product), sizeof(Update), sizeof(CrossEntropy), sizeof(Stage), 17};
    return (int)sizes[which];
}

#ifdef X86
#define DISPATCH(function) (level == 2 ? OF(avx512, function) : level == 1 ? OF(avx2, function) : OF(baseline, function))
#else
#define DISPATCH(function) OF(baseline, function)
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
#endif
