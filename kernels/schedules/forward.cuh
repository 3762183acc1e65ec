// The time loop of forward, of one tile; time_loop.cuh says what the words mean.

// MARKED: what is held and where the output is 0 is in the marks, which know the lengths, too; and a state may be reset before a
// timestep.
template <template <typename> class CellOf, bool MARKED, typename T, typename Position, typename Channel, typename Product>
struct ForwardLoop {
    typedef typename InCell<T>::real real;
    typedef CellOf<real> Cell;
    typedef typename Position::template Stored<T> Stored;
    static constexpr bool staged = Cell::stages > 1;
    static_assert((Cell::first_product == Cell::products || Cell::inner_first) && !(staged && Channel::waits), "see time_loop.cuh");
    static constexpr int G = Cell::gates, Q = Cell::products, S = Cell::states - 1, K = Position::per_thread, U = Position::units;

    const Forward<T>& a;
    const Position& pos;
    Channel& channel;
    Product& product;
    const int T_, H, on, end;  // from one t to the next; where t ends
    const long long state_size;
    int t;
    Places<Position> here;
    float others[some(S)][K][U], bias_a[G][U], bias_r[G][U], own[some(Cell::parameters)][U];
    Stored h_old[K], ax[K][G];
    unsigned char masks[K][some(Cell::draws)][U], mark[K], next_mark[K];

    DEVICE bool within(int k, int t) const { return MARKED ? pos.sequence[k] >= 0 : t < pos.length[k]; }
    DEVICE bool lives(int k, int t) const { return MARKED ? !(mark[k] & Mark::held) : t < pos.length[k]; }

    DEVICE void load_ax(int t, long long gates) {
#pragma unroll
        for (int k = 0; k < K; k++) {
            if (!within(k, t)) continue;
            const T* row = a.gates + here.of(k, gates, here.gates_row);
#pragma unroll
            for (int g = 0; g < G; g++) ax[k][g] = pos.load(row + (size_t)g * H, H);
        }
    }

    DEVICE void load_all_masks(int t) {
#pragma unroll
        for (int k = 0; k < K; k++) {
            if (within(k, t)) load_masks<Cell>(masks[k], pos, k, a.mask, a.mask_steps, t, a.B, H);
        }
    }

    // Of what the next timestep reads.
    DEVICE void send(int k) {
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
    }

    // Gives the initial h to all who multiply by it.
    DEVICE ForwardLoop(const Forward<T>& a_, const Position& pos_, Channel& channel_, Product& product_)
        : a(a_), pos(pos_), channel(channel_), product(product_), T_(a.T_), H(a.H), on(pos.reversed ? -1 : 1),
          end(pos.reversed ? -1 : T_), state_size((long long)(a.save ? T_ + 1 : 2) * a.B * H), t(pos.reversed ? T_ - 1 : 0),
          here(pos, T_, a.B, H, a.W, a.D, t, pos.reversed ? T_ : 0, true) {
        load_own<Cell>(own, pos, a.own, H);
#pragma unroll
        for (int u = 0; u < U; u++) {
#pragma unroll
            for (int g = 0; g < G; g++) {
                const bool valid = a.bias_ih && pos.j + u < H;
                bias_a[g][u] = valid ? a.bias_ih[((size_t)pos.d * G + g) * H + pos.j + u] : 0.0f;
                bias_r[g][u] = valid ? a.bias_hh[((size_t)pos.d * G + g) * H + pos.j + u] : 0.0f;
            }
#pragma unroll
            for (int k = 0; k < K; k++) {
                const bool valid = pos.sequence[k] >= 0 && pos.has(u, H);
                const long long initial = a.save ? here.slot_of(k) : ((long long)pos.d * 2 * a.B + pos.sequence[k]) * H + pos.j;
#pragma unroll
                for (int s = 0; s < S; s++) {
                    others[s][k][u] = valid ? a.others[initial + other_state<Cell>(pos.d, s, state_size) + u] : 0.0f;
                }
            }
        }
#pragma unroll
        for (int k = 0; k < K; k++) h_old[k] = pos.sequence[k] >= 0 ? pos.load(a.h + here.slot_of(k), H) : Stored();
        if (MARKED && T_) load_marks(mark, pos, a.marks, t, T_, a.B);
        if (pos.longest > 0) {
            if (MARKED) load_marks(next_mark, pos, a.marks, pos.reversed ? pos.longest - 1 : 0, T_, a.B);
#pragma unroll
            for (int k = 0; k < K; k++) {
                if (Cell::inner_first && pos.sequence[k] >= 0) {
                    load_masks<Cell>(masks[k], pos, k, a.mask, a.mask_steps, 0, a.B, H);
                }
                send(k);
            }
            const int first = pos.reversed ? pos.longest - 1 : 0;
            if constexpr (Product::makes_ax) product.prefetch(first);
            else load_ax(first, here.gates + (long long)(first - t) * a.B * here.gates_row);
            load_all_masks(first);
            product.next(channel);
        }
    }

    // One timestep; false where the block must give up.
    DEVICE bool step() {
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
        run_cell(saved, active, sends);
        if (sends) {
            // In flight during the product, too. A block that waits for others has time enough behind its stores.
            if (!Product::makes_ax && !Channel::waits) load_ax(t + on, skip(here.gates, here.move, here.gates_row));
            if (!Channel::waits) load_all_masks(t + on);
            product.next(channel);
        }
        store(saved);
        if (!Product::makes_ax && Channel::waits && sends) load_ax(t + on, here.gates);
        if (Channel::waits && sends) load_all_masks(t + on);
#pragma unroll
        for (int k = 0; k < K && MARKED; k++) mark[k] = next_mark[k];
        t += on;
        return true;
    }

    // The cell, and its h to all who multiply by it.
    DEVICE void run_cell(Stored (&saved)[K][some(Cell::saved)], bool active, bool sends) {
        ForwardIn<Cell, real> ins[K][U];
        ForwardOut<Cell, real> outs[K][U];
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
                    ForwardIn<Cell, real> in;
                    ForwardOut<Cell, real> out;
                    read(in, k, u);
                    if constexpr (staged) {
                        if (turn < 0) ins[k][u] = in;
                        if (turn < 0) continue;
                        in = ins[k][u], out = outs[k][u];  // nothing of what was read above is needed
                    }
                    forward_stage<Cell::stages - 1, Cell, real>(in, out);
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
    }

    DEVICE void read(ForwardIn<Cell, real>& in, int k, int u) const {
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
    }

    // What this timestep made; moves on to the next one.
    DEVICE void store(const Stored (&saved)[K][some(Cell::saved)]) {
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
    }

    // The last states of a call that saves no others.
    DEVICE void finish() const {
#pragma unroll
        for (int k = 0; k < K; k++) {
            if (a.save || pos.sequence[k] < 0) continue;
            const long long last = (((long long)pos.d * 2 + T_ % 2) * a.B + pos.sequence[k]) * H + pos.j;
            pos.store(a.h + here.slot_of(k), h_old[k], H);
#pragma unroll
            for (int s = 0; s < S; s++) {
                pos.store(a.others + last + other_state<Cell>(pos.d, s, state_size), pos.stored(others[s][k], 0.0f), H);
            }
        }
    }
};
