// The time loop of the schedules that keep the weights on the chip: what a thread does for its own units and sequences, and
// when it waits.
//
// `Position` says which these are. A thread has Position::units neighbouring units of Position::per_thread sequences. What it
// loads stays as it is stored, Position::Stored, until it is used: a conversion would wait for the load.
//
// `Product` decides how the matrix product is computed and how its operand reaches this block:
//
//     forward    send       gives an h to all who multiply by it, for this thread's k-th sequence
//                next       ends a step: everything was given
//                prefetch   loads x of a step, where the product multiplies W_ih x itself (makes_ax)
//                run        computes the sums from what all have given; false where this block must give up
//                add        start + W_hh h of gate g, for this thread's k-th sequence and unit u; gate G: W_ih x of the last
//     backward   stage      gives dgates of this thread's k-th sequence
//                run        computes dh from what all have staged; false where this block must give up
//                sum        dh, for this thread's k-th sequence and unit u
//                loads_ahead  whether what a step reads is loaded in the step before, in flight while that one waits and
//                           multiplies; false where it does not fit into registers beside the weights
//
// A block sends once for each step that it computes: the initial h before the first, nothing after the last. `channel` is
// what the blocks of a group share; a block that is alone has none.

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
    int H, gates_row, output_row, move;  // numbers of one sequence in h and c, in gates, in output; sequences to the next t
    long long gates, slot, output;

    // Of timestep t, where h and c are those after `slots` timesteps.
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

struct Alone {  // the channel of a block that waits for no other
    static constexpr bool waits = false;
};

template <typename T>
struct Forward {  // the kernels say what each is
    int T_, B, H, W, D, save;
    const float *bias_ih, *bias_hh;
    T *gates, *h;
    float* c;
    T* output;
};

template <typename T>
struct Backward {
    int T_, B, H, W, D;
    T* gates;
    const T* h;
    const float* c;
    const T* doutput;
    float *dh, *dc;
};

// Of one tile; false where the block must give up.
template <template <typename> class CellOf, typename T, typename Position, typename Channel, typename Product>
DEVICE bool time_loop_forward(const Forward<T>& a, const Position& pos, Channel& channel, Product& product)
{
    typedef CellOf<float> Cell;
    typedef typename Position::template Stored<T> Stored;
    constexpr int G = Cell::gates, K = Position::per_thread, U = Position::units;
    const int T_ = a.T_, H = a.H, j = pos.j, on = pos.reversed ? -1 : 1;  // from one t to the next
    const int end = pos.reversed ? -1 : T_;
    int t = pos.reversed ? T_ - 1 : 0;
    Places<Position> here(pos, T_, a.B, H, a.W, a.D, t, pos.reversed ? T_ : 0, true);
    float c_old[K][U], bias_a[G][U], bias_r[G][U];
    Stored h_old[K] = {}, ax[K][G];
    auto load_ax = [&](int t, long long gates) {
#pragma unroll
        for (int k = 0; k < K; k++) {
            if (t >= pos.length[k]) continue;
            const T* row = a.gates + here.of(k, gates, here.gates_row);
#pragma unroll
            for (int g = 0; g < G; g++) ax[k][g] = pos.load(row + (size_t)g * H, H);
        }
    };
#pragma unroll
    for (int u = 0; u < U; u++) {
#pragma unroll
        for (int g = 0; g < G; g++) {
            const bool valid = a.bias_ih && j + u < H;
            bias_a[g][u] = valid ? a.bias_ih[((size_t)pos.d * G + g) * H + j + u] : 0.0f;
            bias_r[g][u] = valid ? a.bias_hh[((size_t)pos.d * G + g) * H + j + u] : 0.0f;
        }
#pragma unroll
        for (int k = 0; k < K; k++) {
            const bool valid = pos.sequence[k] >= 0 && pos.has(u, H);
            const long long initial_c = a.save ? here.slot_of(k) : ((long long)pos.d * 2 * a.B + pos.sequence[k]) * H + j;
            c_old[k][u] = valid && Cell::states == 2 ? a.c[initial_c + u] : 0.0f;
        }
    }
#pragma unroll
    for (int k = 0; k < K; k++) {
        if (pos.sequence[k] >= 0) h_old[k] = pos.load(a.h + here.slot_of(k), H);
    }
    if (pos.longest > 0) {
#pragma unroll
        for (int k = 0; k < K; k++) product.send(channel, pos, k, h_old[k]);
        const int first = pos.reversed ? pos.longest - 1 : 0;
        if constexpr (Product::makes_ax) product.prefetch(first);
        else load_ax(first, here.gates + (long long)(first - t) * a.B * here.gates_row);
        product.next(channel);
    }

    for (; t != end; t += on) {
        const bool active = t < pos.longest;  // the same in all threads of the group
        const bool sends = active && t + on >= 0 && t + on < pos.longest;
        if (active) {
            if constexpr (Product::makes_ax) {
                if (sends) product.prefetch(t + on);
            }
            if (!product.run(channel, pos)) return false;
        }
        Stored saved[K][Cell::saved_blocks + 1];
#pragma unroll
        for (int k = 0; k < K; k++) {
            if (t < pos.length[k]) {
                float h_new[U] = {}, saved_now[Cell::saved_blocks + 1][U] = {};
#pragma unroll
                for (int u = 0; u < U; u++) {
                    if (!pos.has(u, H)) continue;
                    float ax_now[G], ah[G], saves[Cell::saved_blocks + 1], c_new;
#pragma unroll
                    for (int g = 0; g < G; g++) {
                        ah[g] = product.add(bias_r[g][u], k, u, g);
                        ax_now[g] = Product::makes_ax ? bias_a[g][u] : pos.number(ax[k][g], u, T()) + bias_a[g][u];
                    }
                    if (Product::makes_ax && Cell::separate_input_gate) ax_now[G - 1] = product.add(ax_now[G - 1], k, u, G);
                    Cell::forward(ax_now, ah, pos.number(h_old[k], u, T()), c_old[k][u], saves, h_new[u], c_new);
                    if (Cell::states == 2) c_old[k][u] = c_new;
#pragma unroll
                    for (int g = 0; g < Cell::saved_blocks; g++) saved_now[g][u] = saves[g];
                }
                h_old[k] = pos.stored(h_new, T());  // the state is what is stored
#pragma unroll
                for (int g = 0; g < Cell::saved_blocks; g++) saved[k][g] = pos.stored(saved_now[g], T());
            }
            if (sends) product.send(channel, pos, k, h_old[k]);  // before any store: the others wait for it
        }
        if (sends) {
            // In flight during the product, too. A block that waits for others has time enough behind its stores.
            if (!Product::makes_ax && !Channel::waits) load_ax(t + on, skip(here.gates, here.move, here.gates_row));
            product.next(channel);
        }
        here.slot = skip(here.slot, here.move, H);
#pragma unroll
        for (int k = 0; k < K; k++) {
            if (pos.sequence[k] < 0) continue;
            const bool live = t < pos.length[k];
            pos.store(a.output + here.output_of(k), live ? h_old[k] : Stored(), H);
            if (!a.save) continue;
            pos.store(a.h + here.slot_of(k), h_old[k], H);
            if (Cell::states == 2) pos.store(a.c + here.slot_of(k), pos.stored(c_old[k], 0.0f), H);
            if (live) {
                T* row = a.gates + here.gates_of(k);
#pragma unroll
                for (int g = 0; g < Cell::saved_blocks; g++) pos.store(row + (size_t)g * H, saved[k][g], H);
            }
        }
        here.gates = skip(here.gates, here.move, here.gates_row);
        here.output = skip(here.output, here.move, here.output_row);
        if (!Product::makes_ax && Channel::waits && sends) load_ax(t + on, here.gates);
    }
#pragma unroll
    for (int k = 0; k < K; k++) {
        if (a.save || pos.sequence[k] < 0) continue;
        const long long last_c = (((long long)pos.d * 2 + T_ % 2) * a.B + pos.sequence[k]) * H + j;
        pos.store(a.h + here.slot_of(k), h_old[k], H);
        if (Cell::states == 2) pos.store(a.c + last_c, pos.stored(c_old[k], 0.0f), H);
    }
    return true;
}

template <template <typename> class CellOf, typename T, typename Position, typename Channel, typename Product>
DEVICE bool time_loop_backward(const Backward<T>& a, const Position& pos, Channel& channel, Product& product)
{
    typedef CellOf<float> Cell;
    typedef typename Position::template Stored<T> Stored;
    typedef typename Position::template Stored<float> StoredC;
    constexpr int K = Position::per_thread, U = Position::units, P = Cell::preactivations;
    constexpr bool has_c = Cell::states == 2;
    constexpr bool ahead = Product::loads_ahead;
    const int T_ = a.T_, H = a.H, on = pos.reversed ? 1 : -1;  // from one t to the next
    const int end = pos.reversed ? T_ : -1;
    int t = pos.reversed ? 0 : T_ - 1;
    Places<Position> here(pos, T_, a.B, H, a.W, a.D, t, pos.reversed ? 0 : T_, false);
    float dh_now[K][U], dc_now[K][U];
    Stored gates[K][Cell::saved_blocks + 1], doutput[K] = {}, h_old[K] = {}, h_new[K] = {};
    StoredC c_old[K] = {}, c_new[K] = {};
    int given[K];
#pragma unroll
    for (int k = 0; k < K; k++) given[k] = a.doutput ? pos.length[k] : 0;
    auto load_states = [&](long long from, Stored& h, StoredC& c) {
        h = pos.load(a.h + from, H);
        if (has_c) c = pos.load(a.c + from, H);
    };
    auto load_gates = [&](int k) {
        const T* row = a.gates + here.gates_of(k);
#pragma unroll
        for (int g = 0; g < Cell::saved_blocks; g++) gates[k][g] = pos.load(row + (size_t)g * H, H);
    };
    auto load_ahead = [&](int t) {
#pragma unroll
        for (int k = 0; k < K && ahead; k++) {
            if (pos.sequence[k] >= 0) load_states(here.slot_of(k), h_old[k], c_old[k]);
            if (t < pos.length[k]) load_gates(k);
            if (t < given[k]) doutput[k] = pos.load(a.doutput + here.output_of(k), H);
        }
    };
    auto load_now = [&](int k) {
        load_states(here.slot_of(k), h_old[k], c_old[k]);
        load_states(skip(here.slot_of(k), -here.move, H), h_new[k], c_new[k]);
        load_gates(k);
        doutput[k] = a.doutput ? pos.load(a.doutput + here.output_of(k), H) : Stored();
    };
#pragma unroll
    for (int k = 0; k < K; k++) {
        const bool valid = pos.sequence[k] >= 0;
        const size_t n = ((size_t)pos.d * a.B + pos.sequence[k]) * H + pos.j;
#pragma unroll
        for (int u = 0; u < U; u++) {
            dh_now[k][u] = valid && pos.has(u, H) ? a.dh[n + u] : 0.0f;
            dc_now[k][u] = valid && pos.has(u, H) && has_c ? a.dc[n + u] : 0.0f;
        }
        if (valid && ahead) load_states(here.slot_of(k), h_new[k], c_new[k]);
    }
    here.slot = skip(here.slot, here.move, H);
    if (T_) load_ahead(t);
    for (; t != end; t += on) {
        const bool active = t < pos.longest;  // the same in all threads of the group
#pragma unroll
        for (int k = 0; k < K; k++) {
            Stored dgates[P] = {};
            if (t < pos.length[k]) {
                if (!ahead) load_now(k);
                float d[P][U] = {};
#pragma unroll
                for (int u = 0; u < U; u++) {
                    if (!pos.has(u, H)) continue;
                    float saved[Cell::saved_blocks + 1], d_now[P];
#pragma unroll
                    for (int g = 0; g < Cell::saved_blocks; g++) saved[g] = pos.number(gates[k][g], u, T());
                    dh_now[k][u] += pos.number(doutput[k], u, T());
                    Cell::backward(saved, pos.number(h_old[k], u, T()), pos.number(c_old[k], u, 0.0f),
                                   pos.number(h_new[k], u, T()), pos.number(c_new[k], u, 0.0f), dh_now[k][u], dc_now[k][u],
                                   d_now);
#pragma unroll
                    for (int g = 0; g < P; g++) d[g][u] = d_now[g];
                }
#pragma unroll
                for (int g = 0; g < P; g++) dgates[g] = pos.stored(d[g], T());
            }
            if (ahead) h_new[k] = h_old[k], c_new[k] = c_old[k];
            if (active) product.stage(channel, pos, k, dgates);
            if (pos.sequence[k] < 0) continue;
            T* row = a.gates + here.gates_of(k);
#pragma unroll
            for (int g = 0; g < P; g++) pos.store(row + (size_t)g * H, dgates[g], H);
        }
        here.move_on();
        if (t + on != end) load_ahead(t + on);
        if (!active) continue;
        if (!product.run(channel, pos)) return false;
#pragma unroll
        for (int k = 0; k < K; k++) {
#pragma unroll
            for (int u = 0; u < U; u++) dh_now[k][u] += product.sum(k, u);
        }
    }
    // Counted from where the loop has ended: the compiler would keep the pointers of the beginning in registers till here.
    const long long ended = ((long long)pos.d * T_ + (pos.reversed ? T_ + 1 : -1)) * a.B * H;
#pragma unroll
    for (int k = 0; k < K; k++) {
        if (pos.sequence[k] < 0) continue;
        const long long n = here.slot_of(k) - ended;
#pragma unroll
        for (int u = 0; u < U; u++) {
            if (!pos.has(u, H)) continue;
            a.dh[n + u] = dh_now[k][u];
            if (has_c) a.dc[n + u] = dc_now[k][u];
        }
    }
    return true;
}
