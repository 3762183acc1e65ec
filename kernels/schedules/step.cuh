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
template <typename Cell, typename real>
struct Own {
    real p[some(Cell::parameters)];
    unsigned char mask[some(Cell::draws)];

    template <typename Layer>
    DEVICE void load(const Layer& a, const Position& pos, bool live) {
        for (int k = 0; k < Cell::parameters; k++) {
            p[k] = live ? a.own[((size_t)pos.d * Cell::parameters + k) * a.H + pos.j] : real(0);
        }
        if constexpr (Cell::draws > 0) {
            const unsigned char* masks = masks_of<Cell>(a.mask, a.mask_steps, pos.d, pos.t, pos.b, a.B, a.H, pos.j);
            for (int k = 0; k < Cell::draws; k++) mask[k] = live ? masks[(size_t)k * a.H] : 0;
        }
    }
    template <typename In>
    DEVICE void read(In& in) const {
        for (int k = 0; k < Cell::parameters; k++) in.p[k] = p[k];
        for (int k = 0; k < Cell::draws; k++) in.mask[k] = real(mask[k]);
    }
};

// What a cell that computes in Brief made, as the plain number that T is made of.
template <typename T>
DEVICE typename Compute<T>::real float_of(typename Compute<T>::real x) { return x; }

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

    // The place of the same unit so many sequences further on.
    DEVICE ForwardPlace(const Forward<T>& a, const ForwardPlace& from, int sequences)
        : index(skip(from.index, sequences, a.H)), new_h(skip(from.new_h, sequences, a.H)),
          old_other(skip(from.old_other, sequences, a.H)), new_other(skip(from.new_other, sequences, a.H)),
          output(skip(from.output, sequences, gridDim.z * a.H)), row(from.row + skip(0, sequences, a.W * a.H)) {}
};

// From state 1 to state k + 1.
template <typename Cell, typename T>
DEVICE size_t other(const Forward<T>& a, const Position& pos, int k) {
    return other_state<Cell>(pos.d, k, (long long)(a.save ? a.T_ + 1 : 2) * a.B * a.H);
}

// The place of state k + 1 as the timestep reads it. Its h is in h_now, after a reset, too.
template <typename Cell, typename T>
DEVICE const typename Compute<T>::real* old_other(
    const Forward<T>& a, const Position& pos, const StepMarks& m, const ForwardPlace<T>& at, int k)
{
    return m.reset ? a.marks.others + at.index + other_state<Cell>(pos.d, k, (long long)a.B * a.H)
                   : a.others + at.old_other + other<Cell>(a, pos, k);
}

// What a timestep reads of a unit, as it is stored, so that those of several units can be under way at once.
template <typename Cell, typename T>
struct ForwardLoaded {
    typedef typename Compute<T>::real real;
    T ax[Cell::gates], h;
    real others[some(Cell::states - 1)];
    Own<Cell, real> own;

    // live: whether the unit is computed at all.
    DEVICE void load(const Forward<T>& a, const Position& pos, const StepMarks& m, const ForwardPlace<T>& at, bool live) {
        const T zero = T(real(0));
        for (int k = 0; k < Cell::gates; k++) ax[k] = live ? at.row[(size_t)k * a.H] : zero;
        h = live && a.h_now ? a.h_now[at.index] : zero;
        for (int k = 0; k < Cell::states - 1; k++) others[k] = live ? *old_other<Cell>(a, pos, m, at, k) : real(0);
        own.load(a, pos, live);
    }
};

// bias_ih(k), bias_hh(k): of gate k. product(k): W_hh h of it.
template <typename Cell, typename T, typename real, typename BiasIh, typename BiasHh, typename Product>
DEVICE void read(const ForwardLoaded<Cell, T>& loaded, ForwardIn<Cell, real>& in, BiasIh bias_ih, BiasHh bias_hh, Product product) {
    constexpr int G = Cell::gates, Q = Cell::products;
    for (int k = 0; k < G; k++) {
        in.ax[k] = real(loaded.ax[k]) + real(bias_ih(k));
        if (k < Q) in.ah[k] = real(product(k)) + real(bias_hh(k));
        else in.ax[k] += real(bias_hh(k));
    }
    in.state[0] = real(loaded.h);
    for (int k = 0; k < Cell::states - 1; k++) in.state[k + 1] = loaded.others[k];
    loaded.own.read(in);
}

template <typename Cell, typename T, typename real>
DEVICE void read(
    const Forward<T>& a, const Position& pos, const StepMarks& m, const ForwardPlace<T>& at, ForwardIn<Cell, real>& in)
{
    const real* ah_row = a.ah + ((size_t)pos.d * a.B + pos.b) * Cell::products * a.H + pos.j;
    const size_t bias = (size_t)pos.d * Cell::gates * a.H + pos.j;
    ForwardLoaded<Cell, T> loaded;
    loaded.load(a, pos, m, at, true);
    read(loaded, in, [&](int k) { return a.bias_ih ? a.bias_ih[bias + (size_t)k * a.H] : real(0); },
         [&](int k) { return a.bias_hh ? a.bias_hh[bias + (size_t)k * a.H] : real(0); },
         [&](int k) { return ah_row[(size_t)k * a.H]; });
}

// h_now becomes what the next timestep reads, and is returned.
template <typename Cell, typename T, typename real>
DEVICE T write(
    const Forward<T>& a, const Position& pos, const StepMarks& m, const ForwardPlace<T>& at, const ForwardOut<Cell, real>& out)
{
    const T h_new = T(float_of<T>(out.state[0]));
    const T h_next = a.h && m.next_reset ? a.marks.h[at.index] : h_new;  // of a projection, a reset gives fewer numbers
    for (int k = 0; k < Cell::states - 1; k++) a.others[at.new_other + other<Cell>(a, pos, k)] = out.state[k + 1];
    if (a.h) {
        a.h_now[at.index] = h_next;
        a.h[at.new_h] = h_new;
    }
    if (a.output) a.output[at.output] = h_new;
    if (a.m) a.m[at.index] = h_new;
    if (a.save) {
        for (int k = 0; k < Cell::saved; k++) at.row[(size_t)k * a.H] = T(float_of<T>(out.saved[k]));
        if (a.m) at.row[(size_t)Cell::saved * a.H] = h_new;
    }
    return h_next;
}

// A timestep that is held. What the gradient of a weight is multiplied by, where it is saved, is 0. Returns as `write` does.
template <typename Cell, typename T>
DEVICE T hold(const Forward<T>& a, const Position& pos, const StepMarks& m, const ForwardPlace<T>& at) {
    const T zero = T(typename Compute<T>::real(0));
    T h = zero, h_next = zero;
    for (int k = 0; k < Cell::states - 1; k++) {
        a.others[at.new_other + other<Cell>(a, pos, k)] = *old_other<Cell>(a, pos, m, at, k);
    }
    if (a.m) a.m[at.index] = zero;
    if (a.m && a.save) at.row[(size_t)Cell::saved * a.H] = zero;
    if constexpr (Cell::products > Cell::first_product) {
        if (a.save) at.row[(size_t)Cell::inner * a.H] = zero;
    }
    if (a.h) {
        h = h_next = a.h_now[at.index];
        a.h[at.new_h] = h;
        if (m.next_reset) a.h_now[at.index] = h_next = a.marks.h[at.index];
    }
    if (a.output) a.output[at.output] = m.shown ? h : zero;
    return h_next;
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
};

// As ForwardPlace.
template <typename T>
struct BackwardPlace {
    size_t index, old_h, new_h, output;
    T* row;

    DEVICE BackwardPlace(const Backward<T>& a, const Position& pos) {
        const size_t n = (size_t)pos.b * a.H + pos.j, slot = (size_t)a.B * a.H;
        index = pos.d * slot + n;
        old_h = pos.old_slot * slot + n;
        new_h = pos.new_slot * slot + n;
        output = ((size_t)pos.t * a.B + pos.b) * gridDim.z * a.H + (size_t)pos.d * a.H + pos.j;
        row = a.gates + (((size_t)pos.d * a.T_ + pos.t) * a.B + pos.b) * a.W * a.H + pos.j;
    }
    DEVICE BackwardPlace(const Backward<T>& a, const BackwardPlace& from, int sequences)
        : index(skip(from.index, sequences, a.H)), old_h(skip(from.old_h, sequences, a.H)),
          new_h(skip(from.new_h, sequences, a.H)), output(skip(from.output, sequences, gridDim.z * a.H)),
          row(from.row + skip(0, sequences, a.W * a.H)) {}
};

// The gradients with respect to a state that a reset gives go there, and not across.
template <typename Cell, typename T>
DEVICE void reset_gradients(const Backward<T>& a, const Position& pos, const BackwardPlace<T>& at) {
    typedef typename Compute<T>::real real;
    if (a.dh) {
        a.marks.dh[at.index] += a.dh[at.index];
        a.dh[at.index] = real(0);
    }
    for (int k = 0; k < Cell::states - 1; k++) {
        const size_t n = at.index + other_state<Cell>(pos.d, k, (long long)a.B * a.H);
        a.marks.dothers[n] += a.dothers[n];
        a.dothers[n] = real(0);
    }
}

// The output of a timestep that is held and shown is the h before it.
template <typename T>
DEVICE void add_shown(const Backward<T>& a, const BackwardPlace<T>& at) {
    if (a.dh && a.doutput) a.dh[at.index] += typename Compute<T>::real(a.doutput[at.output]);
}

// As ForwardLoaded.
template <typename Cell, typename T>
struct BackwardLoaded {
    typedef typename Compute<T>::real real;
    T saved[some(Cell::saved)], doutput, h_old, h_new;
    real dstate[Cell::states], others_old[some(Cell::states - 1)], others_new[some(Cell::states - 1)];
    Own<Cell, real> own;

    DEVICE void load(const Backward<T>& a, const Position& pos, const StepMarks& m, const BackwardPlace<T>& at, bool live) {
        const long long slot = (long long)a.B * a.H;
        const T zero = T(real(0));
        for (int k = 0; k < Cell::saved; k++) saved[k] = live ? at.row[(size_t)k * a.H] : zero;
        dstate[0] = live ? *((a.dm ? a.dm : a.dh) + at.index) : real(0);
        for (int k = 0; k < Cell::states - 1; k++) {
            dstate[k + 1] = live ? a.dothers[at.index + other_state<Cell>(pos.d, k, slot)] : real(0);
        }
        doutput = live && a.doutput ? a.doutput[at.output] : zero;
        h_old = live && a.h ? *(m.reset ? a.marks.h + at.index : a.h + at.old_h) : zero;
        h_new = live && a.h ? a.h[at.new_h] : zero;
        for (int k = 0; k < Cell::states - 1; k++) {
            const size_t other = other_state<Cell>(pos.d, k, (a.T_ + 1) * slot);
            const real* old = m.reset ? a.marks.others + at.index + other_state<Cell>(pos.d, k, slot) : a.others + at.old_h + other;
            others_old[k] = live ? *old : real(0);
            others_new[k] = live ? a.others[at.new_h + other] : real(0);
        }
        own.load(a, pos, live);
    }

    template <typename real>
    DEVICE void read(BackwardIn<Cell, real>& in) const {
        for (int k = 0; k < Cell::saved; k++) in.saved[k] = real(saved[k]);
        in.dstate[0] = real(dstate[0]) + real(doutput);
        in.state[0] = real(h_old);
        in.new_state[0] = real(h_new);
        for (int k = 0; k < Cell::states - 1; k++) {
            in.dstate[k + 1] = dstate[k + 1];
            in.state[k + 1] = others_old[k];
            in.new_state[k + 1] = others_new[k];
        }
        own.read(in);
    }
};

template <typename Cell, typename T, typename real>
DEVICE void read(
    const Backward<T>& a, const Position& pos, const StepMarks& m, const BackwardPlace<T>& at, BackwardIn<Cell, real>& in)
{
    BackwardLoaded<Cell, T> loaded;
    loaded.load(a, pos, m, at, true);
    loaded.read(in);
}

template <typename Cell, typename T, typename real>
DEVICE void write_dstate(
    const Backward<T>& a, const Position& pos, const BackwardPlace<T>& at, const BackwardOut<Cell, real>& out)
{
    if (a.dh) a.dh[at.index] = out.dstate[0];
    for (int k = 0; k < Cell::states - 1; k++) {
        a.dothers[at.index + other_state<Cell>(pos.d, k, (long long)a.B * a.H)] = out.dstate[k + 1];
    }
}

// d; with INNER all but that of the second product, which was written before. multiplied(k, d): takes what the product with
// W_hh reads of it, of gate k.
template <typename Cell, bool INNER = false, typename T, typename real, typename Multiplied>
DEVICE void write_d(const Backward<T>& a, const BackwardPlace<T>& at, const BackwardOut<Cell, real>& out, Multiplied multiplied) {
    for (int k = 0; k < Cell::preactivations; k++) {
        if (INNER && k >= Cell::first_product && k < Cell::products) continue;
        at.row[(size_t)k * a.H] = T(float_of<T>(out.d[k]));
    }
    for (int k = 0; k < (INNER ? Cell::first_product : Cell::products); k++) multiplied(k, T(float_of<T>(out.d[k])));
}

template <typename Cell, bool INNER = false, typename T, typename real>
DEVICE void write_d(
    const Backward<T>& a, const Position& pos, const BackwardPlace<T>& at, const BackwardOut<Cell, real>& out)
{
    T* d_row = a.d_now + ((size_t)pos.d * a.B + pos.b) * Cell::products * a.H + pos.j;
    write_d<Cell, INNER>(a, at, out, [&](int k, T d) { d_row[(size_t)k * a.H] = d; });
}
