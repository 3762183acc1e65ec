// What gpurnn/backends/cpu and the compiled code hand to each other through ctypes: the same structs are in native.py. A part of
// api.cpp and of cell.cpp.

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
#include <utility>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "processor.h"
#include "threads.h"

#ifdef _WIN32
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

// The dtype of an array; its number is that in DTYPES of ../../gpurnn/dtypes.py. Numbers of 16 bits are computed in float.
enum { FLOAT32, FLOAT64, FLOAT16, BFLOAT16 };
inline bool has_16_bits(int dtype) { return dtype >= FLOAT16; }
inline int bytes_of(int dtype) { return dtype == FLOAT64 ? 8 : has_16_bits(dtype) ? 2 : 4; }

// The time loop of one layer and direction, forward or backward. Arrays are C-contiguous; strides named *_row count elements.
// `real`: the dtype that is computed in, float or double. What has no remark is of `dtype`; the others but h, their gradients, that
// of h, biases and own parameters are real.
// Legend: ../common.cuh; N, M and `products` are of the cell (../cells/cell.cuh), K is the larger of what it saves and of
// what it makes backward.
struct Pass {
    const char* cell;   // the name of a struct in ../cells/all.cuh
    int dtype;
    int weights_dtype;  // of weight_ih, weight_hh, weight_hr: that or real; beside a dtype of 16 bits they are rounded to it
    int T, B, I, H, P;  // P: size of h, less than H with a projection
    int reverse;        // whether the loop runs from T - 1 to 0
    int save;           // whether gates and states are saved for the backward pass
    int by_units;       // whether threads divide the units and not the sequences; only where layer.h can
    int bits;           // of the whole numbers that inputs and states become where weights are int8: 16 or 8
    int flat;           // whether this timestep is several of a longer loop side by side; results have the bits of that loop
    ptrdiff_t gates_row, output_row, doutput_row;
    ptrdiff_t state_stride;  // elements from one of the states besides h to the next
    ptrdiff_t mask_step;     // masks from one timestep to the next; 0 where they are drawn once for a sequence
    const int* lengths;     // [B] or null
    const void* x;          // forward: [T, B, I]
    const void* weight_ih;  // [G*H, I]
    const void* weight_hh;  // [products*H, P], or null
    const void* weight_hr;  // [P, H] of a projection, or null
    const void* bias_ih;    // [G*H] real or null
    const void* bias_hh;    // [G*H] real or null
    const float *scale_ih, *scale_hh, *scale_hr;  // [G*H], [products*H], [P], or null; else the weights are int8, times these
    const void* own;        // [N, H] real, the cell's own parameters, or null
    const bool* masks;      // [T, B, M*H] or [1, B, M*H] or null
    const uint8_t* marks;     // [T, B] or null: sums of HELD, RESET, SHOWN. With them lengths are not read
    const void* reset_h;      // [B, P], what a reset gives, or null
    const void* reset_others; // [S-1, B, H] real or null; likewise
    void* gates;     // [T, B, gates_row], K*H and more; without save one timestep, [1, B, gates_row]. forward, out: what the cell
                     // saves, and behind K blocks what a projection multiplies; backward, out: dgates in their place
    void* h;         // [T+1, B, P], with the initial state in its slot
    void* others;    // [S-1, T+1, B, H] real, or null; without save two slots in turn, [S-1, 2, B, H], the first holds the initial state
    void* output;    // forward, out: [T, B, output_row] or null, zero past each sequence's end and where it is held
    void* doutput;   // backward, in: [T, B, doutput_row] or null
    void* dh;        // [B, P] real; backward, in: gradient of the final state, out: of the initial state
    void* dothers;   // [S-1, B, H] real or null; likewise
    void* dh_steps;  // backward, out: [T, B, P], the gradient of every h of a projection, else null
    void* dreset_h;      // [B, P] real or null; backward, in: zeros, out: the gradient of reset_h
    void* dreset_others; // [S-1, B, H] real or null; likewise
    void* packed;        // forward: the weights as products read them, from gpurnn_native_pack, or null
    void* room;          // else memory to pack them in, from a cache line on, or null
    size_t room_bytes;   // of that memory; where they are too few it is not used
};

// Marks of a timestep and sequence: ../../gpurnn/backends/marks.py says what they mean.
enum { HELD = 1, RESET = 2, SHOWN = 4 };

// A matrix product, C[M, N] = A[M, K] B[K, N] or C += A B. Strides are any, in elements; those of C's columns are 1. dtype: of A
// and B. c_dtype: that, or float beside numbers of 16 bits. room: as in `Pass`, for B.
struct Product {
    int dtype, c_dtype, accumulate;
    ptrdiff_t M, N, K;
    ptrdiff_t a_row, a_column, b_row, b_column, c_row;
    const void *A, *B;
    void* C;
    int bits;  // 0; or B is int8, packed by gpurnn_native_pack_linear, and A becomes whole numbers of so many bits. accumulate is 0
    void* room;
    size_t room_bytes;
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

// A part of one timestep of a whole model: a lookup in a table, a recurrent layer, or a linear one.
enum { TABLE, LOOP, LINEAR };
struct Stage {
    int kind, dtype;
    int rows, in, out;       // sequences; columns of the weight, or rows of the table; columns of y
    int directions, threads; // of a recurrent layer
    int bits;                // as in `Pass`
    const void* x;           // [rows, in]; of a table the numbers [rows], int64
    const void* weight;      // [out, in], real; or [in, out] real of a table
    const float* scales;     // [out] or null; else the weight of a linear layer is int8, times these; it is always packed
    const void* packed;      // of a linear layer: the weight from gpurnn_native_pack_linear, or null
    const void* bias;        // [out] real or null
    void* y;                 // [rows, out]
    const Pass* passes;      // [directions], of one timestep
    int (*generated)(const Pass*, int directions, int threads, int backward);  // the time loop of a generated cell, or null
};

// What the functions return. No exception may leave them: it would end the Python process.
enum { DONE, NO_MEMORY, NO_THREAD, OTHER_ERROR, NO_ROW };

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
    } catch (const std::out_of_range&) {  // from a lookup in a table
        return NO_ROW;
    } catch (const int problem) {  // what the time loop of a generated cell has returned
        return problem;
    } catch (...) {
        return OTHER_ERROR;
    }
}

namespace {

// 1 / k!, for the series in vector.h. It is defined once and not in each instruction set's namespace, where copies of it change
// what GCC 12 inlines.
constexpr double inverse_factorial(int k) { return k < 2 ? 1.0 : inverse_factorial(k - 1) / k; }

}  // namespace
