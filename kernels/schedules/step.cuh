// What a thread of schedule `step` reads and writes of its unit in a timestep. step.cu says what the arrays are.

#include "arrays.cuh"

// A thread's position: unit j (of n) of sequence b in direction d, the timestep t of that direction, the slots of the states
// before and after it. s: timesteps that forward computes before this one.
struct Position {
    int j, b, d, t;
    bool inside;
    size_t old_slot, new_slot;

    DEVICE Position(int T_, int B, int n, int s, int reverse)
        : Position(T_, n, s, reverse, blockIdx.x * blockDim.x + threadIdx.x, blockIdx.y * blockDim.y + threadIdx.y) {
        inside = inside && b < B;
    }
    DEVICE Position(int T_, int n, int s, int reverse, int j_, int b_) : j(j_), b(b_), d(blockIdx.z), inside(j_ < n) {
        const bool reversed = reverse >> d & 1;
        t = reversed ? T_ - 1 - s : s;
        const size_t first = (size_t)d * (T_ + 1);
        old_slot = first + (reversed ? t + 1 : t);
        new_slot = first + (reversed ? t : t + 1);
    }
};

// Own parameters and masks, forward and backward.
template <typename Cell, typename Layer, typename In>
DEVICE void read_more(const Layer& a, const Position& pos, In& in) {
    for (int k = 0; k < Cell::parameters; k++) in.p[k] = a.own[((size_t)pos.d * Cell::parameters + k) * a.H + pos.j];
    if constexpr (Cell::draws > 0) {
        const unsigned char* masks = masks_of<Cell>(a.mask, a.mask_steps, pos.d, pos.t, pos.b, a.B, a.H, pos.j);
        for (int k = 0; k < Cell::draws; k++) in.mask[k] = typename Layer::real(masks[(size_t)k * a.H]);
    }
}

DEVICE int steps_before(int step, const int* done) { return step + (done ? *done : 0); }

// What holds in a thread's timestep: `held` past the end of its sequence; without marks nothing else. next_reset: whether the
// timestep after it, in the order of the time loop, is reset.
struct StepMarks {
    bool held, shown, reset, next_reset;
};

template <bool MARKED>
DEVICE StepMarks marks_of(const Position& pos, const int* lengths, const unsigned char* marks, int T_, int B, int reverse) {
    if constexpr (MARKED) {
        const int on = reverse >> pos.d & 1 ? -1 : 1, next = pos.t + on;
        const unsigned char* mark = marks + ((size_t)pos.d * T_ + pos.t) * B + pos.b;
        const int now = *mark, then = next < 0 || next == T_ ? 0 : mark[on * B];
        return {bool(now & Mark::held), bool(now & Mark::shown), bool(now & Mark::reset), bool(then & Mark::reset)};
    } else {
        return {lengths && pos.t >= lengths[pos.b], false, false, false};
    }
}

// ---- forward

template <typename T>
struct Forward {
    typedef typename Compute<T>::real real;
    int T_, B, H, W, save, mask_steps;
    const real *bias_ih, *bias_hh, *own;
    const bool* mask;
    const real* ah;
    T *gates, *h, *h_now;
    real* others;
    T *m, *output;
    Marks<T> marks;
};

// Where a unit's numbers are. s: timesteps before this one.
template <typename T>
struct ForwardPlace {
    size_t index, new_h, old_other, new_other, output;
    T* row;

    DEVICE ForwardPlace(const Forward<T>& a, const Position& pos, int s) {
        const size_t n = (size_t)pos.b * a.H + pos.j, slot = (size_t)a.B * a.H;
        index = pos.d * slot + n;
        const size_t old_h = pos.old_slot * slot + n;
        new_h = pos.new_slot * slot + n;
        old_other = a.save ? old_h : (pos.d * 2 + s % 2) * slot + n;
        new_other = a.save ? new_h : (pos.d * 2 + 1 - s % 2) * slot + n;
        output = ((size_t)pos.t * a.B + pos.b) * gridDim.z * a.H + (size_t)pos.d * a.H + pos.j;
        row = a.gates + (((size_t)pos.d * a.T_ + pos.t) * a.B + pos.b) * a.W * a.H + pos.j;
    }
};

// From state 1 to state k + 1.
template <typename Cell, typename T>
DEVICE size_t other(const Forward<T>& a, const Position& pos, int k) {
    return other_state<Cell>(pos.d, k, (long long)(a.save ? a.T_ + 1 : 2) * a.B * a.H);
}

// State k + 1 as the timestep reads it. Its h is in h_now, after a reset, too.
template <typename Cell, typename T>
DEVICE typename Compute<T>::real old_other(
    const Forward<T>& a, const Position& pos, const StepMarks& m, const ForwardPlace<T>& at, int k)
{
    if (m.reset) return a.marks.others[at.index + other_state<Cell>(pos.d, k, (long long)a.B * a.H)];
    return a.others[at.old_other + other<Cell>(a, pos, k)];
}

template <typename Cell, typename T, typename real>
DEVICE void read(
    const Forward<T>& a, const Position& pos, const StepMarks& m, const ForwardPlace<T>& at, ForwardIn<Cell, real>& in)
{
    constexpr int G = Cell::gates, Q = Cell::products;
    const int H = a.H, j = pos.j;
    const real* ah_row = a.ah + ((size_t)pos.d * a.B + pos.b) * Q * H + j;
    for (int k = 0; k < G; k++) {
        in.ax[k] = real(at.row[(size_t)k * H]);
        real r = real(0);
        if (k < Q) r = ah_row[(size_t)k * H];
        if (a.bias_ih) {
            const size_t bias = ((size_t)pos.d * G + k) * H + j;
            in.ax[k] += a.bias_ih[bias];
            r += a.bias_hh[bias];
        }
        if (k < Q) in.ah[k] = r;
        else in.ax[k] += r;
    }
    in.state[0] = a.h_now ? real(a.h_now[at.index]) : real(0);
    for (int k = 0; k < Cell::states - 1; k++) in.state[k + 1] = old_other<Cell>(a, pos, m, at, k);
    read_more<Cell>(a, pos, in);
}

// h_now becomes what the next timestep reads.
template <typename Cell, typename T, typename real>
DEVICE void write(
    const Forward<T>& a, const Position& pos, const StepMarks& m, const ForwardPlace<T>& at, const ForwardOut<Cell, real>& out)
{
    const T h_new = T(out.state[0]);
    for (int k = 0; k < Cell::states - 1; k++) a.others[at.new_other + other<Cell>(a, pos, k)] = out.state[k + 1];
    if (a.h) {
        a.h_now[at.index] = m.next_reset ? a.marks.h[at.index] : h_new;
        a.h[at.new_h] = h_new;
    }
    if (a.output) a.output[at.output] = h_new;
    if (a.m) a.m[at.index] = h_new;
    if (a.save) {
        for (int k = 0; k < Cell::saved; k++) at.row[(size_t)k * a.H] = T(out.saved[k]);
        if (a.m) at.row[(size_t)Cell::saved * a.H] = h_new;
    }
}

// A timestep that is held. What the gradient of a weight is multiplied by, where it is saved, is 0.
template <typename Cell, typename T>
DEVICE void hold(const Forward<T>& a, const Position& pos, const StepMarks& m, const ForwardPlace<T>& at) {
    const T zero = T(typename Compute<T>::real(0));
    T h = zero;
    for (int k = 0; k < Cell::states - 1; k++) {
        a.others[at.new_other + other<Cell>(a, pos, k)] = old_other<Cell>(a, pos, m, at, k);
    }
    if (a.m) a.m[at.index] = zero;
    if (a.m && a.save) at.row[(size_t)Cell::saved * a.H] = zero;
    if constexpr (Cell::products > Cell::first_product) {
        if (a.save) at.row[(size_t)Cell::inner * a.H] = zero;
    }
    if (a.h) {
        h = a.h_now[at.index];
        a.h[at.new_h] = h;
        if (m.next_reset) a.h_now[at.index] = a.marks.h[at.index];
    }
    if (a.output) a.output[at.output] = m.shown ? h : zero;
}

// ---- backward

template <typename T>
struct Backward {
    typedef typename Compute<T>::real real;
    int T_, B, H, W, mask_steps;
    const real* own;
    const bool* mask;
    T* gates;
    const T* h;
    const real* others;
    const T* doutput;
    const real* dm;
    real *dh, *dothers;
    T* d_now;
    Marks<T> marks;

    DEVICE T* row(const Position& pos) const { return gates + (((size_t)pos.d * T_ + pos.t) * B + pos.b) * W * H + pos.j; }
};

// The gradients with respect to a state that a reset gives go there, and not across.
template <typename Cell, typename T>
DEVICE void reset_gradients(const Backward<T>& a, const Position& pos) {
    typedef typename Compute<T>::real real;
    const size_t slot = (size_t)a.B * a.H, index = pos.d * slot + (size_t)pos.b * a.H + pos.j;
    if (a.dh) {
        a.marks.dh[index] += a.dh[index];
        a.dh[index] = real(0);
    }
    for (int k = 0; k < Cell::states - 1; k++) {
        const size_t n = index + other_state<Cell>(pos.d, k, slot);
        a.marks.dothers[n] += a.dothers[n];
        a.dothers[n] = real(0);
    }
}

// The output of a timestep that is held and shown is the h before it.
template <typename T>
DEVICE void add_shown(const Backward<T>& a, const Position& pos) {
    if (!a.dh || !a.doutput) return;
    const size_t index = ((size_t)pos.d * a.B + pos.b) * a.H + pos.j;
    a.dh[index] += typename Compute<T>::real(
        a.doutput[((size_t)pos.t * a.B + pos.b) * gridDim.z * a.H + (size_t)pos.d * a.H + pos.j]);
}

template <typename Cell, typename T, typename real>
DEVICE void read(const Backward<T>& a, const Position& pos, const StepMarks& m, BackwardIn<Cell, real>& in) {
    const int H = a.H, j = pos.j;
    const size_t n = (size_t)pos.b * H + j, slot = (size_t)a.B * H, index = (size_t)pos.d * slot + n;
    const size_t old_slot = pos.old_slot * slot + n, new_slot = pos.new_slot * slot + n;
    const T* row = a.row(pos);
    for (int k = 0; k < Cell::saved; k++) in.saved[k] = real(row[(size_t)k * H]);
    in.dstate[0] = a.dm ? a.dm[index] : a.dh[index];
    for (int k = 0; k < Cell::states - 1; k++) in.dstate[k + 1] = a.dothers[index + other_state<Cell>(pos.d, k, slot)];
    if (a.doutput) in.dstate[0] += real(a.doutput[((size_t)pos.t * a.B + pos.b) * gridDim.z * H + (size_t)pos.d * H + j]);
    in.state[0] = a.h ? real(m.reset ? a.marks.h[index] : a.h[old_slot]) : real(0);
    in.new_state[0] = a.h ? real(a.h[new_slot]) : real(0);
    for (int k = 0; k < Cell::states - 1; k++) {
        const size_t other = other_state<Cell>(pos.d, k, (a.T_ + 1) * slot);
        in.state[k + 1] = m.reset ? a.marks.others[index + other_state<Cell>(pos.d, k, slot)] : a.others[old_slot + other];
        in.new_state[k + 1] = a.others[new_slot + other];
    }
    read_more<Cell>(a, pos, in);
}

template <typename Cell, typename T, typename real>
DEVICE void write_dstate(const Backward<T>& a, const Position& pos, const BackwardOut<Cell, real>& out) {
    const size_t slot = (size_t)a.B * a.H, index = (size_t)pos.d * slot + (size_t)pos.b * a.H + pos.j;
    if (a.dh) a.dh[index] = out.dstate[0];
    for (int k = 0; k < Cell::states - 1; k++) a.dothers[index + other_state<Cell>(pos.d, k, slot)] = out.dstate[k + 1];
}

// d, and what GEMMs read of it; with INNER all but that of the second product, which was written before.
template <typename Cell, bool INNER = false, typename T, typename real>
DEVICE void write_d(const Backward<T>& a, const Position& pos, const BackwardOut<Cell, real>& out) {
    T* row = a.row(pos);
    T* d_row = a.d_now + ((size_t)pos.d * a.B + pos.b) * Cell::products * a.H + pos.j;
    for (int k = 0; k < Cell::preactivations; k++) {
        if (INNER && k >= Cell::first_product && k < Cell::products) continue;
        row[(size_t)k * a.H] = T(out.d[k]);
    }
    for (int k = 0; k < (INNER ? Cell::first_product : Cell::products); k++) d_row[(size_t)k * a.H] = T(out.d[k]);
}
