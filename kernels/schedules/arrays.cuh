// Where a thread reads and writes in the arrays of a layer. step.cu says what they are.

// From where a state would lie if the cell had only this one besides h, to where state s + 1 lies. A direction has all of its
// states besides h one after another, each of `size` numbers.
template <typename Cell>
DEVICE long long other_state(int d, int s, long long size) {
    return (long long)(d * (Cell::states - 2) + s) * size;
}

// The masks of a unit in a timestep, one every H bytes: mask is [D, steps, B, M*H], where `steps` is 1 if a sequence has the
// same masks in all timesteps.
template <typename Cell>
DEVICE const unsigned char* masks_of(const bool* mask, int steps, int d, int t, int b, int B, int H, int j) {
    const long long row = ((long long)d * steps + (steps > 1 ? t : 0)) * B + b;
    return (const unsigned char*)mask + row * Cell::draws * H + j;
}

// ---- masks and resets: a kernel is MARKED where its call has some; otherwise it knows only the lengths

// What stands in a mark, as in gpurnn/backends/marks.py, which says what each means.
struct Mark {
    static constexpr unsigned char held = 1, reset = 2, shown = 4;
};

// The marks of a layer, and what resets give. Backward adds the gradients with respect to that up: each number belongs to one
// thread.
template <typename T>
struct Marks {
    typedef typename Compute<T>::real real;
    const unsigned char* bits;  // [D, T, B]
    const T* h;                 // [D, B, H]
    const real* others;         // [D, S-1, B, H]
    real *dh, *dothers;         // likewise
};

// ---- in the schedules whose threads run the whole time loop

// at + count * size in one instruction. The compiler would keep the product in two registers from one timestep to the next.
DEVICE long long skip(long long at, int count, int size) {
    asm("mad.wide.s32 %0, %1, %2, %0;" : "+l"(at) : "r"(count), "r"(size));
    return at;
}

// Where a thread reads and writes in a timestep, moved on from step to step: the places of its unit in the rows of its
// sequence, if it has one, or else of sequence 0.
template <typename Position>
struct Places {
    const Position& pos;
    static constexpr bool one = Position::per_thread == 1;
    int H, gates_row, output_row, move;  // numbers of one sequence in a state, in gates, in output; sequences to the next t
    long long gates, slot, output;

    // Of timestep t, where the states are those after `slots` timesteps.
    DEVICE Places(const Position& pos_, int T_, int B, int H_, int W, int D, int t, int slots, bool forward)
        : pos(pos_), H(H_), gates_row(W * H_), output_row(D * H_), move(forward != pos_.reversed ? B : -B) {
        const int sequence = one ? pos.sequence[0] : 0;
        gates = (((long long)pos.d * T_ + t) * B + sequence) * gates_row + pos.j;
        slot = (((long long)pos.d * (T_ + 1) + slots) * B + sequence) * H + pos.j;
        output = ((long long)t * B + sequence) * output_row + pos.d * H + pos.j;
    }

    // Of the thread's k-th sequence.
    DEVICE long long of(int k, long long at, int size) const { return one ? at : skip(at, pos.sequence[k], size); }
    DEVICE long long gates_of(int k) const { return of(k, gates, gates_row); }
    DEVICE long long slot_of(int k) const { return of(k, slot, H); }
    DEVICE long long output_of(int k) const { return of(k, output, output_row); }

    DEVICE void move_on() {
        gates = skip(gates, move, gates_row);
        slot = skip(slot, move, H);
        output = skip(output, move, output_row);
    }
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
