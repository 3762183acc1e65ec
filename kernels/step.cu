// Schedule `step`: one timestep of every direction of a layer, any size, one thread for one unit of one sequence. What lies
// between two steps, the products with the weights, are GEMMs of their own.
//
// Kernels are named by cell and storage:  step_forward<LstmCell, float>  step_backward<GruCell, __half>
// c, dh and dc, which add up over time, are stored as `real`.
//
// s counts steps in the order in which they are walked. Direction d (blockIdx.z) walks time backwards where bit d of
// `reverse` is set. States have one slot more than there are steps: a forward direction reads slot t and writes t + 1, a
// reverse one reads t + 1 and writes t.
//
// gates [D, T, B, W*H] is worked on in place: forward finds ax = W_ih x in the first G blocks of a row and leaves what the
// cell keeps; backward finds that and leaves d, the derivatives by the pre-activations.
//
// A sequence past its end (t >= lengths[b]) holds its state, h' = h and c' = c, its output is 0, and the derivatives go
// through unchanged.

#include "common.cuh"
#include "cells/rnn.cuh"
#include "cells/lstm.cuh"
#include "cells/gru.cuh"

// Where a thread is: unit j (of n) of sequence b in direction d, the step of that direction, the slots it reads and writes.
struct Place {
    int j, b, d, t;
    bool inside;
    size_t old_slot, new_slot;

    DEVICE Place(int T_, int B, int n, int s, int reverse) {
        j = blockIdx.x * blockDim.x + threadIdx.x;
        b = blockIdx.y * blockDim.y + threadIdx.y;
        d = blockIdx.z;
        inside = j < n && b < B;
        const bool back = reverse >> d & 1;
        t = back ? T_ - 1 - s : s;
        const size_t first = (size_t)d * (T_ + 1);
        old_slot = first + (back ? t + 1 : t);
        new_slot = first + (back ? t : t + 1);
    }
};

// ---- forward

template <template <typename> class CellOf, typename T>
__global__ void step_forward(
    const int T_,
    const int B,
    const int H,
    const int W,         // blocks of H in a row of gates
    const int s,
    const int reverse,
    const int keep,      // 0: inference; gates are only read, c has 2 slots used in turn
    const int* __restrict__ lengths,  // [B]  or null
    const typename Compute<T>::real* __restrict__ bias_ih,  // [D, G*H]  or null
    const typename Compute<T>::real* __restrict__ bias_hh,  // [D, G*H]  or null
    const typename Compute<T>::real* __restrict__ ah,       // [D, B, G*H]  W_hh h
    T* gates,                        // [D, T, B, W*H]  in: ax; out: what the cell keeps
    T* h,                            // [D, T+1, B, H]  out: the new slot; or null with a projection
    typename Compute<T>::real* c,    // [D, T+1 or 2, B, H]  out: the new slot; or null where the cell has none
    T* __restrict__ m,               // [D, B, H]  out, with a projection in place of h; or null
    T* __restrict__ output)          // [T, B, D*H]  out; or null
{
    typedef typename Compute<T>::real real;
    typedef CellOf<real> Cell;
    const Place at(T_, B, H, s, reverse);
    const int j = at.j, b = at.b, d = at.d;
    if (!at.inside) return;
    const size_t n = (size_t)b * H + j, slot = (size_t)B * H;
    const size_t old_h = at.old_slot * slot + n, new_h = at.new_slot * slot + n;
    const size_t old_c = keep ? old_h : (d * 2 + s % 2) * slot + n;
    const size_t new_c = keep ? new_h : (d * 2 + 1 - s % 2) * slot + n;
    const size_t out = ((size_t)at.t * B + b) * gridDim.z * H + (size_t)d * H + j;
    T* row = gates + (((size_t)d * T_ + at.t) * B + b) * W * H + j;
    if (lengths && at.t >= lengths[b]) {
        if (Cell::states == 2) c[new_c] = c[old_c];
        if (m) m[(size_t)d * slot + n] = T(real(0));
        if (m && keep) row[(size_t)Cell::kept * H] = T(real(0));
        if (h) h[new_h] = h[old_h];
        if (output) output[out] = T(real(0));
        return;
    }
    const real* ah_row = ah + ((size_t)d * B + b) * Cell::gates * H + j;
    real a[Cell::gates], r[Cell::gates], kept[Cell::kept + 1], h_new, c_new;
    for (int k = 0; k < Cell::gates; k++) {
        a[k] = real(row[(size_t)k * H]);
        r[k] = real(0);
        if (k < Cell::ready) continue;
        r[k] = ah_row[(size_t)k * H];
        if (bias_ih) {
            const size_t bias = ((size_t)d * Cell::gates + k) * H + j;
            a[k] += bias_ih[bias];
            r[k] += bias_hh[bias];
        }
    }
    Cell::forward(a, r, h ? real(h[old_h]) : real(0), Cell::states == 2 ? c[old_c] : real(0), kept, h_new, c_new);
    if (Cell::states == 2) c[new_c] = c_new;
    if (h) h[new_h] = T(h_new);
    if (output) output[out] = T(h_new);
    if (m) m[(size_t)d * slot + n] = T(h_new);
    if (keep) {
        for (int k = 0; k < Cell::kept; k++) row[(size_t)k * H] = T(kept[k]);
        if (m) row[(size_t)Cell::kept * H] = T(h_new);
    }
}

// The half of a step that comes before a cell's second product (the original GRU): p = r h goes to the block after the gates.
// Past the end of a sequence p is 0.
template <template <typename> class CellOf, typename T>
__global__ void step_reset(
    const int T_,
    const int B,
    const int H,
    const int W,
    const int s,
    const int reverse,
    const int* __restrict__ lengths,  // [B]  or null
    const typename Compute<T>::real* __restrict__ bias_ih,  // [D, G*H]  or null
    const typename Compute<T>::real* __restrict__ bias_hh,  // [D, G*H]  or null
    const typename Compute<T>::real* __restrict__ ah,       // [D, B, ready*H]  W h, the first product
    T* gates,                         // [D, T, B, W*H]  in: ax; out: the activated gates, and p
    const T* __restrict__ h)          // [D, T+1, B, H]
{
    typedef typename Compute<T>::real real;
    typedef CellOf<real> Cell;
    const Place at(T_, B, H, s, reverse);
    const int j = at.j, b = at.b, d = at.d;
    if (!at.inside) return;
    T* row = gates + (((size_t)d * T_ + at.t) * B + b) * W * H + j;
    if (lengths && at.t >= lengths[b]) {
        row[(size_t)Cell::gates * H] = T(real(0));
        return;
    }
    real a[Cell::ready], r[Cell::ready], gate[Cell::ready], p;
    for (int k = 0; k < Cell::ready; k++) {
        a[k] = real(row[(size_t)k * H]);
        r[k] = ah[(((size_t)d * B + b) * Cell::ready + k) * H + j];
        if (bias_ih) {
            const size_t bias = ((size_t)d * Cell::gates + k) * H + j;
            a[k] += bias_ih[bias];
            r[k] += bias_hh[bias];
        }
    }
    Cell::reset(a, r, real(h[(at.old_slot * B + b) * H + j]), gate[0], gate[1], p);
    for (int k = 0; k < Cell::ready; k++) row[(size_t)k * H] = T(gate[k]);
    row[(size_t)Cell::gates * H] = T(p);
}

// What follows the product h' = W_hr m of a projection: sequences past their end get their old h back.
template <typename T>
__global__ void step_project(
    const int T_,
    const int B,
    const int P,
    const int s,
    const int reverse,
    const int* __restrict__ lengths,  // [B]  or null
    T* h,                             // [D, T+1, B, P]  in: the product in the new slot
    T* __restrict__ output)           // [T, B, D*P]  out; or null
{
    typedef typename Compute<T>::real real;
    const Place at(T_, B, P, s, reverse);
    const int j = at.j, b = at.b, d = at.d;
    if (!at.inside) return;
    const size_t new_h = (at.new_slot * B + b) * P + j;
    const bool held = lengths && at.t >= lengths[b];
    if (held) h[new_h] = h[(at.old_slot * B + b) * P + j];
    if (output) output[((size_t)at.t * B + b) * gridDim.z * P + (size_t)d * P + j] = held ? T(real(0)) : h[new_h];
}

// ---- backward
//
// Leaves in dh only what does not go through the weights; the GEMM that follows adds d W_hh to it.

template <template <typename> class CellOf, typename T>
__global__ void step_backward(
    const int T_,
    const int B,
    const int H,
    const int W,
    const int s,
    const int reverse,
    const int* __restrict__ lengths,  // [B]  or null
    T* gates,                         // [D, T, B, W*H]  in: what forward kept; out: d
    const T* __restrict__ h,          // [D, T+1, B, H]  or null with a projection
    const typename Compute<T>::real* __restrict__ c,   // [D, T+1, B, H]  or null where the cell has none
    const T* __restrict__ doutput,    // [T, B, D*H]  or null
    const typename Compute<T>::real* __restrict__ dm,  // [D, B, H]  with a projection: by m, in place of dh; or null
    typename Compute<T>::real* __restrict__ dh,        // [D, B, H]  in: by h'; out: by h; or null with a projection
    typename Compute<T>::real* __restrict__ dc)        // [D, B, H]  in: by c'; out: by c; or null where the cell has none
{
    typedef typename Compute<T>::real real;
    typedef CellOf<real> Cell;
    const Place at(T_, B, H, s, reverse);
    const int j = at.j, b = at.b, d = at.d;
    if (!at.inside) return;
    T* row = gates + (((size_t)d * T_ + at.t) * B + b) * W * H + j;
    real leaves[Cell::leaves];
    if (lengths && at.t >= lengths[b]) {
        for (int k = 0; k < Cell::leaves; k++) leaves[k] = real(0);
    } else {
        const size_t n = (size_t)b * H + j, slot = (size_t)B * H, here = (size_t)d * slot + n;
        const size_t old = at.old_slot * slot + n, now = at.new_slot * slot + n;
        const bool two = Cell::states == 2;
        real kept[Cell::kept + 1];
        for (int k = 0; k < Cell::kept; k++) kept[k] = real(row[(size_t)k * H]);
        real by_h = dm ? dm[here] : dh[here], by_c = two ? dc[here] : real(0);
        if (doutput) by_h += real(doutput[((size_t)at.t * B + b) * gridDim.z * H + (size_t)d * H + j]);
        Cell::backward(kept, h ? real(h[old]) : real(0), two ? c[old] : real(0), h ? real(h[now]) : real(0),
                       two ? c[now] : real(0), by_h, by_c, leaves);
        if (dh) dh[here] = by_h;
        if (two) dc[here] = by_c;
    }
    for (int k = 0; k < Cell::leaves; k++) row[(size_t)k * H] = T(leaves[k]);
}

// The mirror of step_reset, after the product d_p = d_n W_n (0 past the end, and then nothing changes).
template <template <typename> class CellOf, typename T>
__global__ void step_reset_backward(
    const int T_,
    const int B,
    const int H,
    const int W,
    const int s,
    const int reverse,
    T* gates,                         // [D, T, B, W*H]  in: r in block 0; out: d_r there
    const T* __restrict__ h,          // [D, T+1, B, H]
    const typename Compute<T>::real* __restrict__ d_p,  // [D, B, H]
    typename Compute<T>::real* __restrict__ dh)         // [D, B, H]  in, out
{
    typedef typename Compute<T>::real real;
    typedef CellOf<real> Cell;
    const Place at(T_, B, H, s, reverse);
    const int j = at.j, b = at.b, d = at.d;
    if (!at.inside) return;
    T* r = gates + (((size_t)d * T_ + at.t) * B + b) * W * H + j;
    const size_t here = ((size_t)d * B + b) * H + j;
    real d_r;
    Cell::reset_backward(real(*r), real(h[(at.old_slot * B + b) * H + j]), d_p[here], dh[here], d_r);
    *r = T(d_r);
}

// The mirror of step_project, before the product dm = dh' W_hr: the whole derivative by h' moves from dh to dh_steps, and
// dh is left with what passes a sequence that is past its end.
template <typename T>
__global__ void step_project_backward(
    const int T_,
    const int B,
    const int P,
    const int s,
    const int reverse,
    const int* __restrict__ lengths,  // [B]  or null
    const T* __restrict__ doutput,    // [T, B, D*P]  or null
    typename Compute<T>::real* __restrict__ dh,  // [D, B, P]  in, out
    T* __restrict__ dh_steps)         // [D, T, B, P]  out
{
    typedef typename Compute<T>::real real;
    const Place at(T_, B, P, s, reverse);
    const int j = at.j, b = at.b, d = at.d;
    if (!at.inside) return;
    const size_t here = ((size_t)d * B + b) * P + j;
    real whole = real(0);
    if (!(lengths && at.t >= lengths[b])) {
        whole = dh[here];
        if (doutput) whole += real(doutput[((size_t)at.t * B + b) * gridDim.z * P + (size_t)d * P + j]);
        dh[here] = real(0);
    }
    dh_steps[(((size_t)d * T_ + at.t) * B + b) * P + j] = T(whole);
}
