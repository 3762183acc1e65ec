// Schedule `step`: one timestep of every direction of a layer, of any size. A thread computes one unit of one sequence. The
// products with the weights, between two steps, are separate GEMMs.
//
// Kernels are named by cell and storage:  step_forward<lstm, float>  step_backward<gru, __half>
// c, dh and dc accumulate over time and are stored as `real`.
//
// Timesteps are counted in the order of the time loop: `step` + `*done` of them come before this one. A CUDA graph holds
// launches with steps 0, 1, 2, ... and adds their number to `done` at its end, so that the same graph computes the timesteps
// that follow. Direction d (blockIdx.z) runs backwards in time if bit d of `reverse` is set. States have one slot more than
// there are timesteps: a forward direction reads slot t and writes t + 1, a reverse one reads t + 1 and writes t.
//
// gates [D, T, B, W*H] is overwritten in place. Forward reads ax = W_ih x from the first G blocks of a row and writes what
// the cell saves. Backward reads that and writes dgates, the gradients with respect to the pre-activations. What a GEMM
// reads is in a separate array at the same address in every step: h_now, p_now, d_now, dh_now.
//
// Past the end of a sequence (t >= lengths[b]) the state is held, h' = h and c' = c, the output is 0, and gradients pass
// unchanged.

#include "../common.cuh"
#include "../cells/all.cuh"

// A thread's position: unit j (of n) of sequence b in direction d, the timestep t of that direction, the slots of the states
// before and after it. s: timesteps that forward computes before this one.
struct Position {
    int j, b, d, t;
    bool inside;
    size_t old_slot, new_slot;

    DEVICE Position(int T_, int B, int n, int s, int reverse) {
        j = blockIdx.x * blockDim.x + threadIdx.x;
        b = blockIdx.y * blockDim.y + threadIdx.y;
        d = blockIdx.z;
        inside = j < n && b < B;
        const bool reversed = reverse >> d & 1;
        t = reversed ? T_ - 1 - s : s;
        const size_t first = (size_t)d * (T_ + 1);
        old_slot = first + (reversed ? t + 1 : t);
        new_slot = first + (reversed ? t : t + 1);
    }
};

DEVICE int steps_before(int step, const int* done) { return step + (done ? *done : 0); }

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

template <template <typename> class CellOf, typename T>
__global__ void step_forward(
    const int T_,
    const int B,
    const int H,
    const int W,         // blocks of H in a row of gates
    const int step,
    const int* done,     // [1]  or null
    const int reverse,
    const int save,      // 0: inference; gates are only read, c has 2 slots used in turn
    const int* __restrict__ lengths,  // [B]  or null
    const typename Compute<T>::real* __restrict__ bias_ih,  // [D, G*H]  or null
    const typename Compute<T>::real* __restrict__ bias_hh,  // [D, G*H]  or null
    const typename Compute<T>::real* __restrict__ ah,       // [D, B, G*H]  W_hh h
    T* gates,                        // [D, T, B, W*H]  in: ax; out: what the cell saves
    T* h,                            // [D, T+1, B, H]  out: the new slot; or null with a projection
    T* h_now,                        // [D, B, H]  in: h; out: h'; or null with a projection
    typename Compute<T>::real* c,    // [D, T+1 or 2, B, H]  out: the new slot; or null where the cell has none
    T* __restrict__ m,               // [D, B, H]  out, with a projection in place of h; or null
    T* __restrict__ output)          // [T, B, D*H]  out; or null
{
    typedef typename Compute<T>::real real;
    typedef CellOf<real> Cell;
    const int s = steps_before(step, done);
    const Position pos(T_, B, H, s, reverse);
    const int j = pos.j, b = pos.b, d = pos.d;
    if (!pos.inside) return;
    const size_t n = (size_t)b * H + j, slot = (size_t)B * H, index = (size_t)d * slot + n;
    const size_t old_h = pos.old_slot * slot + n, new_h = pos.new_slot * slot + n;
    const size_t old_c = save ? old_h : (d * 2 + s % 2) * slot + n;
    const size_t new_c = save ? new_h : (d * 2 + 1 - s % 2) * slot + n;
    const T h_old = h ? h_now[index] : T(real(0));
    const size_t out = ((size_t)pos.t * B + b) * gridDim.z * H + (size_t)d * H + j;
    T* row = gates + (((size_t)d * T_ + pos.t) * B + b) * W * H + j;
    if (lengths && pos.t >= lengths[b]) {
        if (Cell::states == 2) c[new_c] = c[old_c];
        if (m) m[index] = T(real(0));
        if (m && save) row[(size_t)Cell::saved_blocks * H] = T(real(0));
        if (h) h[new_h] = h_old;
        if (output) output[out] = T(real(0));
        return;
    }
    const real* ah_row = ah + ((size_t)d * B + b) * Cell::gates * H + j;
    real a[Cell::gates], r[Cell::gates], saved[Cell::saved_blocks + 1], h_new, c_new;
    for (int k = 0; k < Cell::gates; k++) {
        a[k] = real(row[(size_t)k * H]);
        r[k] = real(0);
        if (k < Cell::first_product_gates) continue;
        r[k] = ah_row[(size_t)k * H];
        if (bias_ih) {
            const size_t bias = ((size_t)d * Cell::gates + k) * H + j;
            a[k] += bias_ih[bias];
            r[k] += bias_hh[bias];
        }
    }
    Cell::forward(a, r, real(h_old), Cell::states == 2 ? c[old_c] : real(0), saved, h_new, c_new);
    if (Cell::states == 2) c[new_c] = c_new;
    if (h) h[new_h] = h_now[index] = T(h_new);
    if (output) output[out] = T(h_new);
    if (m) m[index] = T(h_new);
    if (save) {
        for (int k = 0; k < Cell::saved_blocks; k++) row[(size_t)k * H] = T(saved[k]);
        if (m) row[(size_t)Cell::saved_blocks * H] = T(h_new);
    }
}

// The part of a step before a cell's second product (the original GRU): p = r h. It is saved in the block after the gates.
// Past the end of a sequence p is 0.
template <template <typename> class CellOf, typename T>
__global__ void step_reset(
    const int T_,
    const int B,
    const int H,
    const int W,
    const int step,
    const int* done,     // [1]  or null
    const int reverse,
    const int save,      // 0: inference; p is not saved
    const int* __restrict__ lengths,  // [B]  or null
    const typename Compute<T>::real* __restrict__ bias_ih,  // [D, G*H]  or null
    const typename Compute<T>::real* __restrict__ bias_hh,  // [D, G*H]  or null
    const typename Compute<T>::real* __restrict__ ah,       // [D, B, first_product_gates*H]  W h, the first product
    T* gates,                         // [D, T, B, W*H]  in: ax; out: the activated gates, and p
    const T* __restrict__ h_now,      // [D, B, H]
    T* __restrict__ p_now)            // [D, B, H]  out: p
{
    typedef typename Compute<T>::real real;
    typedef CellOf<real> Cell;
    const Position pos(T_, B, H, steps_before(step, done), reverse);
    const int j = pos.j, b = pos.b, d = pos.d;
    if (!pos.inside) return;
    const size_t index = ((size_t)d * B + b) * H + j;
    T* row = gates + (((size_t)d * T_ + pos.t) * B + b) * W * H + j;
    if (lengths && pos.t >= lengths[b]) {
        if (save) row[(size_t)Cell::gates * H] = T(real(0));
        p_now[index] = T(real(0));
        return;
    }
    real a[Cell::first_product_gates], r[Cell::first_product_gates], gate[Cell::first_product_gates], p;
    for (int k = 0; k < Cell::first_product_gates; k++) {
        a[k] = real(row[(size_t)k * H]);
        r[k] = ah[(((size_t)d * B + b) * Cell::first_product_gates + k) * H + j];
        if (bias_ih) {
            const size_t bias = ((size_t)d * Cell::gates + k) * H + j;
            a[k] += bias_ih[bias];
            r[k] += bias_hh[bias];
        }
    }
    Cell::reset(a, r, real(h_now[index]), gate[0], gate[1], p);
    for (int k = 0; k < Cell::first_product_gates; k++) row[(size_t)k * H] = T(gate[k]);
    if (save) row[(size_t)Cell::gates * H] = T(p);
    p_now[index] = T(p);
}

// The part of a step after the product W_hr m of a projection. The product is h', except past the end of a sequence, which
// holds its h.
template <typename T>
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
    T* __restrict__ output)           // [T, B, D*P]  out; or null
{
    typedef typename Compute<T>::real real;
    const Position pos(T_, B, P, steps_before(step, done), reverse);
    const int j = pos.j, b = pos.b, d = pos.d;
    if (!pos.inside) return;
    const size_t index = ((size_t)d * B + b) * P + j;
    const bool held = lengths && pos.t >= lengths[b];
    const T h_new = held ? h_now[index] : product[index];
    h[(pos.new_slot * B + b) * P + j] = h_now[index] = h_new;
    if (output) output[((size_t)pos.t * B + b) * gridDim.z * P + (size_t)d * P + j] = held ? T(real(0)) : h_new;
}

// ---- backward
//
// dh is left with the part that does not pass through W_hh; the GEMM that follows adds dgates W_hh. Timesteps are counted
// from the last one.

template <template <typename> class CellOf, typename T>
__global__ void step_backward(
    const int T_,
    const int B,
    const int H,
    const int W,
    const int step,
    const int* done,     // [1]  or null
    const int reverse,
    const int* __restrict__ lengths,  // [B]  or null
    T* gates,                         // [D, T, B, W*H]  in: what forward saved; out: dgates
    const T* __restrict__ h,          // [D, T+1, B, H]  or null with a projection
    const typename Compute<T>::real* __restrict__ c,   // [D, T+1, B, H]  or null where the cell has none
    const T* __restrict__ doutput,    // [T, B, D*H]  or null
    const typename Compute<T>::real* __restrict__ dm,  // [D, B, H]  with a projection, in place of dh; or null
    typename Compute<T>::real* __restrict__ dh,        // [D, B, H]  in: of h'; out: of h; or null with a projection
    typename Compute<T>::real* __restrict__ dc,        // [D, B, H]  in: of c'; out: of c; or null where the cell has none
    T* __restrict__ d_now)            // [D, B, G*H]  out: dgates of this step
{
    typedef typename Compute<T>::real real;
    typedef CellOf<real> Cell;
    const Position pos(T_, B, H, T_ - 1 - steps_before(step, done), reverse);
    const int j = pos.j, b = pos.b, d = pos.d;
    if (!pos.inside) return;
    T* row = gates + (((size_t)d * T_ + pos.t) * B + b) * W * H + j;
    T* d_row = d_now + ((size_t)d * B + b) * Cell::gates * H + j;
    real dgates[Cell::preactivations];
    if (lengths && pos.t >= lengths[b]) {
        for (int k = 0; k < Cell::preactivations; k++) dgates[k] = real(0);
    } else {
        const size_t n = (size_t)b * H + j, slot = (size_t)B * H, index = (size_t)d * slot + n;
        const size_t old_slot = pos.old_slot * slot + n, new_slot = pos.new_slot * slot + n;
        const bool has_c = Cell::states == 2;
        real saved[Cell::saved_blocks + 1];
        for (int k = 0; k < Cell::saved_blocks; k++) saved[k] = real(row[(size_t)k * H]);
        real dh_now = dm ? dm[index] : dh[index], dc_now = has_c ? dc[index] : real(0);
        if (doutput) dh_now += real(doutput[((size_t)pos.t * B + b) * gridDim.z * H + (size_t)d * H + j]);
        Cell::backward(saved, h ? real(h[old_slot]) : real(0), has_c ? c[old_slot] : real(0),
                       h ? real(h[new_slot]) : real(0), has_c ? c[new_slot] : real(0), dh_now, dc_now, dgates);
        if (dh) dh[index] = dh_now;
        if (has_c) dc[index] = dc_now;
    }
    for (int k = 0; k < Cell::preactivations; k++) row[(size_t)k * H] = T(dgates[k]);
    for (int k = 0; k < Cell::gates; k++) d_row[(size_t)k * H] = T(dgates[k]);
}

// The mirror of step_reset, after the product d_p = d_n W_n. Past the end d_p is 0 and nothing changes.
template <template <typename> class CellOf, typename T>
__global__ void step_reset_backward(
    const int T_,
    const int B,
    const int H,
    const int W,
    const int step,
    const int* done,     // [1]  or null
    const int reverse,
    T* gates,                         // [D, T, B, W*H]  in: r in block 0; out: d_r there
    const T* __restrict__ h,          // [D, T+1, B, H]
    const typename Compute<T>::real* __restrict__ d_p,  // [D, B, H]
    typename Compute<T>::real* __restrict__ dh,         // [D, B, H]  in, out
    T* __restrict__ d_now)            // [D, B, G*H]  out: d_r in block 0
{
    typedef typename Compute<T>::real real;
    typedef CellOf<real> Cell;
    const Position pos(T_, B, H, T_ - 1 - steps_before(step, done), reverse);
    const int j = pos.j, b = pos.b, d = pos.d;
    if (!pos.inside) return;
    T* r = gates + (((size_t)d * T_ + pos.t) * B + b) * W * H + j;
    const size_t index = ((size_t)d * B + b) * H + j;
    real d_r;
    Cell::reset_backward(real(*r), real(h[(pos.old_slot * B + b) * H + j]), d_p[index], dh[index], d_r);
    *r = d_now[((size_t)d * B + b) * Cell::gates * H + j] = T(d_r);
}

// The mirror of step_project, before the product dm = dh' W_hr. The complete gradient with respect to h' moves from dh to
// dh_steps and dh_now. Past the end of a sequence it stays in dh.
template <typename T>
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
    T* __restrict__ dh_now)           // [D, B, P]  out
{
    typedef typename Compute<T>::real real;
    const Position pos(T_, B, P, T_ - 1 - steps_before(step, done), reverse);
    const int j = pos.j, b = pos.b, d = pos.d;
    if (!pos.inside) return;
    const size_t index = ((size_t)d * B + b) * P + j;
    real complete = real(0);
    if (!(lengths && pos.t >= lengths[b])) {
        complete = dh[index];
        if (doutput) complete += real(doutput[((size_t)pos.t * B + b) * gridDim.z * P + (size_t)d * P + j]);
        dh[index] = real(0);
    }
    dh_steps[(((size_t)d * T_ + pos.t) * B + b) * P + j] = dh_now[index] = T(complete);
}
