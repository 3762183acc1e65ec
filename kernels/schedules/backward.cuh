// The time loop of backward, of one tile; time_loop.cuh says what the words mean.

template <template <typename> class CellOf, bool MARKED, typename T, typename Position, typename Channel, typename Product>
struct BackwardLoop {
    typedef typename InCell<T>::real real;
    typedef CellOf<real> Cell;
    typedef typename Position::template Stored<T> Stored;
    typedef typename Position::template Stored<float> StoredFloat;
    static constexpr bool staged = Cell::back_stages > 1, ahead = Product::loads_ahead;
    static_assert((Cell::first_product == Cell::products || Cell::inner_first) && !(staged && Channel::waits), "see time_loop.cuh");
    static constexpr int K = Position::per_thread, U = Position::units, S = Cell::states - 1, P = Cell::preactivations;

    const Backward<T>& a;
    const Position& pos;
    Channel& channel;
    Product& product;
    const int T_, H, on, end;  // from one t to the next; where t ends
    const long long state_size;
    int t;
    Places<Position> here;
    float dh_now[K][U], dothers[some(S)][K][U], own[some(Cell::parameters)][U];
    Stored gates[K][some(Cell::saved)], doutput[K], h_old[K], h_new[K];
    StoredFloat others_old[K][some(S)], others_new[K][some(S)];
    unsigned char masks[K][some(Cell::draws)][U], mark[K];
    int given[K];                // timesteps that have a doutput
    bool awaits;                 // whether the product of the timestep before is to be computed
    unsigned resets, lived;      // of that one, bit k: whether sequence k is reset before it, is not held in it
    BackwardIn<Cell, real> ins[K][U];  // of that one, where inner_first
    BackwardOut<Cell, real> outs[K][U];

    DEVICE bool within(int k, int t) const { return MARKED ? pos.sequence[k] >= 0 : t < pos.length[k]; }
    DEVICE bool lives(int k, int t) const { return MARKED ? !(mark[k] & Mark::held) : t < pos.length[k]; }

    DEVICE void load_states(long long from, Stored& h, StoredFloat (&others)[some(S)]) const {
        h = pos.load(a.h + from, H);
#pragma unroll
        for (int s = 0; s < S; s++) others[s] = pos.load(a.others + from + other_state<Cell>(pos.d, s, state_size), H);
    }

    DEVICE void load_gates(int k, int t) {
        const T* row = a.gates + here.gates_of(k);
#pragma unroll
        for (int g = 0; g < Cell::saved; g++) gates[k][g] = pos.load(row + (size_t)g * H, H);
        load_masks<Cell>(masks[k], pos, k, a.mask, a.mask_steps, t, a.B, H);
    }

    DEVICE void load_ahead(int t) {
#pragma unroll
        for (int k = 0; k < K && ahead; k++) {
            if (pos.sequence[k] >= 0) load_states(here.slot_of(k), h_old[k], others_old[k]);
            if (within(k, t)) load_gates(k, t);
            if (t < given[k]) doutput[k] = pos.load(a.doutput + here.output_of(k), H);
        }
    }

    DEVICE void load_now(int k) {
        load_states(here.slot_of(k), h_old[k], others_old[k]);
        load_states(skip(here.slot_of(k), -here.move, H), h_new[k], others_new[k]);
        load_gates(k, t);
        doutput[k] = a.doutput ? pos.load(a.doutput + here.output_of(k), H) : Stored();
    }

    DEVICE BackwardLoop(const Backward<T>& a_, const Position& pos_, Channel& channel_, Product& product_)
        : a(a_), pos(pos_), channel(channel_), product(product_), T_(a.T_), H(a.H), on(pos.reversed ? 1 : -1),
          end(pos.reversed ? T_ : -1), state_size((long long)(T_ + 1) * a.B * H), t(pos.reversed ? 0 : T_ - 1),
          here(pos, T_, a.B, H, a.W, a.D, t, pos.reversed ? 0 : T_, false), awaits(false), resets(0), lived(0) {
        load_own<Cell>(own, pos, a.own, H);
#pragma unroll
        for (int k = 0; k < K; k++) {
            given[k] = !a.doutput ? 0 : !MARKED ? pos.length[k] : pos.sequence[k] < 0 ? 0 : T_;
            doutput[k] = h_old[k] = h_new[k] = Stored();
#pragma unroll
            for (int s = 0; s < some(S); s++) others_old[k][s] = others_new[k][s] = StoredFloat();
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
    }

    // The product of the timestep before, if there is one, and the cell of this one, if there is one; false where the block must
    // give up. So the last call only multiplies.
    DEVICE bool step() {
        if (awaits && !multiply()) return false;
        awaits = t != end && t < pos.longest;  // the same in all threads of the group
        if (t == end) return true;
        run_cell();
        here.move_on();
        t += on;
        if (t != end) load_ahead(t);
        if (MARKED && t != end) load_marks(mark, pos, a.marks, t, T_, a.B);
        if (awaits) product.next(channel);
        return true;
    }

    DEVICE bool done() const { return t == end && !awaits; }

    // The cell, and its dgates to all who multiply by them.
    DEVICE void run_cell() {
        resets = lived = 0;
#pragma unroll
        for (int turn = staged ? -K : 0; turn < K; turn++) {
            const int k = staged && turn < 0 ? turn + K : turn;
            if constexpr (staged) {
                auto valid = [&](int k, int u) { return lives(k, t) && pos.has(u, H); };
                if (turn == 0 && awaits) backward_means<Position>(ins, outs, valid, channel.parts, H);
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
                    BackwardIn<Cell, real> in;
                    BackwardOut<Cell, real> out;
                    read(in, k, u, reset);
                    if constexpr (staged) {
                        if (turn < 0) ins[k][u] = in;
                        if (turn < 0) continue;
                        in = ins[k][u], out = outs[k][u];  // nothing of what was read above is needed
                    }
                    backward_stage<Cell::back_stages - 1, Cell, real>(in, out);
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
            if (awaits) product.stage(channel, pos, k, dgates);
            if (pos.sequence[k] < 0) continue;
            T* row = a.gates + here.gates_of(k);
#pragma unroll
            for (int g = 0; g < P; g++) pos.store(row + (size_t)g * H, dgates[g], H);
        }
    }

    DEVICE void read(BackwardIn<Cell, real>& in, int k, int u, bool reset) const {
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
    }

    // What passes through W_hh, for the timestep before. False where the block must give up.
    DEVICE bool multiply() {
        if (!product.run(channel, pos)) return false;
#pragma unroll
        for (int k = 0; k < K; k++) {
#pragma unroll
            for (int u = 0; u < U; u++) {
                if constexpr (!Cell::inner_first) dh_now[k][u] += product.sum(k, u);
                else if (lived >> k & 1) from_operand(ins[k][u], outs[k][u], product.sum(k, u), k, u, dh_now, dothers);
            }
            if (resets >> k & 1) send_reset<Cell>(dh_now, dothers, pos, k, a.marks, a.B, H);
        }
        return true;
    }

    // The gradients of the initial states.
    DEVICE void finish() const {
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
                for (int s = 0; s < S; s++) {
                    a.dothers[n + u + other_state<Cell>(pos.d, s, (long long)a.B * H)] = dothers[s][k][u];
                }
            }
        }
    }
};
