// What the schedules whose threads run the whole time loop read of a layer, and how a thread loads it for its own units and
// sequences.

#include "arrays.cuh"

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

// The masks of this thread's k-th sequence.
template <typename Cell, typename Position>
DEVICE void load_masks(unsigned char (&to)[some(Cell::draws)][Position::units], const Position& pos, int k, const bool* mask,
                       int steps, int t, int B, int H) {
    if (!Cell::draws) return;
    const unsigned char* from = masks_of<Cell>(mask, steps, pos.d, t, pos.sequence[k], B, H, pos.j);
#pragma unroll
    for (int m = 0; m < Cell::draws; m++) {
#pragma unroll
        for (int u = 0; u < Position::units; u++) {
            if (pos.has(u, H)) to[m][u] = from[(size_t)m * H + u];
        }
    }
}

// The cell's own parameters, of this thread's units.
template <typename Cell, typename Position>
DEVICE void load_own(float (&to)[some(Cell::parameters)][Position::units], const Position& pos, const float* own, int H) {
#pragma unroll
    for (int n = 0; n < Cell::parameters; n++) {
#pragma unroll
        for (int u = 0; u < Position::units; u++) {
            const bool valid = pos.j + u < H;
            to[n][u] = valid ? own[((size_t)pos.d * Cell::parameters + n) * H + pos.j + u] : 0.0f;
        }
    }
}

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
