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
//                add        start + sum g, for this thread's k-th sequence and unit u: W_hh h of gate g, with W_ih x where
//                           makes_ax; behind these W_ih x alone, of the gates from first_apart on
//     backward   stage      gives dgates of this thread's k-th sequence
//                run        computes dh from what all have staged; false where this block must give up
//                sum        dh, for this thread's k-th sequence and unit u
//                loads_ahead  whether what a step reads is loaded in the step before, in flight while that one waits and
//                           multiplies; false where it does not fit into registers beside the weights
//
// A cell has one product in a timestep, or none; it may make what that multiplies of h (inner.cuh). Where it has means over the
// units (means.cuh), all of a sequence are in one block, and a thread reads for all sequences, turn < 0, before it computes.
//
// A block sends once for each step that it computes: the initial h before the first, nothing after the last. `channel` is
// what the blocks of a group share; a block that is alone has none.

#include "layer.cuh"
#include "means.cuh"
#include "inner.cuh"

// Of one tile; false where the block must give up. MARKED: what is held and where the output is 0 is in the marks, which know
// the lengths, too; and a state may be reset before a timestep.
template <template <typename> class CellOf, bool MARKED, typename T, typename Position, typename Channel, typename Product>
DEVICE bool time_loop_forward(const Forward<T>& a, const Position& pos, Channel& channel, Product& product)
{
    typedef CellOf<float> Cell;
    typedef typename Position::template Stored<T> Stored;
    constexpr bool staged = Cell::stages > 1;
    static_assert((Cell::first_product == Cell::products || Cell::inner_first) && !(staged && Channel::waits), "see above");
    constexpr int G = Cell::gates, Q = Cell::products, S = Cell::states - 1, K = Position::per_thread, U = Position::units;
    const int T_ = a.T_, H = a.H, j = pos.j, on = pos.reversed ? -1 : 1;  // from one t to the next
    const long long state_size = (long long)(a.save ? T_ + 1 : 2) * a.B * H;
    const int end = pos.reversed ? -1 : T_;
    int t = pos.reversed ? T_ - 1 : 0;
    Places<Position> here(pos, T_, a.B, H, a.W, a.D, t, pos.reversed ? T_ : 0, true);
    float others[some(S)][K][U], bias_a[G][U], bias_r[G][U], own[some(Cell::parameters)][U];
    Stored h_old[K] = {}, ax[K][G];
    unsigned char masks[K][some(Cell::draws)][U], mark[K], next_mark[K];
    auto within = [&](int k, int t) { return MARKED ? pos.sequence[k] >= 0 : t < pos.length[k]; };
    auto lives = [&](int k, int t) { return MARKED ? !(mark[k] & Mark::held) : t < pos.length[k]; };
    auto load_ax = [&](int t, long long gates) {
#pragma unroll
        for (int k = 0; k < K; k++) {
            if (!within(k, t)) continue;
            const T* row = a.gates + here.of(k, gates, here.gates_row);
#pragma unroll
            for (int g = 0; g < G; g++) ax[k][g] = pos.load(row + (size_t)g * H, H);
        }
    };
    auto load_all_masks = [&](int t) {
#pragma unroll
        for (int k = 0; k < K; k++) {
            if (within(k, t)) load_masks<Cell>(masks[k], pos, k, a.mask, a.mask_steps, t, a.B, H);
        }
    };
    auto send = [&](int k) {  // of what the next timestep reads
        if constexpr (MARKED) {
            Stored h = h_old[k];
            float states[some(S)][K][U];
#pragma unroll
            for (int i = 0; i < some(S) * U; i++) states[i / U][k][i % U] = others[i / U][k][i % U];
            if (next_mark[k] & Mark::reset) load_reset<Cell>(h, states, pos, k, a.marks, a.B, H);
            send_operand<Cell, T>(product, channel, pos, k, h, states, masks, H);
        } else {
            send_operand<Cell, T>(product, channel, pos, k, h_old[k], others, masks, H);
        }
    };
    load_own<Cell>(own, pos, a.own, H);
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
            const long long initial = a.save ? here.slot_of(k) : ((long long)pos.d * 2 * a.B + pos.sequence[k]) * H + j;
#pragma unroll
            for (int s = 0; s < S; s++) {
                others[s][k][u] = valid ? a.others[initial + other_state<Cell>(pos.d, s, state_size) + u] : 0.0f;
            }
        }
    }
#pragma unroll
    for (int k = 0; k < K; k++) {
        if (pos.sequence[k] >= 0) h_old[k] = pos.load(a.h + here.slot_of(k), H);
    }
    if (MARKED && T_) load_marks(mark, pos, a.marks, t, T_, a.B);
    if (pos.longest > 0) {
        if (MARKED) load_marks(next_mark, pos, a.marks, pos.reversed ? pos.longest - 1 : 0, T_, a.B);
#pragma unroll
        for (int k = 0; k < K; k++) {
            if (Cell::inner_first && pos.sequence[k] >= 0) load_masks<Cell>(masks[k], pos, k, a.mask, a.mask_steps, 0, a.B, H);
            send(k);
        }
        const int first = pos.reversed ? pos.longest - 1 : 0;
        if constexpr (Product::makes_ax) product.prefetch(first);
        else load_ax(first, here.gates + (long long)(first - t) * a.B * here.gates_row);
        load_all_masks(first);
        product.next(channel);
    }

    for (; t != end; t += on) {
        const bool active = t < pos.longest;  // the same in all threads of the group
        const bool sends = active && t + on >= 0 && t + on < pos.longest;
        if (MARKED && t + on != end) load_marks(next_mark, pos, a.marks, t + on, T_, a.B);
        if (active) {
            if constexpr (Product::makes_ax) {
                if (sends) product.prefetch(t + on);
            }
            if (!product.run(channel, pos)) return false;
        }
        Stored saved[K][some(Cell::saved)];
        ForwardIn<Cell, float> ins[K][U];
        ForwardOut<Cell, float> outs[K][U];
#pragma unroll
        for (int turn = staged ? -K : 0; turn < K; turn++) {
            const int k = staged && turn < 0 ? turn + K : turn;
            if constexpr (staged) {
                auto valid = [&](int k, int u) { return lives(k, t) && pos.has(u, H); };
                if (turn == 0 && active) forward_means<Position>(ins, outs, valid, channel.parts, H);
            }
            const bool reset = MARKED && (!staged || turn < 0) && (mark[k] & Mark::reset);
            if (reset) load_reset<Cell>(h_old[k], others, pos, k, a.marks, a.B, H);
            if (lives(k, t)) {
                float h_new[U] = {}, saved_now[some(Cell::saved)][U] = {};
#pragma unroll
                for (int u = 0; u < U; u++) {
                    if (!pos.has(u, H)) continue;
                    ForwardIn<Cell, float> in;
                    ForwardOut<Cell, float> out;
#pragma unroll
                    for (int g = 0; g < G; g++) {
                        in.ax[g] = Product::makes_ax ? bias_a[g][u] : pos.number(ax[k][g], u, T()) + bias_a[g][u];
                        if (g < Q) in.ah[g] = product.add(bias_r[g][u], k, u, g);
                        else in.ax[g] += bias_r[g][u];
                        if (Product::makes_ax && g >= first_apart<Cell>) {
                            in.ax[g] = product.add(in.ax[g], k, u, Q + g - first_apart<Cell>);
                        }
                    }
                    in.state[0] = pos.number(h_old[k], u, T());
#pragma unroll
                    for (int s = 0; s < S; s++) in.state[s + 1] = others[s][k][u];
#pragma unroll
                    for (int n = 0; n < Cell::parameters; n++) in.p[n] = own[n][u];
#pragma unroll
                    for (int m = 0; m < Cell::draws; m++) in.mask[m] = float(masks[k][m][u]);
                    if constexpr (staged) {
                        if (turn < 0) ins[k][u] = in;
                        if (turn < 0) continue;
                        in = ins[k][u], out = outs[k][u];  // nothing of what was read above is needed
                    }
                    forward_stage<Cell::stages - 1, Cell, float>(in, out);
                    h_new[u] = out.state[0];
#pragma unroll
                    for (int s = 0; s < S; s++) others[s][k][u] = out.state[s + 1];
#pragma unroll
                    for (int g = 0; g < Cell::saved; g++) saved_now[g][u] = out.saved[g];
                }
                if (staged && turn < 0) continue;
                h_old[k] = pos.stored(h_new, T());  // the state is what is stored
#pragma unroll
                for (int g = 0; g < Cell::saved; g++) saved[k][g] = pos.stored(saved_now[g], T());
            }
            if (staged && turn < 0) continue;
            if (sends) send(k);  // before any store: the others wait for it
        }
        if (sends) {
            // In flight during the product, too. A block that waits for others has time enough behind its stores.
            if (!Product::makes_ax && !Channel::waits) load_ax(t + on, skip(here.gates, here.move, here.gates_row));
            if (!Channel::waits) load_all_masks(t + on);
            product.next(channel);
        }
        here.slot = skip(here.slot, here.move, H);
#pragma unroll
        for (int k = 0; k < K; k++) {
            if (pos.sequence[k] < 0) continue;
            const bool live = lives(k, t), heard = live || (MARKED && (mark[k] & Mark::shown));
            pos.store(a.output + here.output_of(k), heard ? h_old[k] : Stored(), H);
            if (!a.save) continue;
            pos.store(a.h + here.slot_of(k), h_old[k], H);
#pragma unroll
            for (int s = 0; s < S; s++) {
                const long long place = here.slot_of(k) + other_state<Cell>(pos.d, s, state_size);
                pos.store(a.others + place, pos.stored(others[s][k], 0.0f), H);
            }
            if (MARKED || live) {  // where it is held, too: backward loads it before it knows the marks
                T* row = a.gates + here.gates_of(k);
#pragma unroll
                for (int g = 0; g < Cell::saved; g++) {
                    pos.store(row + (size_t)g * H, MARKED && !live ? Stored() : saved[k][g], H);
                }
            } else if constexpr (Cell::inner_first) {  // which the gradient of W_hh is multiplied by
                pos.store(a.gates + here.gates_of(k) + (size_t)Cell::inner * H, Stored(), H);
            }
        }
        here.gates = skip(here.gates, here.move, here.gates_row);
        here.output = skip(here.output, here.move, here.output_row);
        if (!Product::makes_ax && Channel::waits && sends) load_ax(t + on, here.gates);
        if (Channel::waits && sends) load_all_masks(t + on);
#pragma unroll
        for (int k = 0; k < K && MARKED; k++) mark[k] = next_mark[k];
    }
#pragma unroll
    for (int k = 0; k < K; k++) {
        if (a.save || pos.sequence[k] < 0) continue;
        const long long last = (((long long)pos.d * 2 + T_ % 2) * a.B + pos.sequence[k]) * H + j;
        pos.store(a.h + here.slot_of(k), h_old[k], H);
#pragma unroll
        for (int s = 0; s < S; s++) {
            pos.store(a.others + last + other_state<Cell>(pos.d, s, state_size), pos.stored(others[s][k], 0.0f), H);
        }
    }
    return true;
}

template <template <typename> class CellOf, bool MARKED, typename T, typename Position, typename Channel, typename Product>
DEVICE bool time_loop_backward(const Backward<T>& a, const Position& pos, Channel& channel, Product& product)
{
    typedef CellOf<float> Cell;
    typedef typename Position::template Stored<T> Stored;
    typedef typename Position::template Stored<float> StoredFloat;
    constexpr bool staged = Cell::back_stages > 1;
    static_assert((Cell::first_product == Cell::products || Cell::inner_first) && !(staged && Channel::waits), "see above");
    constexpr int K = Position::per_thread, U = Position::units, S = Cell::states - 1, P = Cell::preactivations;
    constexpr bool ahead = Product::loads_ahead;
    const int T_ = a.T_, H = a.H, on = pos.reversed ? 1 : -1;  // from one t to the next
    const int end = pos.reversed ? T_ : -1;
    const long long state_size = (long long)(T_ + 1) * a.B * H;
    int t = pos.reversed ? 0 : T_ - 1;
    Places<Position> here(pos, T_, a.B, H, a.W, a.D, t, pos.reversed ? 0 : T_, false);
    float dh_now[K][U], dothers[some(S)][K][U], own[some(Cell::parameters)][U];
    Stored gates[K][some(Cell::saved)], doutput[K] = {}, h_old[K] = {}, h_new[K] = {};
    StoredFloat others_old[K][some(S)] = {}, others_new[K][some(S)] = {};
    unsigned char masks[K][some(Cell::draws)][U], mark[K];
    int given[K];
    load_own<Cell>(own, pos, a.own, H);
    auto within = [&](int k, int t) { return MARKED ? pos.sequence[k] >= 0 : t < pos.length[k]; };
    auto lives = [&](int k, int t) { return MARKED ? !(mark[k] & Mark::held) : t < pos.length[k]; };
#pragma unroll
    for (int k = 0; k < K; k++) given[k] = !a.doutput ? 0 : !MARKED ? pos.length[k] : pos.sequence[k] < 0 ? 0 : T_;
    auto load_states = [&](long long from, Stored& h, StoredFloat (&others)[some(S)]) {
        h = pos.load(a.h + from, H);
#pragma unroll
        for (int s = 0; s < S; s++) others[s] = pos.load(a.others + from + other_state<Cell>(pos.d, s, state_size), H);
    };
    auto load_gates = [&](int k, int t) {
        const T* row = a.gates + here.gates_of(k);
#pragma unroll
        for (int g = 0; g < Cell::saved; g++) gates[k][g] = pos.load(row + (size_t)g * H, H);
        load_masks<Cell>(masks[k], pos, k, a.mask, a.mask_steps, t, a.B, H);
    };
    auto load_ahead = [&](int t) {
#pragma unroll
        for (int k = 0; k < K && ahead; k++) {
            if (pos.sequence[k] >= 0) load_states(here.slot_of(k), h_old[k], others_old[k]);
            if (within(k, t)) load_gates(k, t);
            if (t < given[k]) doutput[k] = pos.load(a.doutput + here.output_of(k), H);
        }
    };
    auto load_now = [&](int k) {
        load_states(here.slot_of(k), h_old[k], others_old[k]);
        load_states(skip(here.slot_of(k), -here.move, H), h_new[k], others_new[k]);
        load_gates(k, t);
        doutput[k] = a.doutput ? pos.load(a.doutput + here.output_of(k), H) : Stored();
    };
#pragma unroll
    for (int k = 0; k < K; k++) {
        const bool valid = pos.sequence[k] >= 0;
        const size_t n = ((size_t)pos.d * a.B + pos.sequence[k]) * H + pos.j;
#pragma unroll
        for (int u = 0; u < U; u++) {
            dh_now[k][u] = valid && pos.has(u, H) ? a.dh[n + u] : 0.0f;
#pragma unroll
            for (int s = 0; s < S; s++) {
                const long long place = n + u + other_state<Cell>(pos.d, s, (long long)a.B * H);
                dothers[s][k][u] = valid && pos.has(u, H) ? a.dothers[place] : 0.0f;
            }
        }
        if (valid && ahead) load_states(here.slot_of(k), h_new[k], others_new[k]);
    }
    here.slot = skip(here.slot, here.move, H);
    if (T_) load_ahead(t);
    if (MARKED && T_) load_marks(mark, pos, a.marks, t, T_, a.B);
    for (; t != end; t += on) {
        const bool active = t < pos.longest;  // the same in all threads of the group
        unsigned resets = 0, lived = 0;  // bit k: whether sequence k is reset before this timestep, is not held in it
        BackwardIn<Cell, float> ins[K][U];
        BackwardOut<Cell, float> outs[K][U];
#pragma unroll
        for (int turn = staged ? -K : 0; turn < K; turn++) {
            const int k = staged && turn < 0 ? turn + K : turn;
            if constexpr (staged) {
                auto valid = [&](int k, int u) { return lives(k, t) && pos.has(u, H); };
                if (turn == 0 && active) backward_means<Position>(ins, outs, valid, channel.parts, H);
            }
            Stored dgates[P] = {};
            const bool reset = MARKED && (mark[k] & Mark::reset), live = lives(k, t);
            if (reset) resets |= 1u << k;
            if (live) {
                lived |= 1u << k;
                if (!ahead && !(staged && turn >= 0)) load_now(k);
                float d[P][U] = {};
#pragma unroll
                for (int u = 0; u < U; u++) {
                    if (!pos.has(u, H)) continue;
                    BackwardIn<Cell, float> in;
                    BackwardOut<Cell, float> out;
#pragma unroll
                    for (int g = 0; g < Cell::saved; g++) in.saved[g] = pos.number(gates[k][g], u, T());
                    in.state[0] = pos.number(h_old[k], u, T());
                    in.new_state[0] = pos.number(h_new[k], u, T());
                    in.dstate[0] = dh_now[k][u] + pos.number(doutput[k], u, T());
#pragma unroll
                    for (int s = 0; s < S; s++) {
                        in.state[s + 1] = pos.number(others_old[k][s], u, 0.0f);
                        in.new_state[s + 1] = pos.number(others_new[k][s], u, 0.0f);
                        in.dstate[s + 1] = dothers[s][k][u];
                    }
                    if (reset) read_reset(in, pos, k, u, a.marks, a.B, H);
#pragma unroll
                    for (int n = 0; n < Cell::parameters; n++) in.p[n] = own[n][u];
#pragma unroll
                    for (int m = 0; m < Cell::draws; m++) in.mask[m] = float(masks[k][m][u]);
                    if constexpr (staged) {
                        if (turn < 0) ins[k][u] = in;
                        if (turn < 0) continue;
                        in = ins[k][u], out = outs[k][u];  // nothing of what was read above is needed
                    }
                    backward_stage<Cell::back_stages - 1, Cell, float>(in, out);
                    if constexpr (Cell::inner_first) ins[k][u] = in, outs[k][u] = out;
                    dh_now[k][u] = out.dstate[0];
#pragma unroll
                    for (int s = 0; s < S; s++) dothers[s][k][u] = out.dstate[s + 1];
#pragma unroll
                    for (int g = 0; g < P; g++) d[g][u] = out.d[g];
                }
#pragma unroll
                for (int g = 0; g < P; g++) dgates[g] = pos.stored(d[g], T());
            }
            if (staged && turn < 0) continue;
            if (MARKED && !live && a.doutput && (mark[k] & Mark::shown)) {  // the output is the h before
                if (!ahead) doutput[k] = pos.load(a.doutput + here.output_of(k), H);
#pragma unroll
                for (int u = 0; u < U; u++) dh_now[k][u] += pos.number(doutput[k], u, T());
            }
            if (ahead) h_new[k] = h_old[k];
#pragma unroll
            for (int s = 0; s < S && ahead; s++) others_new[k][s] = others_old[k][s];
            if (active) product.stage(channel, pos, k, dgates);
            if (pos.sequence[k] < 0) continue;
            T* row = a.gates + here.gates_of(k);
#pragma unroll
            for (int g = 0; g < P; g++) pos.store(row + (size_t)g * H, dgates[g], H);
        }
        here.move_on();
        if (t + on != end) load_ahead(t + on);
        if (MARKED && t + on != end) load_marks(mark, pos, a.marks, t + on, T_, a.B);
        if (!active) continue;
        if (!product.run(channel, pos)) return false;
#pragma unroll
        for (int k = 0; k < K; k++) {
#pragma unroll
            for (int u = 0; u < U; u++) {
                if constexpr (!Cell::inner_first) dh_now[k][u] += product.sum(k, u);
                else if (MARKED ? lived >> k & 1 : t < pos.length[k])
                    from_operand(ins[k][u], outs[k][u], product.sum(k, u), k, u, dh_now, dothers);
            }
            if (resets >> k & 1) send_reset<Cell>(dh_now, dothers, pos, k, a.marks, a.B, H);
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
#pragma unroll
            for (int s = 0; s < S; s++) a.dothers[n + u + other_state<Cell>(pos.d, s, (long long)a.B * H)] = dothers[s][k][u];
        }
    }
    return true;
}
