// Schedule `step`: one timestep of every direction of a layer, of any size. A thread computes one unit of one sequence. The
// products with the weights, between two steps, are separate GEMMs.
//
// Kernels are named by cell and storage:  step_forward<lstm, float>  step_backward<gru, __half>
// States besides h, and the gradients of all states, accumulate over time and are stored as `real`.
//
// Timesteps are counted in the order of the time loop: `step` + `*done` of them come before this one. A CUDA graph holds
// launches with steps 0, 1, 2, ... and adds their number to `done` at its end, so that the same graph computes the timesteps
// that follow. Direction d (blockIdx.z) runs backwards in time if bit d of `reverse` is set. States have one slot more than
// there are timesteps: a forward direction reads slot t and writes t + 1, a reverse one reads t + 1 and writes t.
//
// gates [D, T, B, W*H] is overwritten in place. Forward reads ax = W_ih x from the first G blocks of a row and writes what
// the cell saves. Backward reads that and writes d, the gradients with respect to the pre-activations and to what the own
// parameters add up. What a GEMM reads is in a separate array at the same address in every step: h_now, inner_now, d_now,
// dh_now.
//
// Past the end of a sequence (t >= lengths[b]) the states are held, h' = h, the output is 0, and gradients pass unchanged. So
// it is where `marks` say so, which know the lengths, too. Where they say that a timestep is reset, it reads the state that a
// reset gives instead of the one in its slot: who writes h_now looks whether the next timestep is reset.
//
// step_means.cu has the same for cells that average over units.

#include "../common.cuh"
#include "../cells/all.cuh"
#include "step.cuh"

// Runs at the end of a graph: `count` more timesteps are done, or none at the end of the sequence.
__global__ void step_done(
    const int T_,
    const int count,
    int* done)  // [1]  in, out
{
    const int total = *done + count;
    *done = total < T_ ? total : 0;
}

// ---- forward

template <template <typename> class CellOf, typename T, bool MARKED = false>
__global__ void step_forward(
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
    T* h,                              // [D, T+1, B, H]  out: the new slot; or null with a projection
    T* h_now,                          // [D, B, H]  in: h; out: h'; or null with a projection
    typename Compute<T>::real* others, // [D, S-1, T+1 or 2, B, H]  out: the new slot; or null where the cell has none
    T* __restrict__ m,                 // [D, B, H]  out, with a projection in place of h; or null
    T* __restrict__ output,            // [T, B, D*H]  out; or null
    const unsigned char* __restrict__ marks,               // [D, T, B]  or null unless MARKED
    const T* __restrict__ reset_h,                         // [D, B, H]  what a reset gives; or null
    const typename Compute<T>::real* __restrict__ reset_others) // [D, S-1, B, H]  likewise; or null
{
    typedef typename Compute<T>::real real;
    typedef CellOf<real> Cell;
    const int s = steps_before(step, done);
    const Position pos(T_, B, H, s, reverse);
    if (!pos.inside) return;
    const Forward<T> a = {T_, B, H, W, save, mask_steps, bias_ih, bias_hh, own, mask, ah, gates, h, h_now, others, m, output,
                          {marks, reset_h, reset_others}};
    const ForwardPlace<T> at(a, pos, s);
    const StepMarks now = marks_of<MARKED>(pos, lengths, marks, T_, B, reverse);
    if (now.held) {
        hold<Cell>(a, pos, now, at);
        return;
    }
    ForwardIn<Cell, real> in;
    ForwardOut<Cell, real> out;
    read(a, pos, now, at, in);
    Cell::forward(in, out);
    write(a, pos, now, at, out);
}

// The part of a step before a cell's second product (the original GRU): what the product reads. Past the end of a sequence it
// is 0.
template <template <typename> class CellOf, typename T, bool MARKED = false>
__global__ void step_inner(
    const int T_,
    const int B,
    const int H,
    const int W,
    const int step,
    const int* done,     // [1]  or null
    const int reverse,
    const int save,      // 0: inference; others has 2 slots used in turn
    const int* __restrict__ lengths,  // [B]  or null
    const typename Compute<T>::real* __restrict__ bias_ih,  // [D, G*H]  or null
    const typename Compute<T>::real* __restrict__ bias_hh,  // [D, G*H]  or null
    const typename Compute<T>::real* __restrict__ own,      // [D, N, H]  or null where the cell has none
    const int mask_steps,
    const bool* __restrict__ mask,                          // [D, mask_steps, B, M*H]  or null where the cell draws none
    const typename Compute<T>::real* __restrict__ ah,       // [D, B, Q*H]  of the first product
    T* gates,                          // [D, T, B, W*H]  in: ax
    T* h_now,                          // [D, B, H]  in
    typename Compute<T>::real* others, // [D, S-1, T+1 or 2, B, H]  in; or null where the cell has none
    T* __restrict__ inner_now,         // [D, B, H]  out
    const unsigned char* __restrict__ marks,               // [D, T, B]  or null unless MARKED
    const T* __restrict__ reset_h,                         // [D, B, H]  what a reset gives; or null
    const typename Compute<T>::real* __restrict__ reset_others) // [D, S-1, B, H]  likewise; or null
{
    typedef typename Compute<T>::real real;
    typedef CellOf<real> Cell;
    const int s = steps_before(step, done);
    const Position pos(T_, B, H, s, reverse);
    if (!pos.inside) return;
    const Forward<T> a = {T_, B, H, W, save, mask_steps, bias_ih, bias_hh, own, mask, ah, gates, nullptr, h_now, others,
                          nullptr, nullptr, {marks, reset_h, reset_others}};
    const ForwardPlace<T> at(a, pos, s);
    const StepMarks now = marks_of<MARKED>(pos, lengths, marks, T_, B, reverse);
    real inner = real(0);
    if (!now.held) {
        ForwardIn<Cell, real> in;
        read(a, pos, now, at, in);
        inner = Cell::forward_inner(in);
    }
    inner_now[at.index] = T(inner);
}

// The part of a step after the product W_hr m of a projection. The product is h', except where the timestep is held.
template <typename T, bool MARKED = false>
__global__ void step_project(
    const int T_,
    const int B,
    const int P,
    const int step,
    const int* done,     // [1]  or null
    const int reverse,
    const int* __restrict__ lengths,  // [B]  or null
    const T* __restrict__ product,    // [D, B, P]  W_hr m
    T* h,                             // [D, T+1, B, P]  out: the new slot
    T* h_now,                         // [D, B, P]  in: h; out: h'
    T* __restrict__ output,           // [T, B, D*P]  out; or null
    const unsigned char* __restrict__ marks,  // [D, T, B]  or null unless MARKED
    const T* __restrict__ reset_h)    // [D, B, P]  what a reset gives; or null
{
    typedef typename Compute<T>::real real;
    const Position pos(T_, B, P, steps_before(step, done), reverse);
    const int j = pos.j, b = pos.b, d = pos.d;
    if (!pos.inside) return;
    const size_t index = ((size_t)d * B + b) * P + j;
    const StepMarks now = marks_of<MARKED>(pos, lengths, marks, T_, B, reverse);
    const T h_new = now.held ? h_now[index] : product[index];
    h_now[index] = now.next_reset ? reset_h[index] : h_new;
    h[(pos.new_slot * B + b) * P + j] = h_new;
    const bool heard = !now.held || now.shown;
    if (output) output[((size_t)pos.t * B + b) * gridDim.z * P + (size_t)d * P + j] = heard ? h_new : T(real(0));
}

// ---- backward
//
// dh is left with the part that does not pass through W_hh; the GEMM that follows adds d W_hh. So it is complete when the
// timestep before begins, which is where the gradient of a reset goes its own way. Timesteps are counted from the last one.

template <template <typename> class CellOf, typename T, bool MARKED = false>
__global__ void step_backward(
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
    const T* __restrict__ h,          // [D, T+1, B, H]  or null with a projection
    const typename Compute<T>::real* __restrict__ others,  // [D, S-1, T+1, B, H]  or null where the cell has none
    const T* __restrict__ doutput,    // [T, B, D*H]  or null
    const typename Compute<T>::real* __restrict__ dm,      // [D, B, H]  with a projection, in place of dh; or null
    typename Compute<T>::real* __restrict__ dh,            // [D, B, H]  in: of h'; out: of h; or null with a projection
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
    const Position pos(T_, B, H, T_ - 1 - steps_before(step, done), reverse);
    if (!pos.inside) return;
    const Backward<T> a = {T_, B, H, W, mask_steps, own, mask, gates, h, others, doutput, dm, dh, dothers, d_now,
                           {marks, reset_h, reset_others, dreset_h, dreset_others}};
    const StepMarks now = marks_of<MARKED>(pos, lengths, marks, T_, B, reverse);
    const BackwardPlace<T> at(a, pos);
    BackwardOut<Cell, real> out;
    if (now.next_reset) reset_gradients<Cell>(a, pos, at);
    if (now.held) {
        if (now.shown) add_shown(a, at);
        for (int k = 0; k < Cell::preactivations; k++) out.d[k] = real(0);
    } else {
        BackwardIn<Cell, real> in;
        read(a, pos, now, at, in);
        Cell::backward(in, out);
        write_dstate(a, pos, at, out);
    }
    write_d(a, pos, at, out);
}

// The mirror of step_inner, after the product d W that gives the gradient of what step_inner made. Past the end nothing
// changes.
template <template <typename> class CellOf, typename T, bool MARKED = false>
__global__ void step_inner_backward(
    const int T_,
    const int B,
    const int H,
    const int W,
    const int step,
    const int* done,     // [1]  or null
    const int reverse,
    const int* __restrict__ lengths,  // [B]  or null
    const typename Compute<T>::real* __restrict__ own,     // [D, N, H]  or null where the cell has none
    const int mask_steps,
    const bool* __restrict__ mask,                         // [D, mask_steps, B, M*H]  or null where the cell draws none
    T* gates,                         // [D, T, B, W*H]  in: d so far, behind it what forward saved; out: d
    const T* __restrict__ h,          // [D, T+1, B, H]
    const typename Compute<T>::real* __restrict__ others,  // [D, S-1, T+1, B, H]  or null where the cell has none
    const typename Compute<T>::real* __restrict__ d_inner, // [D, B, H]
    typename Compute<T>::real* __restrict__ dh,            // [D, B, H]  in, out
    typename Compute<T>::real* __restrict__ dothers,       // [D, S-1, B, H]  in, out; or null where the cell has none
    T* __restrict__ d_now,            // [D, B, Q*H]  out: d of the first product
    const unsigned char* __restrict__ marks,               // [D, T, B]  or null unless MARKED
    const T* __restrict__ reset_h,                         // [D, B, H]  what a reset gives; or null
    const typename Compute<T>::real* __restrict__ reset_others) // [D, S-1, B, H]  likewise; or null
{
    typedef typename Compute<T>::real real;
    typedef CellOf<real> Cell;
    const Position pos(T_, B, H, T_ - 1 - steps_before(step, done), reverse);
    if (!pos.inside) return;
    const StepMarks now = marks_of<MARKED>(pos, lengths, marks, T_, B, reverse);
    if (now.held) return;
    const Backward<T> a = {T_, B, H, W, mask_steps, own, mask, gates, h, others, nullptr, nullptr, dh, dothers, d_now,
                           {marks, reset_h, reset_others}};
    const BackwardPlace<T> at(a, pos);
    BackwardIn<Cell, real> in;
    BackwardOut<Cell, real> out;
    read(a, pos, now, at, in);
    for (int k = 0; k < Cell::preactivations; k++) out.d[k] = real(at.row[(size_t)k * H]);
    for (int k = 0; k < Cell::states; k++) out.dstate[k] = in.dstate[k];
    Cell::backward_inner(in, d_inner[((size_t)pos.d * B + pos.b) * H + pos.j], out);
    write_dstate(a, pos, at, out);
    write_d<Cell, true>(a, pos, at, out);
}

// The mirror of step_project, before the product dm = dh' W_hr. The complete gradient with respect to h' moves from dh to
// dh_steps and dh_now. Where the timestep is held it stays in dh.
template <typename T, bool MARKED = false>
__global__ void step_project_backward(
    const int T_,
    const int B,
    const int P,
    const int step,
    const int* done,     // [1]  or null
    const int reverse,
    const int* __restrict__ lengths,  // [B]  or null
    const T* __restrict__ doutput,    // [T, B, D*P]  or null
    typename Compute<T>::real* __restrict__ dh,  // [D, B, P]  in, out
    T* __restrict__ dh_steps,         // [D, T, B, P]  out
    T* __restrict__ dh_now,           // [D, B, P]  out
    const unsigned char* __restrict__ marks,  // [D, T, B]  or null unless MARKED
    typename Compute<T>::real* __restrict__ dreset_h)  // [D, B, P]  in, out: sums of gradients; or null
{
    typedef typename Compute<T>::real real;
    const Position pos(T_, B, P, T_ - 1 - steps_before(step, done), reverse);
    const int j = pos.j, b = pos.b, d = pos.d;
    if (!pos.inside) return;
    const size_t index = ((size_t)d * B + b) * P + j;
    const StepMarks now = marks_of<MARKED>(pos, lengths, marks, T_, B, reverse);
    if (now.next_reset) {
        dreset_h[index] += dh[index];
        dh[index] = real(0);
    }
    real complete = real(0);
    auto arrived = [&] { return real(doutput[((size_t)pos.t * B + b) * gridDim.z * P + (size_t)d * P + j]); };
    if (!now.held) {
        complete = dh[index];
        if (doutput) complete += arrived();
        dh[index] = real(0);
    } else if (now.shown && doutput) {
        dh[index] += arrived();
    }
    dh_steps[(((size_t)d * T_ + pos.t) * B + b) * P + j] = dh_now[index] = T(complete);
}
