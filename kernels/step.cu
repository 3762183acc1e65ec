// Schedule `step`: one timestep, any size, one thread for one unit of one sequence. What lies between two steps, the product
// with W_hh, is a GEMM of its own.
//
// Kernels are named by cell and storage:  step_forward<LstmCell, float>  step_backward<GruCell, __half>
// float and double are computed in themselves, half and bfloat16 in float; `real` is what is computed in. c, dh and dc,
// which add up over time, are stored as real.
//
// A sequence past its end (t >= lengths[b]) holds its state: h' = h, c' = c, and the derivatives go through unchanged.

#include "common.cuh"
#include "cells/rnn.cuh"
#include "cells/lstm.cuh"
#include "cells/gru.cuh"
#include <cuda_bf16.h>
#include <cuda_fp16.h>

template <typename T> struct Compute { typedef float real; };
template <> struct Compute<double> { typedef double real; };

// ---- forward

template <template <typename> class CellOf, typename T>
__global__ void step_forward(
    const int B,
    const int H,
    const int t,
    const int* __restrict__ lengths,  // [B] or null
    const T* __restrict__ ax,         // [B, G*H]  W_ih x + b_ih
    const T* __restrict__ ah,         // [B, G*H]  W_hh h
    const T* __restrict__ bias_hh,    // [G*H] or null
    const T* __restrict__ h,          // [B, H]
    const typename Compute<T>::real* __restrict__ c,  // [B, H]  null where the cell has none
    T* __restrict__ keep,             // [B, K*H]  out, or null
    T* __restrict__ h_new,            // [B, H]    out
    typename Compute<T>::real* __restrict__ c_new)    // [B, H]  out, null where the cell has none
{
    typedef typename Compute<T>::real real;
    typedef CellOf<real> Cell;
    const int j = blockIdx.x * blockDim.x + threadIdx.x;  // unit
    const int b = blockIdx.y * blockDim.y + threadIdx.y;  // sequence
    if (j >= H || b >= B) return;
    const size_t n = (size_t)b * H + j;
    if (lengths && t >= lengths[b]) {
        h_new[n] = h[n];
        if (Cell::states == 2) c_new[n] = c[n];
        return;
    }
    real a[Cell::gates], r[Cell::gates], kept[Cell::kept + 1], next_h, next_c;
    for (int k = 0; k < Cell::gates; k++) {
        const size_t at = ((size_t)b * Cell::gates + k) * H + j;
        a[k] = real(ax[at]);
        r[k] = real(ah[at]) + (bias_hh ? real(bias_hh[k * H + j]) : real(0));
    }
    Cell::forward(a, r, real(h[n]), Cell::states == 2 ? c[n] : real(0), kept, next_h, next_c);
    h_new[n] = T(next_h);
    if (Cell::states == 2) c_new[n] = next_c;
    if (keep) {
        for (int k = 0; k < Cell::kept; k++) keep[((size_t)b * Cell::kept + k) * H + j] = T(kept[k]);
    }
}

// ---- backward
//
// Leaves in dh only what does not go through W_hh; the GEMM that follows adds d W_hh to it.

template <template <typename> class CellOf, typename T>
__global__ void step_backward(
    const int B,
    const int H,
    const int t,
    const int* __restrict__ lengths,    // [B] or null
    const T* __restrict__ keep,         // [B, K*H]  what forward kept
    const T* __restrict__ h,            // [B, H]    what forward read
    const typename Compute<T>::real* __restrict__ c,      // [B, H]  null where the cell has none
    const T* __restrict__ h_new,        // [B, H]    what forward wrote
    const typename Compute<T>::real* __restrict__ c_new,  // [B, H]  null where the cell has none
    const T* __restrict__ doutput,      // [B, H]    by the output of this step, or null
    typename Compute<T>::real* __restrict__ dh,  // [B, H]  in: by h'; out: by h
    typename Compute<T>::real* __restrict__ dc,  // [B, H]  in: by c'; out: by c; null where the cell has none
    T* __restrict__ d)                  // [B, leaves*H]  out: by the pre-activations
{
    typedef typename Compute<T>::real real;
    typedef CellOf<real> Cell;
    const int j = blockIdx.x * blockDim.x + threadIdx.x;
    const int b = blockIdx.y * blockDim.y + threadIdx.y;
    if (j >= H || b >= B) return;
    const size_t n = (size_t)b * H + j;
    real leaves[Cell::leaves];
    if (lengths && t >= lengths[b]) {
        for (int k = 0; k < Cell::leaves; k++) leaves[k] = real(0);
    } else {
        real kept[Cell::kept + 1];
        for (int k = 0; k < Cell::kept; k++) kept[k] = real(keep[((size_t)b * Cell::kept + k) * H + j]);
        const bool two = Cell::states == 2;
        real by_h = dh[n] + (doutput ? real(doutput[n]) : real(0)), by_c = two ? dc[n] : real(0);
        Cell::backward(kept, real(h[n]), two ? c[n] : real(0), real(h_new[n]), two ? c_new[n] : real(0), by_h, by_c, leaves);
        dh[n] = by_h;
        if (two) dc[n] = by_c;
    }
    for (int k = 0; k < Cell::leaves; k++) d[((size_t)b * Cell::leaves + k) * H + j] = T(leaves[k]);
}
