// What the schedules whose threads run the whole time loop read of a layer, and what they do with its marks.

#include "arrays.cuh"

struct Alone {  // the channel of a block that waits for no other
    static constexpr bool waits = false;
    float* parts;  // of means, in shared memory
};

// Where the product makes W_ih x as well: the first gate whose W_ih x has a sum of its own. W_ih x of the gates before it is
// added to W_hh h.
template <typename Cell>
constexpr int first_apart = Cell::products > Cell::separate ? Cell::products - Cell::separate : 0;

// How many sums a product makes for each unit.
template <typename Cell>
DEVICE constexpr int sums_of(bool makes_ax) {
    return Cell::products + (makes_ax ? Cell::gates - first_apart<Cell> : 0);
}

template <typename T>
struct Forward {  // the kernels say what each is
    int T_, B, H, W, D, save, mask_steps;
    const float *bias_ih, *bias_hh, *own;
    const bool* mask;
    T *gates, *h;
    float* others;
    T* output;
    Marks<T> marks;
};

template <typename T>
struct Backward {
    int T_, B, H, W, D, mask_steps;
    const float* own;
    const bool* mask;
    T* gates;
    const T* h;
    const float* others;
    const T* doutput;
    float *dh, *dothers;
    Marks<T> marks;
};

// The marks of this thread's sequences in a timestep.
template <typename T, typename Position>
DEVICE void load_marks(unsigned char (&to)[Position::per_thread], const Position& pos, const Marks<T>& marks, int t, int T_,
                       int B) {
    const unsigned char* from = marks.bits + ((long long)pos.d * T_ + t) * B;
#pragma unroll
    for (int k = 0; k < Position::per_thread; k++) to[k] = pos.sequence[k] < 0 ? Mark::held : from[pos.sequence[k]];
}

// The place of what a reset gives to this thread's k-th sequence.
template <typename Position>
DEVICE long long reset_place(const Position& pos, int k, int B, int H) {
    return ((long long)pos.d * B + pos.sequence[k]) * H + pos.j;
}

// Makes the state of this thread's k-th sequence what a reset gives.
template <typename Cell, typename T, typename Stored, int S, int K, typename Position>
DEVICE void load_reset(Stored& h, float (&others)[S][K][Position::units], const Position& pos, int k, const Marks<T>& marks, int B,
                       int H) {
    const long long from = reset_place(pos, k, B, H);
    h = pos.load(marks.h + from, H);
#pragma unroll
    for (int s = 0; s < Cell::states - 1; s++) {
        const long long place = from + other_state<Cell>(pos.d, s, (long long)B * H);
#pragma unroll
        for (int u = 0; u < Position::units; u++) {
            if (pos.has(u, H)) others[s][k][u] = marks.others[place + u];
        }
    }
}

// The gradients with respect to a state that a reset gives go there, and not across.
template <typename Cell, typename T, int S, int K, typename Position>
DEVICE void send_reset(float (&dh)[K][Position::units], float (&dothers)[S][K][Position::units], const Position& pos, int k,
                       const Marks<T>& marks, int B, int H) {
    const long long to = reset_place(pos, k, B, H);
#pragma unroll
    for (int u = 0; u < Position::units; u++) {
        if (!pos.has(u, H)) continue;
        marks.dh[to + u] += dh[k][u];
        dh[k][u] = 0.0f;
#pragma unroll
        for (int s = 0; s < Cell::states - 1; s++) {
            marks.dothers[to + u + other_state<Cell>(pos.d, s, (long long)B * H)] += dothers[s][k][u];
            dothers[s][k][u] = 0.0f;
        }
    }
}

// Backward: the state that unit u reads of it.
template <typename Cell, typename T, typename Position, typename real>
DEVICE void read_reset(BackwardIn<Cell, real>& in, const Position& pos, int k, int u, const Marks<T>& marks, int B, int H) {
    const long long from = reset_place(pos, k, B, H) + u;
    in.state[0] = float(marks.h[from]);
#pragma unroll
    for (int s = 0; s < Cell::states - 1; s++) {
        in.state[s + 1] = marks.others[from + other_state<Cell>(pos.d, s, (long long)B * H)];
    }
}
