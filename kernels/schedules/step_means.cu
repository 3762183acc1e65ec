// Schedule `step` for cells that average over the units of a sequence (layer norm): one timestep of every direction of a
// layer. A thread block computes one sequence; thread j has units j, j + THREADS, ...
//
//     step_means_forward<CELL, float, 2>      U 2: units of a thread, THREADS U >= H
//
// Between two stages of the cell the block averages (means.cuh). What the stages hand on stays in registers. The arrays are
// those of step.cu.

#include "../common.cuh"
#include "../cells/all.cuh"
#include "step.cuh"
#include "means.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32;

struct SequenceUnits {  // as means.cuh has it: a thread block has one sequence
    static constexpr int warps = WARPS, apart = 1, working = WARPS;
};

template <template <typename> class CellOf, typename T, int U, bool MARKED = false>
__global__ void __launch_bounds__(THREADS) step_means_forward(
    const int T_,
    const int B,
    const int H,
    const int W,         // blocks of H in a row of gates
    const int step,
    const int* done,     // [1]  or null
    const int reverse,
    const int save,      // 0: inference; gates are only read, others has 2 slots used in turn
    const int* __restrict__ lengths,  // [B]  or null
    const typename Compute<T>::real* __restrict__ bias_ih,  // [D, G*H]  or null
    const typename Compute<T>::real* __restrict__ bias_hh,  // [D, G*H]  or null
    const typename Compute<T>::real* __restrict__ own,      // [D, N, H]  or null where the cell has none
    const int mask_steps,                                   // T, or 1: the same masks in all timesteps
    const bool* __restrict__ mask,                          // [D, mask_steps, B, M*H]  or null where the cell draws none
    const typename Compute<T>::real* __restrict__ ah,       // [D, B, Q*H]  W_hh h; or null where the cell has no product
    T* gates,                          // [D, T, B, W*H]  in: ax; out: what the cell saves
    T* h,                              // [D, T+1, B, H]  out: the new slot
    T* h_now,                          // [D, B, H]  in: h; out: h'
    typename Compute<T>::real* others, // [D, S-1, T+1 or 2, B, H]  out: the new slot; or null where the cell has none
    T* __restrict__ m,                 // or null: always, as there is no projection
    T* __restrict__ output,            // [T, B, D*H]  out
    const unsigned char* __restrict__ marks,               // [D, T, B]  or null unless MARKED
    const T* __restrict__ reset_h,                         // [D, B, H]  what a reset gives; or null
    const typename Compute<T>::real* __restrict__ reset_others) // [D, S-1, B, H]  likewise; or null
{
    typedef typename Compute<T>::real real;
    typedef CellOf<real> Cell;
    const Forward<T> a = {T_, B, H, W, save, mask_steps, bias_ih, bias_hh, own, mask, ah, gates, h, h_now, others, m, output,
                          {marks, reset_h, reset_others}};
    const int s = steps_before(step, done), b = blockIdx.x;
    const Position first(T_, H, s, reverse, threadIdx.x, b);
    const StepMarks now = marks_of<MARKED>(first, lengths, marks, T_, B, reverse);  // the same in all threads
    ForwardIn<Cell, real> in[1][U];
    ForwardOut<Cell, real> out[1][U];
    __shared__ real parts[WARPS * some(Cell::means)];
#pragma unroll
    for (int u = 0; u < U; u++) {
        const Position pos(T_, H, s, reverse, threadIdx.x + u * THREADS, b);
        if (!pos.inside) continue;
        const ForwardPlace<T> at(a, pos, s);
        if (now.held) hold<Cell>(a, pos, now, at);
        else read(a, pos, now, at, in[0][u]);
    }
    if (now.held) return;
    forward_means<SequenceUnits>(in, out, [&](int, int u) { return int(threadIdx.x) + u * THREADS < H; }, parts, H);
#pragma unroll
    for (int u = 0; u < U; u++) {
        const Position pos(T_, H, s, reverse, threadIdx.x + u * THREADS, b);
        if (!pos.inside) continue;
        forward_stage<Cell::stages - 1, Cell, real>(in[0][u], out[0][u]);
        write(a, pos, now, ForwardPlace<T>(a, pos, s), out[0][u]);
    }
}

template <template <typename> class CellOf, typename T, int U, bool MARKED = false>
__global__ void __launch_bounds__(THREADS) step_means_backward(
    const int T_,
    const int B,
    const int H,
    const int W,
    const int step,
    const int* done,     // [1]  or null
    const int reverse,
    const int* __restrict__ lengths,  // [B]  or null
    const typename Compute<T>::real* __restrict__ own,     // [D, N, H]  or null where the cell has none
    const int mask_steps,                                  // T, or 1: the same masks in all timesteps
    const bool* __restrict__ mask,                         // [D, mask_steps, B, M*H]  or null where the cell draws none
    T* gates,                         // [D, T, B, W*H]  in: what forward saved; out: d
    const T* __restrict__ h,          // [D, T+1, B, H]
    const typename Compute<T>::real* __restrict__ others,  // [D, S-1, T+1, B, H]  or null where the cell has none
    const T* __restrict__ doutput,    // [T, B, D*H]  or null
    const typename Compute<T>::real* __restrict__ dm,      // or null: always, as there is no projection
    typename Compute<T>::real* __restrict__ dh,            // [D, B, H]  in: of h'; out: of h
    typename Compute<T>::real* __restrict__ dothers,       // [D, S-1, B, H]  likewise; or null where the cell has none
    T* __restrict__ d_now,            // [D, B, Q*H]  out: d of this step; or null where the cell has no product
    const unsigned char* __restrict__ marks,               // [D, T, B]  or null unless MARKED
    const T* __restrict__ reset_h,                         // [D, B, H]  what a reset gives; or null
    const typename Compute<T>::real* __restrict__ reset_others, // [D, S-1, B, H]  likewise; or null
    typename Compute<T>::real* __restrict__ dreset_h,      // [D, B, H]  in, out: sums of gradients; or null
    typename Compute<T>::real* __restrict__ dreset_others) // [D, S-1, B, H]  likewise; or null
{
    typedef typename Compute<T>::real real;
    typedef CellOf<real> Cell;
    const Backward<T> a = {T_, B, H, W, mask_steps, own, mask, gates, h, others, doutput, dm, dh, dothers, d_now,
                           {marks, reset_h, reset_others, dreset_h, dreset_others}};
    const int s = T_ - 1 - steps_before(step, done), b = blockIdx.x;
    const Position first(T_, H, s, reverse, threadIdx.x, b);
    const StepMarks now = marks_of<MARKED>(first, lengths, marks, T_, B, reverse);  // the same in all threads
    BackwardIn<Cell, real> in[1][U];
    BackwardOut<Cell, real> out[1][U];
    __shared__ real parts[WARPS * some(Cell::back_means)];
#pragma unroll
    for (int u = 0; u < U; u++) {
        const Position pos(T_, H, s, reverse, threadIdx.x + u * THREADS, b);
        for (int k = 0; k < Cell::preactivations; k++) out[0][u].d[k] = real(0);
        if (!pos.inside) continue;
        const BackwardPlace<T> at(a, pos);
        if (now.next_reset) reset_gradients<Cell>(a, pos, at);
        if (!now.held) read(a, pos, now, at, in[0][u]);
        else if (now.shown) add_shown(a, at);
    }
    auto valid = [&](int, int u) { return int(threadIdx.x) + u * THREADS < H; };
    if (!now.held) backward_means<SequenceUnits>(in, out, valid, parts, H);
#pragma unroll
    for (int u = 0; u < U; u++) {
        const Position pos(T_, H, s, reverse, threadIdx.x + u * THREADS, b);
        if (!pos.inside) continue;
        const BackwardPlace<T> at(a, pos);
        if (!now.held) {
            backward_stage<Cell::back_stages - 1, Cell, real>(in[0][u], out[0][u]);
            write_dstate(a, pos, at, out[0][u]);
        }
        write_d(a, pos, at, out[0][u]);
    }
}
